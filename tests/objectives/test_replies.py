"""Objectives of replies do not know how their batch was padded, cut or shared out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from lm.models import bind, skeleton
from lm.models.params import param_specs
from lm.objectives import DistillationConfig, ObjectiveConfig, PreferenceConfig, loss, whole_batch
from lm.parallel.layout import lay_out
from lm.parallel.mesh import MeshConfig, batch_sharding
from lm.parallel.sharding import parameter_shardings
from lm.training.step import sum_of_parts

CONFIG = tiny_models.config()
ROWS, LENGTH = 8, 12


def replies(seed=0, rows=ROWS, length=LENGTH):
    """Rows [rows, 2, length] of a prompt and a reply, of random lengths, and labels."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 40, (rows, 2, LENGTH + 1), dtype=np.int32)
    prompt = rng.integers(1, 5, (rows, 1, 1))
    end = prompt + rng.integers(1, LENGTH - 4, (rows, 2, 1))
    place = np.arange(LENGTH)
    batch = {
        "inputs": tokens[..., :-1] * (place < end),
        "targets": tokens[..., 1:] * (place < end),
        "weights": ((place >= prompt - 1) & (place < end)).astype(np.float32),
        "segment_ids": (place < end).astype(np.int32),
        "positions": (place * (place < end)).astype(np.int32),
    }
    more = [(0, 0), (0, 0), (0, length - LENGTH)]
    batch = {name: np.pad(x, more) for name, x in batch.items()}
    return {**batch, "label": (np.arange(rows) % 3 > 0).astype(np.float32)}


def params(scale=1.0):
    return {name: scale * value for name, value in tiny_models.params(CONFIG).items()}


OBJECTIVES = {
    "dpo": ObjectiveConfig("dpo"),
    "per token": ObjectiveConfig("dpo", preference=PreferenceConfig(per_token=True)),
    "simpo": ObjectiveConfig("dpo", preference=PreferenceConfig("simpo", margin=0.5)),
    "orpo": ObjectiveConfig("orpo"),
    "kto": ObjectiveConfig("kto", preference=PreferenceConfig(undesirable=0.5)),
    "distillation": ObjectiveConfig("distillation", distillation=DistillationConfig("jsd")),
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def of(name, batch):
    """Distillation learns from rows."""
    if name != "distillation":
        return batch
    return {field: x[:, 0] for field, x in batch.items() if x.ndim == 3}


@functools.partial(tiny_models.compiled, static_argnums=(0, 1))
def found(name, accumulation, values, reference, batch):
    """((loss, metrics), gradients) of a batch, taken in micro-batches as a training step does."""
    objective = OBJECTIVES[name]
    frozen = bind(skeleton(CONFIG), reference)

    def about(part, rows_B):
        return whole_batch(bind(skeleton(CONFIG), values), part, objective, frozen)

    totals = sum_of_parts(about, batch, accumulation) if objective.of_whole_batch else {}
    rows = batch["inputs"].shape[:1]
    batch = {**batch, **{field: jnp.full(rows, total) for field, total in totals.items()}}

    def differentiated(part, rows_B):
        def summed(values):
            model = bind(skeleton(CONFIG), values)
            return loss(model, part, objective, None, 0, rows_B, frozen)

        return jax.value_and_grad(summed, has_aux=True)(values)

    return sum_of_parts(differentiated, batch, accumulation)


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-5)


@every_objective
def test_padding_and_what_stands_in_it_change_nothing(name):
    values, reference, batch = params(), params(1.1), of(name, replies())
    expected = found(name, 1, values, reference, batch)
    assert_close(found(name, 1, values, reference, of(name, replies(length=16))), expected)
    junk = dict(batch)
    for field in ("inputs", "targets"):
        junk[field] = np.where(batch["segment_ids"] > 0, batch[field], 7)
    junk["targets"] = np.where(batch["weights"] > 0, junk["targets"], 100)
    jax.tree.map(np.testing.assert_array_equal, found(name, 1, values, reference, junk), expected)


