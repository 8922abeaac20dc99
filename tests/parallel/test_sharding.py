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
from lm.parallel.mesh import MeshConfig, batch_sharding, describe, make_mesh
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


FSDP = {"data": 1, "fsdp": 2, "tensor": 4}
ZERO = {"data": 1, "fsdp": 2, "expert": 2, "context": 2}
ROWS = {"data": 4, "fsdp": 2}


@pytest.mark.parametrize(
    ("sizes", "rules", "shape", "split"),
    [
        # What cannot split is left out,
        (FSDP, PARAMETER_RULES, {"embed": 32, "heads": 8, "head_dim": 4}, ("fsdp", "tensor", None)),
        (FSDP, PARAMETER_RULES, {"embed": 32, "heads": 6}, ("fsdp", None)),  # 6 over 4
        (FSDP, PARAMETER_RULES, {"embed": 31, "heads": 8}, (None, "tensor")),
        (FSDP, PARAMETER_RULES, {"mlp": 8, "vocab": 8}, ("tensor", None)),  # taken
        (FSDP, PARAMETER_RULES, {None: 8, "unheard_of": 8}, (None, None)),
        # ZeRO takes what the batch is split over and other dimensions leave,
        (ZERO, PARAMETER_RULES, {"expert": 4, "embed": 16}, ("expert", ("fsdp", "context"))),
        (ZERO, PARAMETER_RULES, {"embed": 16, "mlp": 8}, (("fsdp", "expert", "context"), None)),
        (ZERO, WHOLE_RULES, {"expert": 4, "embed": 16, "mlp": 8}, ("expert", None, None)),
        # and the batch splits as far as it divides.
        (ROWS, ACTIVATION_RULES, {"batch": 16, "length": 5}, (("data", "fsdp"), None)),
        (ROWS, ACTIVATION_RULES, {"batch": 4}, ("data",)),  # one row each, nothing left for fsdp
        (ROWS, ACTIVATION_RULES, {"batch": 2}, ("fsdp",)),
        (ROWS, ACTIVATION_RULES, {"batch": 7}, (None,)),
    ],
)
def test_dimensions_split_over_the_axes_that_the_rules_name_and_divide_them(
    sizes, rules, shape, split
):
    mesh = make_mesh(MeshConfig(**sizes))
    assert partition(tuple(shape), tuple(shape.values()), mesh, rules) == PartitionSpec(*split)
    with pytest.raises(ValueError, match="differ in length"):
        partition(tuple(shape), (8, *shape.values()), mesh, rules)


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
        ({"data": 3}, r"config.mesh \(data=3\) needs 3 devices, and there are 8"),
        ({"data": 2}, r"config.mesh \(data=2\) needs 2 devices, and there are 8"),
        ({"fsdp": 16}, r"fsdp=16\) needs a multiple of 16 devices, and there are 8"),
        ({"tensor": 0}, r"config.mesh.tensor=0 must be positive"),
        ({"data": -1, "fsdp": -1}, r"only one axis may be -1, not data and fsdp"),
        ({"rounds": 2}, r"config.mesh.*rounds=2.*for a pipeline, and config.mesh.stage is 1"),
        ({"stage": 4, "microbatches": 6}, r"microbatches=6 must be a multiple of stage=4"),
    ],
)
def test_impossible_mesh_sizes_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(view(MeshConfig, sizes, "config.mesh"))
