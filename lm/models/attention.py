"""Attention: which keys each query may see, and the weighted mean of their values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lm.models.build import declare
from lm.models.config import ModelConfig
from lm.models.layers import dropout, rotate, weight_initializer
from lm.models.numerics import add_bias, contract, contract_each, masked_softmax
from lm.models.taps import Tap, no_tap
from lm.parallel.sharding import constrain


def causal_mask(
    query_positions_BT: jax.Array,
    key_positions_BS: jax.Array,
    query_segments_BT: jax.Array | None = None,
    key_segments_BS: jax.Array | None = None,
) -> jax.Array:
    """Whether query t may see key s: not later, not empty (position -1), of the same segment.

    Returns:
      A boolean [B, T, S].
    """
    query, key = query_positions_BT[:, :, None], key_positions_BS[:, None, :]
    mask_BTS = (key <= query) & (key >= 0)
    if query_segments_BT is not None and key_segments_BS is not None:
        mask_BTS &= query_segments_BT[:, :, None] == key_segments_BS[:, None, :]
    return mask_BTS


def attend(
    query_BTHC: jax.Array,
    key_BSKC: jax.Array,
    value_BSKC: jax.Array,
    mask_BTS: jax.Array,
    *,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    tap: Tap = no_tap,
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1); the reference implementation.

    Query heads share key/value heads in groups of G = H/K (Ainslie et al. 2023). Scores and softmax
    are float32.

    Returns:
      The heads' outputs [B, T, H, C] in the queries' dtype.
    """
    B, T, H, C = query_BTHC.shape
    K = key_BSKC.shape[2]
    query_BTKGC = (query_BTHC * C**-0.5).reshape(B, T, K, H // K, C)
    scores = contract("btkgc,bskc->bkgts", query_BTKGC, key_BSKC, jnp.float32)
    scores_BHTS = tap("scores", scores.reshape(B, H, T, -1))
    pattern_BHTS = masked_softmax(scores_BHTS, mask_BTS[:, None], query_BTHC.dtype)
    pattern_BHTS = dropout(tap("pattern", pattern_BHTS), dropout_rate, dropout_key)
    pattern = pattern_BHTS.reshape(B, K, H // K, T, -1)
    return contract("bkgts,bskc->btkgc", pattern, value_BSKC).reshape(B, T, H, C)


class Attention(nnx.Module):
    """Multi-head, grouped-query or multi-query attention."""

    def __init__(self, config: ModelConfig):
        D, H, K, C = config.width, config.num_heads, config.kv_heads, config.head_width
        self.config = config
        self.query = declare(
            (D, H, C), ("embed", "heads", "head_dim"), weight_initializer(config, D, H * C)
        )
        kv_axes, kv_init = ("embed", "kv_heads", "head_dim"), weight_initializer(config, D, K * C)
        self.key = declare((D, K, C), kv_axes, kv_init)
        self.value = declare((D, K, C), kv_axes, kv_init)
        self.output = declare(
            (H, C, D),
            ("heads", "head_dim", "embed"),
            weight_initializer(config, H * C, D, residual=True),
        )
        if config.bias:
            zeros = jax.nn.initializers.zeros
            self.query_bias = declare((H, C), ("heads", "head_dim"), zeros)
            self.key_bias = declare((K, C), ("kv_heads", "head_dim"), zeros)
            self.value_bias = declare((K, C), ("kv_heads", "head_dim"), zeros)
            self.output_bias = declare((D,), ("embed",), zeros)

    def __call__(self, x_BTD, context, cache=None, *, dropout_key=None, tap: Tap = no_tap):
        """What attention adds to the residual stream, and the cache with this call's keys in it.

        Args:
          x_BTD: the normalised residual stream.
          context: the `Context` of this call: mask, rotary angles, where the cache is written.
          cache: None, or this layer's keys and values, each [B, S, K, C].
          dropout_key: turns dropout on.
          tap: see `lm.models.taps`.
        """
        config = self.config
        weights = (self.query[...], self.key[...], self.value[...])
        query_BTHC, key_BTKC, value_BTKC = contract_each("btd,dhc->bthc", x_BTD, weights)
        if config.bias:
            query_BTHC = add_bias(query_BTHC, self.query_bias[...])
            key_BTKC = add_bias(key_BTKC, self.key_bias[...])
            value_BTKC = add_bias(value_BTKC, self.value_bias[...])
        if config.positions == "rotary":
            query_BTHC = rotate(query_BTHC, context.rotary)
            key_BTKC = rotate(key_BTKC, context.rotary)
        query_BTHC = tap("query", constrain(query_BTHC, "batch", "length", "heads", None))
        key_BTKC = tap("key", constrain(key_BTKC, "batch", "length", "kv_heads", None))
        value_BTKC = tap("value", constrain(value_BTKC, "batch", "length", "kv_heads", None))
        query_BTHC = checkpoint_name(query_BTHC, "query")
        key_BTKC = checkpoint_name(key_BTKC, "key")
        value_BTKC = checkpoint_name(value_BTKC, "value")
        key_BSKC, value_BSKC = key_BTKC, value_BTKC
        if cache is not None:
            cache = tuple(
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), context.slot, 1)
                for old, new in zip(cache, (key_BTKC, value_BTKC))
            )
            key_BSKC, value_BSKC = cache
        heads_BTHC = self._attend(query_BTHC, key_BSKC, value_BSKC, context, dropout_key, tap)
        heads_BTHC = tap("heads", heads_BTHC)
        out_BTD = contract("bthc,hcd->btd", heads_BTHC, self.output[...])
        if config.bias:
            out_BTD = add_bias(out_BTD, self.output_bias[...])
        return tap("output", out_BTD), cache

    def _attend(self, query, key, value, context, dropout_key, tap):
        kernel = self.config.attention
        if kernel == "auto":
            kernel = "cudnn" if jax.default_backend() == "gpu" else "xla"
        needs_pattern = tap is not no_tap or (dropout_key is not None and self.config.dropout)
        if kernel == "cudnn" and not needs_pattern and query.dtype != jnp.float32:
            return jax.nn.dot_product_attention(
                query, key, value, mask=context.mask_BTS[:, None], implementation="cudnn"
            )
        return attend(
            query,
            key,
            value,
            context.mask_BTS,
            dropout_rate=self.config.dropout,
            dropout_key=dropout_key,
            tap=tap,
        )
