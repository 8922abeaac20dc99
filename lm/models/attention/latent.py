"""Multi-head latent attention (DeepSeek-V2 report, §2.1): keys and values are made of one latent.

All that decoding remembers of a token is that latent c and one rotated key for all heads. A score
is the sum of two, of the last dimensions of a query, which are rotated, and of the others:

    score = q_rest · (K c) + q_rotated · k_shared = (Kᵀ q_rest) · c + q_rotated · k_shared
    head  = Σ pattern · (V c) = V (Σ pattern · c)

So a whole text has keys and values of every head; and with a cache, queries are as wide as what it
holds, and read the latents themselves, as multi-query attention does its one head.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lm.models.attention.attention import Attention, attend, rotate
from lm.models.attention.context import Context
from lm.models.attention.paged import attend_pages, write
from lm.models.config import ModelConfig
from lm.models.hooks import Tap, no_tap, within
from lm.models.layers import Norm, weight_initializer
from lm.models.matmul import contract, contract_each
from lm.models.params import declare

EPSILON = 1e-6  # of the latents' norms, whatever that of others is, as in the published code


class LatentAttention(Attention):
    """Attention whose keys and values, and perhaps queries, are made of narrow latents."""

    def __init__(self, config: ModelConfig):
        D, H, C, V = config.width, config.num_heads, config.head_width, config.value_width
        Q, R, P = config.query_rank, config.kv_rank, config.shared_key_dim
        self.config = config
        normed = dataclasses.replace(config, norm_epsilon=EPSILON)

        def matrix(shape, axes, fan_in, fan_out, **how):
            return declare(shape, axes, weight_initializer(config, fan_in, fan_out, **how))

        by_head = ("embed", "heads", "head_dim")  # a latent is split as the stream is
        if Q:
            self.query_latent = matrix((D, Q), ("embed", None), D, Q)
            self.query_latent_norm = Norm(normed, (Q,))
        self.query = matrix((Q or D, H, C), by_head, Q or D, H * C)
        self.latent = matrix((D, R + P), ("embed", None), D, R + P)  # and the shared key
        self.latent_norm = Norm(normed, (R,))
        self.key_up = matrix((R, H, C - P), by_head, R, H * (C - P))
        self.value_up = matrix((R, H, V), by_head, R, H * V)
        self.output = matrix((H, V, D), ("heads", "head_dim", "embed"), H * V, D, residual=True)
        if config.has_bias("attention"):
            self.output_bias = declare((D,), ("embed",), jax.nn.initializers.zeros)

    def __call__(
        self,
        x_BTD: jax.Array,
        context: Context,
        cache: tuple | None = None,
        *,
        dropout_key: jax.Array | None = None,
        tap: Tap = no_tap,
    ) -> tuple[jax.Array, tuple | None]:
        """As of `Attention`; the cache is one array of latents and shared keys [B, S, 1, R + P].

        With a cache, `tap` sees no keys and values of heads: there are none.
        """
        kind = self.config.quantization
        down = [self.latent[...]] + ([self.query_latent[...]] if self.config.query_rank else [])
        latent_BTR, *asks = contract_each("btd,dr->btr", x_BTD, down, quantization=kind)
        latent_BTR, shared_BTP = jnp.split(latent_BTR, [self.config.kv_rank], -1)
        latent_BTR = self.latent_norm(latent_BTR, within(tap, "latent_norm"))
        if asks:
            x_BTD = self.query_latent_norm(asks[0], within(tap, "query_latent_norm"))
        query_BTHC = contract("btd,dhc->bthc", x_BTD, self.query[...], quantization=kind)
        query_BTHC = self._query(query_BTHC, context, tap)
        if cache is not None:
            return self._recall(query_BTHC, latent_BTR, shared_BTP, context, cache[0], tap)
        rest, value = (
            contract("btr,rhc->bthc", latent_BTR, up[...], quantization=kind)
            for up in (self.key_up, self.value_up)
        )
        shared = jnp.broadcast_to(shared_BTP[:, :, None], (*rest.shape[:3], shared_BTP.shape[-1]))
        pair = self._pair(jnp.concatenate([rest, shared], -1), value, context.rotary, tap)
        return self._mix(query_BTHC, pair, context, dropout_key, tap), None

    def _recall(self, query_BTHC, latent_BTR, shared_BTP, context: Context, cache, tap):
        """What attention adds to the residual stream, and the cache with the new tokens in it."""
        width, rank = shared_BTP.shape[-1], self.config.kv_rank
        new_BT1C = jnp.concatenate([latent_BTR, shared_BTP], -1)[:, :, None]
        if context.rotary is not None:
            new_BT1C = self._rotated(new_BT1C, context.rotary)
        rest, rotated = query_BTHC[..., :-width], query_BTHC[..., -width:]
        rest = contract("bthc,rhc->bthr", rest, self.key_up[...])
        query_BTHC = jnp.concatenate([rest, rotated], -1)
        # Values are read as wide as keys: the latents alone would be a copy of most of the cache.
        if context.paging is not None:
            cache = write(cache, new_BT1C, context.paging)
            heads = attend_pages(self.config, query_BTHC, cache, cache, context)
        else:
            new = new_BT1C.astype(cache.dtype)
            cache = jax.lax.dynamic_update_slice_in_dim(cache, new, context.slot, 1)
            heads = attend(self.config, query_BTHC, cache, cache, context, tap=tap)
        heads = contract("bthr,rhc->bthc", heads[..., :rank], self.value_up[...])
        return self._project(heads, tap), (cache,)

    def _rotated(self, x_BTHC: jax.Array, angles: tuple[jax.Array, ...]) -> jax.Array:
        still, turned = jnp.split(x_BTHC, [x_BTHC.shape[-1] - self.config.rotary_dim], -1)
        return jnp.concatenate([still, rotate(turned, angles)], -1)
