"""One table from logical axes to mesh axes; changing strategy is changing the table or the mesh.

Parameters and activations name their dimensions (`vocab`, `embed`, `mlp`, `heads`, `kv_heads`,
`head_dim`, `layers`, `batch`, `length`, `expert`); `RULES` says which mesh axes split each. An axis
that does not divide a dimension is left out for that array, so every shape has a valid sharding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lm.parallel.params import ParamSpec

Rules = Mapping[str, tuple[str, ...]]

ACTIVATION_RULES: Rules = {
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
}

PARAMETER_RULES: Rules = {
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
    "layers": ("stage",),
}


def partition(
    axes: Sequence[str | None], shape: Sequence[int], mesh, rules: Rules
) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes and shape on `mesh`.

    Mesh axes of size one, or that do not divide the dimension, or that an earlier dimension took,
    are left out.
    """
    taken: set[str] = set()
    entries = []
    for axis, size in zip(axes, shape, strict=True):
        chosen = []
        for mesh_axis in rules.get(axis, ()) if axis else ():
            ways = mesh.shape.get(mesh_axis, 1)
            if ways > 1 and mesh_axis not in taken and size % ways == 0:
                chosen.append(mesh_axis)
                taken.add(mesh_axis)
                size //= ways
        entries.append(tuple(chosen) if len(chosen) > 1 else chosen[0] if chosen else None)
    return PartitionSpec(*entries)


def parameter_shardings(
    specs: Mapping[str, ParamSpec], mesh, rules: Rules = PARAMETER_RULES
) -> dict[str, NamedSharding]:
    """The sharding of every parameter, from its declaration."""
    return {
        name: NamedSharding(mesh, partition(spec.axes, spec.shape, mesh, rules))
        for name, spec in specs.items()
    }


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, sharded as its logical axes say on the mesh set by `jax.set_mesh`; `x` where none is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes, x.shape, mesh, ACTIVATION_RULES))
