"""Does a model find what it has read, wherever that stands, and beyond what it was trained on?"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lm.config import AboveZero, Bounds, Positive, check
from lm.data.storyworld import generate
from lm.data.storyworld import lexicon as lx
from lm.evaluation import statistics
from lm.evaluation.card import (
    NotApplicable,
    Picture,
    Sample,
    Score,
    Section,
    Table,
    axes,
    digest,
    picture,
)
from lm.evaluation.cooccurrence import UNSEEN
from lm.evaluation.documents import Trained
from lm.evaluation.statistics import Estimate
from lm.evaluation.subject import Likely, Subject, choices
from lm.models import skeleton
from lm.training.plots import COLOURS, FAINT

# Where the stories hide things.
_HIDES = (
    *("in the basket", "in the box", "in the drawer", "in the pot", "in the cupboard"),
    *("in the bag", "under the bed", "under the chair", "under the table"),
)
_APART = 1 << 20  # stories from one item's first to the next one's
_LEAST = 4  # sentences, or pairs, that a needle is to be found among
_ANY = 1 << 40  # tokens
_BINS = 16  # of the picture of losses


@dataclasses.dataclass(frozen=True)
class PositionSettings:
    """What is asked; lengths are multiples of the length that the model was trained on."""

    items: Positive = 16  # contexts of each kind and length, each with the answer at every depth
    depths: Positive = 5  # places of the needle, from the beginning to the end
    lengths: tuple[AboveZero, ...] = (0.5, 0.75, 1.0)
    # Longer than trained, in half as many contexts, as they take long; (): none.
    beyond: tuple[AboveZero, ...] = (1.5, 2.0)
    choices: int = 4  # what the likelihood chooses from
    digits: int = 4  # of the keys and values
    windows: Positive = 16  # of held-out text, as long as the longest of `beyond`

    def validate(self, prefix: str = "config.position") -> None:
        """Raises ConfigError naming the first field that makes no sense."""
        Bounds(2, len(_HIDES)).check(f"{prefix}.choices", self.choices)
        Bounds(3, 32).check(f"{prefix}.digits", self.digits)
        Bounds(2).check(f"{prefix}.depths", self.depths)
        Bounds(2).check(f"{prefix}.items", self.items)
        check(
            all(length <= 1 for length in self.lengths) and bool(self.lengths),
            f"{prefix}.lengths={self.lengths} must be at most 1; longer ones are `beyond`",
        )
        check(
            all(length > 1 for length in self.beyond),
            f"{prefix}.beyond={self.beyond} must be above 1",
        )


class Item(NamedTuple):
    """A question whose answer stands somewhere in its context."""

    kind: str  # "needle" or "key–value"
    length: float  # × the length that the model was trained on
    depth: float  # where the answer stands, from 0 to 1
    number: int  # of the context: what items share that differ in depth
    context: str
    choices: tuple[str, ...]  # the first is right


class Answer(NamedTuple):
    """What a model makes of an item."""

    right: bool  # of the choices it finds the right one likeliest
    greedy: bool  # of all tokens, it finds each of the right answer's likeliest
    p: float  # of the right one, among the choices
    truncated: bool


def needles(
    count: Callable[[str], int], room: int, length: float, settings: PositionSettings, seed: int
) -> Iterator[Item]:
    """Stories in which one sentence says where a thing was put, and the end asks where it is.

    The other sentences are of unseen stories, and none of them hides a thing or names it, or those
    who put it and ask. The places to choose from, too, stand in the stories, here only the right
    one: it is what was read, or a guess.

    Args:
      count: how many tokens a text has.
      room: tokens that context and answer may have.
      length, settings, seed: as of the items.
    """
    for number in range(_contexts(settings, length)):
        rng = np.random.default_rng((seed, number))
        thing = str(rng.choice([toy.noun for toy in lx.PLAYTHINGS]))
        one, other = map(str, rng.permutation([*lx.GIRLS, *lx.BOYS])[:2])
        places = [str(place) for place in rng.permutation(_HIDES)[: settings.choices]]
        needle = f"{one} put the {thing} {places[0]}."
        end = f'"Where is my {thing}?" asked {other}. "I put it'
        words = {thing, one, other, "put", "Where"}
        left = room - count(f"{needle} {end}") - max(count(f" {place}") for place in places)
        filler: list[str] = []
        for sentence in _sentences(seed, number):
            if words & {*sentence.replace('"', " ").replace("'", " ").strip(".,!?").split()}:
                continue
            if any(place in sentence for place in _HIDES) or thing in sentence:
                continue
            left -= count(f" {sentence}")
            if left < 0:
                break
            filler.append(sentence)
        if len(filler) < _LEAST:
            return
        for depth in np.linspace(0, 1, settings.depths):
            at = round(float(depth) * len(filler))
            context = " ".join([*filler[:at], needle, *filler[at:], end])
            choices = tuple(f" {place}" for place in places)
            yield Item("needle", length, float(depth), number, context, choices)


def key_values(
    count: Callable[[str], int], room: int, length: float, settings: PositionSettings, seed: int
) -> Iterator[Item]:
    """Random keys and values as JSON, and the value of one key asked (Liu et al. 2023, §3.1).

    Keys and values are hexadecimal; choices are values that stand there. See `needles`.
    """
    for number in range(_contexts(settings, length)):
        rng = np.random.default_rng((seed, number, 1))

        def written(pairs: Sequence[tuple[str, str]], key: str) -> str:
            lines = ",\n ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in pairs)
            return f'JSON data:\n{{{lines}}}\n\nKey: "{key}"\nCorresponding value: "'

        pairs: list[tuple[str, str]] = []
        values: set[str] = set()
        left = room - count(written([], "0" * settings.digits))
        while left > 0 and len(values) < 16**settings.digits // 4:  # of which there are enough
            key, value = ("".join(rng.choice([*"0123456789abcdef"], settings.digits)) for _ in "kv")
            if {key, value} & values or key == value:
                continue
            pairs.append((key, value))
            values |= {key, value}
            left -= count(f'"{key}": "{value}",\n ') - 1
        while pairs and count(written(pairs, pairs[0][0]) + pairs[0][1]) > room:
            pairs.pop()
        if len(pairs) < max(_LEAST, settings.choices):
            return
        (key, value), *rest = pairs
        others = [pair[1] for pair in rest[: settings.choices - 1]]
        order = rng.permutation(len(rest))
        for depth in np.linspace(0, 1, settings.depths):
            some = [rest[i] for i in order]
            some.insert(round(float(depth) * len(rest)), (key, value))
            choices = tuple(f'{one}"' for one in (value, *others))
            yield Item("key–value", length, float(depth), number, written(some, key), choices)


def answers(
    likely: Callable[[Sequence[tuple[str, str]]], Sequence[Likely]], items: Sequence[Item]
) -> list[Answer]:
    """What a model answers; `likely` as of `Subject`."""
    result = []
    for several in choices(likely, [(item.context, item.choices) for item in items]):
        totals = np.array([one.scored.total for one in several])
        p = float(np.exp(totals[0] - totals.max()) / np.exp(totals - totals.max()).sum())
        right = bool(totals[0] > totals[1:].max())
        truncated = any(one.truncated for one in several)
        result.append(Answer(right, several[0].scored.greedy, p, truncated))
    return result


def ends_over_middle(items: Sequence[Item], right: Sequence[float]) -> Estimate:
    """The share right at the first and last depth less that between, mean over contexts.

    Above 0 where the middle is lost (Liu et al. 2023); 0 for a model that reads all places alike.
    """
    ends: dict[int, list[float]] = {}
    middle: dict[int, list[float]] = {}
    for item, one in zip(items, right):
        part = ends if item.depth in (0.0, 1.0) else middle
        part.setdefault(item.number, []).append(one)
    means = [[float(np.mean(part[number])) for number in sorted(ends)] for part in (ends, middle)]
    return statistics.difference(*means)[0]


def trained_length(subject: Subject) -> int:
    """Tokens of a row in training, where that is known to be less than the model's context."""
    block = subject.run.config.get("data", {}).get("block_size") or subject.max_length
    return min(block, subject.max_length)


