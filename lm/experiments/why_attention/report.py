"""What `why_attention` found: tables, one picture, and a page of Markdown."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from lm.files import replacing

_INK, _SOFT, _FAINT = "#2b2d33", "#6d7078", "#e4e4e8"
_COLOURS = {
    "RNN": "#a3a7b0",
    "GRU": "#e0a33a",
    "LSTM": "#4c78a8",
    "LSTM, one vector": "#4c78a8",
    "LSTM with attention": "#2a9d76",
    "Transformer": "#d9485f",
}
_MARKS = {"LSTM, one vector": "o", "LSTM with attention": "s", "Transformer": "D", "LSTM": "o"}


class Rows(NamedTuple):
    """A table before it is drawn: as text or as Markdown."""

    title: str
    header: list[str]
    rows: list[list[str]]


def _rows(results: dict[str, Any]) -> list[Rows]:
    found = results["gradients"]
    length, models = found["length"], found["models"]
    near = max(1, length // 4)
    tables = [
        Rows(
            "share of the last loss's gradient that arrives at a token",
            [
                "model", "parameters", f"{near} back, at start", f"{length} back, at start",
                f"{length} back, trained", "symbols repeated",
            ],
            [
                [
                    name,
                    f"{model['parameters']:,}",
                    _share(model["at_start"][near]),
                    _share(model["at_start"][length]),
                    _share(model["trained"][length]),
                    f"{model['accuracy']:.1%}",
                ]
                for name, model in models.items()
            ],
        )
    ]  # fmt: skip
    for name, unit in (("copy", "symbols"), ("translation", "words")):
        found = results["bottleneck"][name]
        tables.append(
            Rows(
                f"{name}: whole texts right, by length in {unit}",
                ["model", "parameters", *(f"{n:g}" for n in found["lengths"]), "tokens right"],
                [
                    [
                        model,
                        f"{one['parameters']:,}",
                        *(f"{share:.0%}" for share in one["exact"]),
                        f"{sum(one['tokens']) / len(one['tokens']):.1%}",
                    ]
                    for model, one in found["models"].items()
                ],
            )
        )
    found = results["speed"]
    tables.append(
        Rows(
            f"training tokens/s, {_of_rows(found)}, by length",
            ["model", "parameters", *(f"{n:,}" for n in found["lengths"])],
            [
                [name, f"{one['parameters']:,}", *(f"{n:,}" for n in one["tokens_per_second"])]
                for name, one in found["models"].items()
            ],
        )
    )
    return tables


def _of_rows(found: dict[str, Any]) -> str:
    return "one text at a time" if found["rows"] == 1 else f"{found['rows']} texts at a time"


def _share(value: float) -> str:
    return f"{value:.1%}" if value >= 1e-3 else f"{value:.0e}"


def tables(results: dict[str, Any]) -> list[Table]:
    """The results for a terminal."""
    drawn = []
    for title, header, rows in _rows(results):
        table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
        table.add_column(header[0], no_wrap=True)
        for name in header[1:]:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*row)
        drawn.append(table)
    return drawn


def report(results: dict[str, Any], config: dict[str, Any]) -> str:
    """The results as a page of Markdown, beside `why_attention.png`."""
    vanishing, copied, translated, speed = map(_markdown, _rows(results))
    bottleneck, gradients = config["bottleneck"], config["gradients"]
    steps = f"{bottleneck['steps']} steps"
    return f"""# Why attention

![Gradients by distance, speed and accuracy by length, attention](why_attention.png)

## The gradient vanishes

Language models read {gradients["length"]} random symbols, a mark, and the same symbols again.
What the last symbol is can only be known from the token {gradients["length"]} places back, so that
is where its loss should be felt. Its gradient is taken by the embedding of every token before it,
and the norms are divided by their sum.

{vanishing}
## One vector is a bottleneck

Three encoder-decoders of about as many parameters, trained for {steps} on the same batches:
an LSTM whose encoder ends in one vector (Sutskever et al. 2014), one whose decoder looks back at
all the encoder's states (Bahdanau et al. 2015), and a Transformer (Vaswani et al. 2017). A text
counts where all of it is right, as greedy decoding would write it; "tokens right" is the share of
tokens that are right given a right beginning, its mean over the lengths.

{copied}
{translated}
## A state waits for the one before it

