"""Where every array of the training state lives on the mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from lm.models import init
from lm.parallel.mesh import replicated
from lm.parallel.sharding import ParamSpec, parameter_shardings, zero_rules
from lm.training.optimizer import Optimizer
from lm.training.step import State, initial_state


def abstract_state(
    specs: Mapping[str, ParamSpec],
    optimizer: Optimizer,
    mesh: Mesh,
    zero: int = 3,
    optimizer_memory: str | None = None,
) -> State:
    """The state as `jax.ShapeDtypeStruct`s with shardings, without allocating any of it.

    Parameters, and what the optimizer keeps of each under its name and in its shape, are sharded as
    ZeRO stage `zero` says; the rest is replicated. What the optimizer keeps of parameters is
    in `optimizer_memory` (`lm.training.offload.HOST`); on the device unless given.
    """
    shardings = {
        what: parameter_shardings(specs, mesh, zero_rules(zero, rules))
        for what, rules in (("params", "parameters"), ("optimizer", "optimizer"))
    }
    shapes = jax.eval_shape(lambda: initial_state(init(specs, jax.random.key(0)), optimizer))

    def place(path, leaf):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        name = names[-1] if names else None
        matches = name in specs and leaf.shape == specs[name].shape
        sharding = shardings[names[0]][name] if matches else replicated(mesh)
        if optimizer_memory and matches and names[0] == "optimizer":
            sharding = sharding.with_memory_kind(optimizer_memory)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, shapes)


def gradient_shardings(
    specs: Mapping[str, ParamSpec], mesh: Mesh, zero: int = 3
) -> dict[str, NamedSharding]:
    """The sharding of every parameter's gradient at ZeRO stage `zero`."""
    return parameter_shardings(specs, mesh, zero_rules(zero, "gradients"))


def create_state(
    specs: Mapping[str, ParamSpec],
    optimizer: Optimizer,
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
