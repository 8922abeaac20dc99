"""One loss for every objective: what a batch says is predicted, from what it says is seen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from lm.config import ConfigError, view
from lm.data.config import OBJECTIVES as DATA_OBJECTIVES
from lm.models import ModelConfig, bind, skeleton
from lm.objectives import OBJECTIVES, ObjectiveConfig, check_objective, token_loss

PAIRS = [([5, 9, 2], [0, 31, 7]), ([7, 7, 1, 0, 22], [0, 13, 4, 8])]  # source, decoder inputs
TARGETS = [[31, 7, 1], [13, 4, 8, 1]]


@functools.partial(tiny_models.compiled, static_argnums=(0, 3))
def loss_and_gradient(config, values, batch, max_targets=0):
    objective = ObjectiveConfig(z_loss=1e-3, label_smoothing=0.1)
    return jax.value_and_grad(
        lambda p: token_loss(bind(skeleton(config), p), batch, objective, max_targets=max_targets),
        has_aux=True,
    )(values)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=3e-5, atol=3e-5), a, b)


def row(texts, length):
    """Texts side by side in one padded row: tokens, segment ids, positions."""
    fields = [[], [], []]
    for number, text in enumerate(texts, 1):
        for field, values in zip(fields, (text, [number] * len(text), range(len(text)))):
            field += values
    return [np.array([f + [0] * (length - len(f))], np.int32) for f in fields]


def pairs_batch(which, source_length=10, length=9):
    source, source_segments, source_positions = row([PAIRS[i][0] for i in which], source_length)
    inputs, segments, positions = row([PAIRS[i][1] for i in which], length)
    targets = row([TARGETS[i] for i in which], length)[0]
    return {
        "source": source,
        "source_segment_ids": source_segments,
        "source_positions": source_positions,
        "inputs": inputs,
        "segment_ids": segments,
        "positions": positions,
        "targets": targets,
        "weights": (segments > 0).astype(np.float32),
    }


@pytest.mark.parametrize("positions", ["relative", "sinusoidal", "learned", "rotary"])
def test_packed_pairs_give_the_sum_of_the_pairs(positions):
    config = tiny_models.config(
        architecture="encoder_decoder", num_encoder_layers=1, positions=positions
    )
    values = tiny_models.params(config)
    packed = loss_and_gradient(config, values, pairs_batch([0, 1]))
    apart = [loss_and_gradient(config, values, pairs_batch([i])) for i in (0, 1)]
    assert_close(packed, jax.tree.map(jnp.add, *apart))
    assert packed[0][1]["weight"] == packed[0][1]["tokens"] == 7


def test_a_head_at_the_masked_places_alone_computes_the_same():
    config = tiny_models.config(
        architecture="encoder", head_transform=True, head_bias=True, bias=True, norm="layernorm"
    )
    values = tiny_models.params(config)
    rng = np.random.default_rng(1)
    weights = np.zeros((2, 12), np.float32)
    weights[0, [1, 5, 11]], weights[1, [4]] = 1, 1
    batch = {
        "inputs": tiny_models.tokens(),
        "targets": rng.integers(0, 40, (2, 12), np.int32),
        "weights": weights,
        "segment_ids": np.repeat([[1] * 5 + [2] * 7, [1] * 10 + [0] * 2], 1, 0).astype(np.int32),
    }
    whole = loss_and_gradient(config, values, batch)
    assert_close(whole, loss_and_gradient(config, values, batch, 3))
    assert whole[0][1]["weight"] == 4
    assert whole[0][1]["tokens"] == 22


def test_a_prefix_is_seen_by_all_of_its_document_and_by_no_other():
    config = tiny_models.config(num_layers=1)
    values = tiny_models.params(config)
    segments = np.array([[1] * 6 + [2] * 6], np.int32)
    prefix = np.array([[1, 1, 1, 0, 0, 0] + [0] * 6], np.int32)
    tokens = tiny_models.tokens(1)

    def logits(tokens, prefix):
        return tiny_models.logits(config, values, tokens, segments_BT=segments, prefix_BT=prefix)

    base, plain = logits(tokens, prefix), logits(tokens, np.zeros_like(prefix))
    assert not np.allclose(base[0, 0], plain[0, 0])  # the first token sees the rest of the prefix
    np.testing.assert_allclose(base[0, 6:], plain[0, 6:], atol=1e-5)
    changed = tokens.copy()
    changed[0, 4] = (tokens[0, 4] + 1) % 40  # no prefix: seen by those after it alone
    np.testing.assert_array_equal(logits(changed, prefix)[0, :4], base[0, :4])


def test_an_encoder_sees_both_ways_and_a_decoder_does_not():
    tokens = tiny_models.tokens(1)
    changed = tokens.copy()
    changed[0, -1] = (tokens[0, -1] + 1) % 40
    for architecture, sees in (("encoder", True), ("decoder", False)):
        config = tiny_models.config(architecture=architecture)
        values = tiny_models.params(config)
        before, after = (tiny_models.logits(config, values, t)[0, 0] for t in (tokens, changed))
        assert np.allclose(before, after) != sees


def test_the_router_losses_are_added_in_proportion_to_their_coefficients():
    config = tiny_models.config(num_experts=4, activation="swiglu", dense_layers=1)
    values = tiny_models.params(config)
    batch = {
        "inputs": tiny_models.tokens(),
        "targets": tiny_models.tokens(),
        "weights": np.ones((2, 12), np.float32),
    }

    def loss(**coefficients):
        objective = ObjectiveConfig(**{"load_balancing": 0, "router_z": 0, **coefficients})
        model = bind(skeleton(config), values)
        return tiny_models.compiled(lambda: token_loss(model, batch, objective))()

    (plain, metrics), (more, _) = loss(), loss(load_balancing=0.5, router_z=0.25)
    np.testing.assert_allclose(plain, metrics["nats"], rtol=1e-6)
    added = 0.5 * metrics["load_balancing"] + 0.25 * metrics["router_z"]
    np.testing.assert_allclose(more - plain, added, rtol=1e-4)


def test_every_objective_of_the_data_has_a_loss_and_models_it_fits():
    assert set(OBJECTIVES) == set(DATA_OBJECTIVES)
    for name, architectures in OBJECTIVES.items():
        for architecture in ("decoder", "encoder", "encoder_decoder"):
            objective, model = ObjectiveConfig(name=name), ModelConfig(architecture=architecture)
            if architecture in architectures:
                check_objective(objective, model, "config")
            else:
                with pytest.raises(ConfigError, match=f"objective.name='{name}', which needs"):
                    check_objective(objective, model, "config")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"name": "casual"}, "did you mean 'causal'"),
        ({"label_smoothing": 1.0}, r"config.objective.label_smoothing=1.0 must be in \[0, 1\)"),
        ({"router_z": -1.0}, "config.objective.router_z=-1.0 must be at least 0"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        view(ObjectiveConfig, fields, "config.objective")
