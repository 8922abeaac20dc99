"""A reward model's step is the same however devices and micro-batches share the pairs."""

import types

import jax
import numpy as np
import pytest
from parallel_training import LENGTH, MODEL

from lm.objectives import ObjectiveConfig
from lm.parallel.layout import lay_out
from lm.parallel.mesh import MeshConfig
from lm.training.config import TrainConfig
from lm.training.optimizer import OptimizerConfig
from lm.training.setup import set_up
from lm.training.workload import Workload

PAIRS = 8


def pairs():
    """Random pairs [1, P, 2, T]: replies of random lengths, one filling its row, one pair empty."""
    rng = np.random.default_rng(0)
    shape = (1, PAIRS, 2, LENGTH)
    tokens = rng.integers(1, 48, (*shape[:-1], LENGTH + 1), dtype=np.int32)
    ends = rng.integers(6, LENGTH, shape[:-1])
    ends[0, 0, 0], ends[0, -1] = LENGTH, 0
    places = np.broadcast_to(np.arange(LENGTH), shape)
    filled = places < ends[..., None]
    return {
        "inputs": np.where(filled, tokens[..., :-1], 0),
        "targets": np.where(filled, tokens[..., 1:], 0),
        "weights": (filled & (places >= 4)).astype(np.float32),
        "segment_ids": filled.astype(np.int32),
        "positions": np.where(filled, places, 0).astype(np.int32),
        "margin": rng.normal(size=shape[:2]).astype(np.float32),
    }


def stepped(mesh, accumulation=1, **fields):
    """Metrics and parameters after a step down the gradient."""
    layout = lay_out("", mesh or MeshConfig(), 3, jax.devices()[: 8 if mesh else 1])
    model = dict(classifier="sequence", num_labels=1, num_layers=2, dropout=0.2, **fields)
    workload = Workload(
        MODEL.__class__(**{**vars(MODEL), **model}),
        LENGTH,
        PAIRS,
        objective=ObjectiveConfig(name="reward", centering=0.1),
        optimizer=OptimizerConfig(name="sgd", learning_rate=1.0, b1=0.0, clip_norm=0.0),
        train=TrainConfig(steps=1, accumulation=accumulation),
        layout=layout,
    )
    batches = types.SimpleNamespace(local_rows=np.arange(PAIRS), batch_size=PAIRS)
    with layout.active():
        training = set_up(workload)
        batch = training.put(pairs(), batches, leading=1)
        state, metrics = training.step(training.create_state(), batch)
    return jax.device_get((metrics, state["params"]))


@pytest.fixture(scope="module")
def alone():
    return stepped(None)


@pytest.mark.parametrize(
    "mesh, accumulation",
    [
        (None, 4),
        ({"fsdp": 4, "tensor": 2}, 2),
        pytest.param({"data": 2, "fsdp": 2, "context": 2}, 1, marks=pytest.mark.slow),
    ],
    ids=["accumulated", "fsdp-tensor", "context"],
)
def test_devices_and_micro_batches_change_nothing(alone, mesh, accumulation):
    mesh = mesh and MeshConfig(**{"data": 1, **mesh})
    metrics, params = stepped(mesh, accumulation)
    assert metrics["weight"] == PAIRS - 1
    for name, expected in alone[0].items():
        np.testing.assert_allclose(metrics[name], expected, atol=1e-5, err_msg=name)
    for name, expected in alone[1].items():
        np.testing.assert_allclose(params[name], expected, atol=1e-5, err_msg=name)


def test_in_bfloat16_rewards_are_nearly_those_of_float32(alone):
    metrics, _ = stepped(None, compute_dtype="bfloat16")
    np.testing.assert_allclose(metrics["nats"], alone[0]["nats"], rtol=0.02)
