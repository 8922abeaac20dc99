"""Random numbers that are a function of what they are for.

A generator with a state would make a row depend on those drawn before it. Here every number is a
hash of a key and a counter, as in Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2,
3"), so the rows of a batch draw theirs all at once and any host draws the same. The hash is the
finaliser of SplitMix64 (Steele et al. 2014).
"""

from __future__ import annotations

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: consecutive counters end far apart


def keys(seed: int, numbers: np.ndarray) -> np.ndarray:
    """A key for each of `numbers` (integers), uint64 of the same shape."""
    start = _scrambled(np.array([seed % 2**64], np.uint64) + _STEP)
    return _scrambled(np.asarray(numbers, np.int64).astype(np.uint64) * _STEP ^ start)


def bits(keys: np.ndarray, counters: np.ndarray, purpose: int = 0) -> np.ndarray:
    """64 random bits for each key and counter, uint64; the two shapes are broadcast.

    `purpose` makes the numbers of one use independent of another's, below 2**16. Counters are
    below 2**48.
    """
    # At least one dimension: numpy warns where a single number wraps around, as these are to.
    counters = np.atleast_1d(np.asarray(counters, np.uint64)) + np.uint64((purpose << 48) + 1)
    return _scrambled(keys + counters * _STEP)


def uniform(keys: np.ndarray, counters: np.ndarray, purpose: int = 0) -> np.ndarray:
    """Numbers in [0, 1), float64, as `bits`."""
    return (bits(keys, counters, purpose) >> np.uint64(11)) * 2.0**-53


def _scrambled(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
