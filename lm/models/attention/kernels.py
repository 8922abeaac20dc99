"""Which implementation computes attention, and those that are not our own.

Pallas splash attention on TPU, cuDNN's fused attention on GPU, a ring where devices share a
sequence; XLA (`lm.models.attention.attention.attend`, the reference) for whatever these cannot do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import PartitionSpec

from lm.config import ConfigError
from lm.models.attention.flash import LANES, tile
from lm.models.attention.ring import HEADS, lay_out, ring_attention
from lm.models.config import ModelConfig
from lm.models.text import Text
from lm.parallel.platform import platform
from lm.parallel.ring import context_ways

if TYPE_CHECKING:
    from lm.models.stack import Context

PLATFORM_OF = {"splash": "tpu", "cudnn": "gpu"}
SPLASH_BLOCK = 512  # tokens a block at most
ABSENT = -1  # the segment of what fills up a last block


def choose(
    config: ModelConfig,
    query_BTHC: jax.Array,
    key_BSKC: jax.Array,
    context: Context,
    *,
    dropped: bool,
    tapped: bool,
) -> str:
    """`xla`, `splash`, `cudnn` or `ring`: what computes this attention.

    Args:
      config: the model's; `attention` names a kernel, or `auto` for the platform's.
      query_BTHC, key_BSKC: for their shapes and dtype.
      context: the layer's.
      dropped: whether the pattern is dropped out.
      tapped: whether scores and pattern are looked at.

    Raises:
      ConfigError: the kernel is another platform's.
    """
    asked, here = config.attention, platform()
    if PLATFORM_OF.get(asked, here) != here:
        raise ConfigError(
            f"config.model.attention={asked!r} needs a {PLATFORM_OF[asked].upper()}, and this runs "
            f"on a {here.upper()}: use 'auto' or 'xla'"
        )
    if tapped:
        return "xla"
    ways, known = context_ways(), context.text is not None
    fits = query_BTHC.shape[1] % ways == 0 and key_BSKC.shape[1] % ways == 0
    # A bias known only as a table of all pairs is not what a ring can add.
    if ways > 1 and known and fits and (context.bias_BHTS is None or context.bias is not None):
        return "ring"
    for kernel, obstacle in (("splash", _splash_obstacle), ("cudnn", _cudnn_obstacle)):
        if here == PLATFORM_OF[kernel] and asked in ("auto", kernel):
            reason = "the pattern is dropped out" if dropped else ""
            reason = reason or obstacle(config, query_BTHC, key_BSKC, context)
            if not reason:
                return kernel
            logging.log_first_n(logging.INFO, "attention by xla, not %s: %s", 1, kernel, reason)
    return "xla"


def compute(
    kernel: str,
    config: ModelConfig,
    query_BTHC: jax.Array,
    key_BSKC: jax.Array,
    value_BSKC: jax.Array,
    context: Context,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """The heads' outputs [B, T, H, C] by a `kernel` that `choose` named, other than `xla`."""
    arrays = (query_BTHC, key_BSKC, value_BSKC)
    scale = config.attention_scale
    if kernel == "cudnn":
        return cudnn(*arrays, context, scale=scale)
    options = {
        "causal": context.causal,
        "scale": scale,
        "softcap": config.attention_softcap,
        "window": context.window,
    }
    texts = context.text, context.key_text
    if kernel == "splash":
        return splash(*arrays, *texts, reach=config.window, **options)
    return ring_attention(
        *arrays,
        *texts,
        bias=context.bias,
        dropout_rate=config.dropout,
        dropout_key=dropout_key,
        kernel="xla" if config.attention == "xla" else "auto",
        **options,
    )


# ---- TPU --------------------------------------------------------------------------------------


def _splash_obstacle(config, query, key, context) -> str:
    if context.text is None:
        return "decoding with a cache"
    if context.bias_BHTS is not None:
        return f"positions={config.positions!r} adds to scores"
    if context.causal and context.key_text.prefix_BT is not None:
        return "a prefix is seen by all"
    if query.shape[1] < LANES or key.shape[1] < LANES:
        return f"fewer than {LANES} tokens"
    return ""


