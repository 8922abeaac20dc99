"""Which implementation computes attention: a table of kernels, each with what it cannot do.

Pallas splash attention on TPU, cuDNN's fused attention on GPU, a ring where devices share a
sequence; XLA (`lm.models.attention.attention.attend`, the reference) for whatever these cannot do.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from absl import logging

from lm.config import ConfigError
from lm.models.attention.context import Context
from lm.models.attention.flash import LANES
from lm.models.attention.ring import ring_attention
from lm.models.attention.splash import splash
from lm.models.config import ModelConfig
from lm.parallel.platform import platform
from lm.parallel.ring import context_ways

PLATFORM_OF = {"splash": "tpu", "cudnn": "gpu"}


def choose(
    config: ModelConfig,
    query_BTHC: jax.Array,
    key_BSKC: jax.Array,
    value_BSKC: jax.Array,
    context: Context,
    dropout_key: jax.Array | None = None,
    *,
    tapped: bool = False,
) -> str:
    """`xla`, `splash`, `cudnn` or `ring`: what computes this attention.

    `config.attention` names a kernel, or `auto` for the platform's. `tapped`: whether scores and
    pattern are looked at.

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
    tiled = query_BTHC.shape[1] % LANES == key_BSKC.shape[1] % LANES == 0
    # Splash knows no sinks; the kernel of a ring, here one of one device, needs to know none.
    sunk = here == "tpu" and asked != "xla" and tiled and context.sinks_H is not None
    addable = context.bias_BHTS is None or context.bias is not None
    # A bias known only as a table of all pairs is not what a ring can add.
    if (ways > 1 or (sunk and dropout_key is None)) and known and fits and addable:
        return "ring"
    for kernel, obstacle in (("splash", _splash_obstacle), ("cudnn", _cudnn_obstacle)):
        if here == PLATFORM_OF[kernel] and asked in ("auto", kernel):
            reason = "the pattern is dropped out" if dropout_key is not None else ""
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
    """The heads' outputs [B, T, H, C] by a `kernel` that `choose` named, other than `xla`.

    To them values are as wide as keys: the narrower are filled up with zeros.
    """
    width = value_BSKC.shape[-1]
    arrays = _alike(query_BTHC, key_BSKC, value_BSKC)
    if kernel == "ring":
        blocks = "xla" if config.attention == "xla" else "auto"
        heads = ring_attention(config, *arrays, context, dropout_key, kernel=blocks)
    else:
        heads = {"splash": splash, "cudnn": cudnn}[kernel](config, *arrays, context)
    return heads if heads.shape[-1] == width else heads[..., :width]


def _alike(*arrays: jax.Array) -> list[jax.Array]:
    widest = max(x.shape[-1] for x in arrays)
    missing = [widest - x.shape[-1] for x in arrays]
    return [jnp.pad(x, [(0, 0)] * 3 + [(0, n)]) if n else x for x, n in zip(arrays, missing)]


def _splash_obstacle(config, query, key, context) -> str:
    if context.text is None:
        return "decoding with a cache"
    if context.bias_BHTS is not None:
        return f"positions={config.positions!r} adds to scores"
    if context.sinks_H is not None:
        return "it knows no sinks"
    if context.causal and context.key_text.prefix_BT is not None:
        return "a prefix is seen by all"
    if query.shape[1] < LANES or key.shape[1] < LANES:
        return f"fewer than {LANES} tokens"
    return ""


def _cudnn_obstacle(config, query, key, context) -> str:
    width = max(query.shape[-1], config.value_width)
    lengths = (query.shape[1], key.shape[1])
    if query.dtype == jnp.float32:
        return "it takes no float32"
    if config.attention_softcap:
        return "it has no soft cap"
    if context.sinks_H is not None:
        return "it knows no sinks"
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
    """Whether who sees whom follows from places in the row, so that cuDNN needs no mask.

    It knows no window to both sides.
    """
    if context.text is None or not isinstance(context.window, int):
        return False
    packed = any(t.segments_BT is not None for t in (context.text, context.key_text))
    prefixed = context.causal and context.key_text.prefix_BT is not None
    return not packed and not prefixed and (context.causal or not context.window)


def cudnn(
    config: ModelConfig,
    query_BTHC: jax.Array,
    key_BSKC: jax.Array,
    value_BSKC: jax.Array,
    context: Context,
) -> jax.Array:
    """cuDNN's fused attention, in bfloat16 or float16; tokens in natural order.

    Where no documents are packed, it works out itself what is masked and skips it; else it reads
    `context.mask_BTS`.
    """
    bias, by_index = context.bias_BHTS, _by_index(context)
    return jax.nn.dot_product_attention(
        query_BTHC,
        key_BSKC,
        value_BSKC,
        None if bias is None else bias.astype(query_BTHC.dtype),
        None if by_index else context.mask_BTS[:, None],
        scale=config.score_scale,
        is_causal=by_index and context.causal,
        local_window_size=(context.window - 1, 0) if by_index and context.window else None,
        implementation="cudnn",
    )
