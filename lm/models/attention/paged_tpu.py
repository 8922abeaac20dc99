"""Attention over pages on a TPU, by JAX's kernel for rows of any lengths.

`jax.experimental.pallas.ops.tpu.ragged_paged_attention` reads a row's pages one after the other
into the chip while it multiplies, and no more of them than the row has. It wants a token's keys and
values beside each other: a pool of pages is [P, S, 2·K, C], the key of each head before its value.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm.models.config import ModelConfig
from lm.parallel.platform import platform
from lm.parallel.sharding import automatic_axes

BLOCK_TOKENS = 512  # keys that the kernel has in hand at a time
BLOCK_QUERIES = 8, 32  # tokens that it works on at a time: of rows that draw, of one that is read
LANES = 128


def paired(config: ModelConfig, scanned: bool) -> bool:
    """Whether the kernel does what the config says, so that pools are as it wants them.

    It adds nothing to scores, knows no sinks, wants values beside keys, and a window is the same in
    all layers of a loop. Heads, however `tensor` splits them, must fill the rows of a tile.
    """
    local = {config.is_local(layer) for layer in range(config.num_layers)}
    return (
        platform() == "tpu"
        and config.architecture == "decoder"
        and config.attention != "xla"
        and config.positions not in ("alibi", "relative")
        and not config.attention_sinks
        and (len(local) == 1 or not scanned)
        and not config.kv_rank
        and config.head_width % LANES == 0
        and config.kv_heads & (config.kv_heads - 1) == 0
    )


def attend_pairs(
    config: ModelConfig, query_BTHC: jax.Array, new: tuple, pool_PSJC: jax.Array, context
) -> tuple[jax.Array, jax.Array]:
    """`lm.models.attention.paged.attend_pages`, and before it what writes the new tokens' pair.

    A row's new tokens stand side by side, and padding follows them.

    Args:
      new: their keys and values, each [B, T, K, C].
      pool_PSJC: keys and values in pages.
      context: as of `attend_pages`; its window is no traced number.

    Returns:
      The heads' outputs [B, T, H, C], and the pool with the new tokens.
    """
    paging = context.paging
    B, T, K, C = new[0].shape
    there_BT = paging.positions_BT >= 0
    places_BT = jnp.where(there_BT, paging.positions_BT, 0)
    S = pool_PSJC.shape[1]
    pages_BT = jnp.take_along_axis(paging.table_BN, places_BT // S, 1)
    pages_BT = jnp.where(there_BT, pages_BT, 0) + paging.first
    pair_BTJC = jnp.stack(new, 3).reshape(B, T, 2 * K, C).astype(pool_PSJC.dtype)
    pool_PSJC = pool_PSJC.at[pages_BT, places_BT % S].set(pair_BTJC)
    heads_BTHC = _kernel_on_mesh(
        query_BTHC, pool_PSJC, places_BT[:, 0] + T, paging.table_BN + paging.first, config, context
    )
    return jnp.where(there_BT[..., None, None], heads_BTHC, 0), pool_PSJC


def _kernel_on_mesh(query_BTHC, pool_PSJC, lengths_B, table_BN, config, context) -> jax.Array:
    """Each device takes its own heads of all rows."""
    from jax.experimental.pallas.ops.tpu import ragged_paged_attention as ragged

    B, T, H = query_BTHC.shape[:3]
    pages = max(1, min(table_BN.shape[1], BLOCK_TOKENS // pool_PSJC.shape[1]))
    kernel = functools.partial(
        ragged.ragged_paged_attention,
        sm_scale=config.score_scale,
        sliding_window=context.window or None,
        soft_cap=config.attention_softcap or None,
        num_kv_pages_per_block=pages,
        num_queries_per_block=BLOCK_QUERIES[T > 1],
    )

    def local(query_BTHC, pool_PSJC, lengths_B, table_BN):
        starts = jnp.arange(B + 1, dtype=jnp.int32) * T
        query_NHC = query_BTHC.reshape(B * T, *query_BTHC.shape[2:])
        rows = jnp.array([B], jnp.int32)
        heads_NHC = kernel(query_NHC, pool_PSJC, lengths_B, table_BN, starts, rows)
        return heads_NHC.reshape(query_BTHC.shape)

    arguments = (query_BTHC, pool_PSJC, lengths_B.astype(jnp.int32), table_BN.astype(jnp.int32))
    mesh, names = automatic_axes()
    if not names:
        return local(*arguments)
    ways = mesh.shape.get("tensor", 1)
    split = "tensor" if H % ways == 0 and pool_PSJC.shape[2] // 2 % ways == 0 else None
    heads, whole = PartitionSpec(None, None, split, None), PartitionSpec()
    return jax.shard_map(
        local,
        in_specs=(heads, heads, whole, whole),
        out_specs=heads,
        axis_names=names,
        check_vma=False,
    )(*arguments)
