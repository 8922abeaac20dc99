"""Several cards side by side: each score of the others against the first card's, in pairs."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm.config import ConfigError
from lm.evaluation.card import Score, Table, plain
from lm.evaluation.page import CARD, interval, shown, table_html, write_page
from lm.evaluation.statistics import LEVEL, NORMAL, Estimate, difference, holm
from lm.files import read_json, write_json

_SURE = 1 - LEVEL


class Card(NamedTuple):
    """What card.json has of a model."""

    name: str
    facts: Mapping[str, str]
    titles: dict[str, str]  # of sections, by name
    scores: dict[tuple[str, str], Score]  # by section and name


class Compared(NamedTuple):
    """How a score of one model differs from the first one's.

    Attributes:
      difference: the model's score − the first one's.
      paired: whether on the same items, one by one; else they are taken for independent.
      p: of there being no difference, adjusted for all comparisons that are made (Holm); NaN where
        it is not tested.
      verdict: "better" or "worse" than the first one, or of a score that has no good side "higher"
        or "lower"; "" where that cannot be told. In pairs it rests on `p`; else on the two
        intervals having nothing in common.
    """

    difference: Estimate
    paired: bool
    p: float
    verdict: str


def read_card(directory: str | os.PathLike[str]) -> Card:
    """The card in a directory.

    Raises:
      ConfigError: there is none, or it is damaged.
    """
    path = pathlib.Path(directory).expanduser() / CARD
    found = read_json(path)
    try:
        titles = {name: str(section["title"]) for name, section in found["sections"].items()}
        scores = {
            (name, score["name"]): _score(score)
            for name, section in found["sections"].items()
            for score in section["scores"]
        }
        return Card(str(found["facts"]["model"]), found["facts"], titles, scores)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is no card: {type(error).__name__}: {error}") from None


def compare(cards: Sequence[Card]) -> dict[tuple[str, str], list[Compared | None]]:
    """Each score of every card but the first, against the first one's.

    In pairs where both have the same items (`Score.asked` and `Score.clusters`): a paired t test
    over clusters, whose p-values are adjusted for all tests that are made here (Holm 1979).

    Returns:
      By section and score, in the cards' order, one for each card but the first; None where one of
      the two lacks the score.
    """
    first, *others = cards
    keys = dict.fromkeys(key for card in cards for key in card.scores)
    found: dict[tuple[str, str], list[tuple[Estimate, bool, float] | None]] = {}
    for key in keys:
        one = first.scores.get(key)
        found[key] = [
            _difference(one, card.scores[key]) if one and key in card.scores else None
            for card in others
        ]
    tested = [each for row in found.values() for each in row if each]
    adjusted = iter(holm([p for _, _, p in tested]))
    return {
        key: [
            each and _judged(first.scores[key], card.scores[key], each[0], each[1], next(adjusted))
            for card, each in zip(others, row)
        ]
        for key, row in found.items()
    }


def tables(
    cards: Sequence[Card], compared: Mapping[tuple[str, str], Sequence[Compared | None]]
) -> list[Table]:
    """For each section all scores of all cards, and what the differences are."""
    names = _names(cards)
    head = ["score", names[0]]
    for name in names[1:]:
        head += [name, "difference", "p"]
    found = []
    for section, title in {k: v for card in cards[::-1] for k, v in card.titles.items()}.items():
        rows = []
        for key, row in compared.items():
            if key[0] != section:
                continue
            cells = [key[1], _cell(cards[0].scores.get(key))]
            for card, each in zip(cards[1:], row):
                cells += [_cell(card.scores.get(key)), *_words(each)]
            rows.append(cells)
        if rows:
            found.append(Table(title, head, rows))
    return found


def write_comparison(
    directory: pathlib.Path,
    cards: Sequence[Card],
    compared: Mapping[tuple[str, str], Sequence[Compared | None]],
) -> pathlib.Path:
    """Writes compare.html and compare.json, and returns the path of the former."""
    names = _names(cards)
    result: dict[str, Any] = {"cards": [dict(card.facts) for card in cards], "scores": {}}
    for (section, score), row in compared.items():
        here = result["scores"].setdefault(section, {})[score] = {}
        here["values"] = [
            plain(card.scores[section, score].estimate) if (section, score) in card.scores else None
            for card in cards
        ]
        here["against the first"] = [each and plain(each._asdict()) for each in row]
    write_json(directory / "compare.json", result)
    facts = [
        [name, *(card.facts.get(name, "–") for card in cards)]
        for name in dict.fromkeys(name for card in cards for name in card.facts)
    ]
    body = [
        "<h1>Side by side</h1>",
        f"<p>{_ABOUT}</p>",
        table_html(Table("What is compared", ["", *names], facts)),
        *map(table_html, tables(cards, compared)),
    ]
    return write_page(directory / "compare.html", " and ".join(names), body)


_ABOUT = (
    "Brackets are 95 % intervals; differences are from the first model. Models that were asked the "
    "same, item by item, are compared in pairs: p is that of a paired t test over clusters, "
    "adjusted for all tests on this page (Holm), and a difference counts where it is below 0.05. "
    "Scores of other items, or that are no mean of items, are “unpaired”: there a difference "
    "counts where the intervals lie apart, which misses more."
)


def _names(cards: Sequence[Card]) -> list[str]:
    """What tells the cards from each other: the model's name, else its directory and step."""
    names = [card.name for card in cards]
    if len({*names}) < len(names):
        names = [card.facts.get("directory", name) for card, name in zip(cards, names)]
    if len({*names}) < len(names):
        names = [f"{n}, step {card.facts.get('step', '?')}" for n, card in zip(names, cards)]
    if len({*names}) < len(names):
        names = [f"{number}: {name}" for number, name in enumerate(names, 1)]
    return names


