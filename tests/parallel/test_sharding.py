"""Which axes of the mesh split an array follows from the names of its dimensions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from jax.sharding import PartitionSpec

from lm.models import Transformer, param_specs
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.parallel.sharding import (
    ACTIVATION_RULES,
    PARAMETER_RULES,
    WHOLE_RULES,
    constrain,
    parameter_shardings,
    partition,
)


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
