"""Scores over training and over size: which of them jump, and the picture of it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.training.plots import COLOURS, INK, bare, figure_of, save

# Fields of `lm.evaluation.emergence.Answers`, in words.
METRICS = {
    "exact": "exact match",
    "power": "tokens right, to the power of the length",
    "tokens": "tokens right, share",
    "brier": "Brier score of a character",
    "edits": "edit distance, characters",
    "logprob": "log-likelihood, nats per token",
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """What a run made of one set of questions while it was trained."""

    run: str
    corpus: str  # it was trained on
    what: str  # it was asked
    parameters: int
    steps: list[int]
    means: list[dict[str, float]]  # at each step, of `Answers`

    def values(self, field: str) -> np.ndarray:
        """One of the numbers, at each step."""
        return np.array([each[field] for each in self.means])

    def within(self, field: str, first: float, last: float) -> float:
        """The share of a number's way, from its first value to its last, between two steps."""
        ends = np.interp([first, last], self.steps, self.values(field))
        way = self.values(field)[-1] - self.values(field)[0]
        return float((ends[1] - ends[0]) / way) if way else 0.0


def jump(curve: Curve) -> tuple[float, float]:
    """The steps at which the exact match has 10 % and 90 % of its way behind it, interpolated."""
    values = curve.values("exact")
    way = values[-1] - values[0]
    if not way:
        return float(curve.steps[0]), float(curve.steps[-1])
    done = np.maximum.accumulate((values - values[0]) / way)
    return tuple(_crossed(curve.steps, done, share) for share in (0.1, 0.9))


def _crossed(steps: Sequence[int], done: np.ndarray, share: float) -> float:
    after = int(np.argmax(done >= share))
    before = max(0, after - 1)
    gap = done[after] - done[before]
    part = (share - done[before]) / gap if gap else 0.0
    return steps[before] + float(part) * (steps[after] - steps[before])


def draw(curves: Sequence[Curve], path: pathlib.Path) -> pathlib.Path:
    """Draws a row of panels for each corpus, and returns `path`.

    Of one set of questions: every number of the largest run over training, the log-likelihood of
    all runs, and where they end by size. Of several sets: each one's exact match and
    log-likelihood over training, and where they end.
    """
    rows: dict[str, list[Curve]] = {}
    for curve in curves:
        rows.setdefault(curve.corpus, []).append(curve)
    figure = figure_of(figsize=(12, 4 * len(rows)), dpi=120, layout="constrained")
    grid = figure.subplots(len(rows), 3, squeeze=False)
    for axes, (corpus, some) in zip(grid, rows.items()):
        one_set = len({curve.what for curve in some}) == 1
        (_one_set if one_set else _several_sets)(axes, corpus, some)
    return save(figure, path)


def _one_set(axes: Sequence[Any], corpus: str, curves: list[Curve]) -> None:
    by_size = sorted(curves, key=lambda curve: curve.parameters)
    largest = by_size[-1]
    fields = ("exact", "power", "tokens", "brier")
    for field, colour in zip(fields, COLOURS):
        style = {"linestyle": "--"} if field == "power" else {}
        axes[0].plot(
            largest.steps, largest.values(field), color=colour, label=METRICS[field], **style
        )
    first, last = jump(largest)
    grey = {"color": "#999999", "alpha": 0.15, "linewidth": 0}
    axes[0].axvspan(first, last, label="exact match goes from 10 % to 90 %", **grey)
    _dress(axes[0], f"{corpus}: {largest.parameters:,} parameters", "step")
    for curve, colour in zip(by_size, COLOURS):
        label = f"{curve.parameters:,} parameters"
        axes[1].plot(curve.steps, curve.values("logprob"), color=colour, label=label)
    axes[1].axvspan(first, last, **grey)
    _dress(axes[1], METRICS["logprob"], "step")
    sizes = [curve.parameters for curve in by_size]
    for field, colour in zip(fields, COLOURS):
        ends = [curve.values(field)[-1] for curve in by_size]
        style = {"linestyle": "--"} if field == "power" else {}
        axes[2].plot(sizes, ends, color=colour, marker="o", markersize=4, **style)
    axes[2].set_xscale("log")
    axes[2].set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes[2].minorticks_off()
    _dress(axes[2], "at the end, by size", "parameters", legend=False)


def _several_sets(axes: Sequence[Any], corpus: str, curves: list[Curve]) -> None:
    for axis, field in zip(axes, ("exact", "logprob")):
        for curve, colour in zip(curves, COLOURS):
            axis.plot(curve.steps, curve.values(field), color=colour, label=curve.what)
        _dress(axis, f"{corpus}: {METRICS[field]}", "step", legend=field == "exact")
    ends = [curve.values("exact")[-1] for curve in curves]
    places = range(len(curves))
    axes[2].barh(places, ends, color=COLOURS[: len(curves)], height=0.6)
    axes[2].set_yticks(places, [curve.what for curve in curves])
    axes[2].invert_yaxis()
    for place, end in zip(places, ends):
        axes[2].text(end + 0.02, place, f"{end:.3f}", va="center", color=INK, fontsize=9)
    axes[2].set_xlim(0, 1.15)
    _dress(axes[2], "exact match at the end", "", legend=False)


def _dress(axes: Any, title: str, against: str, legend: bool = True) -> None:
    axes.set_title(title, color=INK, fontsize=10)
    axes.set_xlabel(against, color=INK, fontsize=9)
    bare(axes)
    if legend:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2}
        axes.legend(frameon=False, labelcolor=INK, fontsize=8, **below)
