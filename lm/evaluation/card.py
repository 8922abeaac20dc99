"""What an examination finds: sections of scores, tables, pictures and samples."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal

from lm.evaluation import statistics
from lm.evaluation.statistics import Estimate
from lm.training.plots import FAINT, INK, bare, figure_of

Better = Literal["higher", "lower", "none"]


class NotApplicable(Exception):
    """This model cannot be asked that; the message says why."""


@dataclasses.dataclass(frozen=True)
class Score:
    """One number with its interval, and what it rests on.

    Attributes:
      name: unique within its section.
      estimate: see `lm.evaluation.statistics`.
      better: which way is.
      about: in a few words, what is counted, and its unit.
      unparsed, truncated: of its items; None where nothing is parsed, or cut.
      chance: what guessing would score; None where there is no such thing.
      items: each item's own score, of which `estimate` is the mean: what two models are compared
        by; () where it is no mean.
      clusters: of the items, as `statistics.mean` takes them; () where each is its own.
      asked: tells these items from others (`digest`): only the same ones are compared in pairs.
      fraction: whether it lies between 0 and 1, as a share does.
    """

    name: str
    estimate: Estimate
    better: Better = "none"
    about: str = ""
    unparsed: int | None = None
    truncated: int | None = None
    chance: float | None = None
    items: Sequence[float] = ()
    clusters: Sequence[Hashable] = ()
    asked: str = ""
    fraction: bool = False

    @classmethod
    def mean(
        cls,
        name: str,
        items: Iterable[float],
        better: Better = "none",
        about: str = "",
        clusters: Sequence[Hashable] | None = None,
        asked: str = "",
        **fields: Any,
    ) -> Score:
        """The mean of items' scores, with its interval unless `fields` have an `estimate`."""
        items = [float(one) for one in items]
        estimate = fields.pop("estimate", None) or statistics.mean(items, clusters)
        fields |= {"items": items, "clusters": () if clusters is None else clusters}
        return cls(name, estimate, better, about, asked=asked, **fields)

    @classmethod
    def share(
        cls, name: str, right: Sequence[float], better: Better = "higher", about: str = "",
        clusters: Sequence[Hashable] | None = None, asked: str = "", **fields: Any,
    ) -> Score:  # fmt: skip
        """The share of items that are right, or the mean of what is from 0 to 1."""
        fields |= {"estimate": statistics.share(right, clusters), "fraction": True}
        return cls.mean(name, right, better, about, clusters, asked, **fields)


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells, which are text or numbers."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Picture:
    """An SVG in the colours of the page around it (`picture`)."""

    title: str
    svg: str


@dataclasses.dataclass(frozen=True)
class Sample:
    """What was asked, what came, and what is right; by name, in the order to be shown."""

    parts: dict[str, str]
    right: bool | None = None


@dataclasses.dataclass(frozen=True)
class Section:
    """One part of an examination.

    Attributes:
      name: of the suite.
      title, about: for a reader: what is measured, how, and what to make of it.
      seconds: that it took.
    """

    name: str
    title: str
    about: str
    scores: Sequence[Score] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    samples: Sequence[Sample] = ()
    seconds: float = 0.0

    def score(self, name: str) -> Score:
        """The score of this name; raises KeyError."""
        return {score.name: score for score in self.scores}[name]


def timed(make: Callable[[], Section]) -> Section:
    """What `make` finds, and the seconds that it took."""
    began = time.perf_counter()
    section = make()
    return dataclasses.replace(section, seconds=time.perf_counter() - began)


def made(
    parts: Mapping[str, Callable[[], Section]], told: Callable[[Section], None] = lambda _: None
) -> tuple[dict[str, Section], dict[str, str]]:
    """The sections of a page, by name; and of those that are not applicable why.

    Args:
      parts: what makes each.
      told: is told of each as soon as it is there.
    """
    found: dict[str, Section] = {}
    left_out: dict[str, str] = {}
    for name, make in parts.items():
        try:
            found[name] = timed(make)
        except NotApplicable as why:
            left_out[name] = str(why)
        else:
            told(found[name])
    return found, left_out


def digest(items: Iterable[Any]) -> str:
    """What tells a set of items, in their order, from others."""
    found = hashlib.blake2b(digest_size=8)
    for item in items:
        found.update(json.dumps(item, sort_keys=True, default=str).encode() + b"\n")
    return found.hexdigest()


def axes(across: str, up: str = "", size: tuple[float, float] = (7.2, 3.6)) -> Any:
    """Axes of a new figure to draw a picture in: what they count, and their size in inches."""
    found = figure_of(figsize=size, layout="constrained").add_subplot()
    bare(found)
    found.set_xlabel(across, color=INK)
    found.set_ylabel(up, color=INK)
    return found


def picture(title: str, figure: Any, **legend: Any) -> Picture:
    """A figure (`lm.training.plots.figure_of`) as a picture for light and dark pages.

    What is drawn in the colours `INK` and `FAINT` of `lm.training.plots` takes the page's.
    `legend`, where there is to be one, is as matplotlib's.
    """
    import matplotlib

    if legend:
        figure.axes[0].legend(frameon=False, labelcolor=INK, **legend)
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().decode()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(FAINT, "var(--line)")
    return Picture(title, svg)


def plain(value: Any) -> Any:
    """As JSON has it: no NaN and no infinity, which become null; clusters by number."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Score):
        numbers: dict[Hashable, int] = {}
        groups = [numbers.setdefault(one, len(numbers)) for one in value.clusters]
        value = dataclasses.replace(value, clusters=groups)
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Estimate):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(one) for one in value]
    return value.item() if hasattr(value, "item") else value
