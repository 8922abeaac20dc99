"""Losses of preferences are those of the papers, and read what their config says."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import ConfigError, view
from lm.objectives import ObjectiveConfig, PreferenceConfig
from lm.objectives.preference import dpo, kto, kto_divergence, orpo

P = 5


def sums(seed=0):
    """Summed log-probabilities of policy and reference, and lengths."""
    rng = np.random.default_rng(seed)
    count = rng.integers(1, 9, (P, 2)).astype(np.float32)
    policy, reference = (-rng.uniform(0.2, 3, (P, 2)) * count for _ in range(2))
    return policy.astype(np.float32), reference.astype(np.float32), count


def nats(x):
    return np.log1p(np.exp(-x))


def by_definition(config, policy, reference, count):
    ratio = policy - (0 if config.loss == "simpo" else reference)
    if config.per_token or config.loss in ("ipo", "simpo"):
        ratio = ratio / count
    gap, smooth = ratio[:, 0] - ratio[:, 1], config.label_smoothing
    x = config.beta * gap - config.margin
    return {
        "sigmoid": (1 - smooth) * nats(x) + smooth * nats(-x),
        "simpo": (1 - smooth) * nats(x) + smooth * nats(-x),
        "robust": ((1 - smooth) * nats(x) - smooth * nats(-x)) / (1 - 2 * smooth),
        "hinge": np.maximum(0, 1 - x),
        "ipo": (gap - 1 / (2 * config.beta)) ** 2,
    }[config.loss]


CONFIGS = [
    PreferenceConfig(),
    PreferenceConfig(label_smoothing=0.2),
    PreferenceConfig(per_token=True, beta=2.0),
    PreferenceConfig("robust", label_smoothing=0.2),
    PreferenceConfig("hinge", beta=0.3),
    PreferenceConfig("ipo", beta=0.4),
    PreferenceConfig("simpo", beta=2.0, margin=0.5, label_smoothing=0.1),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_pairs_lose_what_the_papers_say(config):
    policy, reference, count = sums()
    loss, reward = dpo(config, policy, reference, count)
    np.testing.assert_allclose(loss, by_definition(config, policy, reference, count), rtol=1e-5)
    # The reward is what the loss compares: raising it for the chosen reply alone never costs.
    more = policy + np.float32([0.1, 0.0])
    if config.loss != "ipo" and not config.label_smoothing:
        assert np.all(dpo(config, more, reference, count)[0] <= loss)
    assert np.all(dpo(config, more, reference, count)[1][:, 0] > reward[:, 0])


def test_a_policy_that_is_its_reference_loses_what_a_coin_does():
    policy, _, count = sums()
    expected = {"sigmoid": math.log(2), "robust": math.log(2), "hinge": 1.0, "ipo": 25.0}
    for loss, value in expected.items():
        found, reward = dpo(PreferenceConfig(loss), policy, policy, count)
        np.testing.assert_allclose(found, value, rtol=1e-6)
        assert np.all(reward == 0)


def test_the_gradient_weighs_wrongly_ranked_pairs_more():
    """β·σ(reward rejected − reward chosen), with opposite signs (Rafailov et al. 2023, §4)."""
    policy, reference, count = sums()
    config = PreferenceConfig(beta=0.7)
    gradient = jax.grad(lambda x: dpo(config, x, reference, count)[0].sum())(policy)
    ratio = config.beta * (policy - reference)
    weight = config.beta / (1 + np.exp(ratio[:, 0] - ratio[:, 1]))
    np.testing.assert_allclose(gradient, np.stack([-weight, weight], 1), rtol=1e-4)


def test_odds_are_compared_beside_the_chosen_reply_itself():
    policy, _, count = sums()
    mean = policy / count
    odds = np.exp(mean) / (1 - np.exp(mean))
    expected = -mean[:, 0] + 0.3 * nats(np.log(odds[:, 0] / odds[:, 1]))
    loss, reward = orpo(PreferenceConfig(beta=0.3), policy, count)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(reward, 0.3 * mean, rtol=1e-6)


def test_odds_stay_finite_for_a_certain_reply_and_for_none():
    policy, count = np.float32([[0, -1], [0, 0]]), np.float32([[3, 3], [0, 0]])

    def total(policy):
        return orpo(PreferenceConfig(), policy, count)[0].sum()

    loss, gradient = jax.value_and_grad(total)(policy)
    assert jnp.isfinite(loss) and jnp.all(jnp.isfinite(gradient))


def test_replies_are_judged_by_their_divergence_from_that_of_others():
    policy, reference, _ = (each[:, 0] for each in sums())
    desirable = np.array([True, False, True, False, False])
    config = PreferenceConfig(beta=0.2, desirable=1.5, undesirable=0.5)
    ratio, z = policy - reference, 0.4
    value = np.where(desirable, 0.2 * (ratio - z), 0.2 * (z - ratio))
    expected = np.where(desirable, 1.5, 0.5) * (1 - 1 / (1 + np.exp(-value)))
    loss, gap = kto(config, policy, reference, desirable, jnp.float32(z))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(gap, value, rtol=1e-5)


def test_the_divergence_is_a_mean_and_never_negative_and_has_no_gradient():
    assert kto_divergence(jnp.float32(6), jnp.float32(4)) == 1.5
    assert kto_divergence(jnp.float32(-6), jnp.float32(4)) == 0
    assert kto_divergence(jnp.float32(0), jnp.float32(0)) == 0
    assert jax.grad(lambda total: kto_divergence(total, 4.0))(6.0) == 0


@pytest.mark.parametrize(
    ("objective", "fields", "message"),
    [
        ("dpo", {"margin": 0.5}, "preference.margin=0.5 does nothing for 'sigmoid'; .* simpo"),
        ("dpo", {"loss": "ipo", "per_token": True}, "per_token=True does nothing for 'ipo'"),
        ("dpo", {"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing=0.1 does nothing"),
        ("dpo", {"desirable": 2.0}, "desirable=2.0 does nothing for 'sigmoid'; .* kto"),
        ("orpo", {"loss": "ipo"}, "loss='ipo' does nothing for 'orpo'"),
        ("kto", {"label_smoothing": 0.1}, "label_smoothing=0.1 does nothing for 'kto'"),
        ("causal", {"beta": 0.2}, "beta=0.2 does nothing for 'causal'"),
        ("dpo", {"label_smoothing": 0.5}, r"label_smoothing=0.5 must be in \[0, 0.5\)"),
        ("dpo", {"loss": "sigmod"}, "did you mean 'sigmoid'"),
    ],
)
def test_fields_that_do_nothing_for_the_chosen_loss_are_refused(objective, fields, message):
    with pytest.raises(ConfigError, match=message):
        view(ObjectiveConfig, {"name": objective, "preference": fields}, "config.objective")


@pytest.mark.parametrize("name", ["dpo", "orpo", "kto", "distillation"])
@pytest.mark.parametrize("field", ["z_loss", "label_smoothing"])
def test_regularisers_of_the_next_token_are_refused_where_it_is_not_predicted(name, field):
    with pytest.raises(ConfigError, match=f"objective.{field}=0.1 does nothing for"):
        view(ObjectiveConfig, {"name": name, field: 0.1}, "config.objective")


def test_every_loss_reads_fields_that_there_are():
    from lm.objectives.preference import READS

    names = {field.name for field in dataclasses.fields(PreferenceConfig)}
    assert all(set(reads) <= names for reads in READS.values())
