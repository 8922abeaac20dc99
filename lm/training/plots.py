"""The picture of a run: training and evaluation loss against steps and tokens."""

from __future__ import annotations

import itertools
import math
import os
import pathlib
from typing import Any

from lm.config import ConfigError
from lm.training.metrics import read_metrics

_TRAIN, _EVAL, _INK, _FAINT = "#4c78a8", "#e45756", "#333333", "#dddddd"


def plot_losses(
    workdir: str | os.PathLike[str], file: str | os.PathLike[str] | None = None
) -> pathlib.Path:
    """Draws `workdir/loss.png` (or `file`) from `metrics.jsonl` and returns its path.

    The training loss is drawn as logged, pale, under its running mean; the evaluation loss as
    points, its best one labelled. A second axis counts tokens where the records have `tokens`.

    Raises:
      ConfigError: there are no metrics, or no finite loss among them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    workdir = pathlib.Path(workdir)
    path = pathlib.Path(file) if file is not None else workdir / "loss.png"
    records = read_metrics(workdir)
    train, held_out = _series(records, "loss"), _series(records, "eval_loss")
    if not train[0] and not held_out[0]:
        raise ConfigError(f"{workdir} has no finite loss to plot in its metrics.jsonl")

    # Not through pyplot: no global figure, and whatever backend a notebook uses stays its own.
    figure = Figure(figsize=(7.2, 4.2), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train[0]:
        axes.plot(*train, color=_TRAIN, alpha=0.3, linewidth=0.8)
        axes.plot(train[0], _running_mean(train[1]), color=_TRAIN, linewidth=1.8, label="training")
    if held_out[0]:
        axes.plot(
            *held_out, color=_EVAL, linewidth=1.2, marker="o", markersize=3.5, label="evaluation"
        )
        best = min(range(len(held_out[1])), key=lambda i: held_out[1][i])
        axes.annotate(
            f"best {held_out[1][best]:.3f}",
            (held_out[0][best], held_out[1][best]),
            xytext=(0, 9),
            textcoords="offset points",
            ha="right" if best > len(held_out[0]) / 2 else "left",
            color=_EVAL,
            fontsize=9,
            fontweight="bold",
        )
    _dress(axes, records, *train, *held_out)
    scratch = path.with_name(f".{path.name}.partial")
    figure.savefig(scratch, format="png")
    scratch.replace(path)
    return path


def _dress(axes: Any, records: list[dict[str, Any]], *series: list[float]) -> None:
    """Axes, grid and legend: as little ink as the eye needs."""
    steps, losses = [*series[0], *series[2]], [*series[1], *series[3]]
    low, high = min(losses), max(losses)
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(min(0, *steps), max(steps) * 1.02 or 1)
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("loss (nats per token)", color=_INK)
    axes.grid(axis="y", color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#999999")
    axes.tick_params(colors=_INK, labelsize=9, length=0)
    axes.xaxis.set_major_formatter(lambda value, _: _count(value))
    per_step = _tokens_per_step(records)
    if per_step:
        top = axes.secondary_xaxis(
            "top", functions=(lambda s: s * per_step, lambda t: t / per_step)
        )
        top.set_xlabel("tokens", color=_INK, fontsize=9)
        top.xaxis.set_major_formatter(lambda value, _: _count(value))
        top.tick_params(colors=_INK, labelsize=9, length=0)
        top.spines["top"].set_visible(False)
    axes.legend(frameon=False, labelcolor=_INK, fontsize=10, loc="upper right")


def _series(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(r["step"], r[name]) for r in records if name in r and math.isfinite(r[name])]
    return [step for step, _ in points], [value for _, value in points]


def _running_mean(values: list[float]) -> list[float]:
    """Mean over about a fiftieth of the run, centred so that it does not lag where the loss falls.

    Towards both ends the window narrows, and stays centred.
    """
    half = len(values) // 100
    sums = [0.0, *itertools.accumulate(values)]
    means = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        means.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return means


def _tokens_per_step(records: list[dict[str, Any]]) -> float:
    counted = [r for r in records if r["step"] > 0 and r.get("tokens", 0) > 0]
    return counted[-1]["tokens"] / counted[-1]["step"] if counted else 0.0


def _count(value: float) -> str:
    """1500 -> '1.5k', 2e9 -> '2B'."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
