"""Changing the mesh changes where numbers are, never what they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from jax.sharding import PartitionSpec

from lm.config import ConfigError, view
from lm.models import Transformer, bind, param_specs
from lm.objectives import ObjectiveConfig, token_loss
from lm.parallel.mesh import MeshConfig, batch_sharding, batch_ways, describe, make_mesh
from lm.parallel.sharding import (
    ACTIVATION_RULES,
    PARAMETER_RULES,
    WHOLE_RULES,
    constrain,
    parameter_shardings,
    partition,
)

MESHES = [
    {"data": 8},
    {"data": 1, "fsdp": 8},
    {"data": 4, "tensor": 2},
    {"data": 1, "fsdp": 2, "tensor": 4},
]


def problem():
    # Two key/value heads do not divide over tensor=4, and 41 tokens over nothing.
    config = tiny_models.config(num_kv_heads=2, vocab_size=41, activation="swiglu")
    rng = np.random.default_rng(0)
    batch = {
        "inputs": rng.integers(0, 41, (8, 12), np.int32),
        "targets": rng.integers(0, 41, (8, 12), np.int32),
        "weights": rng.integers(0, 2, (8, 12)).astype(np.float32),
    }
    skeleton = Transformer(config)

    def loss(values, batch):
        return token_loss(bind(skeleton, values), batch, ObjectiveConfig(chunk=4))[0]

    return param_specs(skeleton), tiny_models.params(config), batch, jax.value_and_grad(loss)


@pytest.fixture(scope="module")
def alone():
    _, values, batch, function = problem()
    return jax.device_get(tiny_models.compiled(function)(values, batch))


@pytest.mark.parametrize("sizes", MESHES, ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()))
def test_eight_devices_compute_what_one_does(alone, sizes):
    specs, values, batch, function = problem()
    mesh = make_mesh(MeshConfig(**sizes))
    shardings = parameter_shardings(specs, mesh)
    with jax.set_mesh(mesh):
        values = jax.device_put(values, shardings)
        batch = jax.device_put(batch, batch_sharding(mesh))
        step = tiny_models.compiled(function, out_shardings=(None, shardings))
        loss, gradient = step(values, batch)
    np.testing.assert_allclose(loss, alone[0], rtol=1e-5)
    for name, expected in alone[1].items():
        np.testing.assert_allclose(gradient[name], expected, atol=1e-5, rtol=1e-4, err_msg=name)
        assert gradient[name].sharding.is_equivalent_to(shardings[name], gradient[name].ndim)


def test_fsdp_and_tensor_divide_the_memory_of_every_matrix():
    specs = param_specs(Transformer(tiny_models.config(vocab_size=64)))
    shardings = parameter_shardings(specs, make_mesh(MeshConfig(data=1, fsdp=2, tensor=4)))
    for name, spec in specs.items():
        if "norm" not in name:
            share = np.prod(shardings[name].shard_shape(spec.shape))
            assert share * 8 == spec.size, name


def test_partition_leaves_out_what_cannot_split():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))

    def spec(axes, shape):
        return partition(axes, shape, mesh, PARAMETER_RULES)

    assert spec(("embed", "heads", "head_dim"), (32, 8, 4)) == PartitionSpec("fsdp", "tensor", None)
    assert spec(("embed", "heads"), (32, 6)) == PartitionSpec("fsdp", None)  # 6 over 4
    assert spec(("embed", "heads"), (31, 8)) == PartitionSpec(None, "tensor")
    assert spec(("mlp", "vocab"), (8, 8)) == PartitionSpec("tensor", None)  # taken
    assert spec((None, "unheard_of"), (8, 8)) == PartitionSpec(None, None)
    with pytest.raises(ValueError):
        spec(("embed",), (8, 8))


def test_zero_takes_what_the_batch_is_split_over_and_other_dimensions_leave():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, context=2))
    axes, shape = ("expert", "embed", "mlp"), (4, 16, 8)
    assert partition(axes, shape, mesh, PARAMETER_RULES) == PartitionSpec(
        "expert", ("fsdp", "context"), None
    )
    assert partition(axes[1:], shape[1:], mesh, PARAMETER_RULES) == PartitionSpec(
        ("fsdp", "expert", "context"), None
    )
    assert partition(axes, shape, mesh, WHOLE_RULES) == PartitionSpec("expert", None, None)


def test_the_batch_splits_over_data_and_fsdp_as_far_as_it_divides():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))

    def rows(n):
        return partition(("batch", "length"), (n, 5), mesh, ACTIVATION_RULES)

    assert batch_ways(mesh) == 8
    assert rows(16) == PartitionSpec(("data", "fsdp"), None)
    assert rows(4) == PartitionSpec("data", None)  # one row each, nothing left for fsdp
    assert rows(2) == PartitionSpec("fsdp", None)
    assert rows(7) == PartitionSpec(None, None)


def test_constrain_does_nothing_without_a_mesh_and_places_values_with_one():
    x = jnp.zeros((8, 4, 8))
    assert constrain(x, "batch", "length", "mlp") is x
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.jit(lambda x: constrain(x, "batch", "length", "mlp"))(x)
    assert placed.sharding.shard_shape(placed.shape) == (2, 4, 4)


def test_a_mesh_uses_all_devices_and_minus_one_means_the_rest():
    mesh = make_mesh(MeshConfig(data=-1, tensor=2))
    assert mesh.shape["data"] == 4 and mesh.size == 8
    assert describe(mesh) == "data=4 × tensor=2"
    assert describe(make_mesh(MeshConfig(), jax.devices()[:1])) == "one device"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, r"data=3.*8"),
        ({"data": 2}, r"data=2.*8"),
        ({"data": -1, "fsdp": 16}, r"fsdp=16.*8"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(MeshConfig(**sizes))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 0}, r"config.mesh.tensor=0 must be positive"),
        ({"data": -1, "fsdp": -1}, r"only one axis may be -1, not data and fsdp"),
        ({"rounds": 2}, r"config.mesh.*rounds=2.*for a pipeline, and config.mesh.stage is 1"),
        ({"stage": 4, "microbatches": 6}, r"microbatches=6 must be a multiple of stage=4"),
    ],
)
def test_impossible_mesh_sizes_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        view(MeshConfig, sizes, "config.mesh")
