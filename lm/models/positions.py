"""How a model knows order: sinusoids, rotations, and biases on attention scores."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.models.config import ModelConfig
from lm.models.matmul import finished


def sinusoids(positions_BT: jax.Array, width: int) -> jax.Array:
    """The sinusoidal position embedding of Vaswani et al. 2017, §3.5: sines, then cosines.

    As exact at position 16,000 as at the first: whole turns are taken off before they cost digits.
    """
    half = width // 2
    turns = 10_000.0 ** (-np.arange(half) / max(half, 1)) / (2 * math.pi)  # of each position
    mantissa, exponent = np.frexp(turns)
    coarse = np.ldexp(np.round(mantissa * 1024), exponent - 10)  # times 14 bits: exact in float32
    dtype = jnp.result_type(float)  # float64 where that is on
    positions = positions_BT[..., None].astype(dtype)
    most, rest = positions * coarse.astype(dtype), positions * (turns - coarse).astype(dtype)
    angles = 2 * math.pi * (most - jnp.round(most) + rest)
    table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    return jnp.pad(table, [(0, 0)] * (table.ndim - 1) + [(0, width - 2 * half)])


def rotary_frequencies(
    config: ModelConfig, local: bool = False, length: int = 1
) -> tuple[np.ndarray, float]:
    """Radians a position of each rotated pair (Su et al. 2021, §3.2), and a gain on sin and cos.

    `config.rotary_scaling` stretches a trained model to longer contexts: `linear` slows every
    frequency (Chen et al. 2023); `llama3` only those whose wavelength exceeds the original context
    (Llama 3 report, §3.4.2 and its published code); `yarn` likewise, with a ramp between a number
    of rotations, and a gain of 0.1·ln(factor) + 1 (Peng et al. 2023, §3). Two depend on how many
    tokens a text has, `length`: `longrope` divides each frequency by a number of its own, of two
    lists (Ding et al. 2024, §3.2); `dynamic` raises the base with what the text has over the
    original context (NTK-aware scaling, Peng et al. 2023, §3.3, and transformers' code). Local
    layers with a base of their own, which never see further than their window, have a scaling of
    their own, too: most often none (Gemma 3 report, §2).
    """
    width, (base, scaling, factor) = config.rotary_dim, config.rotary_of(local)
    frequencies = 1.0 / base ** (np.arange(0, width, 2) / width)
    original = config.rotary_original_length
    if scaling == "dynamic":
        return frequencies * _growth(config, factor, length), 1.0
    if scaling == "longrope":
        slower = config.rotary_long if length > original else config.rotary_short
        return frequencies / np.array(slower), config.rotary_amplitude
    if scaling == "linear":
        return frequencies / factor, 1.0
    if scaling == "llama3":
        rotations = original * frequencies / (2 * math.pi)
        kept = (rotations - config.rotary_low) / (config.rotary_high - config.rotary_low)
        kept = np.clip(kept, 0, 1)
        return frequencies * (kept + (1 - kept) / factor), 1.0
    if scaling == "yarn":

        def pair_that_rotates(times: float) -> float:
            return width * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

        first, last = map(pair_that_rotates, (config.rotary_high, config.rotary_low))
        if config.rotary_truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        # Of a low base the first may lie behind the last: the ramp falls, as in the published code.
        ramp = (np.arange(width // 2) - first) / (last - first or 0.001)
        slowed = np.clip(ramp, 0, 1)
        return frequencies * (1 - slowed + slowed / factor), config.rotary_amplitude
    return frequencies, 1.0


def _growth(config: ModelConfig, factor: float, length: Any) -> Any:
    """What `dynamic` multiplies frequencies by, [..., R/2] of lengths [..., 1] or of a number."""
    original, width = config.rotary_original_length, config.rotary_dim
    xp = jnp if isinstance(length, jax.Array) else np
    ratio = factor * xp.maximum(length, original) / original - (factor - 1)
    return ratio ** (-np.arange(0, width, 2, dtype=np.float32) / (width - 2))


def stale(config: ModelConfig, made_for_B: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Which texts' angles are others at these lengths than at those (0: there is nothing yet)."""
    original = config.rotary_original_length
    changed_B = (made_for_B > original) != (lengths_B > original)
    if config.angles_until(original + 1) is not None:
        changed_B |= (made_for_B > original) & (made_for_B != lengths_B)
    return changed_B & (made_for_B > 0) & (lengths_B > 0)


def rotary_angles(
    positions_BT: jax.Array,
    config: ModelConfig,
    local: bool = False,
    lengths_BT: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """Cosine and sine [B, T, 1, R/2] of RoPE; R dimensions of a head are rotated.

    Where the angles depend on the length of a text, it is that of each token's own document,
    [B, T] or [B, 1], whatever else is in its row or in the batch. (transformers takes the longest
    row of a batch, padding included: the same where rows are alike.)
    """
    frequencies, gain = rotary_frequencies(config, local)
    frequencies = frequencies.astype(np.float32)
    _, scaling, factor = config.rotary_of(local)
    if scaling == "dynamic":
        frequencies = frequencies * _growth(config, factor, lengths_BT[..., None, None])
    if scaling == "longrope":
        longer = rotary_frequencies(config, local, config.rotary_original_length + 1)[0]
        is_longer = lengths_BT[..., None, None] > config.rotary_original_length
        frequencies = jnp.where(is_longer, longer.astype(np.float32), frequencies)
    angles = positions_BT[..., None, None] * frequencies
    table = finished(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1))
    if gain != 1:
        table *= gain
    return tuple(jnp.split(table, 2, -1))


def relative_buckets(config: ModelConfig, bidirectional: bool) -> np.ndarray:
    """The bucket of each distance key - query from -M to M, M = `relative_distance`.

    Half the buckets hold one distance each, the others logarithmically more, up to M; with
    `bidirectional`, keys ahead have buckets of their own, else they share bucket 0 (Raffel et al.
    2020, §2.1, and its published code).

    Returns:
      An int32 [2M + 1].
    """
    furthest = config.relative_distance
    distance = np.arange(-furthest, furthest + 1)
    buckets = config.relative_buckets // 2 if bidirectional else config.relative_buckets
    ahead = np.where(distance > 0, buckets, 0) if bidirectional else 0
    apart = np.abs(distance) if bidirectional else np.maximum(-distance, 0)
    exact = buckets // 2
    # In float32, as published: at a bucket's edge the rounding decides.
    growth = np.log(np.maximum(apart, 1).astype(np.float32) / np.float32(exact))
    growth = growth / np.float32(math.log(furthest / exact)) * np.float32(buckets - exact)
    far = np.minimum(exact + growth.astype(np.int32), buckets - 1)
    return (ahead + np.where(apart < exact, apart, far)).astype(np.int32)


def relative_bias(
    table: jax.Array, distance_BTS: jax.Array, config: ModelConfig, bidirectional: bool
) -> jax.Array:
    """What T5 adds to attention scores, float32 [B, H, T, S], of learned biases [buckets, H].

    A distance is the position of key s less that of query t; `bidirectional` tells the signs apart.
    """
    furthest = config.relative_distance
    clipped = jnp.clip(distance_BTS, -furthest, furthest) + furthest
    buckets_BTS = jnp.take(relative_buckets(config, bidirectional), clipped)
    return jnp.moveaxis(jnp.take(table.astype(jnp.float32), buckets_BTS, axis=0), -1, 1)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """The slope of each head, float32 [H] (Press et al. 2022, §3, and its published code).

    A geometric sequence from 2^(-8/n) for n heads, n a power of two; for other numbers, that of
    the power below, then every other slope of the power above.
    """

    def geometric(n: int) -> list[float]:
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]

    below = 2 ** int(math.log2(num_heads))
    slopes = geometric(below) + geometric(2 * below)[::2][: num_heads - below]
    return np.array(slopes, np.float32)


def alibi_bias(slopes_H: jax.Array, distance_BTS: jax.Array) -> jax.Array:
    """What ALiBi adds to attention scores, float32 [B, H, T, S]: -slope × distance."""
    return slopes_H[:, None, None] * distance_BTS[:, None].astype(jnp.float32)
