"""One table from logical axes to mesh axes; changing strategy is changing the table or the mesh.

Parameters and activations name their dimensions (`vocab`, `embed`, `mlp`, `heads`, `kv_heads`,
`head_dim`, `layers`, `batch`, `length`, `expert`); rules say which mesh axes split each. An axis
that does not divide a dimension is left out for that array, so every shape has a valid sharding.

Tensor parallelism is Megatron's (Shoeybi et al. 2019): the first product of a pair is split by
column, the second by row. Between the pairs, where norms and residual sums work on each token by
itself, the tokens are split instead (`norm_length`; Korthikanti et al. 2022): what would be an
all-reduce becomes a reduce-scatter and an all-gather of the same bytes, and nothing there is
computed or kept twice.

ZeRO (Rajbhandari et al. 2020) splits what data parallelism would keep many copies of over the axes
`ZERO_AXES`: `zero` = 1 the optimizer's state, 2 gradients too, 3 parameters too.

A model declares its parameters once, as a flat dict from dotted name to `ParamSpec`. Abstract
shapes, shardings, initial values, optimizer masks, counts and checkpoints all come from that dict.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lm.parallel.mesh import BATCH_AXES

Rules = Mapping[str, tuple[str, ...]]

ZERO_AXES = ("fsdp", "expert", "context")

ACTIVATION_RULES: Rules = {
    "batch": BATCH_AXES,
    "length": ("context",),
    "norm_length": ("context", "tensor"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
}

# Of parameters that ZeRO does not split.
WHOLE_RULES: Rules = {
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
    "layers": ("stage",),
}

PARAMETER_RULES: Rules = {**WHOLE_RULES, "embed": ZERO_AXES}


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """A parameter's shape, its logical axes (one name per dimension) and how it starts.

    Logical axes: `vocab`, `embed`, `mlp`, `heads`, `kv_heads`, `head_dim`, `layers`, `length`,
    `expert`, `distance`, `type`, or None for a dimension that is never sharded.
    `initializer(key, shape, dtype)` gives the initial value of the whole array, stacked layers
    included.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    initializer: Callable[..., Any]

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")

    @property
    def size(self) -> int:
        """How many numbers the parameter holds."""
        return math.prod(self.shape)


def partition(
    axes: Sequence[str | None], shape: Sequence[int], mesh, rules: Rules
) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes and shape on `mesh`.

    Mesh axes of size one, or that do not divide the dimension, or that another dimension took, are
    left out; dimensions choose in order, but `embed` last, since ZeRO takes what is left over.
    Inside a `shard_map`, so are the axes it splits by hand.

    Raises:
      ValueError: not one logical axis for each dimension.
    """
    if len(axes) != len(shape):
        raise ValueError(f"axes {tuple(axes)} and shape {tuple(shape)} differ in length")
    taken: set[str] = set()
    entries: list[str | tuple[str, ...] | None] = [None] * len(axes)
    by_hand = manual_axes(mesh)
    for index in sorted(range(len(axes)), key=lambda i: axes[i] == "embed"):
        chosen, size = [], shape[index]
        for mesh_axis in rules.get(axes[index], ()) if axes[index] else ():
            ways = mesh.shape.get(mesh_axis, 1)
            free = mesh_axis not in taken and mesh_axis not in by_hand
            if ways > 1 and free and size % ways == 0:
                chosen.append(mesh_axis)
                taken.add(mesh_axis)
                size //= ways
        entries[index] = tuple(chosen) if len(chosen) > 1 else chosen[0] if chosen else None
    return PartitionSpec(*entries)


def manual_axes(mesh) -> set[str]:
    """The mesh axes over which the code being traced splits arrays by hand."""
    kinds = zip(mesh.axis_names, getattr(mesh, "axis_types", None) or ())
    return {name for name, kind in kinds if kind is AxisType.Manual}


def automatic_axes() -> tuple[jax.sharding.AbstractMesh, set[str]]:
    """The mesh set by `jax.set_mesh`, and its axes that XLA splits arrays over, if any do.

    The names are what a `shard_map` over all that is left to split takes as `axis_names`; empty
    where nothing is split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = set(mesh.axis_names) - manual_axes(mesh)
    return mesh, names if any(mesh.shape[name] > 1 for name in names) else set()


def parameter_shardings(
    specs: Mapping[str, ParamSpec], mesh, rules: Rules = PARAMETER_RULES
) -> dict[str, NamedSharding]:
    """The sharding of every parameter, from its declaration."""
    return {
        name: NamedSharding(mesh, partition(spec.axes, spec.shape, mesh, rules))
        for name, spec in specs.items()
    }


def zero_rules(zero: int, what: str) -> Rules:
    """The rules for `what` (`parameters`, `gradients` or `optimizer`) at ZeRO stage `zero`."""
    first = {"optimizer": 1, "gradients": 2, "parameters": 3}[what]
    return PARAMETER_RULES if zero >= first else WHOLE_RULES


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, sharded as its logical axes say on the mesh set by `jax.set_mesh`; `x` where none is."""
    mesh, names = automatic_axes()
    if not names:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes, x.shape, mesh, ACTIVATION_RULES))
