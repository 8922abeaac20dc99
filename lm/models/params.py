"""From a model's declaration to its parameters and back.

A model built from a config is a skeleton: a Flax NNX module (tree mode: a plain pytree) whose every
`nnx.Param` holds a `ParamSpec` instead of an array, so it costs no memory at any size. Parameters
live in a flat dict from dotted name to array; `bind` puts them into the skeleton, and the result is
callable. Split once, outside the training loop; inside `jax.jit` binding is free.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TypeVar

import jax
from flax import nnx

from lm.parallel.sharding import ParamSpec

Model = TypeVar("Model", bound=nnx.Module)


def declare(shape: tuple[int, ...], axes: tuple[str | None, ...], initializer) -> nnx.Param:
    """A parameter to be: an `nnx.Param` holding a `ParamSpec` until `bind` puts an array in."""
    return nnx.Param(ParamSpec(shape, axes, initializer))


def stack(block: Model, num_layers: int) -> Model:
    """The skeleton of `num_layers` blocks stacked along a leading `layers` axis."""

    def stacked(spec: ParamSpec) -> ParamSpec:
        def initializer(key, shape, dtype):
            keys = jax.random.split(key, shape[0])
            return jax.vmap(lambda k: spec.initializer(k, shape[1:], dtype))(keys)

        return ParamSpec((num_layers, *spec.shape), ("layers", *spec.axes), initializer)

    return jax.tree.map(stacked, block, is_leaf=lambda x: isinstance(x, ParamSpec))


class Layers:
    """A stacked parameter, kept as one array a layer: a single leaf, which `unstack` opens."""

    def __init__(self, arrays: tuple[jax.Array, ...]):
        self.arrays = arrays


def unstack(blocks: Model, num_layers: int) -> list[Model]:
    """The blocks one by one. Their gradients are joined by one concatenation, not summed."""
    leaves, treedef = jax.tree.flatten(blocks)
    parts = [
        leaf.arrays
        if isinstance(leaf, Layers)
        else [part[0] for part in jax.lax.split(leaf, (1,) * num_layers)]
        for leaf in leaves
    ]
    return [jax.tree.unflatten(treedef, layer) for layer in zip(*parts)]


def _named_leaves(model: nnx.Module) -> tuple[list[str], list, jax.tree_util.PyTreeDef]:
    paths, treedef = jax.tree_util.tree_flatten_with_path(model)
    # The last key of each path is the `value` that an nnx.Param wraps.
    names = [".".join(key.name for key in path[:-1]) for path, _ in paths]
    return names, [leaf for _, leaf in paths], treedef


def param_specs(model: nnx.Module) -> dict[str, ParamSpec]:
    """Dotted name → `ParamSpec` of a skeleton, e.g. `blocks.attention.query`."""
    names, leaves, _ = _named_leaves(model)
    return dict(zip(names, leaves))


def init(specs: Mapping[str, ParamSpec], key: jax.Array, dtype="float32") -> dict[str, jax.Array]:
    """Initial parameters.

    Each parameter's key depends on its name alone, so the same seed gives the same values on every
    mesh and whatever else the model holds. Jit it with `out_shardings` to create them in place.
    """
    return {
        name: spec.initializer(
            jax.random.fold_in(key, zlib.crc32(name.encode())), spec.shape, dtype
        )
        for name, spec in specs.items()
    }


def bind(model: Model, params: Mapping[str, jax.Array]) -> Model:
    """The callable model: `model` with each parameter's array in place of its declaration.

    Raises:
      KeyError: naming the parameters that are missing or unknown.
    """
    names, _, treedef = _named_leaves(model)
    if set(names) != set(params):
        missing, unknown = sorted(set(names) - set(params)), sorted(set(params) - set(names))
        raise KeyError(f"parameters missing: {missing}; unknown: {unknown}")
    return jax.tree.unflatten(treedef, [params[name] for name in names])


def unbind(model: nnx.Module) -> dict[str, jax.Array]:
    """The flat dict of a bound model's parameters: the inverse of `bind`."""
    names, leaves, _ = _named_leaves(model)
    return dict(zip(names, leaves))


def count(specs: Mapping[str, ParamSpec]) -> int:
    """How many parameters there are; tied ones are declared, and so counted, once."""
    return sum(spec.size for spec in specs.values())
