"""The two passes of `lm.models.attention.flash` as Pallas kernels for TPUs.

The same visits, masks and numbers, with a block's scores in the chip's vector memory. Blocks that
no query sees are neither computed nor fetched: the list of blocks to visit is known to the chip
before it starts (scalar prefetch), and its end repeats the last block, which is there already.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lm.models.attention.flash import LANES, UNSEEN, Given, Rule, Seen, Tokens, tile, visits

SUBLANES = 8
QUERY_BLOCK, KEY_BLOCK = 512, 1024  # tokens a block at most, forward
BACKWARD_BLOCK = 512  # and backward
SLOT, SEGMENT, PREFIX = range(3)  # rows of the table of a block's tokens


class _Plan(NamedTuple):
    """Which blocks to visit, and what is compared in them."""

    window: bool
    segments: bool
    prefix: bool
    outer: int  # tokens of a block that stays
    inner: int  # tokens of a block that is visited
    scalars: tuple[jax.Array, ...]  # order [B · outer blocks · inner blocks], count, window

    @classmethod
    def of(cls, rule, rows, queries, keys, given, query_block, key_block, by_key=False):
        """Of `rows` rows; the blocks of queries visit those of keys, or the reverse."""
        seen = visits(rule.causal, queries, keys, given.window, query_block, key_block)
        seen = jnp.broadcast_to(seen, (rows, *seen.shape[1:]))
        seen = seen.swapaxes(1, 2) if by_key else seen
        count = seen.sum(-1, dtype=jnp.int32)
        order = jnp.argsort(~seen, -1, stable=True).astype(jnp.int32)
        last = jnp.maximum(count[..., None] - 1, 0)
        place = jnp.minimum(jnp.arange(seen.shape[-1]), last)
        order = jnp.take_along_axis(order, place, -1)
        window = jnp.zeros((1,), jnp.int32) if given.window is None else given.window.reshape(1)
        sizes = (key_block, query_block) if by_key else (query_block, key_block)
        return cls(
            given.window is not None,
            queries.segments_BT is not None,
            keys.prefix_BT is not None,
            *sizes,
            (order.reshape(-1), count.reshape(-1), window),
        )


def forward(
    rule: Rule,
    query_BHTC: jax.Array,
    key_BKSC: jax.Array,
    value_BKSC: jax.Array,
    queries: Tokens,
    keys: Tokens,
    given: Given,
    seen: Seen,
    *,
    interpret: bool = False,
) -> Seen:
    """As `flash.forward`, without bias and dropout; lengths are multiples of 128.

    `interpret` runs the kernel's program off the TPU.
    """
    B, H, T, C = query_BHTC.shape
    K, S = key_BKSC.shape[1:3]
    bq, bk = tile(T, QUERY_BLOCK), tile(S, KEY_BLOCK)
    plan = _Plan.of(rule, B, queries, keys, given, bq, bk)
    spot = _spots(T // bq, S // bk, H // K)
    of_query, of_row = _block(spot.stays, bq, C), _row(spot.stays, bq)
    means, logsums = pl.pallas_call(
        functools.partial(_forward_kernel, rule, plan[:3], T // bq),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, H, T // bq, S // bk),
            in_specs=[
                of_query,
                _block(spot.visited, bk, C),
                _block(spot.visited, bk, C),
                _table(spot.stays, bq),
                _table(spot.visited, bk),
                of_query,
                of_row,
            ],
            out_specs=[of_query, of_row],
            scratch_shapes=[
                pltpu.VMEM((bq, C), jnp.float32),
                pltpu.VMEM((bq, LANES), jnp.float32),
                pltpu.VMEM((bq, LANES), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, H, T, C), jnp.float32),
            jax.ShapeDtypeStruct((B, H, 1, T), jnp.float32),
        ],
        input_output_aliases={8: 0, 9: 1},
        name="ring_forward",
        **_options(rule, query_BHTC, key_BKSC, 4, 2, interpret),
    )(
        *plan.scalars,
        query_BHTC,
        key_BKSC,
        value_BKSC,
        _tabulated(queries, B),
        _tabulated(keys, B),
        seen.heads_BHTC,
        seen.logsum_BHT[:, :, None],
    )
    return Seen(means, logsums[:, :, 0])


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
    *,
    interpret: bool = False,
) -> tuple[tuple[jax.Array, None], tuple[jax.Array, jax.Array]]:
    """As `flash.backward`, without bias and dropout; lengths are multiples of 128."""
    B, H, T, C = query_BHTC.shape
    K, S = key_BKSC.shape[1:3]
    bq, bk = tile(T, BACKWARD_BLOCK), tile(S, BACKWARD_BLOCK)
    gradient, logsum, along = final
    operands = (
        query_BHTC,
        key_BKSC,
        value_BKSC,
        _tabulated(queries, B),
        _tabulated(keys, B),
        gradient,
        logsum[:, :, None],
        along[:, :, None],
    )

    def in_specs(spot, query, key):
        of_query, of_key, of_row = _block(query, bq, C), _block(key, bk, C), _row(query, bq)
        tables = [_table(query, bq), _table(key, bk)]
        return [of_query, of_key, of_key, *tables, of_query, of_row, of_row]

    plan = _Plan.of(rule, B, queries, keys, given, bq, bk)
    spot = _spots(T // bq, S // bk, H // K)
    of_query = _block(spot.stays, bq, C)
    (d_query,) = pl.pallas_call(
        functools.partial(_query_kernel, rule, plan[:3], T // bq),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, H, T // bq, S // bk),
            in_specs=[*in_specs(spot, spot.stays, spot.visited), of_query],
            out_specs=[of_query],
            scratch_shapes=[pltpu.VMEM((bq, C), jnp.float32)],
        ),
        out_shape=[jax.ShapeDtypeStruct(so_far[0].shape, jnp.float32)],
        input_output_aliases={11: 0},
        name="ring_backward_query",
        **_options(rule, query_BHTC, key_BKSC, 4, 3, interpret),
    )(*plan.scalars, *operands, so_far[0])

    plan = _Plan.of(rule, B, queries, keys, given, bq, bk, by_key=True)
    spot = _spots_by_key(S // bk, T // bq, H // K)
    of_key = _block(spot.stays, bk, C)
    d_key, d_value = pl.pallas_call(
        functools.partial(_key_kernel, rule, plan[:3], S // bk),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, K, S // bk, H // K, T // bq),
            in_specs=in_specs(spot, spot.visited, spot.stays),
            out_specs=[of_key, of_key],
            scratch_shapes=[pltpu.VMEM((bk, C), jnp.float32)] * 2,
        ),
        out_shape=[jax.ShapeDtypeStruct(key_BKSC.shape, jnp.float32)] * 2,
        name="ring_backward_key",
        **_options(rule, query_BHTC, key_BKSC, 5, 4, interpret),
    )(*plan.scalars, *operands)
    return (d_query, None), (d_key, d_value)


# ---- Where blocks lie -------------------------------------------------------------------------


class _Spots(NamedTuple):
    """(row, head, block of tokens) of what stays and of what is visited, at a point of the grid."""

    stays: Callable[..., tuple]
    visited: Callable[..., tuple]


def _spots(outer: int, inner: int, group: int) -> _Spots:
    """Over a grid of rows, heads, blocks of queries, visits."""

    def visited(b, h, i, n, order, *_):
        return b, jax.lax.div(h, group), order[(b * outer + i) * inner + n]

    return _Spots(lambda b, h, i, *_: (b, h, i), visited)


def _spots_by_key(outer: int, inner: int, group: int) -> _Spots:
    """Over a grid of rows, key heads, blocks of keys, query heads of each, visits."""

    def visited(b, k, j, g, n, order, *_):
        return b, k * group + g, order[(b * outer + j) * inner + n]

    return _Spots(lambda b, k, j, *_: (b, k, j), visited)


def _block(spot, size: int, width: int) -> pl.BlockSpec:
    """Of an array [B, H, T, C]."""
    return pl.BlockSpec((None, None, size, width), lambda *at: (*spot(*at), 0))


def _row(spot, size: int) -> pl.BlockSpec:
    """Of an array [B, H, 1, T]."""

    def index(*at):
        b, h, i = spot(*at)
        return b, h, 0, i

    return pl.BlockSpec((None, None, 1, size), index)


def _table(spot, size: int) -> pl.BlockSpec:
    """Of an array [B, 8, T]."""

    def index(*at):
        b, _, i = spot(*at)
        return b, 0, i

    return pl.BlockSpec((None, SUBLANES, size), index)


def _tabulated(tokens: Tokens, rows: int) -> jax.Array:
    """What is known of tokens as int32 [B, 8, T]: whole tiles of the chip's memory."""
    shape = (rows, tokens.slots_1T.shape[1])
    table = [
        jnp.zeros(shape, jnp.int32) if x is None else jnp.broadcast_to(x, shape).astype(jnp.int32)
        for x in (*tokens, *(None,) * (SUBLANES - len(tokens)))
    ]
    return jnp.stack(table, 1)


