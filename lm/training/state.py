"""Where every array of the training state lives on the mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from lm.models import init
from lm.parallel.mesh import replicated
from lm.parallel.params import ParamSpec
from lm.parallel.sharding import parameter_shardings
from lm.training.step import State, initial_state


def abstract_state(
    specs: Mapping[str, ParamSpec], optimizer: optax.GradientTransformation, mesh: Mesh
) -> State:
    """The state as `jax.ShapeDtypeStruct`s with shardings, without allocating any of it.

    What the optimizer keeps per parameter, under its name and in its shape, is sharded as the
    parameter is; the rest is replicated.
    """
    shardings = parameter_shardings(specs, mesh)
    shapes = jax.eval_shape(lambda: initial_state(init(specs, jax.random.key(0)), optimizer))

    def place(path, leaf):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        name = names[-1] if names else None
        matches = name in specs and leaf.shape == specs[name].shape
        sharding = shardings[name] if matches else replicated(mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, shapes)


def create_state(
    specs: Mapping[str, ParamSpec],
    optimizer: optax.GradientTransformation,
    abstract: State,
    seed: int,
    params: Mapping[str, Any] | None = None,
) -> State:
    """The state before the first step, created in place on its devices.

    Args:
      specs: the parameters' declarations.
      optimizer: the optimizer.
      abstract: from `abstract_state`.
      seed: of the initial parameters.
      params: start from these instead.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if params is not None:
        return jax.jit(lambda p: initial_state(p, optimizer), out_shardings=shardings)(dict(params))
    return jax.jit(lambda key: initial_state(init(specs, key), optimizer), out_shardings=shardings)(
        jax.random.key(seed)
    )
