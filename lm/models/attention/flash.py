"""Attention block by block, without ever holding the scores of all pairs.

A query's weighted mean of values is built up from blocks of keys in any order: with each new block
the largest score so far and the sum of exponentials are brought up to date (Milakov & Gimelshein
2018; Dao et al. 2022). Of each query the log of that sum is kept, from which the backward pass
finds the pattern again. Which tokens see which is worked out from slots and segments, block by
block; blocks in which no query sees a key are not visited.

Arrays here have their heads before their tokens: [B, H, T, C]. Accumulation is float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.models.layers import dropout
from lm.models.text import visible

UNSEEN = -1e30  # log of the sum of exponentials of a query that has seen no key
BLOCK = 1024  # tokens a block at most
BLOCK_BYTES = 2**26  # what the scores of a block may take
LANES = 128  # TPU kernels cut tokens into multiples of this


@dataclasses.dataclass(frozen=True)
class Rule:
    """How scores come about, as far as it is known when tracing."""

    causal: bool = True
    softcap: float = 0.0  # c in c·tanh(scores/c); 0: none
    dropout_rate: float = 0.0  # of the pattern
    num_heads: int = 1  # of the whole model: dropout counts them
    # (table, distance [1, t, s]) to what is added to scores, [1, H, t, s].
    bias: Callable[[jax.Array, jax.Array], jax.Array] | None = None


class Tokens(NamedTuple):
    """What decides who sees whom, of queries or of keys."""

    slots_1T: jax.Array
    segments_BT: jax.Array | None = None
    prefix_BT: jax.Array | None = None  # of keys: seen by all of their document


class Given(NamedTuple):
    """The rest of what scores and pattern depend on."""

    window: jax.Array | None = None  # int32: keys a query sees, as in `visible`; 0: all
    table: jax.Array | None = None  # of `Rule.bias`, heads last
    words: jax.Array | None = None  # dropout's key, two uint32
    rows_B: jax.Array | None = None  # dropout's: the rows' numbers in the whole batch
    first_head: jax.Array | int = 0  # the number of the first of these heads in the model


class Seen(NamedTuple):
    """What queries have gathered from the keys they have seen so far."""

    heads_BHTC: jax.Array  # float32: weighted means of values
    logsum_BHT: jax.Array  # float32: log of the sum of exponentials of scores

    @classmethod
    def nothing(cls, query_BHTC: jax.Array) -> Seen:
        """What queries have seen before the first key."""
        heads = jnp.zeros(query_BHTC.shape, jnp.float32)
        return cls(heads, jnp.full(query_BHTC.shape[:3], UNSEEN, jnp.float32))


def block_size(tokens: int, limit: int) -> int:
    """A divisor of `tokens` near `limit`, which leaves whole the halves of an even number."""
    half = tokens // 2 if tokens % 2 == 0 else tokens
    divisors = [d for d in range(1, half + 1) if half % d == 0]
    below = max(d for d in divisors if d <= max(limit, 1))
    return below if below >= limit // 8 else min((d for d in divisors if d > below), default=below)


def tile(tokens: int, limit: int) -> int:
    """A multiple of 128 up to `limit` that divides `tokens`, and their halves if they can be."""
    units = tokens // LANES
    units = units // 2 if units % 2 == 0 else units
    return LANES * max(d for d in range(1, limit // LANES + 1) if units % d == 0)


def visits(
    causal: bool, queries: Tokens, keys: Tokens, window, query_block: int, key_block: int
) -> jax.Array:
    """Whether any query of a block may see any key of another; a boolean [B or 1, blocks, blocks].

    Judged from each block's least and greatest slot and segment, so it may say yes in vain.
    """

    def ends(x, size):
        blocks = x.reshape(x.shape[0], -1, size)
        return blocks.min(-1), blocks.max(-1)

    first_query, last_query = (e[:, :, None] for e in ends(queries.slots_1T, query_block))
    first_key, last_key = (e[:, None, :] for e in ends(keys.slots_1T, key_block))
    seen = jnp.ones((1, first_query.shape[1], first_key.shape[2]), bool)
    if causal:
        seen = first_key <= last_query
        if keys.prefix_BT is not None:
            seen |= ends(keys.prefix_BT, key_block)[1][:, None, :] > 0
    if window is not None:
        seen &= (window == 0) | (last_key > first_query - window)
        if not causal:
            seen &= (window == 0) | (first_key < last_query + window)
    if queries.segments_BT is not None:
        first_query, last_query = (e[:, :, None] for e in ends(queries.segments_BT, query_block))
        first_key, last_key = (e[:, None, :] for e in ends(keys.segments_BT, key_block))
        seen &= (first_key <= last_query) & (last_key >= first_query)
    return seen


def forward(
    rule: Rule,
    query_BHTC: jax.Array,
    key_BKSC: jax.Array,
    value_BKSC: jax.Array,
    queries: Tokens,
    keys: Tokens,
    given: Given,
    seen: Seen,
) -> Seen:
    """What queries have seen after these keys as well.

    Queries are scaled already, K divides H, and `seen` is what the queries have seen before.
    """
    blocks = _Blocks(rule, query_BHTC, key_BKSC, queries, keys, given)

    def each_query(i, seen):
        query, tokens = blocks.query(i)
        before = jax.tree.map(lambda x: blocks.of_queries(x, i, 2), seen)

        def each_key(n, carry):
            mean, largest, total = carry
            j = blocks.order[i, n]
            key, value, others = blocks.key(key_BKSC, value_BKSC, j)
            scores, mask, _ = blocks.scores(query, key, tokens, others)
            scores = jnp.where(mask, scores, UNSEEN)
            new = jnp.maximum(largest, scores.max(-1))
            pattern = jnp.where(mask, jnp.exp(scores - new[..., None]), 0)
            shrunk = jnp.exp(largest - new)
            total = total * shrunk + pattern.sum(-1)
            pattern = blocks.dropped(pattern, tokens, others).astype(value.dtype)
            more = _product("bkgts,bksc->bkgtc", pattern, value)
            return mean * shrunk[..., None] + more, new, total

        mean, logsum = blocks.grouped(before.heads_BHTC), blocks.grouped(before.logsum_BHT)
        start = (mean, logsum, jnp.where(logsum > UNSEEN, 1.0, 0.0))
        mean, largest, total = jax.lax.fori_loop(0, blocks.count[i], each_key, start)
        met = total > 0
        total = jnp.where(met, total, 1)
        after = mean / total[..., None], jnp.where(met, largest + jnp.log(total), UNSEEN)
        return Seen(*(blocks.put(whole, part, i) for whole, part in zip(seen, after, strict=True)))

    return jax.lax.fori_loop(0, blocks.order.shape[0], each_query, seen)


def backward(
    rule: Rule,
    query_BHTC: jax.Array,
    key_BKSC: jax.Array,
    value_BKSC: jax.Array,
    queries: Tokens,
    keys: Tokens,
    given: Given,
    final: tuple[jax.Array, jax.Array, jax.Array],
    so_far: tuple[jax.Array, jax.Array | None],
) -> tuple[tuple[jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]]:
    """Gradients by what these keys contributed to the forward pass.

    Args as of `forward`, but
      final: the gradient by the heads [B, H, T, C]; the final log-sums [B, H, T]; and the sum over
        C of heads × gradient [B, H, T].
      so_far: float32 gradients by query and by `given.table`, of the keys before.

    Returns:
      `so_far` with what these keys add, and the float32 gradients by key and value.
    """
    blocks = _Blocks(rule, query_BHTC, key_BKSC, queries, keys, given)

    def each_query(i, carry):
        query, tokens = blocks.query(i)
        (gradient, logsum, along) = (blocks.grouped(blocks.of_queries(x, i, 2)) for x in final)

        def each_key(n, carry):
            d_query, d_table, d_key, d_value = carry
            j = blocks.order[i, n]
            key, value, others = blocks.key(key_BKSC, value_BKSC, j)
            scores, mask, slope = blocks.scores(query, key, tokens, others)
            pattern = jnp.where(mask, jnp.exp(scores - logsum[..., None]), 0)
            dropped = blocks.dropped(pattern, tokens, others).astype(gradient.dtype)
            more = _product("bkgts,bkgtc->bksc", dropped, gradient)
            d_value = blocks.add(d_value, more, j)
            d_pattern = _product("bkgtc,bksc->bkgts", gradient, value)
            d_pattern = blocks.dropped(d_pattern, tokens, others)
            d_scores = pattern * (d_pattern - along[..., None])
            if rule.bias is not None:
                d_table = d_table + blocks.d_table(d_scores, tokens, others)
            if slope is not None:
                d_scores = d_scores * slope
            d_scores = d_scores.astype(query.dtype)
            d_query = d_query + _product("bkgts,bksc->bkgtc", d_scores, key)
            d_key = blocks.add(d_key, _product("bkgts,bkgtc->bksc", d_scores, query), j)
            return d_query, d_table, d_key, d_value

        d_query, d_table, d_key, d_value = carry
        start = blocks.grouped(blocks.of_queries(d_query, i, 2)), d_table, d_key, d_value
        part, d_table, d_key, d_value = jax.lax.fori_loop(0, blocks.count[i], each_key, start)
        return blocks.put(d_query, part, i), d_table, d_key, d_value

    zeros = jnp.zeros(key_BKSC.shape, jnp.float32)
    start = (*so_far, zeros, zeros)
    *so_far, d_key, d_value = jax.lax.fori_loop(0, blocks.order.shape[0], each_query, start)
    return tuple(so_far), (d_key, d_value)


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


class _Blocks:
    """Queries and keys cut into blocks, and which to visit."""

    def __init__(self, rule, query_BHTC, key_BKSC, queries, keys, given):
        B, H, T = query_BHTC.shape[:3]
        K, S = key_BKSC.shape[1:3]
        self.rule, self.given, self.queries, self.keys = rule, given, queries, keys
        self.query_BHTC, self.groups = query_BHTC, (K, H // K)
        limit = BLOCK
        while limit > 128 and B * H * limit**2 * 4 > BLOCK_BYTES:
            limit //= 2
        self.query_size, self.key_size = block_size(T, limit), block_size(S, limit)
        seen = visits(rule.causal, queries, keys, given.window, self.query_size, self.key_size).any(
            0
        )
        self.count = seen.sum(-1)
        self.order = jnp.argsort(~seen, -1, stable=True)  # the blocks to visit come first

    def of_queries(self, x, i, axis):
        return jax.lax.dynamic_slice_in_dim(x, i * self.query_size, self.query_size, axis)

    def query(self, i):
        tokens = jax.tree.map(lambda x: self.of_queries(x, i, 1), self.queries)
        return self.grouped(self.of_queries(self.query_BHTC, i, 2)), tokens

    def key(self, key_BKSC, value_BKSC, j):
        def part(x, axis):
            return jax.lax.dynamic_slice_in_dim(x, j * self.key_size, self.key_size, axis)

        return part(key_BKSC, 2), part(value_BKSC, 2), jax.tree.map(lambda x: part(x, 1), self.keys)

    def grouped(self, x):
        """[B, H, …] as [B, K, G, …]."""
        return x.reshape(x.shape[0], *self.groups, *x.shape[2:])

    def put(self, whole, part, i):
        part = part.reshape(part.shape[0], -1, *part.shape[3:])
        return jax.lax.dynamic_update_slice_in_dim(whole, part, i * self.query_size, 2)

    def add(self, whole, part, j):
        start = j * self.key_size
        old = jax.lax.dynamic_slice_in_dim(whole, start, self.key_size, 2)
        return jax.lax.dynamic_update_slice_in_dim(whole, old + part, start, 2)

    def scores(self, query, key, tokens: Tokens, others: Tokens):
        """Scores [B, K, G, t, s], the mask, and the derivative of the soft cap, if there is one."""
        scores, slope = _product("bkgtc,bksc->bkgts", query, key), None
        if self.rule.softcap:
            bent = jnp.tanh(scores / self.rule.softcap)
            scores, slope = self.rule.softcap * bent, 1 - bent * bent
        if self.rule.bias is not None:
            scores += self.grouped(self.rule.bias(self.given.table, self._distance(tokens, others)))
        mask = visible(tokens, others, causal=self.rule.causal, window=self.given.window)
        return scores, mask[:, None, None], slope

    def dropped(self, pattern, tokens: Tokens, others: Tokens):
        given, rule = self.given, self.rule
        if not rule.dropout_rate:
            return pattern
        heads = given.first_head + jnp.arange(self.groups[0] * self.groups[1])
        kept = dropout(
            pattern.reshape(pattern.shape[0], -1, *pattern.shape[3:]),
            rule.dropout_rate,
            jax.random.wrap_key_data(given.words, impl="threefry2x32"),
            given.rows_B[:, None, None],
            tokens.slots_1T[:, None] * rule.num_heads + heads[:, None],
            others.slots_1T[0],
        )
        return kept.reshape(pattern.shape)

    def d_table(self, d_scores, tokens: Tokens, others: Tokens):
        distance = self._distance(tokens, others)
        _, pull = jax.vjp(lambda table: self.rule.bias(table, distance), self.given.table)
        summed = d_scores.sum(0, keepdims=True)
        return pull(summed.reshape(1, -1, *summed.shape[3:]))[0]

    def _distance(self, tokens, others):
        return others.slots_1T[:, None, :] - tokens.slots_1T[:, :, None]
