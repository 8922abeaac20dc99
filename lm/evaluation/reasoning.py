"""Whether a model draws conclusions, or goes by what stands near: on little stories, by likelihood.

Each question is how a story goes on, and the answers are the ways it may: the likeliest is taken to
be the model's, so that any model can be asked, and no reply has to be parsed. The truth is that of
`lm.data.storyworld`, replayed from its facts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from lm.config import Positive
from lm.data.storyworld import lexicon as lx
from lm.data.storyworld.asking import Draw, asked
from lm.data.storyworld.story import Fact, State, apply
from lm.evaluation.beginnings import drawn
from lm.evaluation.card import NotApplicable, Sample, Score, Section, digest
from lm.evaluation.emergence import answers, corpora, questions, reversals
from lm.evaluation.subject import Subject, choices, spells

NUMBERS = lx.NUMBERS[1:]  # that may be left
ANCHORS = 2, 6  # irrelevant numbers


@dataclasses.dataclass(frozen=True)
class ReasoningSettings:
    """How much is asked."""

    stories: Positive = 60  # of each kind


class Choice(NamedTuple):
    """A story that may go on in several ways, of which one is true.

    Attributes:
      kind: of the question.
      story: which it is about: a cluster.
      context, options: what stands before, and how it may go on.
      right: the number of the true one.
      roles: what each option stands for, by which answers to two wordings are compared.
    """

    kind: str
    story: Hashable
    context: str
    options: tuple[str, ...]
    right: int
    roles: tuple[str, ...] = ()


def measure(subject: Subject, settings: ReasoningSettings, seed: int) -> Section:
    """Asks all that the model's tokenizer can write.

    Raises:
      NotApplicable: it can write no stories, and was not trained on the reversal curse.
    """
    draw = Draw(f"reasoning {seed}")
    stories = range(settings.stories)
    every = [
        *(one for story in stories for one in handed_on(draw, story)),
        *(one for story in stories for one in whereabouts(draw, story)),
        *(one for story in stories for one in left_over(draw, story)),
        *negations(seed, settings.stories),
    ]
    scores, samples = [], []
    if spells(subject.tokenizer, "".join(one.context + one.options[0] for one in every)):
        found, cut = chosen(subject, every)
        if cut.mean() > 0.5:
            raise NotApplicable(
                f"its context of {subject.max_length} tokens is shorter than stories"
            )
        by_kind = {
            kind: [n for n, one in enumerate(every) if one.kind == kind]
            for kind in dict.fromkeys(one.kind for one in every)
        }
        for name, about in _RIGHT.items():
            numbers = by_kind[name]
            some = [every[n] for n in numbers]
            scores.append(_right(name, about, some, found[numbers], int(cut[numbers].sum())))
            samples.append(_sample(every[numbers[0]], found[numbers[0]]))
        scores += _negation(every, found, by_kind)
        scores += _anchoring(every, found, by_kind)
        scores += [_framing(every, found, by_kind, *wordings) for wordings in _WORDINGS]
    if "reversal" in corpora(subject):
        scores += _reversal(subject)
    if not scores:
        raise NotApplicable("its tokenizer cannot write stories")
    return Section(
        "reasoning",
        "Reasoning",
        "How a little story goes on, by the likeliest of the ways given. Who has a thing that was "
        "handed on; where a thing is, whose owner is somewhere; how many are left after one gift, "
        "as the stories of this package tell it, and after two, as they never do; whether a true "
        "statement becomes less likely with a not; whether a number that is beside the point "
        "moves the answer; and whether two wordings of a question get the same answer.",
        scores,
        samples=samples,
    )


_RIGHT = {
    "transitivity: one gift": "who has what was given once; the control",
    "transitivity: two gifts": "who has what was given, and given on",
    "composition: where who is": "as told; the control",
    "composition: where a thing is": "whose holder's place is told",
    "composition: left after one gift": "how many; the control",
    "composition: left after two": "how many",
}
_WORDINGS = (
    ("framing: who has it", "transitivity: two gifts", "reworded gifts"),
    ("framing: how many", "composition: left after one gift", "reworded count"),
)


# ---- Stories


def handed_on(draw: Draw, story: int) -> list[Choice]:
    """A thing is given, and given on; each of three friends in each role, as names differ."""
    names, place = draw.order((*lx.GIRLS, *lx.BOYS))[:3], draw.pick(lx.OUTDOORS).at
    thing = draw.pick(lx.TOYS)
    it, some = f"the {thing.noun}", f"a {_adjective(draw, thing)} {thing.noun}"
    turned = draw.random() < 0.5
    found = []
    for turn in range(3):
        one, two, three = names[turn:] + names[:turn]
        there = f"{three} and {two}" if turned else f"{two} and {three}"
        opening = f"{one} had {some}. {there} were {place}."
        options = tuple(f" {who} had {it}." for who in (one, two, three))
        for kind, way, now in (
            ("transitivity: {}", "{} gave {it} to {}.", "Now"),
            ("reworded gifts", "{} gave {} {it}.", "In the end,"),
        ):
            for gifts, takers in (("one gift", (two,)), ("two gifts", (two, three))):
                if kind == "reworded gifts" and gifts == "one gift":
                    continue
                state, told, giver = State({}, {}, {}, {}), [opening], one
                for sentence, taker in enumerate(takers):
                    told.append(way.format(giver, taker, it=it))
                    apply(state, Fact(giver, "gave", thing.noun, sentence))
                    apply(state, Fact(taker, "has", thing.noun, sentence))
                    giver = taker
                right = (one, two, three).index(state.holder[thing.noun])
                context = " ".join((*told, now))
                roles = ("first", "second", "third")
                found.append(Choice(kind.format(gifts), story, context, options, right, roles))
    return found


def whereabouts(draw: Draw, story: int) -> list[Choice]:
    """Two have a thing each, and are somewhere each: where is who, and where is what."""
    names = draw.order((*lx.GIRLS, *lx.BOYS))[:2]
    things = draw.order(lx.TOYS)[:2]
    places = [place.at for place in draw.order(lx.OUTDOORS)[:2]]
    had = [f"{n} had a {_adjective(draw, t)} {t.noun}." for n, t in zip(names, things)]
    went = [f"{name} was {place}." for name, place in zip(names, places)]
    if draw.random() < 0.5:
        went.reverse()
    context, options = " ".join((*had, *went)), tuple(f" {place}." for place in places)
    found = []
    for number, (name, thing) in enumerate(zip(names, things)):
        for kind, what in (("where who is", name), ("where a thing is", f"The {thing.noun}")):
            asking = f"{context} {what} was"
            found.append(Choice(f"composition: {kind}", story, asking, options, number))
    return found


def left_over(draw: Draw, story: int) -> list[Choice]:
    """One gives away of what one has: how many are left, with and without numbers beside it."""
    hero, friend, other = draw.order((*lx.GIRLS, *lx.BOYS))[:3]
    noun, adjectives = draw.pick(lx.FRUIT)
    many = 4 + int(draw.random() * 3)
    given = 1 + int(draw.random() * 2)
    opening = f"{hero} had {_count(many, noun, draw.pick(adjectives))} in the basket."
    hungry, gift = f"{friend} was hungry.", f"{hero} gave {friend} {_count(given, noun)}."
    again = f"{other} was hungry, too. {hero} gave {other} {_count(1, noun)}."
    beside = {n: f"There were {_count(n, 'bird')} in the tree." for n in ANCHORS}
    one = " ".join((opening, hungry, gift))
    plain = tuple(f" {_count(n, noun)} left." for n, _ in enumerate(NUMBERS, 1))
    inside = tuple(f" {_count(n, noun)} in the basket." for n, _ in enumerate(NUMBERS, 1))
    now, left = f"Now {hero} had", many - given
    asked = [
        ("composition: left after one gift", f"{one} {now}", plain, left),
        ("composition: left after two", f"{one} {again} {now}", plain, left - 1),
        ("reworded count", f"{one} In the end, {hero} had", inside, left),
        *(
            (f"anchor {n}", " ".join((opening, hungry, gift, told, now)), plain, left)
            for n, told in beside.items()
        ),
    ]
    return [Choice(kind, story, told, ways, n - 1, NUMBERS) for kind, told, ways, n in asked]


def negations(seed: int, number: int) -> list[Choice]:
    """Statements about beginnings of generated stories, true and false, each with its negation."""
    found, draw = [], Draw(f"negation {seed}")
    for story in range(number):
        told: list[Choice] = []
        while not told:
            start, after = drawn(seed, draw)
            known = asked(start, after, draw)
            for true, false in zip(known.get("yes", ()), known.get("no", ())):
                for kind, one in (("true", true), ("false", false)):
                    who, is_, what = one.about[1].partition(" is ")
                    if is_:
                        ways = (f" {what}.", f" not {what}.")
                        told.append(
                            Choice(kind, story, f"{start.text} {who} was", ways, kind == "false")
                        )
        found += told
    return found


def _adjective(draw: Draw, thing: lx.Thing) -> str:
    return draw.pick([word for word in thing.adjectives if word[0] not in "aeiou"])


def _count(number: int, noun: str, adjective: str = "") -> str:
    words = (lx.NUMBERS[number], adjective, noun + "s" * (number > 1))
    return " ".join(filter(None, words))


# ---- Scores


def chosen(subject: Subject, every: Sequence[Choice]) -> tuple[np.ndarray, np.ndarray]:
    """log p of each option, nats [N, most options], -inf where there is none; and which were cut.

    Of those that were cut [N] the context has no room for the story's beginning.
    """
    found = choices(subject.likely, [(one.context, one.options) for one in every])
    logs = np.full((len(every), max(map(len, found))), -np.inf)
    for row, several in zip(logs, found):
        row[: len(several)] = [one.scored.total for one in several]
    return logs, np.array([any(one.truncated for one in several) for several in found])


def _right(name: str, about: str, some: list[Choice], logs_NK: np.ndarray, cut: int) -> Score:
    right = [int(row.argmax()) == one.right for row, one in zip(logs_NK, some)]
    clusters, chance = [one.story for one in some], 1 / len(some[0].options)
    fields = {"asked": digest(some), "truncated": cut, "chance": chance}
    return Score.share(name, right, "higher", about, clusters, **fields)


def _negation(every, found, by_kind) -> list[Score]:
    true, false = by_kind["true"], by_kind["false"]  # in pairs
    some, clusters = [every[n] for n in true], [every[n].story for n in true]
    gaps = found[:, 0] - found[:, 1]  # by how much "is" is likelier than "is not", nats
    return [
        Score.share(f"negation: {name}", right, "higher", about, clusters, digest(some), chance=0.5)
        for name, right, about in (
            ("true", gaps[true] > 0, "a true statement is likelier than its negation"),
            ("false", gaps[false] < 0, "a false statement is less likely than its negation"),
            (
                "told apart",
                gaps[true] > gaps[false],
                "a not costs the true one more than the false",
            ),
        )
    ]


def _anchoring(every, found, by_kind) -> list[Score]:
    numbers = np.arange(1, 1 + len(NUMBERS))
    expected, answer, right = [], [], []
    for anchor in ANCHORS:
        rows = by_kind[f"anchor {anchor}"]
        logs = found[rows][:, : len(NUMBERS)]
        p = np.exp(logs - logs.max(1, keepdims=True))
        expected.append((p / p.sum(1, keepdims=True)) @ numbers)
        answer.append(logs.argmax(1))
        right.append(answer[-1] == [every[n].right for n in rows])
    low, high = ANCHORS
    some = [every[n] for n in by_kind[f"anchor {low}"]]
    shift = (
        f"of the expected answer, where there are {high} birds and not {low}, over {high - low}: 0 "
        "without an effect, 1 where it follows (Jacowitz & Kahneman 1995)"
    )
    beside = "share of answers that are right beside such a number"
    moved, changed = (expected[1] - expected[0]) / (high - low), answer[0] != answer[1]
    return [
        Score.mean(
            *(f"anchoring: {name}", items, better, about, None, digest(some)),
            **{"chance": chance, "fraction": name != "shift"},
        )
        for name, items, better, about, chance in (
            ("shift", moved, "lower", shift, 0.0),
            ("changed", changed, "lower", "share of answers that are others", None),
            ("right", np.mean(right, 0), "higher", beside, 1 / len(NUMBERS)),
        )
    ]


def _framing(every, found, by_kind, name: str, usual: str, reworded: str) -> Score:
    some = [[every[n] for n in by_kind[kind]] for kind in (usual, reworded)]
    chose = [found[by_kind[kind]].argmax(1) for kind in (usual, reworded)]
    shares = [np.bincount(c, minlength=found.shape[1]) / len(c) for c in chose]
    same, clusters = chose[0] == chose[1], [one.story for one in some[0]]
    about = "share of questions whose two wordings get the same answer"
    fields = {"asked": digest(itertools.chain(*some)), "chance": float(shares[0] @ shares[1])}
    return Score.share(name, same, "higher", about, clusters, **fields)


def _reversal(subject: Subject) -> list[Score]:
    sets = reversals(int(subject.run.config["seed"]))
    back = sets["backward, held out"]
    wrong = [one._replace(answer=other.answer) for one, other in zip(back, [*back[1:], back[0]])]
    found = {
        what: answers(subject, questions(subject, items), write=False)
        for what, items in {**sets, "": wrong}.items()
    }
    about, chance = "share of names given exactly", 1 / len(sets["forward"])
    scores = [
        Score.share(
            f"reversal: {what}", found[what].exact, about=about, asked=digest(items), chance=chance
        )
        for what, items in sets.items()
    ]
    likelier = found["backward, held out"].logprob > found[""].logprob
    about = "the right name is likelier than another's (Berglund et al. 2023, fig. 4)"
    name, fields = "reversal: right beside another name", {"asked": digest(back), "chance": 0.5}
    return [*scores, Score.share(name, likelier, about=about, **fields)]


def _sample(one: Choice, logs_K: np.ndarray) -> Sample:
    said = int(logs_K.argmax())
    parts = {"story": one.context, "takes": one.options[said], "right": one.options[one.right]}
    return Sample(parts, said == one.right)
