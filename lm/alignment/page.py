"""Responses before and after, side by side: one HTML file that needs no network."""

from __future__ import annotations

import html
import pathlib
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from lm.alignment.prompts import Prompt, shown
from lm.files import read_json, replacing, write_json
from lm.parallel import hosts

BEFORE = "samples_before.json"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em;
  color: #222; background: #fff; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
th, td { text-align: left; vertical-align: top; padding: .5em .7em; border-bottom: 1px solid #ddd; }
td { white-space: pre-wrap; overflow-wrap: anywhere; }
.score { color: #4c78a8; font-variant-numeric: tabular-nums; display: block; }
.cut { color: #e45756; }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818; }
  th, td { border-color: #444; } }
"""


class Shown(NamedTuple):
    """A response for a reader."""

    text: str
    score: float
    ended: bool


def keep_before(directory: pathlib.Path, responses: Sequence[Shown]) -> None:
    """Notes in a run's directory what the policy says before it learns."""
    if hosts.index() == 0:
        write_json(directory / BEFORE, {"responses": responses})


def write_page(
    directory: pathlib.Path, prompts: Sequence[Prompt], after: Sequence[Shown]
) -> pathlib.Path:
    """Writes samples.html: a table of prompts, and each one's responses before and after."""
    before = [Shown(*each) for each in read_json(directory / BEFORE)["responses"]]
    columns = {"before": before, "after": after}
    heads = "".join(f"<th>{name}" for name in ("prompt", *columns))
    rows = "".join(
        f"<tr><td>{html.escape(shown(prompt.text))}{_cell(first)}{_cell(second)}"
        for prompt, first, second in zip(prompts, before, after)
    )
    means = ", ".join(
        f"{name} {statistics.fmean(each.score for each in responses):.3f}"
        for name, responses in columns.items()
        if responses
    )
    title = html.escape(directory.resolve().name)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{_STYLE}</style><h1>{title}</h1><p>mean reward: {means}</p>"
        f"<table><thead><tr>{heads}</thead><tbody>{rows}</tbody></table></html>\n"
    )
    path = directory / "samples.html"
    if hosts.index() == 0:
        with replacing(path) as file:
            file.write(page.encode("utf-8", "replace"))
    return path


def _cell(response: Shown) -> str:
    cut = "" if response.ended else ' <span class="cut">(cut off)</span>'
    score = f'<span class="score">{response.score:.3f}</span>'
    return f"<td>{score}{html.escape(response.text)}{cut}"
