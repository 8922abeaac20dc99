"""Which tokens a sampler could have drawn, found again from the trainer's own logits.

Where top-k, top-p or min-p cut the distribution, the tokens that are left share its probability
anew, and a policy gradient needs the log-probabilities of that: of what was drawn from (Yao et al.
2025 measure what happens where the two differ). The set is found once, when an iteration is scored,
and stays what it was while the policy changes, so that ratios are of one support.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lm.alignment.rollouts import RolloutConfig
from lm.inference import warpers
from lm.inference.sampling import filtered, warping
from lm.models import Model
from lm.objectives.chunked import chunk_length
from lm.objectives.tokens import text_of


def needs_support(config: RolloutConfig, known: int, vocab_size: int) -> bool:
    """Whether anything is ruled out: by filters, or ids that the tokenizer does not have."""
    return known < vocab_size or config.sampling().kind().draws == "filtered"


def sampler_support(
    model: Model, batch: Mapping[str, jax.Array], config: RolloutConfig, known: int
) -> jax.Array:
    """The tokens that the sampler may draw at each place: uint32 [B, T, ⌈V/32⌉].

    Bit i of word w is token 32 w + i, as in `lm.inference.warpers.allowed`. The target itself is
    always kept: to rounding, it was drawn from there.

    Args:
      model: bound.
      batch: of rows (`lm.data.batches`).
      config: of the sampler.
      known: ids from here up are never drawn.
    """
    x_BTD, _ = model.forward(text_of(batch))
    B, T, V = *batch["inputs"].shape, model.config.vocab_size
    chunk = chunk_length(B, T, V)
    values, _ = warping([config.sampling()], known)

    def of_chunk(_, part):
        x_BCD, targets_BC = part
        logits_NV = model.unembed(x_BCD).reshape(-1, V)[:, :known]
        every = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(logits_NV), *x.shape[1:])), values)
        scaled_NV = warpers.temperature(logits_NV, every.temperature_B)
        kept_NV = filtered(scaled_NV, every) > -jnp.inf
        kept_NV |= targets_BC.reshape(-1, 1) == jnp.arange(known)
        return None, packed_bits(kept_NV, V).reshape(*targets_BC.shape, -1)

    def cut(x):
        return jnp.moveaxis(x.reshape(B, T // chunk, chunk, *x.shape[2:]), 1, 0)

    _, bits_NBCW = jax.lax.scan(of_chunk, None, (cut(x_BTD), cut(batch["targets"])))
    return jnp.moveaxis(bits_NBCW, 0, 1).reshape(B, T, -1)


def packed_bits(kept_NV: jax.Array, vocab_size: int) -> jax.Array:
    """Booleans as bit masks uint32 [N, ⌈vocab_size/32⌉]; ids that `kept_NV` lacks are not kept."""
    words = -(-vocab_size // 32)
    short = words * 32 - kept_NV.shape[1]
    bits_NWI = jnp.pad(kept_NV, ((0, 0), (0, short))).reshape(len(kept_NV), words, 32)
    return (bits_NWI.astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32)).sum(
        -1, dtype=jnp.uint32
    )
