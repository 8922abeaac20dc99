"""Twenty steps on eight devices, however they share the work, end where one device ends."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from parallel_training import MODEL, STEPS, problem, train

from lm.parallel.layout import STRATEGIES, lay_out, resolve
from lm.parallel.mesh import MeshConfig

MIXTURE = {"num_experts": 8, "num_layers": 2}
BUSY = {"dropout": 0.2, "accumulation": 2}


def check(mesh, zero=3, **fields):
    one, many = train(**fields), train(mesh, zero, **fields)
    assert len(one.losses) == STEPS and one.losses[-1] < one.losses[0]
    np.testing.assert_allclose(many.losses, one.losses, atol=1e-5, rtol=0)
    for name, expected in one.params.items():
        np.testing.assert_allclose(many.params[name], expected, atol=1e-4, rtol=0, err_msg=name)


def strategy(name, **fields):
    mesh = MeshConfig(**({"tensor": 2} if name == "megatron_3d" else {}))
    return resolve(name, mesh, -1)


# Every batch is packed; the fast ones are those that differ most in what is compiled.
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("zero2", "megatron_3d") else pytest.param(name, marks=pytest.mark.slow)
        for name in STRATEGIES
    ],
)
def test_every_strategy_trains_as_one_device_does(name):
    fields = MIXTURE if name == "expert" else {}
    # Four heads and two of keys: eight ways are more than tensor parallelism has heads.
    check(*strategy(name), **fields)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "fields"),
    [
        ({"data": 2, "tensor": 2, "stage": 2}, BUSY),
        ({"data": 2, "tensor": 2, "stage": 2, "rounds": 2}, {"dropout": 0.2}),
        ({"fsdp": 2, "tensor": 2, "context": 2}, BUSY),
        ({"fsdp": 2, "context": 2, "stage": 2}, {"dropout": 0.2}),
        ({"data": 2, "fsdp": 2, "expert": 2}, {**MIXTURE, **BUSY}),
        ({"expert": 2, "tensor": 2, "stage": 2}, MIXTURE),
        ({"expert": 2, "context": 2, "tensor": 2}, {**MIXTURE, "capacity_factor": 1.25}),
        ({"tensor": 2, "context": 2, "stage": 2}, {"remat": "full"}),
        ({"context": 4, "stage": 2}, {"attention_pattern": ("local", "global"), "window": 8}),
    ],
    ids=lambda value: "-".join(f"{name}{size}" for name, size in value.items()),
)
def test_products_of_strategies_train_as_one_device_does(mesh, fields):
    check(MeshConfig(**{"data": 1, **mesh}), **fields)


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_device_holds_what_the_strategy_promises(name):
    mesh, zero = strategy(name)
    layout = lay_out("", mesh, zero)
    model = dataclasses.replace(MODEL, **(MIXTURE if name == "expert" else {}))
    with layout.active():
        training, state = problem(layout, model, steps=1, accumulation=1)
    ways = layout.mesh.shape

    def split(axes, zero_from):
        """Over how many devices a matrix is split by what its dimensions are."""
        width = (
            math.prod(ways[a] for a in ("fsdp", "expert", "context")) if zero >= zero_from else 1
        )
        model = {"heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
        model |= {"layers": "stage", "expert": "expert"}
        product = math.prod(ways[model[axis]] for axis in axes if axis in model)
        if "embed" in axes:
            product *= width // (ways["expert"] if "expert" in axes and zero >= zero_from else 1)
        return product

    for name, spec in training.specs.items():
        for what, zero_from in (("params", 3), ("optimizer", 1)):
            arrays = [
                leaf
                for path, leaf in jax.tree_util.tree_flatten_with_path(state[what])[0]
                if getattr(path[-1], "key", None) == name
            ]
            assert len(arrays) == (1 if what == "params" else 2), name
            expected = 4 * spec.size // split(spec.axes, zero_from)
            if "kv_heads" in spec.axes and ways["tensor"] > MODEL.kv_heads:
                expected *= ways["tensor"]  # two heads are not split eight ways
            elif "heads" in spec.axes and ways["tensor"] > MODEL.num_heads:
                expected *= ways["tensor"]
            for array in arrays:
                assert array.addressable_shards[0].data.nbytes == expected, (name, what)
