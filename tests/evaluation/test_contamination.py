"""Spans that were trained on are found, and no others."""

import types

import numpy as np
import pytest

from lm.evaluation import contamination
from lm.evaluation.contamination import Training, covered


def corpus(tokens):
    return types.SimpleNamespace(tokens=np.asarray(tokens, np.uint16), num_tokens=len(tokens))


@pytest.mark.parametrize("span", [1, 4, 13])
def test_spans_are_found_as_by_comparing_all(span, monkeypatch):
    monkeypatch.setattr(contamination, "_CHUNK", 16)  # so that spans lie across chunks
    rng = np.random.default_rng(span)
    corpora = [rng.integers(0, 3, size).tolist() for size in (100, 9, 57)]
    texts = [rng.integers(0, 3, size).tolist() for size in (40, 3, 0, 25)] + [corpora[0][20:60]]
    known = {tuple(c[i : i + span]) for c in corpora for i in range(len(c) - span + 1)}
    found = Training([corpus(c) for c in corpora], 10**9).has(texts, span)
    for text, occurs in zip(texts, found):
        spans = [tuple(text[i : i + span]) for i in range(len(text) - span + 1)]
        assert occurs.tolist() == [each in known for each in spans]
    assert found[-1].all()
    if span > 1:
        assert not found[0].all()


def test_tokens_of_a_span_that_occurs_are_covered():
    occurs = np.array([True, False, False, False, True])
    assert covered(occurs, 2).tolist() == [True, True, False, False, True, True]
    assert not len(covered(np.zeros(0, bool), 2))


def test_no_more_is_searched_and_counted_than_allowed():
    training = Training([corpus([1] * 80), corpus([2] * 20)], 50)
    assert (training.total, training.searched) == (100, 50)
    assert training.counts(4).tolist() == [0, 40, 10, 0]
    assert Training([], 50).searched == 0
