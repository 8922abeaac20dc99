"""What one can ask about the beginning of a story, and what answers are right and wrong.

A story is cut after a few sentences, and its ground truth with it, so that answers are about what
has been told so far, and "Continue the story." has one continuation that is known.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

from lm.data.storyworld import lexicon as lx
from lm.data.storyworld.story import Story, place_phrase
from lm.data.storyworld.teller import article

T = TypeVar("T")

UNKNOWN = "I do not know."

# How each kind is asked, of what `Asked.about` holds; the last wording is for held-out sets alone.
WORDINGS: dict[str, tuple[str, ...]] = {
    "where": ("Where is {0}?", "Where is {0} now?", "Tell me where {0} is.", "Where can {0} be?"),
    "did": ("{0}?", "Tell me. {0}?", "{0} in the story?"),
    "has": ("Who has {0}?", "Tell me who has {0}.", "Who has {0} now?"),
    "lost": ("Who lost {0}?", "Tell me who lost {0}.", "Who could not find {0}?"),
    "feels": ("How does {0} feel?", "Tell me how {0} feels.", "How does {0} feel now?"),
    "count": ("How many {0} are there?", "Count the {0}.", "How many {0} are there now?"),
    "is a": ("What is {0}?", "Tell me what {0} is.", "What animal is {0}?"),
    "name": ("What is the name of the {0}?", "Who is the {0}?", "Tell me the name of the {0}."),
    "lives": ("Where does {0} live?", "Tell me where {0} lives.", "Where is the home of {0}?"),
    "why": ("{0}", "Tell me. {0}", "One question. {0}"),
    "true": ("Is it true that {0}?", "{1}. Is that true?", "{1}. Is it true?"),
    "reverse": ("Reverse the words: {0}", "Reverse: {0}", "Say in reverse: {0}"),
    "words": ("Count the words: {0}", "How many words are here: {0}", "How many words: {0}"),
    "continue": ("Continue the story.", "Go on.", "Please continue."),
    "old": ("How old is {0}?", "Tell me how old {0} is.", "How old is {0} now?"),
    "eyes": ("What colour are {0}'s eyes?", "Tell me the colour of {0}'s eyes.", "{0}'s eyes?"),
    "song": ("What is {0}'s best song?", "Tell me {0}'s best song.", "{0}'s best song?"),
}


class Asked(NamedTuple):
    """A question or instruction; `kind` names its wordings, filled with `about`."""

    kind: str
    about: tuple[str, ...]
    answer: str
    wrong: str  # an invented answer: of the right kind, with what the text does not tell of


class Draw(random.Random):
    """Random choices that derive from `random()`, whose stream Python promises to keep."""

    def pick(self, options: Sequence[T]) -> T:
        """One of `options`, uniformly."""
        return options[int(self.random() * len(options))]

    def other(self, options: Iterable[str], than: Iterable[str]) -> str:
        """One of `options` that is none of `than`."""
        taken = {*than}
        return self.pick([option for option in dict.fromkeys(options) if option not in taken])

    def order(self, items: Iterable[T]) -> list[T]:
        """`items` in a random order."""
        return sorted(items, key=lambda _: self.random())


def beginning(story: Story, sentences: int) -> Story:
    """`story` cut after so many sentences, with what is true by then."""
    whole = story._record
    record = whole._replace(
        sentences=whole.sentences[:sentences],
        facts=tuple(fact for fact in whole.facts if fact[0] < sentences),
        causes=tuple(c for c in whole.causes if max(c[:2]) < sentences),
    )
    text = " ".join(story.sentences[:sentences])
    return dataclasses.replace(story, text=text, _record=record)


def asked(story: Story, after: str, draw: Draw) -> dict[str, list[Asked]]:
    """All that can be asked of a beginning, by kind.

    Args:
      story: as `beginning` cuts it.
      after: the sentence that follows.
      draw: where wrong answers come from.
    """
    cast = _Cast(story, draw)
    found = [*_places(cast), *_owners(cast), *_feelings(cast), *_counts(cast), *_kinds(cast)]
    for cause in story.causes:
        found.append(Asked("why", (cause.question,), _said(cause.answer), cast.wrong_reason(cause)))
    kinds: dict[str, list[Asked]] = {}
    for one in found:
        kinds.setdefault(one.kind, []).append(one)
    kinds |= {"yes": [], "no": []}
    for statement, false in cast.statements:
        kinds["yes"].append(Asked("true", (statement, _capital(statement)), "Yes.", "No."))
        kinds["no"].append(Asked("true", (false, _capital(false)), "No.", "Yes."))
    kinds["unknown"] = list(_unknown(cast))
    kinds["continue"] = [Asked("continue", (), after, "")]
    return {kind: several for kind, several in kinds.items() if several}


def reverse(draw: Draw) -> Asked:
    """Two to four words to be said in reverse."""
    words = draw.order(_WORDS)[: 2 + int(draw.random() * 3)]
    wrong = [*reversed(words)]
    wrong[int(draw.random() * len(wrong))] = draw.other(_WORDS, words)
    return Asked("reverse", (" ".join(words),), " ".join(reversed(words)), " ".join(wrong))


def count_words(draw: Draw) -> Asked:
    """One to six words to be counted."""
    words = draw.order(_WORDS)[: 1 + int(draw.random() * 6)]
    answer = lx.NUMBERS[len(words)]
    wrong = draw.other(lx.NUMBERS[1:], (answer,))
    return Asked("words", (" ".join(words),), _said(answer), _said(wrong))


def words(text: str) -> list[str]:
    """The words of a text as they are written, without punctuation, `s` of a possessive apart."""
    return text.translate(_NO_MARKS).split()


class _Cast:
    """Who is in a beginning, what it says of them, and what it might have said."""

    def __init__(self, story: Story, draw: Draw):
        self.story, self.draw = story, draw
        self.text = f" {' '.join(words(story.text))} ".lower()
        self.people = {c.name: c for c in story.characters if self.says(c.phrases[0])}
        self.latest = {(f.subject, f.relation): f for f in story.facts}
        self.statements: list[tuple[str, str]] = []  # a true one and one that it makes false

    def says(self, phrase: str) -> bool:
        """Whether the text has these words, whatever article stands before them."""
        return f" {phrase.removeprefix('the ').lower()} " in self.text

    def the(self, name: str) -> str:
        return self.people[name].phrases[0] if name in self.people else name

    def since(self, sentence: int) -> set[str]:
        """The words after a sentence."""
        rest = " ".join(self.story.sentences[sentence + 1 :])
        return {*words(rest.lower())}

    def nobody(self) -> str:
        """A person's or animal's phrase."""
        return self.absent(_BEINGS)

    def nowhere(self) -> str:
        """A place."""
        return _AT[self.absent(_AT)]

    def absent(self, options: Iterable[str]) -> str:
        """One of `options` of which the text does not tell."""
        options = [*options]
        while self.says(option := self.draw.pick(options)):
            pass
        return option

    def wrong_reason(self, cause) -> str:
        known = map(self.the, self.people)
        who = next(filter(cause.answer.startswith, known), None) or self.nobody()
        reasons = [reason for reason in _REASONS if not self.says(reason.split()[-1])]
        return _said(f"{who} {self.draw.pick(reasons)}")


def _places(cast: _Cast) -> Iterable[Asked]:
    for name, place in cast.story.state.location.items():
        fact = cast.latest[name, "at"]
        told = place_phrase(place)
        if name not in cast.people or cast.people[name].pronoun == "they":
            continue
        if told.split()[0] not in _PREPOSITIONS or _MOVES & cast.since(fact.sentence):
            continue  # not said in a way that still holds at the end
        the, wrong = cast.the(name), cast.nowhere()
        yield Asked("where", (the,), _said(told), _said(wrong))
        if place in _AT:
            cast.statements.append((f"{the} is {told}", f"{the} is {wrong}"))
    for fact in cast.story.facts:
        match = _DID.fullmatch(fact.object) if fact.relation == "did" else None
        if match and match[1] in _VERBS and fact.subject in cast.people:
            about = f"Where did {cast.the(fact.subject)} {_VERBS[match[1]]}{match[2]}"
            yield Asked("did", (about,), _said(match[3]), _said(cast.nowhere()))


def _owners(cast: _Cast) -> Iterable[Asked]:
    for thing, holder in cast.story.state.holder.items():
        if thing in cast.people and holder in cast.people:
            answer, wrong = cast.the(holder), cast.nobody()
            yield Asked("has", (cast.the(thing),), _said(answer), _said(wrong))
            about = cast.the(thing)
            cast.statements.append((f"{answer} has {about}", f"{wrong} has {about}"))
    for fact in cast.story.facts:
        if fact.relation == "lost by":
            answer = cast.the(fact.object)
            yield Asked("lost", (cast.the(fact.subject),), _said(answer), _said(cast.nobody()))


def _feelings(cast: _Cast) -> Iterable[Asked]:
    for name, feeling in cast.story.state.feeling.items():
        if name in cast.people:
            ever = {f.object for f in cast.story.facts if f[:2] == (name, "feels")}
            ever |= {_OPPOSITE[one] for one in ever & {*_OPPOSITE}}
            wrong = cast.absent(one for one in _FEELINGS if one not in ever)
            yield Asked("feels", (cast.the(name),), _said(feeling), _said(wrong))
            if feeling in _OPPOSITE and not cast.says(_OPPOSITE[feeling]):
                is_ = f"{cast.the(name)} is "
                cast.statements.append((is_ + feeling, is_ + _OPPOSITE[feeling]))


def _counts(cast: _Cast) -> Iterable[Asked]:
    for (name, relation), fact in cast.latest.items():
        if relation == "count" and not _TAKEN & cast.since(fact.sentence):
            wrong = cast.absent(number for number in lx.NUMBERS[2:] if number != fact.object)
            yield Asked("count", (name,), _said(fact.object), _said(wrong))
            if fact.object != "one":
                there = f"there are {{}} {name}"
                cast.statements.append((there.format(fact.object), there.format(wrong)))


def _kinds(cast: _Cast) -> Iterable[Asked]:
    animals = [animal.noun for animal in lx.HERD]
    for (name, relation), fact in cast.latest.items():
        if name not in cast.people:
            continue
        if relation == "is a" and fact.object in animals and fact.object != name:
            wrong = cast.absent(animals)
            yield Asked("is a", (name,), _said(article(fact.object)), _said(article(wrong)))
            names = [n for several in lx.ANIMAL_NAMES.values() for n in several]
            yield Asked("name", (fact.object,), _said(name), _said(cast.absent(names)))
        elif relation == "lives":
            homes = [a.home for a in lx.HERD if not cast.says(a.home.split()[-1])]
            wrong = cast.draw.other(homes, (fact.object,))
            yield Asked("lives", (cast.the(name),), _said(fact.object), _said(wrong))


def _unknown(cast: _Cast) -> Iterable[Asked]:
    """Questions whose answer the text does not say, each with an invented one."""
    draw = cast.draw
    nobody = cast.nobody()
    nothing = cast.absent([*(f"the {thing}" for thing in lx.THINGS), "the key", "the letter"])
    none = cast.absent([noun + "s" for noun, _ in lx.FRUIT])
    someone = draw.pick([cast.the(n) for n, c in cast.people.items() if c.person] or [nobody])
    colour = draw.pick(("blue", "green", "brown"))
    for kind, about, wrong in (
        ("where", nobody, cast.nowhere()),
        ("has", nothing, cast.nobody()),
        ("lost", nothing, cast.nobody()),
        ("feels", nobody, cast.absent(_FEELINGS)),
        ("count", none, cast.absent(lx.NUMBERS[2:])),
        ("old", someone, cast.absent(lx.NUMBERS[3:])),
        ("eyes", someone, colour),
        ("song", someone, "the song of the wind"),
    ):
        yield Asked(kind, (about,), UNKNOWN, _said(wrong))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _said(answer: str) -> str:
    return _capital(answer) + "."


_NO_MARKS = {ord(mark): " " for mark in ".,!?\"'"}
_BEINGS = (*lx.GIRLS, *lx.BOYS, *(f"the {animal.noun}" for animal in lx.HERD))
_PREPOSITIONS = ("in", "at", "by", "on", "under", "behind", "next", "between")
_AT = {place.name: place.at for place in lx.OUTDOORS}
# Words of sentences after which one may be elsewhere than one was, though no fact says where.
_MOVES = frozenset(
    (
        *("went", "came", "walked", "ran", "flew", "hopped", "waddled", "trotted", "swam", "led"),
        *("brought", "took", "carried", "pulled", "showed", "visit", "visited", "fell", "free"),
        *("safe", "bed", "road", "path", "way", "over", "through", "along", "out", "home", "back"),
    )
)
_TAKEN = frozenset(("gave", "paid", "ate", "took", "shared", "left"))  # then there are fewer
_VERBS = {
    **{"sat": "sit", "slept": "sleep", "ran": "run", "dug": "dig", "chased": "chase"},
    **{"flew": "fly", "made": "make", "hopped": "hop", "ate": "eat", "swam": "swim"},
    **{"jumped": "jump", "sang": "sing", "hid": "hide", "climbed": "climb", "laid": "lay"},
    **{"rolled": "roll", "walked": "walk", "splashed": "splash"},
}
# verb, what, where: "dug", " a hole", "in the garden"
_DID = re.compile(
    r"(\w+)((?: (?:a|an|the|grass|nuts|corn|leaves|cheese|berries|hole|nest|egg|burrow|stick))*)"
    r" ((?:in|on|by|under|across|over|through|along|around|up|into|at) (?:(?! and ).)+)"
)
_FEELINGS = ("happy", "sad", "afraid", "hungry", "proud", "lonely", "angry", "cold", "worried")
_OPPOSITE = {"happy": "sad", "sad": "happy", "lonely": "happy", "worried": "happy"}
# To be counted or said in reverse.
_WORDS = (
    *(animal.noun for animal in lx.HERD),
    *lx.THINGS,
    *(place.name for place in lx.ALL_PLACES),
    *("red", "blue", "green", "old", "little", "happy", "warm", "soft", "round", "funny"),
)
_REASONS = (
    "lost the ball",
    "was hungry",
    "heard a noise at the door",
    "fell over a stone",
    "came to visit",
    "had a cold",
    "was cold",
)
