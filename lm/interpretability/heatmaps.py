"""Tables of numbers as pictures, for pages light and dark."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np

from lm.evaluation.card import Picture, picture
from lm.training.plots import COLOURS, INK, bare, figure_of

POSITIVE, NEGATIVE = COLOURS[0], COLOURS[1]
_CELL = 0.62, 0.3  # inches


@dataclasses.dataclass(frozen=True)
class Heatmap(Picture):
    """A picture of numbers, which a page's JSON has beside it."""

    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    values: Sequence[Sequence[float]] = ()


def coloured(shares_RC: np.ndarray) -> np.ndarray:
    """RGBA [R, C, 4] of numbers from −1 to 1: blue above zero, red below, clear at it."""
    found = np.zeros((*shares_RC.shape, 4))
    for colour, where in ((POSITIVE, shares_RC >= 0), (NEGATIVE, shares_RC < 0)):
        found[where, :3] = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    found[..., 3] = np.abs(shares_RC)
    return found


def heatmap(
    title: str,
    values_RC: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    texts: Sequence[Sequence[str]] | None = None,
    across: str = "",
    down: str = "",
) -> Heatmap:
    """A cell for each number, blue for those above zero and red for those below.

    The first row is on top. The strongest colour is that of the number largest in size. What stands
    in the cells, `texts`, is the numbers themselves where they are few enough, unless given.
    """
    values_RC = np.asarray(values_RC, float)
    number_R, number_C = values_RC.shape
    finite = np.where(np.isfinite(values_RC), values_RC, 0.0)
    largest = np.abs(finite).max() or 1.0
    if texts is None and number_C <= 24:
        texts = [[_short(value) for value in row] for row in values_RC]
    wide, high = 1.2 + _CELL[0] * number_C, 1.1 + _CELL[1] * number_R
    figure = figure_of(
        figsize=(size := max(7.0, min(wide, 24)), min(high, 14)), layout="constrained"
    )
    axes = figure.add_subplot()
    axes.pcolormesh(coloured(0.85 * finite / largest), edgecolors="none")
    for r, line in enumerate(texts or ()):
        for c, text in enumerate(line):
            at = {"ha": "center", "va": "center", "fontsize": 7, "color": INK}
            axes.text(c + 0.5, r + 0.5, text, parse_math=False, **at)
    axes.set_xticks(np.arange(number_C) + 0.5, columns, rotation=45 if number_C > 8 else 0)
    axes.set_yticks(np.arange(number_R) + 0.5, rows)
    axes.invert_yaxis()
    bare(axes)
    axes.grid(False)
    above = axes.set_title(title, color=INK, fontsize=10, loc="left")  # seen where a page is narrow
    axes.set_xlabel(across, color=INK)
    axes.set_ylabel(down, color=INK)
    for label in (above, *axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)  # a token may be "$"
    axes.tick_params(labelsize=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's fonts have it
        svg = picture(title, figure).svg
    # So wide that its text can be read, however narrow the page: it scrolls.
    svg = svg.replace("<svg", f'<svg style="min-width: {68 * size:.0f}px"', 1)
    return Heatmap(title, svg, list(rows), list(columns), values_RC.tolist())


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 99.5 else f"{round(value, 3) + 0.0:.2g}"


def token_names(tokenizer, ids: Sequence[int]) -> list[str]:
    """Tokens as a reader tells them apart: spaces and ends of lines are seen."""
    marks = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})
    if tokenizer is None:
        return [str(i) for i in ids]
    found = []
    for i in ids:
        data = tokenizer.token_bytes(int(i))
        text = data.decode("utf-8", "backslashreplace").translate(marks)
        text = text or tokenizer.special_names.get(int(i), f"<{int(i)}>")
        found.append(text if text.isprintable() else ascii(text)[1:-1])
    return found
