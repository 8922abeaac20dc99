"""The routers' losses: means over tokens and layers, whatever the batch is cut into."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from lm.models import bind
from lm.models.hooks import no_tap
from lm.models.moe.experts import Experts
from lm.models.params import init, param_specs
from lm.objectives import ObjectiveConfig
from lm.objectives.tokens import router_loss

CONFIG = tiny_models.config(num_experts=4, width=8, expert_width=8, activation="swiglu")
LOSS = ObjectiveConfig()


def traced_stats(params, x_BTD, valid_BT):
    return bind(Experts(CONFIG), params)(x_BTD, no_tap, valid_BT)[1]


stats = tiny_models.compiled(traced_stats)


def problem():
    params = init(param_specs(Experts(CONFIG)), jax.random.key(0))
    params["router"] *= 100  # far from balanced
    x_BTD = np.random.default_rng(0).normal(size=(4, 6, 8)).astype(np.float32)
    return params, x_BTD, np.random.default_rng(1).random((4, 6)) < 0.7


def test_the_loss_follows_the_papers():
    params, x, valid = problem()
    logits = (x @ np.asarray(params["router"]))[valid]
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-logits, -1)[:, :2]
    frequency = np.bincount(chosen.ravel(), minlength=4) / chosen.size
    balance = 4 * (frequency * probability.mean(0)).sum()
    z = (np.log(np.exp(logits).sum(-1)) ** 2).mean()
    loss, metrics = router_loss(stats(params, x, valid), LOSS, jnp.float32(10))
    np.testing.assert_allclose(loss / 10, 0.01 * balance + 0.001 * z, rtol=1e-5)
    means = {name: value / 10 for name, value in metrics.items()}
    expected = {
        "load_balancing": balance,
        "router_z": z,
        "dropped": 0,
        "max_load": 4 * frequency.max(),
    }
    assert means == {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}


def test_the_parts_of_a_batch_add_up_to_it_and_layers_count_by_their_tokens():
    params, x, valid = problem()
    parts = [stats(params, x[rows], valid[rows]) for rows in (slice(0, 2), slice(2, 4))]
    whole = stats(params, x, valid)
    added = jax.tree.map(jnp.add, *parts)
    for name in ("tokens", "balance", "z", "dropped", "max_load"):
        np.testing.assert_allclose(getattr(added, name), getattr(whole, name), rtol=1e-5)
    layers = jax.tree.map(lambda *each: jnp.stack(each), *parts)
    balance = sum(part.balance for part in parts) / whole.tokens
    metrics = router_loss(layers, LOSS, 1.0)[1]
    np.testing.assert_allclose(metrics["load_balancing"], balance, rtol=1e-6)


def test_following_the_loss_balances_the_experts():
    params, x, _ = problem()
    x += 1  # what all tokens share sends all to the same experts
    config = dataclasses.replace(LOSS, load_balancing=1.0, router_z=0.0)

    @tiny_models.compiled
    @jax.value_and_grad
    def loss(router):
        return router_loss(traced_stats({**params, "router": router}, x, None), config, 1.0)[0]

    router = params["router"]
    before, _ = loss(router)
    for _ in range(200):
        router = router - 5 * loss(router)[1]
    assert before > 1.5
    assert loss(router)[0] < 1.1


def test_no_tokens_is_no_loss():
    params, x, valid = problem()
    loss, metrics = router_loss(stats(params, x, np.zeros_like(valid)), LOSS, jnp.float32(0))
    assert loss == 0 and all(value == 0 for value in metrics.values())
