"""Scores and pictures of confidences: are they calibrated, do they tell right from wrong."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from lm.evaluation.card import Picture, Score, Table, axes, picture
from lm.evaluation.statistics import bootstrap, mean
from lm.evaluation.uncertainty import auroc, brier, ece, ece_by_chance, reliability, risk_coverage
from lm.training.plots import COLOURS, FAINT

ENOUGH = 5  # right answers, and wrong ones, without which nothing tells them apart
_BY_CHANCE = 200  # worlds in which confidences are what they say


def calibration(
    name: str,
    confidence: Sequence[float] | np.ndarray,
    right: Sequence[bool] | np.ndarray,
    clusters: Sequence[Hashable],
    asked: str,
    bins: int = 10,
    draws: int = 500,
) -> list[Score]:
    """How far confidences are from how often they are right: ECE of both kinds of bins, and Brier.

    ECE is above 0 by chance, and more so with few answers: `Score.chance` is what calibrated
    confidences would have, and an ECE that one in twenty of these exceeds has an interval from 0.

    Args:
      name: of the confidence, before the scores' own.
      confidence, right, clusters: of each answer [N].
      asked: see `Score`.
      bins: of ECE.
      draws: resamples of clusters.
    """
    c_N, right_N = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    scores = []
    for equal in ("width", "mass"):
        chance, most = ece_by_chance(c_N, bins, equal, _BY_CHANCE)
        found = bootstrap(
            lambda i, equal=equal: ece(c_N[i], right_N[i], bins, equal), len(c_N), clusters, draws
        )
        low = 0.0 if found.value <= most else max(0.0, found.low)
        found = found._replace(low=low, high=min(1.0, found.high))
        about = (
            f"mean |accuracy − confidence| over {bins} bins of equal {equal}; chance: of "
            "calibrated confidences"
        )
        fields = {"better": "lower", "about": about, "chance": chance, "fraction": True}
        scores.append(Score(f"{name}: ECE, equal {equal}", found, **fields))
    squares_N = (c_N - right_N) ** 2
    share = float(right_N.mean())
    square = mean(squares_N, clusters)
    square = square._replace(low=max(0.0, square.low), high=min(1.0, square.high))
    usual = brier(np.full(len(c_N), share), right_N)
    about = f"mean (confidence − right)², 0 to 1; one who always says {share:.2f} has {usual:.3f}"
    fields = {"clusters": clusters, "asked": asked, "estimate": square, "fraction": True}
    return [*scores, Score.mean(f"{name}: Brier", squares_N, "lower", about, **fields)]


def telling_apart(
    measures: Mapping[str, np.ndarray],
    right: Sequence[bool] | np.ndarray,
    clusters: Sequence[Hashable],
    draws: int = 500,
) -> tuple[list[Score], list[Table]]:
    """Which measures are higher for right answers: AUROC of each, and risk at less coverage.

    Args:
      measures: of each answer, the higher the surer [N], by name.
      right, clusters: of each answer [N].
      draws: resamples of clusters.

    Returns:
      nothing where fewer than `ENOUGH` answers are right, or wrong.
    """
    right_N = np.asarray(right, bool)
    if min(right_N.sum(), (~right_N).sum()) < ENOUGH:
        return [], []
    scores, rows = [], []
    for name, x_N in {**measures, "hindsight": right_N.astype(float)}.items():
        area = bootstrap(
            lambda i, x_N=x_N: risk_coverage(x_N[i], right_N[i])[2], len(x_N), clusters, draws
        )
        found = bootstrap(lambda i, x_N=x_N: auroc(x_N[i], right_N[i]), len(x_N), clusters, draws)
        rows.append([name, found.value, area.value, area.error, *_risks(x_N, right_N)])
        if name != "hindsight":
            about = "how often a right answer has more of it than a wrong one"
            clipped = found._replace(low=max(0.0, found.low), high=min(1.0, found.high))
            fields = {"about": about, "chance": 0.5, "fraction": True}
            scores.append(Score(f"AUROC: {name}", clipped, "higher", **fields))
    head = ["measure", "AUROC", "AURC", "its error", "risk at 50 %", "at 80 %", "at 100 %"]
    return scores, [Table("Share of wrong answers if only the surest are given", head, rows)]


def _risks(x_N: np.ndarray, right_N: np.ndarray) -> list[float]:
    """The risk at the least coverage of at least 50, 80 and 100 %."""
    coverage, risk, _ = risk_coverage(x_N, right_N)
    return [float(risk[np.argmax(coverage >= least - 1e-9)]) for least in (0.5, 0.8, 1.0)]


def reliability_diagram(
    title: str, confidences: Mapping[str, tuple[np.ndarray, np.ndarray]], bins: int = 10
) -> Picture:
    """Accuracy over confidence, a dot for each bin of equal mass, the larger the more answers.

    Args:
      title: of the picture.
      confidences: (confidence [N], right [N]) by name.
      bins: of each.
    """
    drawn = axes("confidence", "share that is right", (5.2, 4.4))
    drawn.plot([0, 1], [0, 1], color=FAINT, linewidth=1.5, zorder=1)
    for (name, (c_N, right_N)), colour in zip(confidences.items(), COLOURS):
        found = reliability(c_N, right_N, bins, "mass")
        x, y = [one.confidence for one in found], [one.accuracy for one in found]
        drawn.plot(x, y, color=colour, linewidth=1, alpha=0.35, zorder=2)
        sizes = [12 + 160 * one.items / len(c_N) for one in found]
        drawn.scatter(x, y, sizes, color=colour, label=name, zorder=3)
    drawn.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    return picture(title, drawn.figure, fontsize=8, loc="upper left")


def risk_picture(title: str, measures: Mapping[str, np.ndarray], right: np.ndarray) -> Picture:
    """The share of wrong answers over the share that is given, the surest first."""
    drawn = axes("share of answers given", "share of them wrong", (5.2, 4.0))
    risk = 1 - float(np.mean(right))
    drawn.plot([0, 1], [risk, risk], color=FAINT, linewidth=1.5, zorder=1)
    highest = risk
    for (name, x_N), colour in zip(measures.items(), COLOURS):
        coverage, risks, _ = risk_coverage(x_N, right)
        shown = coverage >= min(1.0, 20 / len(x_N))  # what fewer answers say is noise
        drawn.plot(coverage[shown], risks[shown], color=colour, linewidth=1.6, label=name)
        highest = max(highest, *risks[shown])
    drawn.set(xlim=(0, 1.01), ylim=(0, highest * 1.15 if highest else 1))
    return picture(title, drawn.figure, fontsize=8, loc="best")
