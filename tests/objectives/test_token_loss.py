"""One loss for every objective: what a batch says is predicted, from what it says is seen.

Sums over tokens, so that they do not know how a batch was cut.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from lm.config import ConfigError, view
from lm.data.config import OBJECTIVES as DATA_OBJECTIVES
from lm.models import ModelConfig, bind, skeleton
from lm.models.config import POSITIONS
from lm.models.hooks import no_tap
from lm.models.moe.experts import Experts
from lm.models.params import init, param_specs
from lm.objectives import OBJECTIVES, ObjectiveConfig, check_objective, token_loss
from lm.objectives.tokens import router_loss

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


DOCUMENTS = [[5, 9, 2, 31], [7, 7, 1, 0, 22, 13, 4]]


def documents_batch(rows, length=12):
    """Of rows of documents: the next token's prediction in each."""
    inputs = [row([d[:-1] for d in documents], length) for documents in rows]
    targets = [row([d[1:] for d in documents], length)[0] for documents in rows]
    names = ("inputs", "segment_ids", "positions")
    batch = {name: np.concatenate(parts) for name, parts in zip(names, zip(*inputs))}
    weights = (batch["segment_ids"] > 0).astype(np.float32)
    return {**batch, "targets": np.concatenate(targets), "weights": weights}


@pytest.mark.parametrize("positions", POSITIONS)
def test_loss_and_gradient_of_packed_documents_are_sums_over_the_documents(positions):
    config = tiny_models.config(positions=positions)
    values = tiny_models.params(config)
    one = loss_and_gradient(config, values, documents_batch([DOCUMENTS]))
    apart = [loss_and_gradient(config, values, documents_batch([[d]])) for d in DOCUMENTS]
    assert_close(one, jax.tree.map(jnp.add, *apart))
    assert one[0][1]["weight"] == sum(len(document) - 1 for document in DOCUMENTS)


def test_accumulating_rows_of_unequal_length_gives_the_full_batch():
    config = tiny_models.config()
    values = tiny_models.params(config)
    rows = [[document] for document in ([1, 2, 3], *DOCUMENTS, list(range(10, 21)))]
    whole = loss_and_gradient(config, values, documents_batch(rows))
    parts = [loss_and_gradient(config, values, documents_batch([row])) for row in rows]
    assert_close(whole, functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts))
    # The mean of the parts' means, the usual mistake, is something else.
    (_, metrics), _ = whole
    means = [part[0][1]["nats"] / part[0][1]["weight"] for part in parts]
    assert abs(np.mean(means) - metrics["nats"] / metrics["weight"]) > 1e-3


def test_what_stands_in_padding_does_not_matter():
    config = tiny_models.config()
    values = tiny_models.params(config)
    batch = documents_batch([DOCUMENTS])
    junk = {name: value.copy() for name, value in batch.items()}
    junk["inputs"][0, 9:], junk["targets"][0, 9:] = 3, 38
    assert_close(*(loss_and_gradient(config, values, each) for each in (batch, junk)))


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
    assert set(OBJECTIVES) >= set(DATA_OBJECTIVES)
    for name, architectures in OBJECTIVES.items():
        for architecture in ("decoder", "encoder", "encoder_decoder"):
            head = {"classifier": "sequence", "num_labels": 1} if name == "reward" else {}
            model = ModelConfig(architecture=architecture, **head)
            objective = ObjectiveConfig(name=name)
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


# ---- Routers -----------------------------------------------------------------------------------

EXPERTS = tiny_models.config(num_experts=4, width=8, expert_width=8, activation="swiglu")
ROUTING = ObjectiveConfig()


def traced_stats(params, x_BTD, valid_BT):
    return bind(Experts(EXPERTS), params)(x_BTD, no_tap, valid_BT)[1]


stats = tiny_models.compiled(traced_stats)


def routing_problem():
    params = init(param_specs(Experts(EXPERTS)), jax.random.key(0))
    params["router"] *= 100  # far from balanced
    x_BTD = np.random.default_rng(0).normal(size=(4, 6, 8)).astype(np.float32)
    return params, x_BTD, np.random.default_rng(1).random((4, 6)) < 0.7


def test_the_loss_follows_the_papers():
    params, x, valid = routing_problem()
    logits = (x @ np.asarray(params["router"]))[valid]
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-logits, -1)[:, :2]
    frequency = np.bincount(chosen.ravel(), minlength=4) / chosen.size
    balance = 4 * (frequency * probability.mean(0)).sum()
    z = (np.log(np.exp(logits).sum(-1)) ** 2).mean()
    loss, metrics = router_loss(stats(params, x, valid), ROUTING, jnp.float32(10))
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
    params, x, valid = routing_problem()
    parts = [stats(params, x[rows], valid[rows]) for rows in (slice(0, 2), slice(2, 4))]
    whole = stats(params, x, valid)
    added = jax.tree.map(jnp.add, *parts)
    for name in ("tokens", "balance", "z", "dropped", "max_load"):
        np.testing.assert_allclose(getattr(added, name), getattr(whole, name), rtol=1e-5)
    layers = jax.tree.map(lambda *each: jnp.stack(each), *parts)
    balance = sum(part.balance for part in parts) / whole.tokens
    metrics = router_loss(layers, ROUTING, 1.0)[1]
    np.testing.assert_allclose(metrics["load_balancing"], balance, rtol=1e-6)
    nothing = router_loss(stats(params, x, np.zeros_like(valid)), ROUTING, jnp.float32(0))
    assert all(value == 0 for value in jax.tree.leaves(nothing))


def test_following_the_loss_balances_the_experts():
    params, x, _ = routing_problem()
    x += 1  # what all tokens share sends all to the same experts
    config = dataclasses.replace(ROUTING, load_balancing=1.0, router_z=0.0)

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