def _options(rule: Rule, query, key, axes: int, products: int, interpret: bool) -> dict:
    """How to run a kernel with a grid of so many axes that takes so many products of a block.

    The estimate of its work, for half of all pairs where half are hidden, is what the compiler
    needs to know to let transfers go on meanwhile.
    """
    B, H, T, C = query.shape
    S = key.shape[2]
    pairs = B * H * T * S // (2 if rule.causal else 1)
    moved = 2 * query.size * query.dtype.itemsize + 2 * key.size * key.dtype.itemsize
    return {
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3 + ("arbitrary",) * (axes - 3)
        ),
        "cost_estimate": pl.CostEstimate(
            flops=2 * products * pairs * C, transcendentals=pairs, bytes_accessed=moved
        ),
        "interpret": interpret,
    }


# ---- Kernels ----------------------------------------------------------------------------------


def _dot(a, b, contract_a: int, contract_b: int):
    axes = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _mask(rule: Rule, compared, queries, keys, window):
    """Whether each query sees each key; `queries` and `keys` give a mark along their own axis."""
    windowed, segmented, prefixed = compared
    conditions = []
    if rule.causal:
        earlier = keys(SLOT) <= queries(SLOT)
        conditions.append(earlier | (keys(PREFIX) > 0) if prefixed else earlier)
    if windowed:
        conditions.append((window == 0) | (keys(SLOT) > queries(SLOT) - window))
        if not rule.causal:
            conditions.append((window == 0) | (keys(SLOT) < queries(SLOT) + window))
    if segmented:
        conditions.append(keys(SEGMENT) == queries(SEGMENT))
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def _down(ref):
    """The marks of a block of tokens, as columns."""
    return lambda mark: ref[mark][:, None]