def splash(
    query_BTHC: jax.Array,
    key_BSKC: jax.Array,
    value_BSKC: jax.Array,
    query_text: Text,
    key_text: Text,
    *,
    causal: bool = True,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | jax.Array = 0,
    reach: int = 0,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention, JAX's Pallas kernel for TPU, on each device's rows and heads.

    Args:
      query_BTHC, key_BSKC, value_BSKC: of every head, tokens in natural order; K divides H.
      query_text, key_text: for the segments, if there are any.
      causal: no later keys.
      scale: multiplies the queries; C^-½ unless given.
      softcap: c in c·tanh(scores/c); 0: none.
      window: only this many keys up to the query's own are seen; 0: all.
      reach: what a traced `window` is, where it is not 0.
      interpret: run the kernel's program off the TPU.

    Returns:
      The heads' outputs [B, T, H, C] in the queries' dtype; of a query that sees no key, a mean of
      some values.
    """
    if not isinstance(window, int):
        local, everywhere = (
            lambda *arrays, w=w: splash(
                *arrays, query_text, key_text, causal=causal, scale=scale, softcap=softcap,
                window=w, interpret=interpret,
            )
            for w in (reach, 0)
        )  # fmt: skip
        return jax.lax.cond(window > 0, local, everywhere, query_BTHC, key_BSKC, value_BSKC)
    scale = query_BTHC.shape[-1] ** -0.5 if scale is None else scale
    layout, key_BSKC, value_BSKC = lay_out(query_BTHC, key_BSKC, value_BSKC, None)
    T, S = query_BTHC.shape[1], key_BSKC.shape[1]
    segments = _segments(query_text, key_text, always=not causal and S % LANES != 0)

    def local(query, key, value, *segments):
        query, key, value = (_filled(x).swapaxes(1, 2) for x in (query * scale, key, value))
        segments = [_filled(s, ABSENT) for s in segments]
        shape = query.shape[2], key.shape[2]
        kernel = _splash_kernel(query.shape[1], shape, causal, softcap, window, interpret)
        heads = jax.vmap(kernel)(query, key, value, *segments)
        return heads.swapaxes(1, 2)[:, :T]

    arrays = (query_BTHC, key_BSKC, value_BSKC, *segments)
    if not layout.names:
        return local(*arrays)
    rows = PartitionSpec(layout.query[0])
    mapped = jax.shard_map(
        local,
        in_specs=(layout.query, layout.key, layout.key, *(rows for _ in segments)),
        out_specs=layout.query,
        axis_names=set(layout.names),
        check_vma=False,
    )
    return mapped(*arrays)


def _segments(query_text: Text, key_text: Text, always: bool) -> tuple[jax.Array, ...]:
    texts = query_text, key_text
    if not always and all(m.segments_BT is None for m in texts):
        return ()
    return tuple(
        jnp.ones_like(m.positions_BT) if m.segments_BT is None else m.segments_BT for m in texts
    )


def _filled(x: jax.Array, value: int = 0) -> jax.Array:
    """`x` with its second axis, tokens, filled up to a multiple of 128."""
    missing = -x.shape[1] % LANES
    widths = [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, widths, constant_values=value) if missing else x


def _splash_kernel(
    heads: int, shape: tuple[int, int], causal: bool, softcap: float, window: int, interpret: bool
):
    """(query [H, T, C], key [K, S, C], value, and the segments of both or none) to [H, T, C].

    The numbers of queries and keys are multiples of 128.
    """
    # Here, since importing Pallas takes a third of a second.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    if window:
        mask = masks.LocalMask(shape, (window - 1, 0 if causal else None), 0)
    elif causal:
        mask = masks.CausalMask(shape)
    else:
        mask = masks.FullMask(shape)
    query_block, key_block = (tile(n, SPLASH_BLOCK) for n in shape)
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


# ---- GPU --------------------------------------------------------------------------------------


def _cudnn_obstacle(config, query, key, context) -> str:
    width, lengths = query.shape[-1], (query.shape[1], key.shape[1])
    if query.dtype == jnp.float32:
        return "it takes no float32"
    if config.attention_softcap:
        return "it has no soft cap"
    if width % 8 or width > _widest_head():
        return f"heads of width {width}"
    tabled = context.bias_BHTS is not None or not _by_index(context)
    if tabled and (lengths[0] % 2 or lengths[1] % 2):
        return f"masks of odd lengths {lengths}"
    return ""


def _widest_head() -> int:
    capability = str(getattr(jax.devices()[0], "compute_capability", "0"))
    hopper = capability.replace(".", "").isdigit() and float(capability) >= 9
    return 256 if hopper else 128


def _by_index(context: Context) -> bool:
    """Whether who sees whom follows from places in the row, so that cuDNN needs no mask."""
    if context.text is None or not isinstance(context.window, int):
        return False
    both = context.text, context.key_text
    packed = any(text.segments_BT is not None for text in both)
    prefixed = context.causal and context.key_text.prefix_BT is not None
    return not packed and not prefixed and (context.causal or not context.window)


def cudnn(
    query_BTHC: jax.Array,
    key_BSKC: jax.Array,
    value_BSKC: jax.Array,
    context: Context,
    *,
    scale: float | None = None,
) -> jax.Array:
    """cuDNN's fused attention, in bfloat16 or float16; tokens in natural order.

    Where no documents are packed, it works out itself what is masked and skips it; else it reads
    `context.mask_BTS`.

    Returns:
      The heads' outputs [B, T, H, C] in the queries' dtype.
    """
    bias, by_index = context.bias_BHTS, _by_index(context)
    return jax.nn.dot_product_attention(
        query_BTHC,
        key_BSKC,
        value_BSKC,
        None if bias is None else bias.astype(query_BTHC.dtype),
        None if by_index else context.mask_BTS[:, None],
        scale=scale,
        is_causal=by_index and context.causal,
        local_window_size=(context.window - 1, 0) if by_index and context.window else None,
        implementation="cudnn",
    )
