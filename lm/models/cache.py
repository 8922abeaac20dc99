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
    a loop writes those in place, where it would copy slices of a stacked array. Of latent attention
    (`lm.models.attention.latent`) what is kept of a token is a key, and there are no values.

    An encoder-decoder's cache also holds what cross-attention reads: the keys and values of the
    encoder's output, and which of its places are not padding.
    """

    keys_LBSKC: Stacked
    values_LBSKC: Stacked | None
    positions_BS: jax.Array
    slot: jax.Array  # the next free slot
    source_keys_LBSKC: Stacked | None = None
    source_values_LBSKC: Stacked | None = None
    source_mask_BS: jax.Array | None = None
    # Where angles depend on a text's length: what was read, to be read anew, and what length the
    # keys and values were made for.
    tokens_BS: jax.Array | None = None
    lengths_B: jax.Array | None = None

    @classmethod
    def empty(cls, config: ModelConfig, batch_size: int, length: int, scanned: bool) -> Cache:
        """A cache with room for `length` tokens a row, in the compute dtype."""
        dtype = compute_dtype(config.compute_dtype)
        shape = (batch_size, length, config.cached_heads, config.cached_width)

        def zeros() -> Stacked:
            if scanned:
                return jnp.zeros((config.num_layers, *shape), dtype)
            return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))

        keys, values = zeros(), None if config.kv_rank else zeros()
        cache = cls(keys, values, jnp.full((batch_size, length), -1), jnp.int32(0))
        if not config.angles_by_length:
            return cache
        tokens_BS = jnp.zeros((batch_size, length), jnp.int32)
        return dataclasses.replace(cache, tokens_BS=tokens_BS, lengths_B=tokens_BS[:, 0])

    @property
    def own(self) -> tuple[Stacked, ...]:
        """Keys and values of the tokens so far, or what is kept in their place."""
        if self.values_LBSKC is None:
            return (self.keys_LBSKC,)
        return self.keys_LBSKC, self.values_LBSKC

    def with_own(self, own: tuple[Stacked, ...]) -> Cache:
        """With others."""
        values = own[1] if len(own) > 1 else None
        return dataclasses.replace(self, keys_LBSKC=own[0], values_LBSKC=values)

    def layer(self, index: int | jax.Array) -> tuple[tuple, tuple | None]:
        """Layer `index`'s own keys and values, and those of the source, if there is one."""
        own = tuple(kept[index] for kept in self.own)
        if self.source_mask_BS is None:
            return own, None
        return own, (self.source_keys_LBSKC[index], self.source_values_LBSKC[index])

    def rows(self, index_N: jax.Array, source: bool = True) -> Cache:
        """The cache of a batch of which row n is this one's row `index_N[n]`.

        Without `source` what is remembered of sources stays where it is: for rows that change
        places with others of the same source.
        """
        batch_axis = 1 if isinstance(self.keys_LBSKC, jax.Array) else 0

        def taken(x, axis=batch_axis):
            return jax.tree.map(lambda x: jnp.take(x, index_N, axis), x)

        cache = dataclasses.replace(
            self,
            keys_LBSKC=taken(self.keys_LBSKC),
            values_LBSKC=taken(self.values_LBSKC),
            positions_BS=taken(self.positions_BS, 0),
            tokens_BS=taken(self.tokens_BS, 0),
            lengths_B=taken(self.lengths_B, 0),
        )
        if not source:
            return cache
        return dataclasses.replace(
            cache,
            source_keys_LBSKC=taken(self.source_keys_LBSKC),
            source_values_LBSKC=taken(self.source_values_LBSKC),
            source_mask_BS=taken(self.source_mask_BS, 0),
        )

    def repeat(self, times: int) -> Cache:
        """The cache of a batch in which every row stands `times` times in a row."""
        return self.rows(jnp.repeat(jnp.arange(self.positions_BS.shape[0]), times))

    def rewind(self, count_B: jax.Array) -> Cache:
        """The cache without the last `count_B` slots of each row.

        Rows that drop different numbers turn until they end at one slot again, the first that has
        room for the longest: so a row's tokens must be in slots side by side that end with the last
        one before `slot`.
        """
        slots_S = jnp.arange(self.positions_BS.shape[1])
        end_B = self.slot - count_B
        positions_BS = jnp.where(slots_S < end_B[:, None], self.positions_BS, -1)
        if len(positions_BS) == 1:
            return dataclasses.replace(self, positions_BS=positions_BS, slot=end_B[0])
        slot = jnp.max((positions_BS >= 0).sum(1)).astype(jnp.int32)
        from_BS = (slots_S - (slot - end_B)[:, None]) % len(slots_S)

        def turned(x):
            axis = x.ndim - 3  # of slots
            index = from_BS.reshape((1,) * (axis - 1) + from_BS.shape + (1, 1))
            return jnp.take_along_axis(x, index, axis)

        return dataclasses.replace(
            self,
            keys_LBSKC=jax.tree.map(turned, self.keys_LBSKC),
            values_LBSKC=jax.tree.map(turned, self.values_LBSKC),
            positions_BS=jnp.take_along_axis(positions_BS, from_BS, 1),
            tokens_BS=jax.tree.map(lambda x: jnp.take_along_axis(x, from_BS, 1), self.tokens_BS),
            slot=slot,
        )
