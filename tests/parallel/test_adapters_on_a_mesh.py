"""Adapters train on a mesh as on one device, and beside frozen parameters take what is said."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from parallel_training import LENGTH, MODEL, ROWS, packed_batches

from lm.models import init, param_specs
from lm.models.adapters import AdapterConfig
from lm.parallel.layout import lay_out
from lm.parallel.mesh import MeshConfig, batch_sharding
from lm.training.config import TrainConfig
from lm.training.memory import expected_memory
from lm.training.optimizer import OptimizerConfig
from lm.training.setup import set_up
from lm.training.workload import Workload

STEPS = 3


def problem(adapter, mesh=None, accumulation=1, **fields):
    layout = lay_out("", mesh or MeshConfig(), 3, jax.devices()[: 8 if mesh else 1])
    workload = Workload(
        dataclasses.replace(MODEL, **fields),
        LENGTH,
        ROWS,
        packed=True,
        seed=7,
        adapter=adapter,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        train=TrainConfig(steps=STEPS, accumulation=accumulation),
        layout=layout,
    )
    return set_up(workload), layout


def begun(training):
    params = init(param_specs(training.model), jax.random.key(3))
    base, adapters = training.adapt(params)
    return training.create_state(adapters), {"base": base}


def trained(*arguments, **fields):
    training, layout = problem(*arguments, **fields)
    batches = packed_batches(np.random.default_rng(0), STEPS)
    with layout.active():
        state, frozen = begun(training)
        batches = jax.device_put(batches, batch_sharding(layout.mesh, 1))
        state, metrics = training.step(state, batches, frozen)
    losses = np.asarray(metrics["nats"]) / np.asarray(metrics["weight"])
    return losses, {name: np.asarray(value) for name, value in state["params"].items()}


MESHES = {
    "fsdp and tensor": dict(data=1, fsdp=4, tensor=2),
    "stages": dict(data=1, fsdp=2, stage=4),
    "context": dict(data=2, context=4),
}
SHARED = {
    ("fsdp and tensor", "dora", "int8"): {},
    ("fsdp and tensor", "lora", "nf4"): dict(accumulation=2, scan_layers=False),
    ("stages", "lora", "int8"): {},
    ("context", "dora", "compute"): dict(remat="dots"),
}


@pytest.mark.parametrize(
    "mesh, kind, base",
    [
        pytest.param(*case, marks=[pytest.mark.slow] * bool(fields))
        for case, fields in SHARED.items()
    ],
)
def test_a_mesh_is_one_device(mesh, kind, base):
    adapter = AdapterConfig(kind=kind, rank=4, base=base)
    fields = SHARED[mesh, kind, base]
    one = trained(adapter, **fields)
    many = trained(adapter, MeshConfig(**MESHES[mesh]), **fields)
    np.testing.assert_allclose(many[0], one[0], rtol=2e-5)
    for name, value in one[1].items():
        # Adam's first steps divide by what may be a rounding error.
        assert np.mean(np.abs(many[1][name] - value) < 1e-3) > 0.97, name


def test_a_step_makes_no_gradient_of_what_is_frozen_and_takes_what_is_expected():
    sizes = dict(tie_embeddings=False, vocab_size=1000, mlp_width=200)
    training, layout = problem(AdapterConfig(kind="lora", rank=2), **sizes)
    full, _ = problem(AdapterConfig(), **sizes)
    batches = packed_batches(np.random.default_rng(0), 1)
    with layout.active():
        state, frozen = begun(training)
        lowered = training.step.lower(state, batches, frozen)
        memory = lowered.compile().memory_analysis()
        products, of_all = (
            set(re.findall(r"dot_general.*-> tensor<([\dx]+)xf32>", text.as_text()))
            for text in (lowered, full.step.lower(full.abstract, batches))
        )
    matrices = {"32x4x8", "32x2x8", "32x8x8", "4x8x32", "32x200", "32x400", "200x32", "1000x32"}
    matrices |= {"x".join(reversed(shape.split("x"))) for shape in matrices}
    assert len(of_all & matrices) >= 5 and not products & matrices
    taken = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert 0.6 < sum(expected_memory(training.workload).values()) / taken < 1.6
