"""Twenty steps on eight devices, however they share the work, end where one device ends."""

import dataclasses

import jax
import numpy as np
import pytest
from parallel_training import MODEL, STEPS, problem, train

from lm.parallel.layout import STRATEGIES, lay_out, resolve
from lm.parallel.mesh import MeshConfig

MIXTURE = {"num_experts": 8, "num_layers": 2}
LATENT = {
    "num_kv_heads": None, "head_dim": 12, "kv_rank": 16, "query_rank": 8, "shared_key_dim": 4,
    "value_dim": 6,
}  # fmt: skip
GROUPED = {
    "num_experts": 8, "router_score": "sigmoid", "router_bias": True, "router_groups": 4,
    "router_group_limit": 2,
}  # fmt: skip
LONGROPE = {
    "rotary_scaling": "longrope",
    "rotary_original_length": 5,  # some packed documents are longer
    "rotary_short": (1.0, 1.2, 1.5, 2.0),
    "rotary_long": (1.0, 2.0, 4.0, 8.0),
}
SINKS = {"attention_sinks": True}
BUSY = {"dropout": 0.2, "accumulation": 2}


def check(mesh, zero=3, **fields):
    one, many = train(**fields), train(mesh, zero, **fields)
    assert len(one.losses) == STEPS and one.losses[-1] < one.losses[0]
    np.testing.assert_allclose(many.losses, one.losses, atol=1e-5, rtol=0)
    for name, expected in one.params.items():
        np.testing.assert_allclose(many.params[name], expected, atol=1e-4, rtol=0, err_msg=name)


def strategy(name):
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
        ({"expert": 2, "tensor": 2, "stage": 2}, {**MIXTURE, **SINKS, "expert_bias": True}),
        ({"expert": 2, "context": 2, "tensor": 2}, {**MIXTURE, "capacity_factor": 1.25}),
        ({"tensor": 2, "context": 2, "stage": 2}, {"remat": "full", **LONGROPE}),
        (
            {"context": 4, "stage": 2},
            {"attention_pattern": ("local", "global"), "window": 8, **SINKS},
        ),
        ({"fsdp": 2, "tensor": 2, "context": 2}, LATENT),
        ({"tensor": 2, "expert": 2, "stage": 2}, {**LATENT, **GROUPED}),
    ],
    ids=lambda value: "-".join(f"{name}{size}" for name, size in value.items()),
)
def test_products_of_strategies_train_as_one_device_does(mesh, fields):
    check(MeshConfig(**{"data": 1, **mesh}), **fields)


# Over how many devices each splits the matrices of layers, and the optimizer's state of them.
SPLIT = {
    "data_parallel": (1, 1),
    "zero1": (1, 8),
    "zero2": (1, 8),
    "zero3": (8, 8),
    "tensor": (8, 8),
    "megatron_3d": (4, 8),
    "context": (8, 8),
    "expert": (8, 8),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_device_holds_what_the_strategy_promises(name):
    layout = lay_out("", *strategy(name))
    model = dataclasses.replace(MODEL, **(MIXTURE if name == "expert" else {}))
    with layout.active():
        training, state = problem(layout, model, steps=1, accumulation=1)
    # Eight ways are more than there are heads.
    split = {"mlp"} if name == "tensor" else {"mlp", "heads", "kv_heads"}
    matrices = {name for name, spec in training.specs.items() if split & {*spec.axes}}
    assert len(matrices) == (3 if name == "tensor" else 7)
    for what, ways in zip(("params", "optimizer"), SPLIT[name]):
        for path, leaf in jax.tree_util.tree_flatten_with_path(state[what])[0]:
            if getattr(path[-1], "key", "") in matrices:
                held = leaf.addressable_shards[0].data.nbytes
                assert held * ways == leaf.nbytes, (what, path)
