"""What decoding remembers: keys and values of the tokens so far, and of the source."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lm.models.config import ModelConfig
from lm.models.matmul import compute_dtype

Stacked = jax.Array | tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, and where each slot's token stands.

    Rows of different lengths share their slots: a row's unused slots have position -1 and are
    never seen. For layers that are not scanned, keys and values are tuples of one array a layer:
    a loop writes those in place, where it would copy slices of a stacked array.

    An encoder-decoder's cache also holds what cross-attention reads: the keys and values of the
    encoder's output, and which of its places are not padding.
    """

    keys_LBSKC: Stacked
    values_LBSKC: Stacked
    positions_BS: jax.Array
    slot: jax.Array  # the next free slot
    source_keys_LBSKC: Stacked | None = None
    source_values_LBSKC: Stacked | None = None
    source_mask_BS: jax.Array | None = None

    @classmethod
    def empty(cls, config: ModelConfig, batch_size: int, length: int, scanned: bool) -> Cache:
        """A cache with room for `length` tokens a row, in the compute dtype."""
        dtype = compute_dtype(config.compute_dtype)
        shape = (batch_size, length, config.kv_heads, config.head_width)

        def zeros() -> Stacked:
            if scanned:
                return jnp.zeros((config.num_layers, *shape), dtype)
            return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))

        return cls(zeros(), zeros(), jnp.full((batch_size, length), -1), jnp.int32(0))

    def layer(self, index: int | jax.Array) -> tuple[tuple, tuple | None]:
        """Layer `index`'s own keys and values, and those of the source, if there is one."""
        own = (self.keys_LBSKC[index], self.values_LBSKC[index])
        if self.source_mask_BS is None:
            return own, None
        return own, (self.source_keys_LBSKC[index], self.source_values_LBSKC[index])

    def repeat(self, times: int) -> Cache:
        """The cache of a batch in which every row stands `times` times in a row."""
        batch_axis = 1 if isinstance(self.keys_LBSKC, jax.Array) else 0

        def rows(x, axis):
            return jax.tree.map(lambda x: jnp.repeat(x, times, axis), x)

        return Cache(
            rows(self.keys_LBSKC, batch_axis),
            rows(self.values_LBSKC, batch_axis),
            rows(self.positions_BS, 0),
            self.slot,
            rows(self.source_keys_LBSKC, batch_axis),
            rows(self.source_values_LBSKC, batch_axis),
            rows(self.source_mask_BS, 0),
        )
