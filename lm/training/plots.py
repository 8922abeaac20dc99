"""Pictures of training and evaluation loss: of a run, and of several side by side."""

from __future__ import annotations

import itertools
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from lm.config import check
from lm.files import replacing
from lm.training.metrics import read_metrics

# Of curves side by side.
COLOURS = ("#4c78a8", "#e45756", "#54a24b", "#b279a2", "#f58518", "#72b7b2", "#9d755d", "#8c8c8c")
_TRAIN, _EVAL, INK, FAINT = "#4c78a8", "#e45756", "#333333", "#dddddd"


class _Curves(NamedTuple):
    """The losses of a run: (steps, values) of the training and of the evaluation loss."""

    train: tuple[list[int], list[float]]
    held_out: tuple[list[int], list[float]]
    colours: tuple[Any, Any]
    labels: tuple[str, str | None]


def plot_losses(
    workdir: str | os.PathLike[str], file: str | os.PathLike[str] | None = None
) -> pathlib.Path:
    """Draws `workdir/loss.png` (or `file`) from `metrics.jsonl` and returns its path.

    The training loss is drawn as logged, pale, under its running mean; the evaluation loss as
    points, its best one labelled. A second axis counts tokens where the records have `tokens`.

    Raises:
      ConfigError: there are no metrics, or no finite loss among them.
    """
    workdir = pathlib.Path(workdir)
    records = read_metrics(workdir)
    steps, losses = held_out = series(records, "eval_loss")
    train = series(records, "loss")
    check(bool(train[0] or steps), f"{workdir} has no finite loss to plot in its metrics.jsonl")
    curves = _Curves(train, held_out, (_TRAIN, _EVAL), ("training", "evaluation"))
    figure, axes = _drawn([curves], workdir.resolve().name)
    if steps:
        best = min(range(len(losses)), key=losses.__getitem__)
        axes.annotate(
            f"best {losses[best]:.3f}",
            (steps[best], losses[best]),
            xytext=(0, 9),
            textcoords="offset points",
            ha="right" if best > len(steps) / 2 else "left",
            color=_EVAL,
            fontsize=9,
            fontweight="bold",
        )
    _count_tokens(axes, records)
    return save(figure, workdir / "loss.png" if file is None else pathlib.Path(file))


def plot_runs(
    runs: Mapping[str, list[dict[str, Any]]], path: pathlib.Path, against: str = "step"
) -> pathlib.Path:
    """Draws the losses of several runs, each in its colour, to `path`, and returns it.

    Args:
      runs: records (`read_metrics`) by what the legend calls their run.
      path: of the PNG.
      against: what the horizontal axis counts: "step" or "tokens".

    Raises:
      ConfigError: a run without a finite loss, or without what it is drawn against.
    """
    import matplotlib

    few = len(runs) <= 10
    colours = matplotlib.colormaps["tab10" if few else "turbo"]
    every = []
    for number, (name, records) in enumerate(runs.items()):
        name = f"./{name}" if name.startswith("_") else name  # which a legend leaves out
        colour = colours(number if few else number / len(runs))
        train, held_out = (series(records, loss, against) for loss in ("loss", "eval_loss"))
        check(
            bool(train[0] or held_out[0]),
            f"{name} has no finite loss against {against!r} in its metrics.jsonl",
        )
        labels = (name, None if train[0] else name)
        every.append(_Curves(train, held_out, (colour, colour), labels))
    held = any(curves.held_out[0] for curves in every)
    title = "Training loss" + (", and evaluation loss as points" if held else "")
    return save(_drawn(every, title, against)[0], path)


def _drawn(every: list[_Curves], title: str, against: str = "step"):
    """A figure of these curves, and its axes."""
    figure = figure_of(figsize=(7.2, 4.2), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    for (steps, losses), held_out, (colour, eval_colour), (label, eval_label) in every:
        if steps:
            axes.plot(steps, losses, color=colour, alpha=0.3, linewidth=0.8)
            axes.plot(steps, _running_mean(losses), color=colour, linewidth=1.8, label=label)
        if held_out[0]:
            points = {"linewidth": 1.2, "marker": "o", "markersize": 3.5}
            axes.plot(*held_out, color=eval_colour, label=eval_label, **points)
    _dress(axes, title, against, [series for curves in every for series in curves[:2]])
    return figure, axes


def figure_of(**style: Any) -> Any:
    """A figure apart from pyplot: none is global, and a notebook's backend stays its own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(**style)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: pathlib.Path) -> pathlib.Path:
    """Writes a PNG, which appears whole or not at all."""
    with replacing(path) as file:
        figure.savefig(file, format="png")
    return path


def bare(axes: Any) -> None:
    """As little ink as the eye needs: a grid across, and the bottom of the frame."""
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#999999")
    axes.tick_params(which="both", colors=INK, labelsize=9, length=0)


def _dress(axes: Any, title: str, against: str, drawn: list[tuple[list[int], list[float]]]) -> None:
    """Title, axes, grid and legend: as little ink as the eye needs."""
    steps = [step for some, _ in drawn for step in some]
    losses = [loss for _, some in drawn for loss in some]
    low, high = min(losses), max(losses)
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(min(0, *steps), max(steps) * 1.02 or 1)
    title = axes.set_title(title, color=INK, fontsize=11)
    axes.set_xlabel(against, color=INK)
    axes.set_ylabel("loss (nats per token)", color=INK)
    bare(axes)
    axes.xaxis.set_major_formatter(lambda value, _: _count(value))
    legend = axes.legend(frameon=False, labelcolor=INK, fontsize=10, loc="upper right")
    for text in (title, *legend.get_texts()):
        text.set_parse_math(False)  # a directory may be called "$x$"


def _count_tokens(axes: Any, records: list[dict[str, Any]]) -> None:
    """A second axis, on top, where the records have `tokens`."""
    per_step = _tokens_per_step(records)
    if not per_step:
        return
    top = axes.secondary_xaxis("top", functions=(lambda s: s * per_step, lambda t: t / per_step))
    top.set_xlabel("tokens", color=INK, fontsize=9)
    top.xaxis.set_major_formatter(lambda value, _: _count(value))
    top.tick_params(colors=INK, labelsize=9, length=0)
    top.spines["top"].set_visible(False)


def series(
    records: list[dict[str, Any]], name: str, against: str = "step"
) -> tuple[list[int], list[float]]:
    """The finite values of `name`, and the step (or tokens) of each.

    Records of evaluations have no tokens of their own: those of the step they follow.
    """
    places, values, last = [], [], {}
    for record in records:
        last |= record
        if math.isfinite(record.get(name, math.nan)) and against in last:
            places.append(last[against])
            values.append(record[name])
    return places, values


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
