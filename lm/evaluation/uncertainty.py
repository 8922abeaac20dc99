"""Does a model know what it knows: calibration, entropy of meanings, risk and coverage."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Bin(NamedTuple):
    """Answers of about the same confidence: a point of the reliability diagram."""

    low: float  # confidences, from
    high: float  # to
    items: int
    confidence: float  # mean
    accuracy: float  # share that is right


def reliability(
    confidence: Sequence[float] | np.ndarray,
    right: Sequence[bool] | np.ndarray,
    bins: int = 10,
    equal: str = "width",
) -> list[Bin]:
    """Answers sorted into bins by confidence; empty ones are left out.

    Args:
      confidence: that each answer is right, from 0 to 1 [N].
      right: whether it is [N].
      bins: how many.
      equal: "width": all of 1 / `bins`; "mass": all of as many answers, ties in one bin.

    Raises:
      ValueError: a confidence is no probability, or `equal` none of both.
    """
    c_N, right_N = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    if not ((c_N >= 0) & (c_N <= 1)).all():
        raise ValueError("a confidence is from 0 to 1")
    if equal == "width":
        edges = np.linspace(0, 1, bins + 1)
    elif equal == "mass":
        last = [-(-b * len(c_N) // bins) - 1 for b in range(1, bins + 1)]
        edges = np.unique([0.0, *np.sort(c_N)[last]])
    else:
        raise ValueError(f"equal={equal!r}: 'width' or 'mass'")
    # A bin is (low, high], and the first has its lower end, too.
    place_N = np.clip(np.searchsorted(edges, c_N, side="left") - 1, 0, max(len(edges) - 2, 0))
    found = []
    for place in np.unique(place_N):
        inside = place_N == place
        low, high = float(edges[place]), float(edges[min(place + 1, len(edges) - 1)])
        count, mean = int(inside.sum()), float(c_N[inside].mean())
        found.append(Bin(low, high, count, mean, float(right_N[inside].mean())))
    return found


def ece(
    confidence: Sequence[float] | np.ndarray,
    right: Sequence[bool] | np.ndarray,
    bins: int = 10,
    equal: str = "width",
) -> float:
    """Expected calibration error: Σ n_b/n |accuracy_b − confidence_b| (Naeini et al. 2015).

    See `reliability`. It is above 0 by chance, too: `ece_by_chance` says by how much.
    """
    found = reliability(confidence, right, bins, equal)
    total = sum(one.items for one in found)
    return sum(one.items / total * abs(one.accuracy - one.confidence) for one in found)


def ece_by_chance(
    confidence: Sequence[float] | np.ndarray,
    bins: int = 10,
    equal: str = "width",
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """The mean and the 95th percentile of the ECE of answers as right as their confidences say."""
    rng, c_N = np.random.default_rng(seed), np.asarray(confidence, np.float64)
    found = [ece(c_N, rng.random(len(c_N)) < c_N, bins, equal) for _ in range(draws)]
    return float(np.mean(found)), float(np.quantile(found, 0.95))


def brier(confidence: Sequence[float] | np.ndarray, right: Sequence[bool] | np.ndarray) -> float:
    """Mean of (confidence − right)², from 0 to 1; 0.25 for one who always says one half."""
    gap_N = np.asarray(confidence, np.float64) - np.asarray(right, np.float64)
    return float(np.mean(gap_N**2))


def brier_of_choices(
    probabilities: Sequence[Sequence[float]] | np.ndarray, answers: Sequence[int] | np.ndarray
) -> float:
    """Mean of Σ_k (p_k − [k is right])² over choices, from 0 to 2 (Brier 1950)."""
    p_NK = np.asarray(probabilities, np.float64)
    return float(np.mean(((p_NK - np.eye(p_NK.shape[1])[np.asarray(answers)]) ** 2).sum(-1)))


def clusters(answers: Sequence[str], same: Callable[[str, str], bool]) -> list[int]:
    """The meaning of each answer, by number: the first whose first member means the same.

    Greedy, as Kuhn et al. (2023) cluster; `same` is asked of (first member, answer).
    """
    firsts: list[str] = []
    found = []
    for answer in answers:
        for number, first in enumerate(firsts):
            if same(first, answer):
                found.append(number)
                break
        else:
            found.append(len(firsts))
            firsts.append(answer)
    return found


def predictive_entropy(
    logprobs: Sequence[float] | np.ndarray, lengths: Sequence[int] | None = None
) -> float:
    """−mean of log p(answer) over samples, in nats: the entropy of answers, by Monte Carlo.

    With `lengths` (tokens) each log-probability is divided by its own: the length-normalised
    predictive entropy (Malinin & Gales 2021).
    """
    l_N = np.asarray(logprobs, np.float64)
    return float(-np.mean(l_N if lengths is None else l_N / np.asarray(lengths)))


def semantic_entropy(logprobs: Sequence[float] | np.ndarray, meanings: Sequence[int]) -> float:
    """−Σ_c p_c log p_c, nats, p_c ∝ Σ exp(log p) of the answers that mean c, of those given.

    Farquhar et al. (2024), eq. 5 (Rao–Blackwellised); answers that were drawn twice count twice.
    """
    l_N, of_N = np.asarray(logprobs, np.float64), np.asarray(meanings)
    mass_C = np.bincount(of_N, np.exp(l_N - l_N.max()))
    return _entropy(mass_C[np.unique(of_N)])


def discrete_semantic_entropy(meanings: Sequence[int]) -> float:
    """−Σ_c p_c log p_c, nats, p_c the share of answers that mean c (Farquhar et al. 2024)."""
    return _entropy(np.unique(np.asarray(meanings), return_counts=True)[1])


def auroc(confidence: Sequence[float] | np.ndarray, right: Sequence[bool] | np.ndarray) -> float:
    """How often a right answer is held with more confidence than a wrong one, ties counting half.

    The area under the ROC curve, as Mann & Whitney (1947) count it: 0.5 for a confidence that tells
    nothing. NaN where no answer is right, or none wrong.
    """
    right_N = np.asarray(right, bool)
    yes, no = int(right_N.sum()), int((~right_N).sum())
    if not yes or not no:
        return math.nan
    ranks_N = stats.rankdata(np.asarray(confidence, np.float64))
    return float((ranks_N[right_N].sum() - yes * (yes + 1) / 2) / (yes * no))


def risk_coverage(
    confidence: Sequence[float] | np.ndarray, right: Sequence[bool] | np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """What is wrong of the answers that are given, where the least confident are withheld.

    Answers of equal confidence are given together.

    Returns:
      coverage [M], the share that is given; risk [M], the share of these that is wrong; and the
      area under risk, mean over answers (AURC, Geifman et al. 2019).
    """
    c_N, wrong_N = np.asarray(confidence, np.float64), 1 - np.asarray(right, np.float64)
    order = np.argsort(-c_N, kind="stable")
    given_N = np.arange(1, len(c_N) + 1)
    last_N = np.searchsorted(-c_N[order], -c_N[order], side="right") - 1  # of its ties
    risk_N = (np.cumsum(wrong_N[order]) / given_N)[last_N]
    ends = np.unique(last_N)
    return given_N[ends] / len(c_N), risk_N[ends], float(risk_N.mean())


def _entropy(mass: np.ndarray) -> float:
    p = mass / mass.sum()
    return float(sum(-one * math.log(one) for one in p if one))
