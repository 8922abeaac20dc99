"""Intervals hold what they promise, and tests err as rarely as they say."""

import math
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from lm.evaluation import statistics as st

WORLDS = 4000  # simulated; 1.96 standard errors of a coverage of 0.95 are 0.007


def coverage(estimates, truth):
    return np.mean([one.low <= truth <= one.high for one in estimates])


@pytest.mark.parametrize("items, chance", [(40, 0.5), (100, 0.2), (300, 0.03), (300, 0.9)])
def test_the_interval_of_a_share_holds_the_truth(items, chance):
    rng = np.random.default_rng(items)
    found = [st.share(rng.random(items) < chance) for _ in range(WORLDS)]
    assert 0.93 <= coverage(found, chance) <= 0.97


@pytest.mark.parametrize("draw", ["normal", "uniform", "beta"])
def test_the_interval_of_a_mean_holds_the_truth(draw):
    rng = np.random.default_rng(3)
    drawn = {"normal": (1.0, 2.0), "uniform": (0.0, 1.0), "beta": (0.8, 2.0)}[draw]
    truth = {"normal": 1.0, "uniform": 0.5, "beta": 0.8 / 2.8}[draw]
    found = [st.mean(getattr(rng, draw)(*drawn, size=60)) for _ in range(WORLDS)]
    assert 0.93 <= coverage(found, truth) <= 0.97


@pytest.mark.parametrize("alike", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("of", ["mean", "share"])
def test_items_of_clusters_are_not_taken_for_independent(alike, of):
    rng = np.random.default_rng(7)
    clusters, found, naive = np.repeat(np.arange(60), 6), [], []
    for _ in range(WORLDS):
        shared, own = rng.random(60)[clusters], rng.random(360)
        right = np.where(rng.random(360) < alike, shared, own) < 0.7
        found.append(getattr(st, of)(right, clusters))
        naive.append(getattr(st, of)(right))
    assert 0.93 <= coverage(found, 0.7) <= 0.97
    if alike == 1.0:
        assert coverage(naive, 0.7) < 0.6


def test_clusters_may_differ_in_size():
    rng, found = np.random.default_rng(1), []
    clusters = np.repeat(np.arange(40), np.arange(40) % 5 + 1)
    for _ in range(WORLDS):
        found.append(
            st.mean(rng.normal(size=40)[clusters] + rng.normal(size=len(clusters)), clusters)
        )
    assert 0.93 <= coverage(found, 0.0) <= 0.97


def test_the_bootstrap_of_a_ratio_holds_the_truth():
    rng, found = np.random.default_rng(2), []
    clusters = np.repeat(np.arange(40), 3)
    for world in range(600):
        x = rng.exponential(1.0, 40)[clusters] + rng.exponential(1.0, 120)
        y = rng.exponential(2.0, 120)

        def ratio(i, x=x, y=y):
            return x[i].sum() / y[i].sum()

        found.append(st.bootstrap(ratio, 120, clusters, 200, world))
    assert 0.92 <= coverage(found, 1.0) <= 0.98


def test_a_mean_with_clusters_of_one_is_the_plain_one():
    x = np.random.default_rng(0).normal(size=50)
    found, plain = st.mean(x, list("ab" * 25)), st.mean(x)
    assert plain.error == pytest.approx(stats.sem(x)) and plain == st.mean(x, range(50))
    assert (found.clusters, found.items) == (2, 50)
    # Every item twice over is as much information as every item once.
    assert st.mean(np.repeat(x, 2), np.repeat(np.arange(50), 2)).error == pytest.approx(plain.error)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_right_or_all_wrong_is_not_certain(value):
    for found in (st.mean([value] * 20), st.share([value] * 20)):
        assert found.value == value
        assert (found.high > 0.1) if value == 0 else (found.low < 0.9)
        assert 0 <= found.low <= found.high <= 1
    four = np.repeat(np.arange(4), 5)
    wide = st.share([value] * 20, four)
    assert wide.high - wide.low > 0.4  # four stories, not twenty


def test_one_cluster_tells_nothing_of_its_spread():
    found = st.share([1, 0, 1], ["story"] * 3)
    assert found.value == pytest.approx(2 / 3) and (found.low, found.high) == (0, 1)
    assert math.isnan(found.error)
    with pytest.raises(ValueError, match="no items"):
        st.mean([])
    with pytest.raises(ValueError, match="3 items and clusters of 2"):
        st.mean([1, 2, 3], [0, 1])


def test_pairs_cancel_what_they_have_in_common():
    rng = np.random.default_rng(4)
    hard = rng.normal(0, 5, 200)
    one, other = hard + 0.5 + rng.normal(size=200), hard + rng.normal(size=200)
    found, p = st.difference(one, other)
    assert found.low < 0.5 < found.high and p < 0.001
    assert p == pytest.approx(stats.ttest_rel(one, other).pvalue)
    assert st.difference(one, one) == (st.Estimate(0.0, 0.0, 0.0, 0.0, 200, 200), 1.0)


def test_without_a_difference_one_in_twenty_is_significant():
    rng = np.random.default_rng(5)
    clusters = np.repeat(np.arange(25), 4)
    found = []
    for _ in range(WORLDS):
        gap = rng.normal(size=25)[clusters] + rng.normal(size=100)
        found.append(st.difference(gap, np.zeros(100), clusters)[1] < 0.05)
    assert 0.03 <= np.mean(found) <= 0.07


def test_holm_is_as_he_published():
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.6, 0.7]) == [1.0, 1.0]
    adjusted = st.holm([0.01, math.nan])
    assert adjusted[0] == 0.01 and math.isnan(adjusted[1])


def test_permutations_count_what_is_as_extreme():
    labels = np.array([1, 1, 1, 0, 0, 0])
    scores = np.array([9.0, 8.0, 7.0, 1.0, 2.0, 3.0])
    p = st.permutation_p(lambda y: scores @ y, labels, draws=20_000)
    assert p == pytest.approx(1 / 20, abs=0.005)  # one of the C(6, 3) ways


@pytest.mark.parametrize("right, drawn, k", [(0, 5, 2), (1, 5, 1), (2, 6, 3), (5, 5, 1), (4, 5, 3)])
def test_pass_at_k_is_the_share_of_all_draws(right, drawn, k):
    draws = list(combinations([True] * right + [False] * (drawn - right), k))
    assert st.pass_at_k(right, drawn, k) == pytest.approx(np.mean([any(draw) for draw in draws]))
    for wrong in ((drawn + 1, drawn, k), (right, drawn, drawn + 1), (right, drawn, 0)):
        with pytest.raises(ValueError, match="pass@"):
            st.pass_at_k(*wrong)


def test_the_interval_of_a_ratio_holds_the_truth_and_a_mean_is_one():
    rng, found = np.random.default_rng(4), []
    for _ in range(WORLDS):
        under = rng.integers(1, 9, 60)
        found.append(st.ratio(under * rng.gamma(4.0, 0.5, 60), under))
    assert 0.93 <= coverage(found, 2.0) <= 0.97
    x, clusters = rng.normal(size=30), np.repeat(np.arange(10), 3)
    assert st.ratio(x, np.ones(30), clusters) == pytest.approx(st.mean(x, clusters))
    with pytest.raises(ValueError, match="2 items over 1"):
        st.ratio([1, 2], [1])
