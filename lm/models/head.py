"""From the last residual stream to logits: what every language model ends in."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from lm.models.hooks import Tap, no_tap
from lm.models.matmul import contract
from lm.parallel.sharding import constrain


class LanguageModel(nnx.Module):
    """A model with `config`, `embedding.tokens`, `hidden` and, as the config says, a head."""

    def __call__(
        self,
        tokens_BT: jax.Array,
        targets_BT: jax.Array | None = None,
        *,
        tap: Tap = no_tap,
        **arguments,
    ) -> jax.Array:
        """Logits [B, T, V], float32: of the token after each position, or at it (encoder).

        Args:
          tokens_BT: token ids; the source's [B, S] for an encoder-decoder.
          targets_BT: an encoder-decoder's inputs to the decoder.
          tap: reads or replaces named activations (`lm.models.hooks`).
          **arguments: as of `hidden`.
        """
        return self.unembed(self.hidden(tokens_BT, targets_BT, tap=tap, **arguments), tap=tap)

    def readout(self, x_BTD: jax.Array) -> jax.Array:
        """What the output head multiplies, of the last residual stream: that, unless overridden."""
        return x_BTD

    def output_weights(self) -> jax.Array:
        """The output head [V, D]: the token embedding when tied."""
        return self.embedding.tokens[...] if self.config.tie_embeddings else self.head[...]

    def output_bias(self) -> jax.Array | None:
        """The output head's bias [V], if it has one."""
        return self.head_bias[...] if self.config.head_bias else None

    def unembed(self, x_BTD: jax.Array, tap: Tap = no_tap) -> jax.Array:
        """Logits [B, T, V], float32, of a last residual stream."""
        read_BTD = self.readout(x_BTD)
        logits_BTV = contract("btd,vd->btv", read_BTD, self.output_weights(), jnp.float32)
        if self.config.head_bias:
            logits_BTV += self.head_bias[...]
        if cap := self.config.logits_softcap:
            logits_BTV = cap * jnp.tanh(logits_BTV / cap)
        return tap("logits", constrain(logits_BTV, "batch", "length", "vocab"))
