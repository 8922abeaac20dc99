"""An examination as a page that needs no network, as JSON, and as lines for a terminal."""

from __future__ import annotations

import html
import math
import pathlib
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lm.config import changed
from lm.evaluation.card import Picture, Sample, Score, Section, Table, plain
from lm.files import replacing, write_json

CARD = "card.json"
_SAMPLES, _AT_ONCE = 12, 4  # of a section on the page, and without a click; the JSON has all
_ROWS = 15  # of a table that is shown without a click


def line(section: Section) -> str:
    """A section's scores, each in a line."""
    width = max((len(score.name) for score in section.scores), default=0)
    lines = [f"{section.title} ({section.seconds:.0f} s)"]
    for score in section.scores:
        value = f"  {score.name:{width}}  {shown(score.estimate.value)}  {interval(score)}"
        lines.append("  ".join(filter(None, (value, notes(score)))))
    return "\n".join(lines)


def write_card(
    directory: pathlib.Path,
    facts: Mapping[str, str],
    command: str,
    sections: Sequence[Section],
    left_out: Mapping[str, str],
) -> pathlib.Path:
    """Writes card.html and card.json, and returns the path of the former.

    Args:
      directory: where to.
      facts: what the model is: `model` is its name, the others are shown as they are.
      command: that makes this card.
      sections: what was found.
      left_out: suites that the model cannot be asked, and why.
    """
    title = f"{facts['model']}: what it can and cannot do"
    more = metadata(facts, sections)
    about = (
        "What it can and cannot do, measured. Brackets are 95 % intervals; where items share a "
        "story or a template, clustered."
    )
    page = directory / "card.html"
    return write_report(page, title, about, facts, command, sections, left_out, more)


def write_report(
    path: pathlib.Path,
    title: str,
    about: str,
    facts: Mapping[str, str],
    command: str,
    sections: Sequence[Section],
    left_out: Mapping[str, str] | None = None,
    more: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes sections as a page and, beside it, as JSON of the same name; returns the page's path.

    Args:
      path: of the page, `NAME.html`.
      title, about: of the page, in words; its heading is `facts["model"]`.
      facts, command, sections, left_out: as of `write_card`.
      more: what else the JSON is to have.
    """
    found = {
        "facts": dict(facts),
        "command": command,
        "sections": {section.name: plain(section) for section in sections},
        "left_out": dict(left_out or {}),
    }
    write_json(path.with_suffix(".json"), {**found, **(more or {})})
    return write_page(path, title, _body(about, facts, command, sections, left_out or {}))


def made_by(file: str, job: Any) -> str:
    """The command that makes a page again: the config's file, and fields unlike the job's own."""
    words = [
        f"--{name}={one}"
        for name, value in changed(job, type(job)())
        for one in (value if isinstance(value, tuple) else (value,))
    ]
    return shlex.join(["python", "main.py", f"--config={file}", *words])


def write_page(path: pathlib.Path, title: str, body: Iterable[str]) -> pathlib.Path:
    """Writes a page of HTML in the card's style, whole or not at all, and returns its path."""
    style = pathlib.Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{style}</style><main>{''.join(body)}</main></html>\n"
    )
    with replacing(path) as file:
        file.write(page.encode("utf-8", "replace"))
    return path


def metadata(facts: Mapping[str, str], sections: Sequence[Section]) -> dict[str, Any]:
    """The scores as the Hugging Face Hub's model cards have them (`model-index`)."""
    results = [
        {
            "task": {"type": "text-generation", "name": section.title},
            "dataset": {"type": section.name, "name": score.about or section.title},
            "metrics": [{"type": score.name, "name": score.name, "value": score.estimate.value}],
        }
        for section in sections
        for score in section.scores
        if math.isfinite(score.estimate.value)
    ]
    return {"model-index": [{"name": facts["model"], "results": results}]}


