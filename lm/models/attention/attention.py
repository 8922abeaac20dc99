"""Attention: which keys each query may see, and the weighted mean of their values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lm.models.attention import kernels
from lm.models.attention.ring import HEADS
from lm.models.config import ModelConfig
from lm.models.hooks import Tap, no_tap, within
from lm.models.layers import Norm, dropout, weight_initializer
from lm.models.matmul import add_bias, contract, contract_each, masked_softmax
from lm.models.params import declare
from lm.models.positions import rotate
from lm.models.text import Text
from lm.parallel.sharding import constrain

Pair = tuple[jax.Array, jax.Array]  # keys and values


def attention_mask(
    query_positions_BT: jax.Array,
    key_positions_BS: jax.Array,
    query_segments_BT: jax.Array | None = None,
    key_segments_BS: jax.Array | None = None,
    *,
    causal: bool = True,
    window: int = 0,
    prefix_BS: jax.Array | None = None,
) -> jax.Array:
    """Whether query t may see key s: not an empty one (position -1), and of the same segment.

    Args:
      query_positions_BT, key_positions_BS: where they stand.
      query_segments_BT, key_segments_BS: which document each is of.
      causal: no later keys.
      window: only the last `window` keys up to the query's own; 0: all.
      prefix_BS: keys that everyone may see, though later (a prefix language model's).

    Returns:
      A boolean [B, T, S].
    """
    query, key = query_positions_BT[:, :, None], key_positions_BS[:, None, :]
    mask_BTS = jnp.broadcast_to(key >= 0, jnp.broadcast_shapes(query.shape, key.shape))
    if causal:
        earlier = key <= query
        mask_BTS &= earlier if prefix_BS is None else earlier | prefix_BS[:, None, :]
    if window:
        mask_BTS &= key > query - window
    if query_segments_BT is not None and key_segments_BS is not None:
        mask_BTS &= query_segments_BT[:, :, None] == key_segments_BS[:, None, :]
    return mask_BTS


def attend(
    query_BTHC: jax.Array,
    key_BSKC: jax.Array,
    value_BSKC: jax.Array,
    mask_BTS: jax.Array,
    *,
    bias_BHTS: jax.Array | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    text: Text | None = None,
    key_text: Text | None = None,
    tap: Tap = no_tap,
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1); the reference implementation.

    Query heads share key/value heads in groups of G = H/K (Ainslie et al. 2023). Scores and softmax
    are float32.

    Args:
      query_BTHC, key_BSKC, value_BSKC: of every head.
      mask_BTS: which keys each query may see.
      bias_BHTS: added to the scores.
      scale: multiplies the queries; C^-½ unless given.
      softcap: c in c·tanh(scores/c) (Gemma 2 report, §2); 0: none.
      dropout_rate, dropout_key: dropout of the pattern.
      text, key_text: of the queries and of the keys, if dropout is on.
      tap: see `lm.models.hooks`.

    Returns:
      The heads' outputs [B, T, H, C] in the queries' dtype.
    """
    B, T, H, C = query_BTHC.shape
    K = key_BSKC.shape[2]
    scale = C**-0.5 if scale is None else scale
    query_BTKGC = (query_BTHC * scale).reshape(B, T, K, H // K, C)
    scores = contract("btkgc,bskc->bkgts", query_BTKGC, key_BSKC, jnp.float32)
    scores_BHTS = scores.reshape(B, H, T, -1)
    if softcap:
        scores_BHTS = softcap * jnp.tanh(scores_BHTS / softcap)
    if bias_BHTS is not None:
        scores_BHTS += bias_BHTS
    scores_BHTS = tap("scores", scores_BHTS)
    pattern_BHTS = masked_softmax(scores_BHTS, mask_BTS[:, None], query_BTHC.dtype)
    pattern_BHTS = tap("pattern", pattern_BHTS)
    if dropout_key is not None and dropout_rate:
        row, place = (
            text.rows_B[:, None, None],
            text.slots_1T[:, None] * H + jnp.arange(H)[:, None],
        )
        pattern_BHTS = dropout(
            pattern_BHTS, dropout_rate, dropout_key, row, place, key_text.slots_1T[0]
        )
    pattern = pattern_BHTS.reshape(B, K, H // K, T, -1)
    return contract("bkgts,bskc->btkgc", pattern, value_BSKC).reshape(B, T, H, C)


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
            self.query_norm = Norm(config, C, "head_dim")
            self.key_norm = Norm(config, C, "head_dim")

    def __call__(self, x_BTD, context, cache=None, *, dropout_key=None, tap: Tap = no_tap):
        """What attention adds to the residual stream, and the cache with this call's keys in it.

        Args:
          x_BTD: the normalised residual stream.
          context: the layer's `Context`: mask, rotary angles, bias, where the cache is written.
          cache: None, or this layer's keys and values, each [B, S, K, C].
          dropout_key: turns dropout on.
          tap: see `lm.models.hooks`.
        """
        weights = (self.query[...], self.key[...], self.value[...])
        kind = self.config.quantization
        query_BTHC, *pair = contract_each("btd,dhc->bthc", x_BTD, weights, quantization=kind)
        query_BTHC = self._query(query_BTHC, context.rotary, tap)
        key_BTKC, value_BTKC = self._pair(*pair, context.rotary, tap)
        key_BSKC, value_BSKC = key_BTKC, value_BTKC
        if cache is not None:
            cache = tuple(
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), context.slot, 1)
                for old, new in zip(cache, (key_BTKC, value_BTKC))
            )
            key_BSKC, value_BSKC = cache
        heads_BTHC = self._attend(query_BTHC, key_BSKC, value_BSKC, context, dropout_key, tap)
        return self._write(heads_BTHC, tap), cache

    def remember(self, memory_BSD: jax.Array, tap: Tap = no_tap) -> Pair:
        """Keys and values [B, S, K, C] of an encoder's output, for `recall`."""
        weights, kind = (self.key[...], self.value[...]), self.config.quantization
        pair = contract_each("btd,dhc->bthc", memory_BSD, weights, quantization=kind)
        return self._pair(*pair, None, tap)

    def recall(self, x_BTD, pair: Pair, context, *, dropout_key=None, tap: Tap = no_tap):
        """Cross-attention (Vaswani et al. 2017, §3.2.3): what it adds to the residual stream.

        Args:
          x_BTD: the normalised residual stream.
          pair: from `remember`.
          context: the layer's `Context`, `across` to the encoder.
          dropout_key: turns dropout on.
          tap: see `lm.models.hooks`.
        """
        kind = self.config.quantization
        query_BTHC = contract("btd,dhc->bthc", x_BTD, self.query[...], quantization=kind)
        query_BTHC = self._query(query_BTHC, None, tap)
        heads_BTHC = self._attend(query_BTHC, *pair, context, dropout_key, tap)
        return self._write(heads_BTHC, tap)

    def _query(self, query_BTHC, rotary, tap):
        if hasattr(self, "query_bias"):
            query_BTHC = add_bias(query_BTHC, self.query_bias[...])
        if hasattr(self, "query_norm"):
            query_BTHC = self.query_norm(query_BTHC, within(tap, "query_norm"))
        if rotary is not None:
            query_BTHC = rotate(query_BTHC, rotary)
        query_BTHC = tap("query", constrain(query_BTHC, "batch", "length", "heads", None))
        return checkpoint_name(query_BTHC, "query")

    def _pair(self, key_BSKC, value_BSKC, rotary, tap) -> Pair:
        if hasattr(self, "key_bias"):
            key_BSKC = add_bias(key_BSKC, self.key_bias[...])
            value_BSKC = add_bias(value_BSKC, self.value_bias[...])
        if hasattr(self, "key_norm"):
            key_BSKC = self.key_norm(key_BSKC, within(tap, "key_norm"))
        if rotary is not None:
            key_BSKC = rotate(key_BSKC, rotary)
        key_BSKC = tap("key", constrain(key_BSKC, "batch", "length", "kv_heads", None))
        value_BSKC = tap("value", constrain(value_BSKC, "batch", "length", "kv_heads", None))
        return checkpoint_name(key_BSKC, "key"), checkpoint_name(value_BSKC, "value")

    def _write(self, heads_BTHC, tap):
        heads_BTHC, kind = tap("heads", heads_BTHC), self.config.quantization
        out_BTD = contract("bthc,hcd->btd", heads_BTHC, self.output[...], quantization=kind)
        out_BTD = constrain(out_BTD, "batch", "norm_length", "embed")
        if hasattr(self, "output_bias"):
            out_BTD = add_bias(out_BTD, self.output_bias[...])
        return tap("output", out_BTD)

    def _attend(self, query, key, value, context, dropout_key, tap):
        config = self.config
        dropped = dropout_key is not None and config.dropout > 0
        tapped = tap is not no_tap
        kernel = kernels.choose(config, query, key, context, dropped=dropped, tapped=tapped)
        if kernel != "xla":
            return kernels.compute(kernel, config, query, key, value, context, dropout_key)
        heads_BTHC = attend(
            query,
            key,
            value,
            context.mask_BTS,
            bias_BHTS=context.bias_BHTS,
            scale=config.attention_scale,
            softcap=config.attention_softcap,
            dropout_rate=config.dropout,
            dropout_key=dropout_key,
            text=context.text,
            key_text=context.key_text,
            tap=tap,
        )
        return checkpoint_name(heads_BTHC, HEADS)
