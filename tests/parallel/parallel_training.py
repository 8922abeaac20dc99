"""Trains a tiny model on a mesh of fake devices, to be compared with training on one."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np

from lm.models import ModelConfig
from lm.parallel.layout import Layout, lay_out
from lm.parallel.mesh import MeshConfig, batch_sharding
from lm.training.config import TrainConfig
from lm.training.optimizer import OptimizerConfig
from lm.training.setup import set_up
from lm.training.workload import Workload

ROWS, LENGTH, STEPS = 16, 32, 20

MODEL = ModelConfig(
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    width=32,
    mlp_width=64,
    vocab_size=48,
    max_length=LENGTH,
    activation="swiglu",
    compute_dtype="float32",
    scan_layers=True,
)


class Trained(NamedTuple):
    """What a run leaves behind."""

    losses: np.ndarray  # [steps], nats a token
    params: dict[str, np.ndarray]


def packed_batches(rng, steps=STEPS, rows=ROWS, length=LENGTH, vocab=48):
    """Random tokens [steps, rows, length] in documents of random lengths, some padding behind."""
    shape = (steps, rows, length)
    tokens = rng.integers(1, vocab, (steps, rows, length + 1), dtype=np.int32)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row in np.ndindex(steps, rows):
        place, number = 0, 1
        end = length - int(rng.integers(0, 5))
        while place < end:
            size = min(int(rng.integers(3, 17)), end - place)
            segments[row][place : place + size] = number
            positions[row][place : place + size] = np.arange(size)
            place, number = place + size, number + 1
    return {
        "inputs": tokens[..., :-1],
        "targets": tokens[..., 1:],
        "weights": (segments > 0).astype(np.float32),
        "segment_ids": segments,
        "positions": positions,
    }


def problem(layout: Layout, model: ModelConfig, steps: int, accumulation: int):
    """The training of a model as a job sets it up, and its first state."""
    workload = Workload(
        model,
        LENGTH,
        ROWS,
        seed=7,
        optimizer=OptimizerConfig(learning_rate=3e-3),
        train=TrainConfig(steps=steps, accumulation=accumulation),
        layout=layout,
    )
    training = set_up(workload)
    return training, training.create_state()


@functools.lru_cache(maxsize=32)
def train(
    mesh: MeshConfig | None = None,
    zero: int = 3,
    accumulation: int = 1,
    steps: int = STEPS,
    **model,
) -> Trained:
    """Trains on `mesh` of eight devices, or on one."""
    layout = lay_out("", mesh or MeshConfig(), zero, jax.devices()[: 8 if mesh else 1])
    batches = packed_batches(np.random.default_rng(0), steps)
    with layout.active():
        training, state = problem(layout, dataclasses.replace(MODEL, **model), steps, accumulation)
        state, metrics = training.step(
            state, jax.device_put(batches, batch_sharding(layout.mesh, 1))
        )
    losses = np.asarray(metrics["nats"]) / np.asarray(metrics["weight"])
    return Trained(losses, {name: np.asarray(value) for name, value in state["params"].items()})
