"""A policy's and a critic's gradients do not know how responses were padded, cut or shared out."""

import functools

import jax
import numpy as np
import pytest
import tiny_models

from lm.models import bind, skeleton
from lm.models.params import param_specs
from lm.objectives import ObjectiveConfig, loss
from lm.objectives.policy import PolicyConfig
from lm.parallel.layout import lay_out
from lm.parallel.mesh import MeshConfig, batch_sharding
from lm.parallel.sharding import parameter_shardings
from lm.training.step import sum_of_parts

CONFIG = tiny_models.config(classifier="token", num_labels=1)  # a critic that shares the trunk
VALUES = tiny_models.params(CONFIG)
ROWS, LENGTH = 8, 12
TERMS = {"kl_coefficient": 0.1, "entropy_coefficient": 0.05, "importance_cap": 1.1}
OBJECTIVES = {
    "ppo": ObjectiveConfig("policy", policy=PolicyConfig("ppo", **TERMS)),
    "dr_grpo": ObjectiveConfig("policy", policy=PolicyConfig("dr_grpo", **TERMS, max_response=9)),
    "gspo": ObjectiveConfig("policy", policy=PolicyConfig("gspo", **TERMS)),
    "value": ObjectiveConfig("value"),
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def responses(seed=0, length=LENGTH):
    """Rows of a prompt and a response, of random lengths; the last is nothing but padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 40, (ROWS, LENGTH + 1), dtype=np.int32)
    prompt = rng.integers(1, 5, (ROWS, 1))
    end = prompt + rng.integers(1, LENGTH - 4, (ROWS, 1))
    end[-1] = 0
    place = np.arange(LENGTH)
    batch = {
        "inputs": tokens[:, :-1] * (place < end),
        "targets": tokens[:, 1:] * (place < end),
        "weights": ((place >= prompt - 1) & (place < end)).astype(np.float32),
        "segment_ids": (place < end).astype(np.int32),
        "positions": (place * (place < end)).astype(np.int32),
    }
    likely = ("old_logprob", "ref_logprob", "rollout_logprob")  # about log 1/40
    for name, mean in {
        **dict.fromkeys(likely, -3.7),
        "advantage": 0,
        "value": 0,
        "return": 0,
    }.items():
        batch[name] = rng.normal(mean, 0.3, (ROWS, LENGTH)).astype(np.float32) * batch["weights"]
    return {name: np.pad(x, [(0, 0), (0, length - LENGTH)]) for name, x in batch.items()}


@functools.partial(tiny_models.compiled, static_argnums=(0, 1))
def found(name, accumulation, values, batch):
    """((loss, metrics), gradients) of a batch, taken in micro-batches as a training step does."""

    def differentiated(part, rows_B):
        def summed(values):
            return loss(bind(skeleton(CONFIG), values), part, OBJECTIVES[name], None, 0, rows_B)

        return jax.value_and_grad(summed, has_aux=True)(values)

    return sum_of_parts(differentiated, batch, accumulation)


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-5)


@every_objective
def test_padding_and_what_stands_in_it_change_nothing(name):
    batch = responses()
    expected = found(name, 1, VALUES, batch)
    assert_close(found(name, 1, VALUES, responses(length=16)), expected)
    # Ids where nothing is read or learned, numbers wherever nothing is learned.
    junk = {
        "inputs": np.where(batch["segment_ids"] > 0, batch["inputs"], 7),
        "targets": np.where(batch["weights"] > 0, batch["targets"], 100),
        **{
            field: np.where(batch["weights"] > 0, batch[field], np.nan).astype(np.float32)
            for field in batch
            if field not in ("inputs", "targets", "weights", "segment_ids", "positions")
        },
    }
    again = found(name, 1, VALUES, {**batch, **junk})
    jax.tree.map(np.testing.assert_array_equal, again, expected)


@every_objective
def test_micro_batches_add_up_to_the_batch(name):
    batch = responses()
    expected = found(name, 1, VALUES, batch)
    assert_close(found(name, 4, VALUES, batch), expected)
    order = np.random.default_rng(1).permutation(ROWS)
    assert_close(found(name, 2, VALUES, {k: x[order] for k, x in batch.items()}), expected)


@every_objective
def test_a_mesh_of_eight_devices_computes_the_same(name):
    batch = responses()
    expected = found(name, 2, VALUES, batch)
    layout = lay_out("", MeshConfig(data=1, fsdp=4, tensor=2), 3)
    with layout.active():
        values = jax.device_put(
            VALUES, parameter_shardings(param_specs(skeleton(CONFIG)), layout.mesh)
        )
        placed = {
            field: jax.device_put(x, batch_sharding(layout.mesh, 0, x.ndim))
            for field, x in batch.items()
        }
        assert_close(found(name, 2, values, placed), expected)
