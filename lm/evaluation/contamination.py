"""Which spans of a text a model was trained on: spans of tokens, looked for in the token cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lm.data import TokenizedCorpus, counter_rng

_CHUNK = 1 << 20  # tokens that are hashed together
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2⁶⁴


class Training:
    """What a model was trained on, as far as it is searched.

    Args:
      corpora: its tokens; of several, parts in proportion to their sizes.
      most: how many tokens of all together are searched, from the beginning of each.
    """

    def __init__(self, corpora: Sequence[TokenizedCorpus], most: int):
        self.total = sum(corpus.num_tokens for corpus in corpora)
        share = min(1.0, most / self.total) if self.total else 0.0
        self._parts = [(corpus.tokens, int(corpus.num_tokens * share)) for corpus in corpora]
        self.searched = sum(size for _, size in self._parts)

    def counts(self, vocab_size: int) -> np.ndarray:
        """How often each token occurs, int64 [V]."""
        found_V = np.zeros(vocab_size, np.int64)
        for tokens, size in self._parts:
            for start in range(0, size, _CHUNK):
                chunk = np.asarray(tokens[start : min(size, start + _CHUNK)])
                found_V += np.bincount(chunk, minlength=vocab_size)
        return found_V

    def has(self, texts: Sequence[Sequence[int]], span: int) -> list[np.ndarray]:
        """For each text whether its spans of `span` tokens occur: bool [tokens − span + 1].

        Spans are told apart by 64-bit hashes, so that one is taken for another once in 2⁶⁴ pairs.
        """
        hashes = [_hashes(np.asarray(ids, np.int64), span) for ids in texts]
        wanted = np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes]))
        seen = np.zeros(len(wanted), bool)
        for tokens, size in self._parts if len(wanted) else ():
            for start in range(0, max(0, size - span + 1), _CHUNK):
                chunk = np.asarray(tokens[start : min(size, start + _CHUNK + span - 1)])
                found = _hashes(chunk.astype(np.int64), span)
                place = np.minimum(np.searchsorted(wanted, found), len(wanted) - 1)
                seen[place[wanted[place] == found]] = True
        return [seen[np.searchsorted(wanted, each)] for each in hashes]


def covered(occurs: np.ndarray, span: int) -> np.ndarray:
    """Which tokens of a text lie in a span that occurs: bool [tokens] of what `has` says of it.

    A text that is shorter than a span has no such tokens, nor any others: bool [0].
    """
    if not len(occurs):
        return np.zeros(0, bool)
    return np.convolve(occurs, np.ones(span, np.int64))[: len(occurs) + span - 1] > 0


def _hashes(ids: np.ndarray, span: int) -> np.ndarray:
    """The hash of each stretch of `span` ids, uint64 [ids − span + 1]: Σ random(id) · base^place.

    As a difference of two sums from the beginning on, over the power of the place where it begins.
    """
    if len(ids) < span:
        return np.zeros(0, np.uint64)
    with np.errstate(over="ignore"):
        powers = _powers(_BASE, len(ids))
        sums = np.cumsum(counter_rng.bits(np.uint64(0), ids) * powers, dtype=np.uint64)
        inside = sums[span - 1 :] - np.concatenate([np.zeros(1, np.uint64), sums[:-span]])
        return inside * _powers(pow(_BASE, -1, 1 << 64), len(inside))


def _powers(base: int, number: int) -> np.ndarray:
    """base⁰, base¹, … modulo 2⁶⁴."""
    factors = np.full(number, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)
