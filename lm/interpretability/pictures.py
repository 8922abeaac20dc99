"""Curves side by side, in the colours of the page around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.training.plots import COLOURS, INK, bare, figure_of


class Panel(NamedTuple):
    """Curves over one axis."""

    title: str
    x: Sequence[float]
    curves: Mapping[str, Any]  # label → values at each x
    xlabel: str = "step"
    ylabel: str = ""
    log: bool = False


def panels(rows: Sequence[Panel], columns: int = 2, **style: Any) -> Any:
    """A figure of panels, as many in a row as `columns`, each with its legend below it."""
    columns = min(columns, len(rows))
    lines = -(-len(rows) // columns)
    size = {"figsize": (4.2 * columns, 3.4 * lines), "layout": "constrained", **style}
    figure = figure_of(**size)
    for axes in (grid := figure.subplots(lines, columns, squeeze=False).reshape(-1))[len(rows) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid, rows):
        for (label, values), colour in zip(panel.curves.items(), _colours(len(panel.curves))):
            marker = "o" if len(panel.x) < 30 else ""
            # A curve ends where its numbers do: what over- or underflowed has no place on an axis.
            y = np.asarray(values, np.float64)
            y = np.where(np.isfinite(y) & ((y > 0) | (not panel.log)), y, np.nan)
            axes.plot(panel.x, y, color=colour, label=label, marker=marker, markersize=3)
        if panel.log:
            axes.set_yscale("log")
        whole = all(float(x).is_integer() for x in panel.x)  # layers and steps have no halves
        axes.xaxis.get_major_locator().set_params(integer=whole)
        dress(axes, panel.title, panel.xlabel, panel.ylabel, legend=len(panel.curves) > 1)
    return figure


def dress(axes: Any, title: str, xlabel: str = "", ylabel: str = "", legend: bool = False) -> None:
    """Title, labels and legend as the pages have them."""
    axes.set_title(title, color=INK, fontsize=10)
    axes.set_xlabel(xlabel, color=INK, fontsize=9)
    axes.set_ylabel(ylabel, color=INK, fontsize=9)
    bare(axes)
    if legend:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 2}
        axes.legend(frameon=False, labelcolor=INK, fontsize=8, **below)


def _colours(number: int) -> Sequence[Any]:
    """Distinct ones for a few curves; from dark to light, as layers are in order, for many."""
    if number <= len(COLOURS):
        return COLOURS
    from matplotlib import colormaps

    # Its ends are seen on either dark or light paper, not on both.
    return [colormaps["viridis"](0.3 + 0.55 * i / (number - 1)) for i in range(number)]
