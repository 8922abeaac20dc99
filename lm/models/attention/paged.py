"""Attention over pages: each row's keys and values lie in pages of a pool that all rows share.

A page holds `S` consecutive tokens of one text (Kwon et al. 2023). New tokens are written to the
pages of their rows, and then see what these hold: page by page in order, with a running softmax
(Milakov & Gimelshein 2018), in which a page that a token sees nothing of changes no bit. What a
row gets is thus independent of how many pages other rows have. Page 0 belongs to no text: padding
is written there.

Pages may hold eight-bit numbers, rounded as they are written and widened a page at a time as they
are read.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.models.attention.paged_tpu import paired
from lm.models.config import ModelConfig
from lm.models.matmul import compute_dtype, contract
from lm.models.reading import rounded

HIDDEN = -1e30  # a score that is not seen


class Paging(NamedTuple):
    """Where the texts of the rows lie, and the new tokens in them."""

    table_BN: jax.Array  # the pages of each row, in order
    positions_BT: jax.Array  # of the new tokens; -1 is padding
    slots_B: jax.Array  # where what else is kept of the rows' texts stands
    first: jax.Array | int = 0  # the pool's page that is page 0 of this layer
    lengths_B1: jax.Array | None = None  # of the texts, where angles depend on it; None: so far

    @classmethod
    def of_one(
        cls, config: ModelConfig, table_1N: np.ndarray, positions_1T: np.ndarray, slot: int, length
    ) -> Paging:
        """Of one text, whose whole length is told where its angles depend on that."""
        lengths_11 = np.array([[length]], np.int32) if config.angles_by_length else None
        return cls(table_1N, positions_1T, np.array([slot], np.int32), lengths_B1=lengths_11)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EightBits:
    """Keys, or values, in P pages: int8 steps of a float32 scale for each token and head."""

    values_PKSC: jax.Array
    scale_PKS: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers."""
        return self.values_PKSC.shape

    def __getitem__(self, pages) -> EightBits:
        """Some of the pages."""
        return EightBits(self.values_PKSC[pages], self.scale_PKS[pages])


