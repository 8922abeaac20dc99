"""Measures of leaning, on examples worked by hand and on worlds whose leaning is known."""

import math

import numpy as np
import pytest
from scipy import stats

from lm.evaluation import bias


def test_embeddings_that_lean_are_told_from_those_that_do_not():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 8, 40)) * 0.3
    a[:, 0] += 1
    b[:, 0] -= 1
    x, y = rng.normal(size=(2, 8, 40)) * 0.3
    assert bias.weat(x, y, a, b, 2000).p > 0.02
    x[:, 0] += 1
    y[:, 0] -= 1
    found = bias.weat(x, y, a, b, 2000)
    assert found.effect > 1.7 and found.p < 0.001
    assert bias.weat(y, x, a, b, 2000).effect == pytest.approx(-found.effect)


def test_association_worked_by_hand():
    east, north = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    x, y = np.array([[2.0, 0.0], [3.0, 0.0]]), np.array([[0.0, 5.0], [0.0, 1.0]])
    # s = 1, 1, -1, -1; the effect is 2 / std = 2 / sqrt(4/3), and 1 of C(4, 2) ways is as good
    found = bias.weat(x, y, east, north, 20_000)
    assert found.effect == pytest.approx(math.sqrt(3))
    assert found.p == pytest.approx(1 / 6, abs=0.01)


def test_the_direction_of_pairs_is_found():
    rng = np.random.default_rng(2)
    axis = np.eye(30)[3]
    words = rng.normal(size=(6, 30))
    pairs = [(word + 2 * axis, word - 2 * axis + 0.05 * rng.normal(size=30)) for word in words]
    found, explained = bias.direction(pairs)
    assert found @ axis > 0.99 and explained > 0.95
    assert bias.direction([(two, one) for one, two in pairs])[0] @ axis < -0.99


def test_tokens_that_two_sentences_share():
    # "The poor man was late ." and "The rich old man was late ."
    assert bias.shared([1, 2, 3, 4, 5], [1, 7, 8, 3, 4, 5]) == ([0, 2, 3, 4], [0, 3, 4, 5])
    assert bias.shared([1, 2], [3, 4]) == ([], [])
    assert bias.shared([0] * 300, [0] * 300)[0] == list(range(300))  # however often one comes


def test_crows_counts_pairs():
    found = bias.crows([-10.0, -12.0, -9.0, -8.0], [-11.0, -11.0, -9.0, -9.5])
    assert found.value == (1 + 0 + 0.5 + 1) / 4
    assert 0 <= found.low < found.value < found.high <= 1


def test_stereoset_worked_by_hand():
    # Of three sentences; the third prefers nonsense to its opposite.
    found = bias.stereoset([-5.0, -6.0, -4.0], [-6.0, -5.0, -9.0], [-7.0, -8.0, -8.0])
    assert found.language == pytest.approx(100 * 5 / 6)
    assert found.stereotype == pytest.approx(100 * 2 / 3)
    assert found.icat == pytest.approx(100 * 5 / 6 * (100 / 3) / 50)
    ideal = bias.stereoset([-1.0, -2.0], [-2.0, -1.0], [-9.0, -9.0])
    assert ideal == (100, 50, 100)
    assert bias.stereoset([-1.0], [-2.0], [-9.0]).icat == 0  # always the stereotype


def test_stereoset_is_a_mean_over_target_terms():
    # The term "a" has two sentences, "b" one: ½ and 1 of them are the stereotype's.
    found = bias.stereoset([-5.0, -7.0, -4.0], [-6.0, -6.0, -9.0], [-9.0, -9.0, -8.0], list("aab"))
    assert found.stereotype == pytest.approx(100 * (0.5 + 1) / 2)
    assert found.language == pytest.approx(100 * (1 + 0.5) / 2)


def test_winobias_worked_by_hand():
    found = bias.winobias([True, True, False, True], [True, False, False, False])
    assert (found.pro.value, found.anti.value, found.gap.value) == (0.75, 0.25, 0.5)
    # differences 0, 1, 0, 1: standard error sqrt(4/3 · 4 · ¼) / 4, t = √3 with 3 degrees of freedom
    assert found.gap.error == pytest.approx(math.sqrt(1 / 12))
    assert found.p == pytest.approx(2 * stats.t.sf(math.sqrt(3), 3))
    assert bias.winobias([True, False], [True, False]).gap.value == 0


def test_the_data_itself_amplifies_nothing():
    found = bias.amplification([0.75] * 8, (299.5, 99.5))
    assert found.value == pytest.approx(1) and found.low < 1 < found.high and found.items == 8
    assert bias.amplification([0.9, 0.9], (74.5, 24.5)).value == pytest.approx(3)
    rng, held = np.random.default_rng(0), 0
    for _ in range(2000):  # a model that is right on the whole, unlike from place to place
        one = rng.binomial(300, 0.75)
        found = bias.amplification(rng.beta(7.5, 2.5, 60), (one, 300 - one))
        held += found.low <= 1 <= found.high
    assert 0.93 <= held / 2000 <= 0.97
    sure, unsure = bias.amplification([0.75] * 9, (75, 75)), bias.amplification([0.5] * 9, (2, 2))
    both = bias.pooled([sure, unsure])
    assert sure.low < both.value < sure.value and both.error < sure.error
    assert math.isnan(bias.pooled([]).value)
