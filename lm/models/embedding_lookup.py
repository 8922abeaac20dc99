"""Rows of a table by number, where the mesh splits both."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm.parallel.layout import current_layout
from lm.parallel.reduce import axes_of, shared, summed_over
from lm.parallel.sharding import (
    ACTIVATION_RULES,
    WHOLE_RULES,
    automatic_axes,
    partition,
    zero_rules,
)


class _Split(NamedTuple):
    """How the mesh splits a look-up."""

    names: frozenset  # axes over which arrays are split by hand
    vocab: str | None  # that splits the rows of the table
    tokens: PartitionSpec  # of the row numbers
    found: PartitionSpec  # of what is found
    table: PartitionSpec  # of the table's gradient
    dtype: jnp.dtype  # in which the table travels
    size: int  # rows of the table

    @property
    def scatters(self) -> bool:
        """Whether devices that share the table's rows leave each other a part of the tokens."""
        return self.tokens[:2] != self.found[:2]


def embedding_lookup(
    table_VD: jax.Array, rows_BT: jax.Array, dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """`table_VD[rows_BT]`, [B, T, D].

    On a mesh each device looks up the rows of its own tokens; where `tensor` splits the table, in
    the part it holds, and the parts are added (Shoeybi et al. 2019, §3). Left to itself, XLA may
    gather the tokens of all devices instead.

    Args:
      table_VD: float32.
      rows_BT: numbers of rows.
      dtype: what devices send each other rows in, the compute dtype: where there are several, what
        is found is rounded to it. Gradients are summed in float32 on each device, however.
    """
    mesh, names = automatic_axes()
    if not names:
        return jnp.take(table_VD, rows_BT, axis=0)
    shape = (*rows_BT.shape, table_VD.shape[1])
    vocab = partition(("vocab", None), table_VD.shape, mesh, WHOLE_RULES)[0]
    short = partition(("batch", "norm_length", None), shape, mesh, ACTIVATION_RULES)
    whole = partition(("batch", "length", None), shape, mesh, ACTIVATION_RULES)
    rules = zero_rules(current_layout().zero, "gradients")
    split = _Split(
        frozenset(names),
        vocab,
        PartitionSpec(*(whole if vocab else short)[:2]),
        short,
        partition(("vocab", "embed"), table_VD.shape, mesh, rules),
        jnp.dtype(dtype),
        table_VD.shape[0],
    )
    return _found(split, table_VD, rows_BT)


def _local(rows_BT, first_V, split: _Split):
    """Rows counted from this device's first, and which of them it holds."""
    if split.vocab is None:
        return rows_BT, None
    rows_BT = rows_BT - first_V[0]
    here_BT = (rows_BT >= 0) & (rows_BT < first_V.shape[0])
    return jnp.where(here_BT, rows_BT, 0), here_BT[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _found(split: _Split, table_VD, rows_BT):
    def local(first_V, table_VD, rows_BT):
        rows_BT, here_BT1 = _local(rows_BT, first_V, split)
        found = jnp.take(table_VD, rows_BT, axis=0)
        if here_BT1 is None:
            return found
        found = jnp.where(here_BT1, found, 0)
        if split.scatters:
            return jax.lax.psum_scatter(found, split.vocab, scatter_dimension=1, tiled=True)
        return jax.lax.psum(found, split.vocab)

    whole = PartitionSpec(split.vocab)
    found = jax.shard_map(
        local,
        in_specs=(whole, whole, split.tokens),
        out_specs=split.found,
        axis_names=set(split.names),
        check_vma=False,
    )(jnp.arange(split.size, dtype=rows_BT.dtype), table_VD.astype(split.dtype), rows_BT)
    return found.astype(table_VD.dtype)


def _found_forward(split, table_VD, rows_BT):
    return _found(split, table_VD, rows_BT), rows_BT


def _found_backward(split: _Split, rows_BT, gradient_BTD):
    axes = axes_of(split.tokens[0]) + axes_of(split.tokens[1])

    def local(first_V, rows_BT, gradient_BTD):
        if split.scatters:
            gradient_BTD = jax.lax.all_gather(gradient_BTD, split.vocab, axis=1, tiled=True)
        rows_BT, here_BT1 = _local(rows_BT, first_V, split)
        gradient_BTD = gradient_BTD.astype(jnp.float32)
        if here_BT1 is not None:
            gradient_BTD = jnp.where(here_BT1, gradient_BTD, 0)
        empty_VD = jnp.zeros((first_V.shape[0], gradient_BTD.shape[2]), jnp.float32)
        return summed_over(axes, empty_VD.at[rows_BT].add(gradient_BTD), split.table)

    gradient_VD = jax.shard_map(
        local,
        in_specs=(PartitionSpec(split.vocab), split.tokens, split.found),
        out_specs=PartitionSpec(split.vocab, shared(split.table, axes)[1]),
        axis_names=set(split.names),
        check_vma=False,
    )(jnp.arange(split.size, dtype=rows_BT.dtype), rows_BT, gradient_BTD.astype(split.dtype))
    return gradient_VD.astype(gradient_BTD.dtype), None


_found.defvjp(_found_forward, _found_backward)