def shown(value: Any) -> str:
    """A number as a reader wants it: four digits that count."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}" if isinstance(value, int) else "–"
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        text = f"{value:.2e}"
    else:
        text = f"{value:,.{3 if size < 10 else 2 if size < 100 else 0}f}"
    return text.replace("-", "−", 1) if value < 0 else text


def interval(score: Score) -> str:
    """The 95 % interval in brackets."""
    _, _, low, high, _, _ = score.estimate
    if not (math.isfinite(low) and math.isfinite(high)):
        return "[–]"
    return f"[{shown(low)}, {shown(high)}]"


def notes(score: Score) -> str:
    """What else is to be known of a score."""
    items, clusters = score.estimate.items, score.estimate.clusters
    found = [f"of {items:,}" + (f" in {clusters:,} clusters" if clusters != items else "")]
    if score.chance is not None:
        found.append(f"chance {shown(score.chance)}")
    for count, what in ((score.unparsed, "unparsed"), (score.truncated, "truncated")):
        if count is not None:
            found.append(f"{count:,} {what}")
    return ", ".join(found)


def _body(
    about: str,
    facts: Mapping[str, str],
    command: str,
    sections: Sequence[Section],
    left_out: Mapping[str, str],
) -> Iterator[str]:
    esc = html.escape
    yield f"<h1>{esc(facts['model'])}</h1><p>{esc(about)}</p><dl>"
    for name, value in facts.items():
        yield f"<dt>{esc(name)}<dd>{esc(value)}"
    seconds = sum(section.seconds for section in sections)
    lines = esc(command).replace(" --config.", " \\\n    --config.")
    yield f'<dt>took<dd>{seconds:.0f} s</dl><p class="quiet">Made by</p>'
    yield f'<pre tabindex="0" role="region" aria-label="Command">{lines}</pre>'
    links = "".join(f'<li><a href="#{esc(s.name)}">{esc(s.title)}</a>' for s in sections)
    yield f'<nav aria-label="Sections"><ul>{links}</ul></nav>'
    for section in sections:
        yield f'<section id="{esc(section.name)}"><h2>{esc(section.title)}</h2>'
        yield f'<p>{esc(section.about)} <span class="quiet">{section.seconds:.0f}\xa0s.</span></p>'
        if section.scores:
            yield _scores(section)
        for number, one in enumerate(section.pictures):
            yield _picture(one, f"{section.name}-{number}-")
        for table in section.tables:
            long = len(table.rows) > _ROWS
            yield folded(table.title, [table_html(table)]) if long else table_html(table)
        samples = [_sample(one) for one in section.samples[:_SAMPLES]]
        if samples:
            yield "<h3>Samples</h3>"
        yield from samples[:_AT_ONCE]
        if samples[_AT_ONCE:]:
            yield folded(f"{len(samples) - _AT_ONCE} more", samples[_AT_ONCE:])
        yield "</section>"
    if left_out:
        rows = "".join(f"<dt>{esc(name)}<dd>{esc(why)}" for name, why in left_out.items())
        yield f"<section><h2>Left out</h2><dl>{rows}</dl></section>"


def _scores(section: Section) -> str:
    rows = []
    for score in section.scores:
        arrow = {"higher": "\xa0↑", "lower": "\xa0↓", "none": ""}[score.better]
        quiet = "".join(
            f'<span class="quiet">{html.escape(text)}</span>'
            for text in (score.about, notes(score))
            if text
        )
        rows.append(
            f'<tr><th scope="row">{html.escape(score.name)}{arrow}{quiet}'
            f'<td class="n">{shown(score.estimate.value)}<td class="n">{interval(score)}'
            f"{_bar(score)}"
        )
    heads = '<th>score<th class="n">value<th class="n">95 %'
    content = f"<thead><tr>{heads}</thead><tbody>{''.join(rows)}</tbody>"
    return _wide(f"{section.title}: scores", content, ' class="scores"')


def _bar(score: Score) -> str:
    """Value and interval of a fraction, on a line from 0 to 1; nothing of other scores."""
    value, _, low, high, _, _ = score.estimate
    if not score.fraction or not all(math.isfinite(x) and 0 <= x <= 1 for x in (value, low, high)):
        return ""
    at = [4 + 136 * x for x in (value, low, high)]
    chance = ""
    if score.chance is not None:
        x = 4 + 136 * score.chance
        chance = f'<line class="chance" x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="14"/>'
    return (
        '<svg class="bar" viewBox="0 0 144 16" aria-hidden="true">'
        f'<line class="way" x1="4" x2="140" y1="8" y2="8"/>{chance}'
        f'<line class="span" x1="{at[1]:.1f}" x2="{at[2]:.1f}" y1="8" y2="8"/>'
        f'<circle class="at" cx="{at[0]:.1f}" cy="8" r="4"/></svg>'
    )


def table_html(table: Table) -> str:
    """A table as a part of a page; columns of numbers stand to the right."""
    numeric = [
        all(isinstance(row[i], int | float) for row in table.rows) for i in range(len(table.head))
    ]
    kinds = [' class="n"' if one else "" for one in numeric]
    heads = "".join(
        f"<th{kind}>{html.escape(head)}" if head else "<td>"
        for kind, head in zip(kinds, table.head)
    )
    heads = f"<thead><tr>{heads}</thead>" if any(table.head) else ""
    rows = "".join(
        "<tr>" + "".join(f"<td{k}>{html.escape(_unbroken(cell))}" for k, cell in zip(kinds, row))
        for row in table.rows
    )
    return _wide(table.title, f"{heads}<tbody>{rows}</tbody>")


def _unbroken(cell: Any) -> str:
    """A cell's text, in which no line ends within an interval."""
    return re.sub(r"\[[^]]*\]", lambda found: found[0].replace(" ", "\xa0"), shown(cell))


def _wide(title: str, content: str, kind: str = "") -> str:
    """A table that scrolls by itself where the page is narrow."""
    name = html.escape(title)
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{name}"><table{kind}>'
        f"<caption>{name}</caption>{content}</table></div>"
    )


def folded(title: str, parts: Iterable[str]) -> str:
    """Parts of a page that are shown on a click."""
    return f"<details><summary>{html.escape(title)}</summary>{''.join(parts)}</details>"


def _picture(picture: Picture, prefix: str) -> str:
    """A picture whose ids, which matplotlib counts anew in each, are those of no other."""
    title, drawn = html.escape(picture.title), html.escape(picture.title, quote=False)
    svg = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*", "", picture.svg, flags=re.S)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    caption = "" if f">{drawn}</text>" in svg else f"<figcaption>{title}</figcaption>"
    box = f'class="wide" role="group" tabindex="0" aria-label="{title}"'
    return f"<figure {box}>{svg}{caption}</figure>"


def _sample(sample: Sample) -> str:
    kind = {True: " right", False: " wrong", None: ""}[sample.right]
    parts = "".join(
        f"<dt>{html.escape(name)}<dd>{html.escape(text.strip())}"
        for name, text in sample.parts.items()
    )
    return f'<dl class="sample{kind}">{parts}</dl>'