def _along(ref):
    """The marks of a block of tokens, as rows."""
    return lambda mark: ref[mark : mark + 1]


def _capped(rule: Rule, scores):
    """Scores after the soft cap, and its derivative or None."""
    if not rule.softcap:
        return scores, None
    bent = jnp.tanh(scores / rule.softcap)
    return rule.softcap * bent, 1 - bent * bent


def _masked(mask, x, other):
    return x if mask is None else jnp.where(mask, x, other)


def _at(axis: int, blocks: int):
    """The row of the batch, counted in blocks that stay, for looking up the number of visits."""
    return pl.program_id(0) * blocks + pl.program_id(axis)


def _forward_kernel(
    rule, compared, blocks, order, count, window, query, key, value, queries, keys, mean_before,
    logsum_before, mean_after, logsum_after, mean, largest, total,
):  # fmt: skip
    visit = pl.program_id(3)
    width = mean.shape[1]

    def spread(x):  # [bq, 128], each row one number, over the width of a head
        copies = -(-width // LANES)
        return jnp.tile(x, (1, copies))[:, :width]

    @pl.when(visit == 0)
    def _():
        before = jnp.broadcast_to(logsum_before[0][:, None], largest.shape)
        mean[...], largest[...] = mean_before[...], before
        total[...] = jnp.where(before > UNSEEN, 1.0, 0.0)

    @pl.when(visit < count[_at(2, blocks)])
    def _():
        scores, _ = _capped(rule, _dot(query[...], key[...], 1, 1))
        mask = _mask(rule, compared, _down(queries), _along(keys), window[0])
        scores = _masked(mask, scores, UNSEEN)
        new = jnp.maximum(largest[...], scores.max(1)[:, None])
        pattern = jnp.exp(scores - jnp.tile(new, (1, scores.shape[1] // LANES)))
        pattern = _masked(mask, pattern, 0.0)
        shrunk = jnp.exp(largest[...] - new)
        total[...] = total[...] * shrunk + pattern.sum(1)[:, None]
        largest[...] = new
        more = _dot(pattern.astype(value.dtype), value[...], 1, 0)
        mean[...] = mean[...] * spread(shrunk) + more

    @pl.when(visit == pl.num_programs(3) - 1)
    def _():
        met = total[...] > 0
        whole = jnp.where(met, total[...], 1.0)
        mean_after[...] = mean[...] / spread(whole)
        logsum = jnp.where(met, largest[...] + jnp.log(whole), UNSEEN)
        logsum_after[...] = logsum.T[:1]


def _query_kernel(
    rule, compared, blocks, order, count, window, query, key, value, queries, keys, gradient,
    logsum, along, before, after, d_query,
):  # fmt: skip
    visit = pl.program_id(3)

    @pl.when(visit == 0)
    def _():
        d_query[...] = before[...]

    @pl.when(visit < count[_at(2, blocks)])
    def _():
        scores, slope = _capped(rule, _dot(query[...], key[...], 1, 1))
        mask = _mask(rule, compared, _down(queries), _along(keys), window[0])
        pattern = _masked(mask, jnp.exp(scores - logsum[0][:, None]), 0.0)
        d_pattern = _dot(gradient[...], value[...], 1, 1)
        d_scores = pattern * (d_pattern - along[0][:, None])
        d_scores = d_scores if slope is None else d_scores * slope
        d_query[...] += _dot(d_scores.astype(key.dtype), key[...], 1, 0)

    @pl.when(visit == pl.num_programs(3) - 1)
    def _():
        after[...] = d_query[...]


def _key_kernel(
    rule, compared, blocks, order, count, window, query, key, value, queries, keys, gradient,
    logsum, along, d_key_after, d_value_after, d_key, d_value,
):  # fmt: skip
    head, visit = pl.program_id(3), pl.program_id(4)

    @pl.when((head == 0) & (visit == 0))
    def _():
        d_key[...], d_value[...] = jnp.zeros_like(d_key), jnp.zeros_like(d_value)

    @pl.when(visit < count[_at(2, blocks)])
    def _():
        # Keys down, queries along: both products with queries then need no transposition.
        scores, slope = _capped(rule, _dot(key[...], query[...], 1, 1))
        mask = _mask(rule, compared, _along(queries), _down(keys), window[0])
        pattern = _masked(mask, jnp.exp(scores - logsum[...]), 0.0)
        d_value[...] += _dot(pattern.astype(gradient.dtype), gradient[...], 1, 0)
        d_pattern = _dot(value[...], gradient[...], 1, 1)
        d_scores = pattern * (d_pattern - along[...])
        d_scores = d_scores if slope is None else d_scores * slope
        d_key[...] += _dot(d_scores.astype(query.dtype), query[...], 1, 0)

    @pl.when((head == pl.num_programs(3) - 1) & (visit == pl.num_programs(4) - 1))
    def _():
        d_key_after[...], d_value_after[...] = d_key[...], d_value[...]
