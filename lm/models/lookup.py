"""Rows of a table by number, where the mesh splits both."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm.parallel.sharding import ACTIVATION_RULES, WHOLE_RULES, automatic_axes, partition


def lookup(table_VD: jax.Array, rows_BT: jax.Array) -> jax.Array:
    """`table_VD[rows_BT]`, [B, T, D].

    On a mesh each device looks up the rows of its own tokens; where `tensor` splits the table, in
    the part it holds, and the parts are added (Shoeybi et al. 2019, §3). Left to itself, XLA may
    gather the tokens of all devices instead.
    """
    mesh, names = automatic_axes()
    if not names:
        return jnp.take(table_VD, rows_BT, axis=0)
    shape = (*rows_BT.shape, table_VD.shape[1])
    split = partition(("vocab", None), table_VD.shape, mesh, WHOLE_RULES)[0]
    short = partition(("batch", "norm_length", None), shape, mesh, ACTIVATION_RULES)
    whole = partition(("batch", "length", None), shape, mesh, ACTIVATION_RULES)
    tokens = whole if split else short
    scatter = split is not None and short != whole
    first_V = jnp.arange(table_VD.shape[0], dtype=rows_BT.dtype)

    def local(first_V, table_VD, rows_BT):
        if split is None:
            return jnp.take(table_VD, rows_BT, axis=0)
        rows_BT = rows_BT - first_V[0]
        here_BT = (rows_BT >= 0) & (rows_BT < table_VD.shape[0])
        found = jnp.take(table_VD, jnp.where(here_BT, rows_BT, 0), axis=0)
        found = jnp.where(here_BT[..., None], found, 0)
        if scatter:
            return jax.lax.psum_scatter(found, split, scatter_dimension=1, tiled=True)
        return jax.lax.psum(found, split)

    return jax.shard_map(
        local,
        in_specs=(PartitionSpec(split), PartitionSpec(split), PartitionSpec(*tokens[:2])),
        out_specs=short if scatter or split is None else whole,
        axis_names=names,
        check_vma=False,
    )(first_V, table_VD, rows_BT)