Pool = jax.Array | EightBits
Pools = Pool | tuple[Pool, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Keys and values of all texts, in P pages; one pair of pools a layer.

    For layers that are scanned, the pools of all L layers are one, of L·P pages. On a TPU the two
    may be one pool (`lm.models.attention.paged_tpu`), and of latent attention there are no values.
    An encoder-decoder's cache also holds what cross-attention reads, a row for each slot.
    """

    keys_PKSC: Pools | None
    values_PKSC: Pools | None
    source_keys_LBSKC: jax.Array | tuple[jax.Array, ...] | None = None
    source_values_LBSKC: jax.Array | tuple[jax.Array, ...] | None = None
    source_mask_BS: jax.Array | None = None
    pairs_PSJC: Pools | None = None  # J: two of each key/value head

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        pages: int,
        page_size: int,
        slots: int,
        scanned: bool,
        eight_bits: bool = False,
    ) -> PagedCache:
        """Pools of so many pages, and room for the sources of `slots`, which are never rounded."""
        L, dtype = config.num_layers, compute_dtype(config.compute_dtype)
        source = (slots, config.max_length, config.kv_heads, config.head_width)
        heads, width = config.cached_heads, config.cached_width
        shape = (pages * (L if scanned else 1), heads, page_size, width)

        def pool() -> Pool:
            if eight_bits:
                return EightBits(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], jnp.float32))
            return jnp.zeros(shape, dtype)

        def pools() -> Pools:
            return pool() if scanned else tuple(pool() for _ in range(L))

        def sources():
            if scanned:
                return jnp.zeros((L, *source), dtype)
            return tuple(jnp.zeros(source, dtype) for _ in range(L))

        if not eight_bits and paired(config, scanned):
            shape = (shape[0], page_size, 2 * config.kv_heads, config.head_width)
            return cls(None, None, pairs_PSJC=pools())
        cache = cls(pools(), None if config.kv_rank else pools())
        if config.architecture == "decoder":
            return cache
        return dataclasses.replace(
            cache,
            source_keys_LBSKC=sources(),
            source_values_LBSKC=sources(),
            source_mask_BS=jnp.zeros(source[:2], bool),
        )

    @property
    def own(self) -> tuple[Pools, ...]:
        """Keys and values, or both in one, or what is kept in their place."""
        if self.pairs_PSJC is not None:
            return (self.pairs_PSJC,)
        if self.values_PKSC is None:
            return (self.keys_PKSC,)
        return self.keys_PKSC, self.values_PKSC

    def with_own(self, own: tuple[Pools, ...]) -> PagedCache:
        """With other keys and values."""
        if self.pairs_PSJC is not None:
            return dataclasses.replace(self, pairs_PSJC=own[0])
        values = own[1] if len(own) > 1 else None
        return dataclasses.replace(self, keys_PKSC=own[0], values_PKSC=values)

    def layer(self, index: int) -> tuple[tuple[Pool, ...], tuple | None]:
        """Layer `index`'s own pools, where each has its own; and what it reads of the source."""
        own = tuple(pool[index] for pool in self.own)
        if self.source_mask_BS is None:
            return own, None
        return own, (self.source_keys_LBSKC[index], self.source_values_LBSKC[index])

    def sources(self, slots_B: jax.Array) -> PagedCache:
        """With the sources of these slots alone."""
        axis = 0 if isinstance(self.keys_PKSC, tuple) else 1

        def rows(x, axis):
            return jax.tree.map(lambda x: jnp.take(x, slots_B, axis), x)

        return dataclasses.replace(
            self,
            source_keys_LBSKC=rows(self.source_keys_LBSKC, axis),
            source_values_LBSKC=rows(self.source_values_LBSKC, axis),
            source_mask_BS=rows(self.source_mask_BS, 0),
        )

    def with_source(self, slot: jax.Array, keys_L1SKC, values_L1SKC, mask_1S) -> PagedCache:
        """With another source in one slot, which may be shorter than there is room for."""
        axis = 0 if isinstance(self.keys_PKSC, tuple) else 1

        def row(old, new, axis):
            start = [0] * old.ndim
            start[axis] = slot
            return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), start)

        mask_BS = row(self.source_mask_BS, jnp.zeros_like(self.source_mask_BS[:1]), 0)
        pairs = (self.source_keys_LBSKC, keys_L1SKC), (self.source_values_LBSKC, values_L1SKC)
        keys, values = (
            jax.tree.map(lambda old, new: row(old, new, axis), old, new) for old, new in pairs
        )
        return dataclasses.replace(
            self,
            source_keys_LBSKC=keys,
            source_values_LBSKC=values,
            source_mask_BS=row(mask_BS, mask_1S, 0),
        )

    def take(self, config: ModelConfig, pages_N: jax.Array) -> tuple[Pools, ...]:
        """What these pages hold."""
        return jax.tree.map(lambda pool: pool[self._everywhere(config, pages_N)], self.own)

    def put(self, config: ModelConfig, pages_N: jax.Array, held: tuple[Pools, ...]) -> PagedCache:
        """With `held`, which `take` returned, in these pages."""
        places = self._everywhere(config, pages_N)
        return self.with_own(jax.tree.map(lambda pool, x: pool.at[places].set(x), self.own, held))

    def copy(self, config: ModelConfig, pages_2: jax.Array, slots_2: jax.Array) -> PagedCache:
        """With the first page, and the source of the first slot, copied to the second of each."""
        cache = self.put(config, pages_2[1:], self.take(config, pages_2[:1]))
        if self.source_mask_BS is None:
            return cache
        first = cache.sources(slots_2[:1])
        pair = (first.source_keys_LBSKC, first.source_values_LBSKC)
        return cache.with_source(slots_2[1], *pair, first.source_mask_BS)

    def _everywhere(self, config: ModelConfig, pages_N: jax.Array) -> jax.Array:
        """These pages in a pool: of each of its layers where they share it."""
        pool = self.own[0]
        if isinstance(pool, tuple):
            return pages_N
        layers_L1 = jnp.arange(config.num_layers)[:, None]
        return (pages_N + layers_L1 * (pool.shape[0] // config.num_layers)).ravel()


def write(pool_PKSC: Pool, new_BTKC: jax.Array, paging: Paging) -> Pool:
    """The pool with the new tokens' keys, or values, in it."""
    size = pool_PKSC.shape[2]
    there_BT = paging.positions_BT >= 0
    places_BT = jnp.where(there_BT, paging.positions_BT, 0)
    pages_BT = jnp.take_along_axis(paging.table_BN, places_BT // size, 1)
    pages_BT = jnp.where(there_BT, pages_BT, 0) + paging.first

    def put(pool: jax.Array, new: jax.Array) -> jax.Array:
        return pool.at[pages_BT, :, places_BT % size].set(new.astype(pool.dtype))

    if not isinstance(pool_PKSC, EightBits):
        return put(pool_PKSC, new_BTKC)
    values_BTKC, scale_BTK = rounded(new_BTKC)
    return EightBits(put(pool_PKSC.values_PKSC, values_BTKC), put(pool_PKSC.scale_PKS, scale_BTK))


def attend_pages(
    config: ModelConfig,
    query_BTHC: jax.Array,
    keys_PKSC: Pool,
    values_PKSC: Pool,
    context,
) -> jax.Array:
    """As `lm.models.attention.attention.attend`, of keys and values in pages.

    Args:
      context: its `paging` says where each row's tokens lie; its `window` is 0 where a token sees
        all before it. Rows of padding alone get zeros.
    """
    paging, window = context.paging, context.window
    B, T, H, C = query_BTHC.shape
    K, S = keys_PKSC.shape[1:3]
    query_BKGTC = (query_BTHC * config.score_scale).reshape(B, T, K, H // K, C)
    query_BKGTC = query_BKGTC.transpose(0, 2, 3, 1, 4)
    positions_BT = paging.positions_BT
    last_B = positions_BT.max(1)
    first_B = jnp.where(positions_BT < 0, last_B[:, None], positions_BT).min(1)
    seen_from_B = jnp.maximum(jnp.where(window == 0, 0, first_B - window + 1), 0)
    start_B = seen_from_B // S
    count_B = jnp.where(last_B < 0, 0, last_B // S + 1 - start_B)

    def one_page(column, carry):
        most_BKGT, total_BKGT, sum_BKGTC = carry
        column_B = jnp.minimum(start_B + column, paging.table_BN.shape[1] - 1)
        pages_B = jnp.take_along_axis(paging.table_BN, column_B[:, None], 1)[:, 0] + paging.first
        key_BKSC, value_BKSC = keys_PKSC[pages_B], values_PKSC[pages_B]
        key_scale = value_scale = None
        if isinstance(keys_PKSC, EightBits):
            key_scale, value_scale = (x.scale_PKS[:, :, None, None] for x in (key_BKSC, value_BKSC))
            key_BKSC, value_BKSC = key_BKSC.values_PKSC, value_BKSC.values_PKSC
        scores = contract("bkgtc,bksc->bkgts", query_BKGTC, key_BKSC, jnp.float32)
        if key_scale is not None:
            scores *= key_scale
        if cap := config.attention_softcap:
            scores = cap * jnp.tanh(scores / cap)
        slots_BS = (start_B + column)[:, None] * S + jnp.arange(S)
        distance_BTS = slots_BS[:, None] - positions_BT[..., None]
        if context.bias is not None:
            bias_BHTS = context.bias.of(context.bias.table, distance_BTS)
            scores += bias_BHTS.reshape(scores.shape)
        seen_BTS = (distance_BTS <= 0) & ((window == 0) | (distance_BTS > -window))
        seen = (seen_BTS & (positions_BT >= 0)[..., None])[:, None, None]
        now_BKGT = jnp.maximum(most_BKGT, jnp.where(seen, scores, HIDDEN).max(-1))
        shares = jnp.where(seen, jnp.exp(scores - now_BKGT[..., None]), 0)
        kept_BKGT = jnp.exp(most_BKGT - now_BKGT)
        total_BKGT = total_BKGT * kept_BKGT + shares.sum(-1)
        if value_scale is not None:
            shares *= value_scale
        part = contract(
            "bkgts,bksc->bkgtc", shares.astype(query_BTHC.dtype), value_BKSC, jnp.float32
        )
        return now_BKGT, total_BKGT, sum_BKGTC * kept_BKGT[..., None] + part

    shape = query_BKGTC.shape[:-1]
    empty = (
        jnp.full(shape, HIDDEN, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, C), jnp.float32),
    )
    if context.sinks_H is not None:  # a first score, of a value of zero
        sinks_KG1 = context.sinks_H.astype(jnp.float32).reshape(K, H // K, 1)
        empty = (jnp.broadcast_to(sinks_KG1, shape), jnp.ones(shape, jnp.float32), empty[2])
    _, total_BKGT, sum_BKGTC = jax.lax.fori_loop(0, count_B.max(), one_page, empty)
    heads = sum_BKGTC / jnp.maximum(total_BKGT, 1e-30)[..., None]
    return heads.transpose(0, 3, 1, 2, 4).reshape(B, T, H, C).astype(query_BTHC.dtype)