def lengthened(subject: Subject, tokens: int) -> Subject:
    """The same model with a context of at least so many tokens.

    Raises:
      NotApplicable: its positions are learned: there are none beyond its context.
    """
    run = subject.run
    config = run.skeleton.config
    if tokens <= config.max_length:
        return subject
    if config.positions == "learned" and config.cell == "attention":
        raise NotApplicable(
            f"its positions are learned, and there are none beyond its {config.max_length} tokens"
        )
    longer = dataclasses.replace(config, max_length=tokens)
    model = skeleton(longer)
    return Subject(dataclasses.replace(run, skeleton=model), subject.scorer.ways)


def measure(subject: Subject, settings: PositionSettings, seed: int) -> Section:
    """Needles and key–value pairs by depth and length, and loss beyond the training length.

    Raises:
      NotApplicable: the context has no room for a question and a few sentences.
    """
    trained, why = trained_length(subject), ""
    subjects = dict.fromkeys(settings.lengths, subject)
    if settings.beyond:
        try:
            longer = lengthened(subject, math.ceil(max(settings.beyond) * trained))
            subjects |= dict.fromkeys(settings.beyond, longer)
        except NotApplicable as reason:
            why = f" Not asked beyond: {reason}."

    def count(text: str) -> int:
        return len(subject.tokenizer.encode(text)) + 1

    asked: dict[tuple[str, float], list[Item]] = {}
    for length in subjects:
        for kind, make in (("needle", needles), ("key–value", key_values)):
            if kind == "key–value" and length != max(settings.lengths):
                continue
            room = int(length * trained)
            if some := list(make(count, room, length, settings, seed)):
                asked[kind, length] = some
    if not asked:
        raise NotApplicable(
            f"its context of {trained} tokens has no room for a question and {_LEAST} sentences"
        )
    found = {key: answers(subjects[key[1]].likely, some) for key, some in asked.items()}
    scores = [score for key in asked for score in _scores(asked[key], found[key], settings)]
    tables = [_by_depth(asked, found)]
    pictures = [_curves(asked, found, settings.choices)]
    if settings.beyond and not why:
        loss_WT = _losses(longer, math.ceil(max(settings.beyond) * trained), settings.windows, seed)
        score, table, drawn = _beyond(loss_WT, trained)
        scores.append(score)
        tables.append(table)
        pictures.append(drawn)
    samples = [
        Sample({"asked": some[mid].context, "right": some[mid].choices[0]}, found[key][mid].right)
        for key, some in asked.items()
        if (mid := settings.depths // 2) < len(some) and key[1] in settings.lengths
    ]
    positions = subject.run.skeleton.config
    kind = positions.positions if positions.cell == "attention" else f"none ({positions.cell})"
    about = f"{_ABOUT} Positions: {kind}; trained on rows of {trained} tokens.{why}"
    return Section("position", "Position", about, scores, tables, pictures, samples)


_ABOUT = (
    "Needle: among sentences of unseen stories one says where a thing was put, and the end asks "
    "for it. Key–value: of a JSON object of random hexadecimal keys and values one key is asked "
    "for (Liu et al. 2023, Lost in the Middle). Right: the right place, or value, is the likeliest "
    "of the choices; greedy: each of its tokens is the likeliest of all. What is asked at several "
    "depths in the same context is one cluster. Lengths are multiples of the training length; "
    "beyond it the same parameters are run at positions that they have not seen, and loss is that "
    "of held-out documents, one after the other. Where training packed documents that each began "
    "at position 0, positions beyond the longest document are new as well."
)


def _scores(
    items: Sequence[Item], found: Sequence[Answer], settings: PositionSettings
) -> Iterator[Score]:
    kind, length = items[0].kind, items[0].length
    fields = {
        "about": f"share right, over all depths, at {length:g} × the training length",
        "clusters": [item.number for item in items],
        "asked": digest((item.context, item.choices) for item in items),
        "truncated": sum(one.truncated for one in found),
    }
    right, greedy = ([one[place] for one in found] for place in (0, 1))
    yield Score.share(f"{kind}, {length:g}×", right, chance=1 / settings.choices, **fields)
    yield Score.share(f"{kind}, greedy, {length:g}×", greedy, **fields)
    if settings.depths > 2 and length <= 1:
        gap = ends_over_middle(items, right)
        about = "share right at both ends − between them; above 0: the middle is lost"
        yield Score(f"{kind}, ends over middle, {length:g}×", gap, about=about, chance=0.0)


def _at_depth(
    items: Sequence[Item], found: Sequence[Answer]
) -> Iterator[tuple[float, Estimate, Estimate, float]]:
    """Depth, share right, share greedy and mean probability."""
    for depth in sorted({item.depth for item in items}):
        some = [one for item, one in zip(items, found) if item.depth == depth]
        right, greedy = ([getattr(one, name) for one in some] for name in ("right", "greedy"))
        p = float(np.mean([one.p for one in some]))
        yield depth, statistics.share(right), statistics.share(greedy), p


def _by_depth(asked, found) -> Table:
    rows = [
        (kind, f"{length:g}×", depth, one.items, one.value, one.low, one.high, greedy.value, p)
        for (kind, length), items in asked.items()
        for depth, one, greedy, p in _at_depth(items, found[kind, length])
    ]
    head = ("kind", "length", "depth", "items", "right", "from", "to", "greedy", "probability")
    return Table("Right by depth", head, rows)


def _curves(asked, found, choices: int) -> Picture:
    drawn = axes("depth of the answer in the context (0: first)", "share right")
    for ((kind, length), items), colour in zip(asked.items(), itertools.cycle(COLOURS)):
        depths, right, _, _ = zip(*_at_depth(items, found[kind, length]))
        fields = {"color": colour, "marker": "o", "label": f"{kind}, {length:g}×"}
        _line(drawn, depths, right, length == 1, linestyle="--" if length > 1 else "-", **fields)
    drawn.axhline(1 / choices, color=FAINT, linewidth=1)
    drawn.set_ylim(-0.03, 1.03)
    beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    return picture("Right by depth", drawn.figure, fontsize=9, **beside)


def _line(drawn, x: Sequence[float], found: Sequence[Estimate], band: bool = True, **fields):
    """Estimates as a line, with a band for their intervals."""
    drawn.plot(x, [one.value for one in found], **fields)
    if band:
        ends = ([one.low for one in found], [one.high for one in found])
        drawn.fill_between(x, *ends, color=fields["color"], alpha=0.15, linewidth=0)


# ---- Beyond the training length


def _losses(subject: Subject, tokens: int, windows: int, seed: int) -> np.ndarray:
    """Loss of each token of windows of held-out text, nats [W, T]."""
    ids: list[int] = []
    separator = [subject.prefix] if subject.run.framing.before else subject.tokenizer.encode("\n")
    for text in _texts(subject, windows * tokens, seed):
        ids += [*text, *separator]
        if len(ids) >= windows * tokens:
            break
    number = len(ids) // tokens
    check(number > 0, f"what was held out has {len(ids)} tokens, fewer than a window of {tokens}")
    starts = [[subject.prefix, *ids[i * tokens : (i + 1) * tokens]] for i in range(number)]
    found = subject.likely_ids([(one, 1) for one in starts])
    return -np.stack([one.scored.logprob for one in found]).astype(np.float64)


def _texts(subject: Subject, tokens: int, seed: int) -> Iterator[list[int]]:
    """Held-out documents of a run, else stories."""
    try:
        documents = Trained.of(subject.run).held_out(subject.tokenizer, tokens // 100 + 1, _ANY)
        yield from (document.ids for document in documents.documents)
    except NotApplicable:
        pass
    number = UNSEEN
    while True:
        yield subject.tokenizer.encode(generate(seed, number).text)
        number += 1


def _beyond(loss_WT: np.ndarray, trained: int) -> tuple[Score, Table, Picture]:
    tokens = loss_WT.shape[1]
    inside_W = loss_WT[:, trained // 2 : trained].mean(1)
    gap_W = loss_WT[:, trained:].mean(1) - inside_W
    about = (
        f"nats a token: loss from {trained} to {tokens} tokens − from {trained // 2} to {trained}"
    )
    score = Score.mean("loss beyond", gap_W, "lower", about, chance=0.0)
    edges = np.unique(np.linspace(0, tokens, _BINS + 1).astype(int))
    bins = list(itertools.pairwise(edges.tolist()))
    found = [statistics.mean(loss_WT[:, begin:end].mean(1)) for begin, end in bins]
    rows = [(a, b, b / trained, x.value, x.low, x.high) for (a, b), x in zip(bins, found)]
    head = ("from", "to token", "× training length", "loss", "low", "high")
    size = (7.2, 3.2)
    drawn = axes("tokens before (the line: length in training)", "loss, nats a token", size)
    middle = [(begin + end) / 2 for begin, end in bins]
    _line(drawn, middle, found, color=COLOURS[0], marker="o", markersize=4)
    drawn.axvline(trained, color=FAINT, linewidth=1.2)
    title = "Loss beyond the training length"
    return score, Table(title, head, rows), picture(title, drawn.figure)


def _contexts(settings: PositionSettings, length: float) -> int:
    return settings.items if length <= 1 else max(2, settings.items // 2)


def _sentences(seed: int, number: int) -> Iterator[str]:
    """Sentences of unseen stories, the same for the same item at any length."""
    first = UNSEEN + number * _APART
    for story in itertools.count(first):
        yield from generate(seed, story).sentences
