"""Logits to the next token: greedy, temperature, top-k and nucleus sampling.

The filters work on `Candidates`: the tokens that may still be drawn, likeliest first. Ranking once
serves both filters, and after top-k the rest is done on k numbers instead of the vocabulary. Among
equal logits the token with the lower id ranks first, so that top-k keeps exactly k.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.config import Count, NotNegative, Positive, Share

HEAD = 256  # ranks that nearly every nucleus stays within; sorting a whole vocabulary is slow


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Drawing tokens. The filters apply in the order temperature, top_k, top_p.

    Hashable, so that a compiled function can take it as a static argument.
    """

    temperature: NotNegative = 1.0  # divides the logits; 0 is greedy: always the likeliest token
    top_k: Count | None = None  # draw from the k likeliest tokens only; 0, None: from all
    top_p: Share | None = None  # the fewest that hold this share of the probability; 0, None: all
    max_new_tokens: Positive = 200  # per sample, end-of-text included
    num_samples: Positive = 1  # continuations of each prompt
    truncate_prompt: bool = True  # one longer than the context loses what comes first; or an error
    stop_at_end_of_text: bool = True  # False goes on after end-of-text, into the next document

    @property
    def greedy(self) -> bool:
        """Whether nothing is left to chance; below 1e-5 logits would overflow, and none is."""
        return self.temperature < 1e-5 or self.top_k == 1


class Candidates(NamedTuple):
    """Tokens that may be drawn: their logits (-inf rules one out) and ids, likeliest first."""

    logits_BN: jax.Array
    ids_BN: jax.Array


def top_k(logits_BV: jax.Array, k: int) -> Candidates:
    """The k likeliest tokens (Fan et al. 2018); all of them where the vocabulary has fewer."""
    return Candidates(*jax.lax.top_k(logits_BV, min(k, logits_BV.shape[-1])))


def ranked(logits_BV: jax.Array) -> Candidates:
    """Every token, likeliest first."""
    ids_BV = jnp.broadcast_to(jnp.arange(logits_BV.shape[-1]), logits_BV.shape)
    negated, ids_BV = jax.lax.sort((-logits_BV, ids_BV), is_stable=True, num_keys=1)
    return Candidates(-negated, ids_BV)


def top_p(candidates: Candidates, p: float, total_B1: jax.Array | None = None) -> Candidates:
    """The nucleus: the fewest tokens whose probabilities sum to at least p (Holtzman et al. 2020).

    The likeliest token always stays.

    Args:
      candidates: in the order of their ranks.
      p: the share of the probability.
      total_B1: log of the sum that probabilities are shares of; that of `candidates` unless given.
    """
    if total_B1 is None:
        total_B1 = jax.nn.logsumexp(candidates.logits_BN, -1, keepdims=True)
    probabilities_BN = jnp.exp(candidates.logits_BN - total_B1)
    before_BN = jnp.cumsum(probabilities_BN, -1) - probabilities_BN
    keep_BN = (before_BN < p).at[:, 0].set(True)
    return Candidates(jnp.where(keep_BN, candidates.logits_BN, -jnp.inf), candidates.ids_BN)


def candidates(logits_BV: jax.Array, config: SamplingConfig) -> Candidates:
    """What `config` allows to be drawn, and with which logits; `temperature` must not be 0.

    Without filters the tokens are in the order of their ids: nothing needs their ranks.
    """
    logits_BV = logits_BV.astype(jnp.float32) / config.temperature
    nucleus = _has_nucleus(config)
    if config.top_k:
        allowed = top_k(logits_BV, config.top_k)
    elif nucleus:
        allowed = ranked(logits_BV)
    else:
        ids_BV = jnp.broadcast_to(jnp.arange(logits_BV.shape[-1]), logits_BV.shape)
        return Candidates(logits_BV, ids_BV)
    return top_p(allowed, config.top_p) if nucleus else allowed


def greedy(logits_BV: jax.Array) -> jax.Array:
    """The likeliest token of each row; the lowest id among equals."""
    return jnp.argmax(logits_BV, -1).astype(jnp.int32)


def sample(logits_BV: jax.Array, keys_B: jax.Array, config: SamplingConfig) -> jax.Array:
    """One token for every row, int32 [B].

    Args:
      logits_BV: the model's, of any float dtype.
      keys_B: a random key for every row; a row's token depends on its own key and logits alone.
      config: static under jit.
    """
    if config.greedy:
        return greedy(logits_BV)
    if not _has_nucleus(config) or config.top_k or logits_BV.shape[-1] <= HEAD:
        return _draw(candidates(logits_BV, config), keys_B)
    scaled_BV = logits_BV.astype(jnp.float32) / config.temperature
    total_B1 = jax.nn.logsumexp(scaled_BV, -1, keepdims=True)
    head = top_k(scaled_BV, HEAD)
    held_B = jnp.exp(head.logits_BN - total_B1).sum(-1)
    return jax.lax.cond(
        (held_B > config.top_p).all(),
        lambda: _draw(top_p(head, config.top_p, total_B1), keys_B),
        lambda: _draw(candidates(logits_BV, config), keys_B),
    )


def _has_nucleus(config: SamplingConfig) -> bool:
    return bool(config.top_p) and config.top_p < 1


def _draw(allowed: Candidates, keys_B: jax.Array) -> jax.Array:
    """A token of each row by the Gumbel-max trick.

    The noise of the first `HEAD` candidates does not depend on how many there are, so that a row
    draws the same token from the head as from the whole ranking.
    """

    def noise(key: jax.Array) -> jax.Array:
        size = allowed.logits_BN.shape[-1]
        first = jax.random.gumbel(key, (min(size, HEAD),))
        rest = jax.random.gumbel(jax.random.fold_in(key, 1), (max(size - HEAD, 0),))
        return jnp.concatenate([first, rest])

    chosen_B = jnp.argmax(allowed.logits_BN + jax.vmap(noise)(keys_B), -1)
    return jnp.take_along_axis(allowed.ids_BN, chosen_B[:, None], 1)[:, 0].astype(jnp.int32)


def probabilities(logits_BV: jax.Array, config: SamplingConfig) -> jax.Array:
    """The distribution [B, V] that `sample` draws from, float32."""
    if config.greedy:
        return jax.nn.one_hot(greedy(logits_BV), logits_BV.shape[-1])
    allowed = candidates(logits_BV, config)
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    zeros_BV = jnp.zeros(logits_BV.shape, jnp.float32)
    return zeros_BV.at[rows_B1, allowed.ids_BN].set(jax.nn.softmax(allowed.logits_BN, -1))