@every_objective
def test_micro_batches_add_up_to_the_batch(name):
    values, reference, batch = params(), params(1.1), of(name, replies())
    expected = found(name, 1, values, reference, batch)
    assert_close(found(name, 4, values, reference, batch), expected)


@every_objective
def test_companions_do_not_matter_but_to_the_divergence_of_all(name):
    values, reference, batch = params(), params(1.1), of(name, replies())
    (total, metrics), _ = found(name, 1, values, reference, batch)
    if name == "kto":
        batch |= {
            "mismatched": np.full(ROWS, metrics["divergence"], np.float32),
            "mismatches": np.full(ROWS, ROWS, np.float32),
        }
        assert metrics["divergence"] > 0
    halves = [
        found_apart(name, values, reference, {field: x[rows] for field, x in batch.items()})
        for rows in (slice(0, 3), slice(3, None))
    ]
    np.testing.assert_allclose(sum(each[0] for each in halves), total, rtol=1e-5)


@functools.partial(tiny_models.compiled, static_argnums=0)
def found_apart(name, values, reference, batch):
    model, frozen = (bind(skeleton(CONFIG), each) for each in (values, reference))
    return loss(model, batch, OBJECTIVES[name], reference=frozen)


@every_objective
def test_rows_of_padding_weigh_nothing(name):
    values, reference, batch = params(), params(1.1), replies()
    padded = {field: np.concatenate([x, np.zeros_like(x[:3])]) for field, x in batch.items()}
    expected = found(name, 1, values, reference, of(name, batch))
    assert_close(found(name, 1, values, reference, of(name, padded)), expected)
    nothing = {field: np.zeros_like(x) for field, x in batch.items()}
    results = found(name, 1, values, reference, of(name, nothing))
    assert all(np.all(x == 0) for x in jax.tree.leaves(results))


@every_objective
def test_a_mesh_of_eight_devices_computes_the_same(name):
    values, reference, batch = params(), params(1.1), of(name, replies())
    expected = found(name, 2, values, reference, batch)
    layout = lay_out("", MeshConfig(data=1, fsdp=4, tensor=2), 3)
    with layout.active():
        shardings = parameter_shardings(param_specs(skeleton(CONFIG)), layout.mesh)
        values, reference = (jax.device_put(each, shardings) for each in (values, reference))
        placed = {
            field: jax.device_put(x, batch_sharding(layout.mesh, 0, x.ndim))
            for field, x in batch.items()
        }
        assert_close(found(name, 2, values, reference, placed), expected)


def test_what_is_reported_is_what_the_rewards_are():
    values, batch = params(), replies()
    (total, metrics), _ = found("dpo", 1, values, values, batch)
    np.testing.assert_allclose(total / metrics["weight"], np.log(2), rtol=1e-6)
    assert metrics["weight"] == ROWS and metrics["accuracy"] == metrics["margin"] == 0
    assert metrics["tokens"] == batch["segment_ids"].sum()
    (_, metrics), gradients = found("dpo", 1, values, params(1.1), batch)
    assert 0 < metrics["accuracy"] < ROWS
    gap = metrics["chosen_reward"] - metrics["rejected_reward"]
    np.testing.assert_allclose(metrics["margin"], gap, rtol=1e-4)
    stepped = {field: value - 0.05 * gradients[field] for field, value in values.items()}
    better = found("dpo", 1, stepped, params(1.1), batch)[0][1]
    assert better["margin"] > metrics["margin"] and better["nats"] < metrics["nats"]


def test_routers_are_balanced_as_beside_any_objective():
    config = tiny_models.config(num_experts=4, activation="swiglu", num_layers=1)
    values, batch = tiny_models.params(config), replies(rows=2)

    @functools.partial(tiny_models.compiled, static_argnums=0)
    def measured(objective):
        model = bind(skeleton(config), values)
        return loss(model, batch, objective, reference=model)

    for name in ("dpo", "orpo", "kto"):
        total, metrics = measured(ObjectiveConfig(name, load_balancing=0.5, router_z=0.25))
        added = 0.5 * metrics["load_balancing"] + 0.25 * metrics["router_z"]
        assert added > 0
        np.testing.assert_allclose(total - metrics["nats"], added, rtol=1e-4)
