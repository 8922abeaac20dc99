"""JAX's splash attention, a Pallas kernel for TPUs, on each device's rows and heads."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm.models.attention.context import Context
from lm.models.attention.flash import LANES, tile
from lm.models.attention.ring import shard_heads
from lm.models.config import ModelConfig
from lm.models.remat import HEADS
from lm.models.text import both_segments

BLOCK = 512  # tokens a block at most
ABSENT = -1  # the segment of what fills up a last block


def splash(
    config: ModelConfig,
    query_BTHC: jax.Array,
    key_BSKC: jax.Array,
    value_BSKC: jax.Array,
    context: Context,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention of tokens in natural order, without bias and dropout.

    `interpret` runs the kernel's program off the TPU.

    Returns:
      The heads' outputs [B, T, H, C] in the queries' dtype; of a query that sees no key, a mean of
      some values.
    """
    if not isinstance(context.window, int):  # traced: `config.window` or 0

        def within(window, *arrays):
            reach = context._replace(window=window)
            return splash(config, *arrays, reach, interpret=interpret)

        local, everywhere = (functools.partial(within, window) for window in (config.window, 0))
        arrays = (query_BTHC, key_BSKC, value_BSKC)
        return jax.lax.cond(context.window > 0, local, everywhere, *arrays)
    sharding, key_BSKC, value_BSKC = shard_heads(query_BTHC, key_BSKC, value_BSKC, None)
    T, S = query_BTHC.shape[1], key_BSKC.shape[1]
    causal, texts = context.causal, (context.text, context.key_text)
    segments = both_segments(*texts)
    if segments[0] is None:  # they are needed all the same to hide what fills up the last block
        hide = not causal and S % LANES != 0
        segments = [jnp.ones_like(text.positions_BT) for text in texts] if hide else []

    def local(query, key, value, *segments):
        arrays = (query * config.score_scale, key, value)
        query, key, value = (_filled(x).swapaxes(1, 2) for x in arrays)
        segments = [_filled(s, ABSENT) for s in segments]
        shape = query.shape[2], key.shape[2]
        cap, window = config.attention_softcap, context.window
        kernel = _kernel(query.shape[1], shape, causal, cap, window, interpret)
        heads = jax.vmap(kernel)(query, key, value, *segments)
        return heads.swapaxes(1, 2)[:, :T]

    arrays = (query_BTHC, key_BSKC, value_BSKC, *segments)
    if not sharding.names:
        return local(*arrays)
    rows = PartitionSpec(sharding.heads[0])
    mapped = jax.shard_map(
        local,
        in_specs=(sharding.heads, sharding.heads, sharding.heads, *(rows for _ in segments)),
        out_specs=sharding.heads,
        axis_names=set(sharding.names),
        check_vma=False,
    )
    return mapped(*arrays)


def _filled(x: jax.Array, value: int = 0) -> jax.Array:
    """`x` with its second axis, tokens, filled up to a multiple of 128."""
    missing = -x.shape[1] % LANES
    widths = [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, widths, constant_values=value) if missing else x


def _kernel(
    heads: int, shape: tuple[int, int], causal: bool, softcap: float, window: int, interpret: bool
):
    """(query [H, T, C], key [K, S, C], value, and the segments of both or none) to [H, T, C].

    The numbers of queries and keys, `shape`, are multiples of 128.
    """
    # Here, since importing Pallas takes a third of a second.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    if window:
        mask = masks.LocalMask(shape, (window - 1, 0 if causal else window - 1), 0)
    elif causal:
        mask = masks.CausalMask(shape)
    else:
        mask = masks.FullMask(shape)
    query_block, key_block = (tile(n, BLOCK) for n in shape)
    sizes = kernels.BlockSizes(
        block_q=query_block, block_kv=key_block, block_kv_compute=key_block,
        block_q_dkv=query_block, block_kv_dkv=key_block, block_kv_dkv_compute=key_block,
        block_q_dq=query_block, block_kv_dq=key_block,
    )  # fmt: skip
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name=HEADS,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def attention(query, key, value, *segments):
        return kernel(query, key, value, *([kernels.SegmentIds(*segments)] if segments else []))

    return attention
