"""What becomes of a parameter's gradient where devices have each a part of the sum.

They are sums over tokens, of which each device has its own. In float32 nothing is lost; in bfloat16
half as much travels, and each device's sum is rounded before all are added up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm.parallel.layout import current_layout

PIECE = 2**25  # numbers of a table that are added up over devices at once


def axes_of(entry: str | Sequence[str] | None) -> tuple[str, ...]:
    """The mesh axes that one entry of a PartitionSpec names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def shared(spec: PartitionSpec, axes: Sequence[str]) -> PartitionSpec:
    """How `summed_over` leaves a gradient: `spec`, of whose mesh axes only those in `axes`."""
    kept = (tuple(a for a in axes_of(entry) if a in axes) for entry in spec)
    return PartitionSpec(*(entry or None for entry in kept))


def summed_over(axes: Sequence[str], gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The sum of `gradient` over devices, in `shard_map`: each keeps its share of it.

    Args:
      axes: of the mesh, over which devices have parts of the sum.
      gradient: this device's part.
      spec: how the parameter is split; a dimension that some of `axes` split is left split over
        those. What other axes split, is split in `gradient` already.
    """
    kept = shared(spec, axes)
    left = tuple(axis for axis in axes if not any(axis in axes_of(entry) for entry in kept))

    def summed(gradient):
        gradient = gradient.astype(current_layout().reduce_dtype)
        for dimension, entry in enumerate(kept):
            if entry:
                gradient = jax.lax.psum_scatter(
                    gradient, entry, scatter_dimension=dimension, tiled=True
                )
        return jax.lax.psum(gradient, left) if left else gradient

    pieces = 1 if axes_of(kept[0]) else _pieces(gradient.shape)
    if pieces == 1:
        return summed(gradient)
    cut = gradient.reshape(pieces, -1, *gradient.shape[1:])
    shares = jax.lax.map(summed, cut)
    return shares.reshape(-1, *shares.shape[2:])


def after(first: jax.Array, x: jax.Array) -> jax.Array:
    """`x`, which can be used only once `first` is computed.

    A TPU's compiler drops `jax.lax.optimization_barrier` before it orders operations: this is a sum
    with a zero that it cannot know. (Where `first` is NaN, so is `x`.)
    """
    zero = jnp.minimum(jnp.abs(first.ravel()[0]), 0)
    return x + zero.astype(x.dtype)


def _pieces(shape: Sequence[int]) -> int:
    """Into how many parts a table is cut, that `summed_over` adds up one after the other.

    Left to itself, a TPU's compiler adds up the whole table on every device, and cuts a share out
    of it where the optimizer reads it: the table stays for all of the backward pass.
    """
    least = math.prod(shape) / PIECE
    return next((n for n in range(1, shape[0] + 1) if n >= least and shape[0] % n == 0), 1)