{speed}
Made in {results["seconds"]:.0f} s. The numbers are in `results.json`, and what was asked for in
`config.json`.
"""


def _markdown(table: Rows) -> str:
    lines = [
        "| " + " | ".join(table.header) + " |",
        "| --- |" + " ---: |" * (len(table.header) - 1),
        *("| " + " | ".join(row) + " |" for row in table.rows),
    ]
    return f"{table.title[0].upper()}{table.title[1:]}:\n\n" + "\n".join(lines) + "\n"


# ---- The picture -----------------------------------------------------------------------------


def plot(results: dict[str, Any], file: str | os.PathLike[str]) -> None:
    """Draws the six panels into the PNG `file`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not through pyplot: no global figure, and whatever backend a notebook uses stays its own.
    figure = Figure(figsize=(15, 9.2), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        2, 3, left=0.055, right=0.975, top=0.835, bottom=0.075, wspace=0.24, hspace=0.52
    )
    start, trained, speed, copy, translation, pattern = (
        figure.add_subplot(grid[place]) for place in itertools.product((0, 1), (0, 1, 2))
    )
    figure.text(0.055, 0.955, "Why attention", fontsize=21, fontweight="bold", color=_INK)
    figure.text(
        0.055,
        0.922,
        "A path of one step to every token, instead of one that is as long as the text",
        fontsize=12.5,
        color=_SOFT,
    )
    _plot_gradients(start, results["gradients"], "at_start")
    _plot_gradients(trained, results["gradients"], "trained")
    _plot_speed(speed, results["speed"])
    _plot_accuracy(copy, results["bottleneck"]["copy"], "symbols to copy")
    _plot_accuracy(translation, results["bottleneck"]["translation"], "words to translate")
    translation.get_legend().remove()  # as in the panel before
    _plot_pattern(pattern, results["bottleneck"]["translation"]["pattern"])
    _title(start, "Gradients vanish", "share of the last loss's gradient, before training")
    _title(trained, "…or arrive", f"the same after {results['gradients']['steps']} steps")
    _title(speed, "States wait", f"training tokens/s, {_of_rows(results['speed'])}")
    _title(copy, "One vector is a bottleneck", "whole texts copied without a mistake")
    _title(translation, "Attention is the cure", "whole sentences translated without a mistake")
    _title(pattern, "What it looks at", "LSTM with attention: each written token's weights")
    with replacing(file) as picture:
        figure.savefig(picture, format="png")


def _title(axes: Any, title: str, subtitle: str) -> None:
    axes.text(
        0, 1.115, title, transform=axes.transAxes, fontsize=13.5, fontweight="bold", color=_INK
    )
    axes.text(0, 1.045, subtitle, transform=axes.transAxes, fontsize=10, color=_SOFT)


def _dress(axes: Any, xlabel: str) -> None:
    axes.set_xlabel(xlabel, color=_INK, fontsize=10)
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#b0b2b8")
    axes.tick_params(colors=_SOFT, labelsize=9, length=0)
    axes.tick_params(which="minor", length=0)


def _plot_gradients(axes: Any, found: dict[str, Any], when: str) -> None:
    for name, model in found["models"].items():
        axes.plot(model[when], color=_COLOURS[name], linewidth=2, label=name)
    axes.set_yscale("log")
    axes.set_ylim(1e-9, 2)
    axes.set_xlim(0, 2 * found["length"])
    axes.axvline(found["length"], color=_INK, linewidth=0.8, linestyle=(0, (2, 3)))
    if when == "trained":
        axes.annotate(
            "the symbol to repeat",
            (found["length"], 1e-9),
            xytext=(5, 6),
            textcoords="offset points",
            fontsize=9,
            color=_INK,
        )
    else:
        axes.legend(frameon=False, labelcolor=_INK, fontsize=9.5, loc="lower left")
    _dress(axes, "tokens back")


def _plot_speed(axes: Any, found: dict[str, Any]) -> None:
    from matplotlib.ticker import LogLocator

    lengths = found["lengths"]
    for name, model in found["models"].items():
        speeds, colour = model["tokens_per_second"], _COLOURS[name]
        axes.plot(
            lengths,
            speeds,
            color=colour,
            linewidth=2,
            marker=_MARKS[name],
            markersize=5,
            label=name,
        )
        above = speeds[-1] == max(m["tokens_per_second"][-1] for m in found["models"].values())
        axes.annotate(
            _thousands(speeds[-1]),
            (lengths[-1], speeds[-1]),
            xytext=(0, 9 if above else -15),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=colour,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    everything = [s for model in found["models"].values() for s in model["tokens_per_second"]]
    axes.set_ylim(min(everything) / 3, max(everything) * 1.6)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: _thousands(value))
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.legend(frameon=False, labelcolor=_INK, fontsize=9.5, loc="lower right")
    _dress(axes, "tokens in a text")


def _thousands(value: float) -> str:
    return f"{value:.0f}" if value < 1e3 else f"{value / 1e3:.3g}k"


def _plot_accuracy(axes: Any, found: dict[str, Any], xlabel: str) -> None:
    for name, model in found["models"].items():
        axes.plot(
            found["lengths"],
            model["exact"],
            color=_COLOURS[name],
            linewidth=2,
            marker=_MARKS[name],
            markersize=5,
            label=name,
            clip_on=False,
        )
    axes.set_ylim(0, 1)
    axes.set_xlim(0, max(found["lengths"]) * 1.03)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.legend(
        frameon=False, labelcolor=_INK, fontsize=9.5, loc="center right", bbox_to_anchor=(1, 0.42)
    )
    _dress(axes, xlabel)


def _plot_pattern(axes: Any, found: dict[str, Any]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("attention", ["#ffffff", "#2a9d76", "#0d3b2d"])
    axes.imshow(found["weights"], cmap=shades, vmin=0, vmax=1, aspect="auto")
    for axis, tokens in ((axes.xaxis, found["source"]), (axes.yaxis, found["target"])):
        axis.set_ticks(range(len(tokens)), _visible(tokens))
    axes.tick_params(colors=_INK, labelsize=7.5, length=0)
    axes.tick_params(axis="x", labelrotation=90)
    axes.spines[:].set_color(_FAINT)


def _visible(tokens: Sequence[str]) -> list[str]:
    return [token.strip() or "␣" for token in tokens]
