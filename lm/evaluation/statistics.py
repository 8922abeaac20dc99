"""Scores with their uncertainty: standard errors, intervals, tests.

Items that share a story, a template or a question are not independent; they are a cluster, and a
score's standard error is that of the clusters' sums (Liang & Zeger 1986; Miller 2024, "Adding Error
Bars to Evals", eq. 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95  # of every interval
NORMAL = float(stats.norm.ppf((1 + LEVEL) / 2))  # half of it, in standard errors


class Estimate(NamedTuple):
    """A score and how sure it is."""

    value: float
    error: float  # standard error; NaN where one item, or one cluster, tells nothing of it
    low: float  # of the interval of `LEVEL`
    high: float
    items: int
    clusters: int

    @property
    def bracketed(self) -> str:
        """The value with the ends of its interval, such as 0.42 [0.30, 0.55]."""
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {(self.high - self.low) / 2:.3f}"


def mean(
    values: Sequence[float] | np.ndarray, clusters: Sequence[Hashable] | None = None
) -> Estimate:
    """The mean of items' scores, its interval by Student's t over the clusters.

    Scores that are all 0 or all 1 have no spread to read an interval from; theirs is Wilson's, of
    as many trials as there are clusters.

    Args:
      values: a score of each item [N].
      clusters: what each item shares with others; each its own unless given.

    Raises:
      ValueError: there are no items, or not as many clusters.
    """
    x_N = np.asarray(values, np.float64)
    if not x_N.size:
        raise ValueError("a mean of no items")
    groups_N = _groups(clusters, x_N.size)
    number = int(groups_N.max()) + 1
    value = float(x_N.mean())
    if number == 1:
        return Estimate(value, math.nan, -math.inf, math.inf, x_N.size, 1)
    sums_G = np.bincount(groups_N, x_N - value, number)
    error = math.sqrt(number / (number - 1) * float(sums_G @ sums_G)) / x_N.size
    if not error and value in (0.0, 1.0):
        low, high = wilson(round(value * number), number)
        return Estimate(value, error, low, high, x_N.size, number)
    return _by_t(value, error, x_N.size, number)


def share(
    right: Sequence[bool] | np.ndarray, clusters: Sequence[Hashable] | None = None
) -> Estimate:
    """The share of items that are right: a mean whose interval stays within 0 and 1.

    Wilson's interval (1927) of independent items; of clusters, of as many independent items as
    would have the clustered standard error (Kish 1965, design effect).
    """
    x_N = np.asarray(right, np.float64)
    found = mean(x_N, clusters)
    if found.clusters == 1:
        return found._replace(low=0.0, high=1.0)
    simple = found.value * (1 - found.value) / found.items
    effect = found.error**2 / simple if simple else found.items / found.clusters
    trials = found.items / max(effect, 1.0)
    low, high = wilson(found.value * trials, trials)
    return found._replace(low=low, high=high)


def wilson(right: float, trials: float) -> tuple[float, float]:
    """The score interval of a proportion (Wilson 1927)."""
    z = NORMAL
    share = right / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    spread = math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    half = z * spread / (1 + z * z / trials)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return 0.0 if not right else low, 1.0 if right == trials else high  # to the last bit


def difference(
    one: Sequence[float] | np.ndarray,
    other: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
) -> tuple[Estimate, float]:
    """The mean of `one` − `other` on the same items, and the p-value of its being none.

    A paired t test over the clusters: what items have in common cancels, so it tells apart what the
    intervals of the two means do not.
    """
    found = mean(np.asarray(one, np.float64) - np.asarray(other, np.float64), clusters)
    if found.clusters == 1:
        return found, math.nan
    if not found.error:
        return found._replace(low=found.value, high=found.value), float(found.value == 0)
    t = abs(found.value) / found.error
    return found, float(2 * stats.t.sf(t, found.clusters - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of many comparisons, such that one of them errs as rarely as one alone would.

    Holm (1979); NaN stays NaN and counts as no comparison.
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, worst = list(p_values), 0.0
    for rank, (p, i) in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * p))
        adjusted[i] = worst
    return adjusted


def ratio(
    over: Sequence[float] | np.ndarray,
    under: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
) -> Estimate:
    """Σ `over` / Σ `under`, such as bits over bytes, its interval by Student's t over the clusters.

    The standard error is linearised: that of Σ (over − ratio · under) over Σ under (Cochran 1977,
    ch. 6). Where `under` is 1 everywhere it is that of `mean`.

    Args:
      over, under: of each item [N]; Σ `under` is above 0.
      clusters: see `mean`.

    Raises:
      ValueError: there are no items, or not as many of `under` or clusters.
    """
    x_N, w_N = np.asarray(over, np.float64), np.asarray(under, np.float64)
    if not x_N.size or x_N.shape != w_N.shape:
        raise ValueError(f"a ratio of {x_N.size} items over {w_N.size}")
    groups_N = _groups(clusters, x_N.size)
    number = int(groups_N.max()) + 1
    value = float(x_N.sum() / w_N.sum())
    if number == 1:
        return Estimate(value, math.nan, -math.inf, math.inf, x_N.size, 1)
    sums_G = np.bincount(groups_N, x_N - value * w_N, number)
    error = math.sqrt(number / (number - 1) * float(sums_G @ sums_G)) / float(w_N.sum())
    return _by_t(value, error, x_N.size, number)


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    items: int,
    clusters: Sequence[Hashable] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """A statistic of items that is no mean, its interval by resampling whole clusters.

    The basic interval of Student's t with the bootstrap's standard error (Efron & Tibshirani 1993,
    ch. 12), as that of `mean`.

    Args:
      statistic: of the numbers of the items that were drawn [M], each as often as it was.
      items: how many there are.
      clusters: see `mean`.
      draws: resamples.
      seed: of the resampling.
    """
    groups_N = _groups(clusters, items)
    number = int(groups_N.max()) + 1
    members = np.split(np.argsort(groups_N, kind="stable"), np.cumsum(np.bincount(groups_N))[:-1])
    rng, value = np.random.default_rng(seed), float(statistic(np.arange(items)))
    if number == 1:
        return Estimate(value, math.nan, -math.inf, math.inf, items, 1)
    found = []
    for _ in range(draws):
        drawn = rng.integers(number, size=number)
        found.append(statistic(np.concatenate([members[group] for group in drawn])))
    error = float(np.nanstd(found, ddof=1))
    return _by_t(value, error, items, number)


def permutation_p(
    statistic: Callable[[np.ndarray], float], labels: np.ndarray, draws: int = 10_000, seed: int = 0
) -> float:
    """How often labels that were shuffled give as much as those there are, these included.

    (b + 1) / (draws + 1), which is never 0 (Phipson & Smyth 2010).
    """
    rng, found = np.random.default_rng(seed), statistic(labels)
    more = sum(statistic(rng.permutation(labels)) >= found - 1e-12 for _ in range(draws))
    return (more + 1) / (draws + 1)


def pass_at_k(right: int, drawn: int, k: int) -> float:
    """The chance that one of k samples is right, where `right` of `drawn` are.

    1 − C(drawn − right, k) / C(drawn, k), which is unbiased (Chen et al. 2021).

    Raises:
      ValueError: not 0 <= right <= drawn, or not 1 <= k <= drawn.
    """
    if not 0 <= right <= drawn or not 1 <= k <= drawn:
        raise ValueError(f"pass@{k} of {right} right ones of {drawn}")
    return 1 - math.comb(drawn - right, k) / math.comb(drawn, k)


def _by_t(value: float, error: float, items: int, clusters: int) -> Estimate:
    """With the interval of Student's t over the clusters."""
    half = float(stats.t.ppf((1 + LEVEL) / 2, clusters - 1)) * error
    return Estimate(value, error, value - half, value + half, items, clusters)


def _groups(clusters: Sequence[Hashable] | None, items: int) -> np.ndarray:
    """The number of each item's cluster."""
    if clusters is None:
        return np.arange(items)
    if len(clusters) != items:
        raise ValueError(f"{items} items and clusters of {len(clusters)}")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(one, len(numbers)) for one in clusters])
