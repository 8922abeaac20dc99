"""What `why_attention` found: tables, one picture, and a page of Markdown."""

from __future__ import annotations

import itertools
import pathlib
from typing import Any

from lm.training.plots import FAINT, INK, bare, figure_of, save

_SOFT = "#6d7078"
_COLOURS = {
    "RNN": "#a3a7b0",
    "GRU": "#e0a33a",
    "LSTM": "#4c78a8",
    "LSTM, one vector": "#4c78a8",
    "LSTM with attention": "#2a9d76",
    "Transformer": "#d9485f",
}
_MARKERS = {"LSTM": "o", "LSTM, one vector": "o", "LSTM with attention": "s", "Transformer": "D"}


def tables(results: dict[str, Any]) -> list[str]:
    """The results as Markdown: gradients, copies, translations, speed."""
    found = results["gradients"]
    length, near = found["length"], max(1, found["length"] // 4)
    columns = [f"{near} back, at start", f"{length} back, at start", f"{length} back, trained"]
    drawn = [
        _table(
            "share of the last loss's gradient that arrives at a token",
            [*columns, "symbols repeated"],
            found["models"],
            lambda model: [
                *map(_share, (model["at_start"][near], model["at_start"][length])),
                _share(model["trained"][length]),
                f"{model['accuracy']:.1%}",
            ],
        )
    ]
    for name, unit in (("copy", "symbols"), ("translation", "words")):
        found = results["bottleneck"][name]
        drawn.append(
            _table(
                f"{name}: whole texts right, by length in {unit}",
                [*(f"{n:g}" for n in found["lengths"]), "tokens right"],
                found["models"],
                lambda model: [
                    *(f"{share:.0%}" for share in model["exact"]),
                    f"{sum(model['tokens']) / len(model['tokens']):.1%}",
                ],
            )
        )
    found = results["speed"]
    drawn.append(
        _table(
            f"training tokens/s, {_of_rows(found)}, by length",
            [f"{n:,}" for n in found["lengths"]],
            found["models"],
            lambda model: [f"{n:,}" for n in model["tokens_per_second"]],
        )
    )
    return drawn


def _table(title: str, columns: list[str], models: dict[str, Any], cells) -> str:
    """A row for each model: its name, its parameters, and its `cells`."""
    rows = [[name, f"{one['parameters']:,}", *cells(one)] for name, one in models.items()]
    rows.insert(0, ["model", "parameters", *columns])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        padded = [other.rjust(width) for other, width in zip(others, widths[1:])]
        lines.append("| " + " | ".join([first.ljust(widths[0]), *padded]) + " |")
    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines.insert(1, "| " + " | ".join(rules) + " |")
    return f"{title[0].upper()}{title[1:]}:\n\n" + "\n".join(lines) + "\n"


def _of_rows(found: dict[str, Any]) -> str:
    return "one text at a time" if found["rows"] == 1 else f"{found['rows']} texts at a time"


def _share(value: float) -> str:
    return f"{value:.1%}" if value >= 1e-3 else f"{value:.0e}"


def report(results: dict[str, Any], steps: int) -> str:
    """The results as a page of Markdown, beside `why_attention.png`.

    `steps` is how long the encoder-decoders were trained.
    """
    vanishing, copied, translated, speed = tables(results)
    length = results["gradients"]["length"]
    return f"""# Why attention

![Gradients by distance, speed and accuracy by length, attention](why_attention.png)

## The gradient vanishes

Language models read {length} random symbols, a mark, and the same symbols again.
What the last symbol is can only be known from the token {length} places back, so that
is where its loss should be felt. Its gradient is taken by the embedding of every token before it,
and the norms are divided by their sum.

{vanishing}
## One vector is a bottleneck

Three encoder-decoders of about as many parameters, trained for {steps} steps on the same batches:
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


# ---- The picture -----------------------------------------------------------------------------


def plot(results: dict[str, Any], file: pathlib.Path) -> None:
    """Draws the six panels into the PNG `file`."""
    figure = figure_of(figsize=(15, 9.2), dpi=130, facecolor="white")
    edges = {"left": 0.055, "right": 0.975, "top": 0.835, "bottom": 0.075}
    grid = figure.add_gridspec(2, 3, **edges, wspace=0.24, hspace=0.52)
    figure.text(0.055, 0.955, "Why attention", fontsize=21, fontweight="bold", color=INK)
    subtitle = "A path of one step to every token, instead of one that is as long as the text"
    figure.text(0.055, 0.922, subtitle, fontsize=12.5, color=_SOFT)
    gradients, speed = results["gradients"], results["speed"]
    copies, translations = (results["bottleneck"][name] for name in ("copy", "translation"))
    trained, rows = f"the same after {gradients['steps']} steps", _of_rows(speed)
    panels = [
        ("Gradients vanish", "share of the last loss's gradient, before training"),
        ("…or arrive", trained),
        ("States wait", f"training tokens/s, {rows}"),
        ("One vector is a bottleneck", "whole texts copied without a mistake"),
        ("Attention is the cure", "whole sentences translated without a mistake"),
        ("What it looks at", "LSTM with attention: each written token's weights"),
    ]
    axes = [figure.add_subplot(grid[place]) for place in itertools.product((0, 1), (0, 1, 2))]
    _plot_gradients(axes[0], gradients, "at_start")
    _plot_gradients(axes[1], gradients, "trained")
    _plot_speed(axes[2], speed)
    _plot_accuracy(axes[3], copies, "symbols to copy")
    _plot_accuracy(axes[4], translations, "words to translate")
    axes[4].get_legend().remove()  # as in the panel before
    _plot_pattern(axes[5], translations["pattern"])
    for panel, (title, subtitle) in zip(axes, panels, strict=True):
        style = {"transform": panel.transAxes, "color": INK, "fontweight": "bold"}
        panel.text(0, 1.115, title, fontsize=13.5, **style)
        panel.text(0, 1.045, subtitle, transform=panel.transAxes, fontsize=10, color=_SOFT)
    save(figure, file)


def _lines(axes: Any, models: dict[str, Any], values: str, places=None, **style: Any) -> None:
    """A line of each model, in its colour; with a marker at each of `places`."""
    for name, model in models.items():
        at = range(len(model[values])) if places is None else places
        marked = {} if places is None else {"marker": _MARKERS[name], "markersize": 5}
        axes.plot(
            at, model[values], color=_COLOURS[name], linewidth=2, label=name, **marked, **style
        )


def _finish(axes: Any, xlabel: str, **legend: Any) -> None:
    if legend:
        axes.legend(frameon=False, labelcolor=INK, fontsize=9.5, **legend)
    bare(axes)
    axes.set_xlabel(xlabel, color=INK, fontsize=10)
    axes.tick_params(which="both", length=0)
    axes.tick_params(colors=_SOFT)


def _plot_gradients(axes: Any, found: dict[str, Any], when: str) -> None:
    _lines(axes, found["models"], when)
    axes.set_yscale("log")
    axes.set_ylim(1e-9, 2)
    axes.set_xlim(0, 2 * found["length"])
    axes.axvline(found["length"], color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
    if when == "trained":
        note = {"xytext": (5, 6), "textcoords": "offset points", "fontsize": 9, "color": INK}
        axes.annotate("the symbol to repeat", (found["length"], 1e-9), **note)
    _finish(axes, "tokens back", **({} if when == "trained" else {"loc": "lower left"}))


def _plot_speed(axes: Any, found: dict[str, Any]) -> None:
    from matplotlib.ticker import LogLocator

    lengths, models = found["lengths"], found["models"]
    _lines(axes, models, "tokens_per_second", lengths)
    last = {name: model["tokens_per_second"][-1] for name, model in models.items()}
    for name, speed in last.items():
        place = (0, 9 if speed == max(last.values()) else -15)
        note = {"xytext": place, "textcoords": "offset points", "ha": "center", "fontsize": 9}
        axes.annotate(_thousands(speed), (lengths[-1], speed), color=_COLOURS[name], **note)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    everything = [speed for model in models.values() for speed in model["tokens_per_second"]]
    axes.set_ylim(min(everything) / 3, max(everything) * 1.6)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: _thousands(value))
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    _finish(axes, "tokens in a text", loc="lower right")


def _thousands(value: float) -> str:
    return f"{value:.0f}" if value < 1e3 else f"{value / 1e3:.3g}k"


def _plot_accuracy(axes: Any, found: dict[str, Any], xlabel: str) -> None:
    _lines(axes, found["models"], "exact", found["lengths"], clip_on=False)
    axes.set_ylim(0, 1)
    axes.set_xlim(0, max(found["lengths"]) * 1.03)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _finish(axes, xlabel, loc="center right", bbox_to_anchor=(1, 0.42))


def _plot_pattern(axes: Any, found: dict[str, Any]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("attention", ["#ffffff", "#2a9d76", "#0d3b2d"])
    axes.imshow(found["weights"], cmap=shades, vmin=0, vmax=1, aspect="auto")
    for axis, tokens in ((axes.xaxis, found["source"]), (axes.yaxis, found["target"])):
        axis.set_ticks(range(len(tokens)), [token.strip() or "␣" for token in tokens])
    axes.tick_params(colors=INK, labelsize=7.5, length=0)
    axes.tick_params(axis="x", labelrotation=90)
    axes.spines[:].set_color(FAINT)