def _score(found: Mapping[str, Any]) -> Score:
    """A score as it was before it was written."""
    numbers = {name: math.nan if x is None else x for name, x in found["estimate"].items()}
    for side, end in (("low", -math.inf), ("high", math.inf)):
        numbers[side] = end if found["estimate"][side] is None else numbers[side]
    clusters = tuple(found["clusters"])
    items = tuple(math.nan if x is None else float(x) for x in found["items"])
    values = {**found, "estimate": Estimate(**numbers), "items": items, "clusters": clusters}
    return Score(**values)


def _difference(one: Score, other: Score) -> tuple[Estimate, bool, float]:
    """(other − one, whether in pairs, p)."""
    same = one.asked and one.asked == other.asked and one.clusters == other.clusters
    if same and len(one.items) == len(other.items) > 0:
        found, p = difference(other.items, one.items, one.clusters or None)
        if math.isfinite(found.value):
            return found, True, p
    a, b = one.estimate, other.estimate
    error = math.hypot(a.error, b.error)
    value, half = b.value - a.value, NORMAL * error if math.isfinite(error) else math.inf
    items, clusters = min(a.items, b.items), min(a.clusters, b.clusters)
    return Estimate(value, error, value - half, value + half, items, clusters), False, math.nan


def _judged(one: Score, other: Score, found: Estimate, paired: bool, p: float) -> Compared:
    if paired:
        told = p < _SURE
    else:
        told = other.estimate.low > one.estimate.high or other.estimate.high < one.estimate.low
    verdict = ""
    if told and found.value:
        up = found.value > 0
        words = {"higher": ("worse", "better"), "lower": ("better", "worse")}
        verdict = words.get(one.better, ("lower", "higher"))[up]
    return Compared(found, paired, p, verdict)


def _cell(score: Score | None) -> str:
    return f"{shown(score.estimate.value)} {_whole(interval(score))}" if score else "–"


def _whole(text: str) -> str:
    return text.replace(" ", "\xa0")  # a line does not end within it


def _words(each: Compared | None) -> list[str]:
    """Difference, p, and what to make of them."""
    if each is None:
        return ["–", "–"]
    value, _, low, high, _, _ = each.difference
    between = _whole(f"[{shown(low)}, {shown(high)}]") if math.isfinite(high - low) else "[–]"
    p = "unpaired" if not each.paired else "–" if math.isnan(each.p) else f"{each.p:.3f}"
    said = ["< 0.001" if each.p < 0.001 else p, *filter(None, [each.verdict])]
    return [f"{shown(value)} {between}", ", ".join(said)]
