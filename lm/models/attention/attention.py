"""Attention: each token asks with a query which keys it sees, and reads a mean of their values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lm.models.attention import kernels
from lm.models.attention.context import Context
from lm.models.attention.paged import attend_pages, write
from lm.models.attention.paged_tpu import attend_pairs
from lm.models.config import ModelConfig
from lm.models.hooks import Tap, no_tap, within
from lm.models.layers import Norm, dropout, weight_initializer
from lm.models.matmul import (
    add_bias,
    contract,
    contract_each,
    masked_softmax,
    precise,
    softmax_with_sinks,
)
from lm.models.params import declare
from lm.models.remat import HEADS
from lm.parallel.sharding import constrain

Pair = tuple[jax.Array, jax.Array]  # keys and values


def attend(
    config: ModelConfig,
    query_BTHC: jax.Array,
    key_BSKC: jax.Array,
    value_BSKC: jax.Array,
    context: Context,
    dropout_key: jax.Array | None = None,
    tap: Tap = no_tap,
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1); the reference implementation.

    Query heads share key/value heads in groups of G = H/K (Ainslie et al. 2023). Scores and softmax
    are float32. A soft cap c bends scores to c·tanh(scores/c) (Gemma 2 report, §2). A sink is one
    more score of each query, of a key whose value is zero (Xiao et al. 2023, §3.3).

    Returns:
      The heads' outputs [B, T, H, C] in the queries' dtype.
    """
    B, T, H, C = query_BTHC.shape
    K = key_BSKC.shape[2]
    query_BTKGC = (query_BTHC * config.score_scale).reshape(B, T, K, H // K, C)
    scores = contract("btkgc,bskc->bkgts", query_BTKGC, key_BSKC, precise(query_BTHC).dtype)
    scores_BHTS = scores.reshape(B, H, T, -1)
    if cap := config.attention_softcap:
        scores_BHTS = cap * jnp.tanh(scores_BHTS / cap)
    if context.bias_BHTS is not None:
        scores_BHTS += context.bias_BHTS
    scores_BHTS = tap("scores", scores_BHTS)
    mask_B1TS, dtype = context.mask_BTS[:, None], query_BTHC.dtype
    if context.sinks_H is None:
        pattern_BHTS = masked_softmax(scores_BHTS, mask_B1TS, dtype)
    else:
        pattern_BHTS = softmax_with_sinks(scores_BHTS, mask_B1TS, context.sinks_H, dtype)
    pattern_BHTS = tap("pattern", pattern_BHTS)
    if dropout_key is not None:
        row, column = context.text.rows_B[:, None, None], context.key_text.slots_1T[0]
        place = context.text.slots_1T[:, None] * H + jnp.arange(H)[:, None]
        pattern_BHTS = dropout(pattern_BHTS, config.dropout, dropout_key, row, place, column)
    pattern = pattern_BHTS.reshape(B, K, H // K, T, -1)
    return contract("bkgts,bskc->btkgc", pattern, value_BSKC).reshape(B, T, H, -1)


def rotate(x_BTHC: jax.Array, angles: tuple[jax.Array, ...]) -> jax.Array:
    """Rotates pairs (i, i + R/2) of each head by its position's angles, in float32.

    Dimensions from R on, where angles are for fewer than the whole head, stay as they are.
    """
    cos, sin = angles
    half = cos.shape[-1]
    x = precise(x_BTHC)
    first, second = x[..., :half], x[..., half : 2 * half]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    if x.shape[-1] > 2 * half:
        rotated.append(x[..., 2 * half :])
    return jnp.concatenate(rotated, -1).astype(x_BTHC.dtype)


class Attention(nnx.Module):
    """Multi-head, grouped-query or multi-query attention, to oneself or across to an encoder."""

    def __init__(self, config: ModelConfig):
        D, H, K, C = config.width, config.num_heads, config.kv_heads, config.head_width
        self.config = config
        query_init = weight_initializer(config, D, H * C)
        if config.initializer == "t5":  # its scores are not divided by √C; its queries start so
            query_init = weight_initializer(config, D * C, H * C)
        self.query = declare((D, H, C), ("embed", "heads", "head_dim"), query_init)
        kv_axes, kv_init = ("embed", "kv_heads", "head_dim"), weight_initializer(config, D, K * C)
        self.key = declare((D, K, C), kv_axes, kv_init)
        self.value = declare((D, K, C), kv_axes, kv_init)
        self.output = declare(
            (H, C, D),
            ("heads", "head_dim", "embed"),
            weight_initializer(config, H * C, D, residual=True),
        )
        zeros = jax.nn.initializers.zeros
        if config.has_bias("qkv"):
            self.query_bias = declare((H, C), ("heads", "head_dim"), zeros)
            self.key_bias = declare((K, C), ("kv_heads", "head_dim"), zeros)
            self.value_bias = declare((K, C), ("kv_heads", "head_dim"), zeros)
        if config.has_bias("attention"):
            self.output_bias = declare((D,), ("embed",), zeros)
        if config.qk_norm:
            first = 0 if config.qk_norm_joint else 1
            self.query_norm = Norm(config, (H, C)[first:], ("heads", "head_dim")[first:])
            self.key_norm = Norm(config, (K, C)[first:], ("kv_heads", "head_dim")[first:])
        if config.attention_sinks:
            self.sinks = declare((H,), ("heads",), zeros)

    def __call__(
        self,
        x_BTD: jax.Array,
        context: Context,
        cache: Pair | None = None,
        *,
        dropout_key: jax.Array | None = None,
        tap: Tap = no_tap,
    ) -> tuple[jax.Array, Pair | None]:
        """What attention adds to the residual stream, and the cache with this call's keys in it.

        Args:
          x_BTD, context: the normalised residual stream, and this layer's context.
          cache: None, or this layer's keys and values, each [B, S, K, C]; or its pools of pages,
            where the context has `paging`.
          dropout_key: turns dropout on.
          tap: see `lm.models.hooks`.
        """
        if hasattr(self, "sinks"):
            context = context._replace(sinks_H=self.sinks[...])
        weights = (self.query[...], self.key[...], self.value[...])
        kind = self.config.quantization
        query_BTHC, *pair = contract_each("btd,dhc->bthc", x_BTD, weights, quantization=kind)
        query_BTHC = self._query(query_BTHC, context, tap)
        pair = self._pair(*pair, context.rotary, tap)
        if context.paging is not None and len(cache) == 1:
            heads_BTHC, pool = attend_pairs(self.config, query_BTHC, pair, *cache, context)
            return self._project(heads_BTHC, tap), (pool,)
        if context.paging is not None:
            cache = tuple(write(pool, new, context.paging) for pool, new in zip(cache, pair))
            heads_BTHC = attend_pages(self.config, query_BTHC, *cache, context)
            return self._project(heads_BTHC, tap), cache
        if cache is not None:
            pair = cache = tuple(
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), context.slot, 1)
                for old, new in zip(cache, pair)
            )
        return self._mix(query_BTHC, pair, context, dropout_key, tap), cache

    def remember(self, memory_BSD: jax.Array, tap: Tap = no_tap) -> Pair:
        """Keys and values [B, S, K, C] of an encoder's output, for `recall`."""
        weights, kind = (self.key[...], self.value[...]), self.config.quantization
        pair = contract_each("btd,dhc->bthc", memory_BSD, weights, quantization=kind)
        return self._pair(*pair, None, tap)

    def recall(
        self, x_BTD: jax.Array, pair: Pair, context: Context, *, dropout_key=None, tap=no_tap
    ) -> jax.Array:
        """Cross-attention (Vaswani et al. 2017, §3.2.3): what it adds to the residual stream.

        `pair` is from `remember`, and the context is `across` to the encoder.
        """
        kind = self.config.quantization
        query_BTHC = contract("btd,dhc->bthc", x_BTD, self.query[...], quantization=kind)
        return self._mix(self._query(query_BTHC, context, tap), pair, context, dropout_key, tap)

    def _query(self, query_BTHC, context: Context, tap):
        """A product with bias, norm, rotation and scale."""
        if hasattr(self, "query_bias"):
            query_BTHC = add_bias(query_BTHC, self.query_bias[...])
        if hasattr(self, "query_norm"):
            query_BTHC = self.query_norm(query_BTHC, within(tap, "query_norm"))
        if context.rotary is not None:
            query_BTHC = self._rotated(tap("query_unrotated", query_BTHC), context.rotary)
        if not isinstance(context.query_scale, float) or context.query_scale != 1:
            query_BTHC = query_BTHC * jnp.asarray(context.query_scale, query_BTHC.dtype)
        query_BTHC = tap("query", constrain(query_BTHC, "batch", "length", "heads", None))
        return checkpoint_name(query_BTHC, "query")

    def _pair(self, key_BSKC, value_BSKC, rotary, tap) -> Pair:
        if hasattr(self, "key_bias"):
            key_BSKC = add_bias(key_BSKC, self.key_bias[...])
            value_BSKC = add_bias(value_BSKC, self.value_bias[...])
        if hasattr(self, "key_norm"):
            key_BSKC = self.key_norm(key_BSKC, within(tap, "key_norm"))
        if rotary is not None:
            key_BSKC = self._rotated(tap("key_unrotated", key_BSKC), rotary)
        key_BSKC = tap("key", constrain(key_BSKC, "batch", "length", "kv_heads", None))
        value_BSKC = tap("value", constrain(value_BSKC, "batch", "length", "kv_heads", None))
        return checkpoint_name(key_BSKC, "key"), checkpoint_name(value_BSKC, "value")

    def _rotated(self, x_BTHC: jax.Array, angles: tuple[jax.Array, ...]) -> jax.Array:
        return rotate(x_BTHC, angles)

    def _mix(self, query_BTHC, pair: Pair, context: Context, dropout_key, tap):
        """Every head's mean of the values it sees, projected back to the residual stream."""
        config = self.config
        dropout_key = dropout_key if config.dropout else None
        arguments = (config, query_BTHC, *pair, context, dropout_key)
        kernel = kernels.choose(*arguments, tapped=tap is not no_tap)
        if kernel == "xla":
            heads_BTHC = checkpoint_name(attend(*arguments, tap), HEADS)
        else:
            heads_BTHC = kernels.compute(kernel, *arguments)
        return self._project(heads_BTHC, tap)

    def _project(self, heads_BTHC, tap):
        """What the heads have read, back in the residual stream."""
        config = self.config
        heads_BTHC = tap("heads", heads_BTHC)
        out_BTD = contract(
            "bthc,hcd->btd", heads_BTHC, self.output[...], quantization=config.quantization
        )
        out_BTD = constrain(out_BTD, "batch", "norm_length", "embed")
        if hasattr(self, "output_bias"):
            out_BTD = add_bias(out_BTD, self.output_bias[...])
        return tap("output", out_BTD)
