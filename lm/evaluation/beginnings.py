"""Held-out beginnings of stories, and what can be asked and said of them that is true or not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from lm.data.storyworld import Story, generate
from lm.data.storyworld import lexicon as lx
from lm.data.storyworld.asking import UNKNOWN, WORDINGS, Asked, Draw, asked, beginning, words
from lm.data.storyworld.instructions import COURTESIES, is_held_out

Sort = Literal["true", "invented", "mixed up"]

_AT = {place.at for place in lx.OUTDOORS}
_NOT_ASKED = ("yes", "no", "unknown", "continue")  # kinds without a short answer of their own


class Question(NamedTuple):
    """A question about a beginning."""

    story: str  # the beginning
    kind: str  # as of `lm.data.storyworld.instructions.KINDS`
    asked: str  # in words
    answer: str  # `UNKNOWN` where the story does not say

    @property
    def prompt(self) -> str:
        """What a user says: the beginning, and the question in a line of its own."""
        return f"{self.story}\n{self.asked}"

    @property
    def answerable(self) -> bool:
        """Whether the story holds the answer."""
        return self.answer != UNKNOWN


class Statement(NamedTuple):
    """What might be said of a beginning, such as "Mia is in the park": true; invented, of what it
    does not tell of; or mixed up, of what it tells of others."""

    story: str
    said: str  # without the full stop
    sort: Sort

    @property
    def told(self) -> str:
        """As a story tells it: a sentence in the past."""
        was = {" is ": " was ", " has ": " had ", " are ": " were "}
        verb = re.search("|".join(was), self.said)
        said = self.said.replace(verb[0], was[verb[0]], 1) if verb else self.said
        return f"{said[0].upper()}{said[1:]}."

    @property
    def about(self) -> Literal["places", "owners", "numbers", "feelings"]:
        """What it says something of."""
        if " has " in self.said:
            return "owners"
        if " are " in self.said:
            return "numbers"
        return "places" if self.said.partition(" is ")[2] in _AT else "feelings"


class Pair(NamedTuple):
    """A true statement and a false one with the same verb."""

    true: Statement
    false: Statement


def beginnings(seed: int, number: int) -> Iterator[tuple[str, dict[str, list[Asked]], Draw]]:
    """`number` held-out beginnings of three to five sentences, and what can be asked of each.

    A pure function of its arguments: every model is asked the same. None comes twice.

    Yields:
      the beginning; what `asking.asked` finds, by kind; where further choices come from.
    """
    draw, seen = Draw(f"beginnings {seed}"), set[str]()
    while len(seen) < number:
        story, after = drawn(seed, draw)
        if is_held_out(story.text) and story.text not in seen:
            seen.add(story.text)
            yield story.text, asked(story, after, draw), draw


def drawn(seed: int, draw: Draw) -> tuple[Story, str]:
    """The first three to five sentences of some story of the stream `seed`, and the next one."""
    whole = generate(seed, int(draw.random() * 2**53))
    cut = 3 + int(draw.random() * 3)
    return beginning(whole, cut), whole.sentences[cut]


def questions(seed: int, number: int, each: int) -> list[Question]:
    """Of each of `number` beginnings, up to `each` questions of different kinds that it answers,
    and one that it does not."""
    found = []
    for story, kinds, draw in beginnings(seed, number):
        chosen = draw.order(kind for kind in kinds if kind not in _NOT_ASKED)[:each]
        for kind in (*chosen, "unknown"):
            one = draw.pick(kinds[kind])
            *wordings, _ = WORDINGS[one.kind]
            worded = draw.pick(wordings).format(*one.about)
            found.append(Question(story, kind, worded, one.answer))
    return found


def pairs(seed: int, number: int) -> list[Pair]:
    """What can be said of `number` beginnings, each true statement beside false ones.

    One is invented; where there is one that takes what the beginning tells of another, that too.
    """
    found = []
    for story, kinds, draw in beginnings(seed, number):
        for yes, no in zip(kinds.get("yes", ()), kinds.get("no", ())):
            said = yes.about[0]
            one = Statement(story, said, "true")
            found.append(Pair(one, Statement(story, no.about[0], "invented")))
            if mixed := _mixed_up(story, said):
                found.append(Pair(one, Statement(story, draw.pick(mixed), "mixed up")))
    return found


def _mixed_up(story: str, said: str) -> list[str]:
    """What `said` becomes with another place, or another owner, that the beginning tells of.

    A thing has one owner and nobody is at two places, so these are false. One may feel two ways at
    once, and what is counted is told of once, so there are none of feelings and numbers.
    """
    told = {*words(story)}
    owner, has, thing = said.partition(" has ")
    if has:
        people = [name for name in (*lx.GIRLS, *lx.BOYS) if name in told]
        # An animal may be called by its name or by its kind: only people are surely others to it.
        animals = [f"the {animal.noun}" for animal in lx.HERD if animal.noun in told]
        others = people + animals * (owner in people)
        return [f"{other} has {thing}" for other in others if other != owner]
    subject, _, at = said.partition(" is ")
    places = [place.at for place in lx.OUTDOORS if place.name in told]
    return [f"{subject} is {place}" for place in places if at in _AT and place != at]


def sentence(reply: str, most: int = 12) -> str | None:
    """The short answer that a reply gives: its first sentence, after courtesies.

    None of a reply that gives none: it is empty, begins with no letter, ends in the middle of its
    first sentence, or goes on for more than `most` words.
    """
    said = without_courtesies(reply)
    end = next((i for i, mark in enumerate(said) if mark in ".!?\n"), -1)
    first = said[: end + 1].strip()
    whole = end > 0 and said[0].isalnum() and said[end] != "\n"
    return first if whole and len(first.split()) <= most else None


def without_courtesies(reply: str) -> str:
    """A reply without "Sure!" and the like in front."""
    said = reply.strip()
    while courtesy := next((c for c in COURTESIES if said.startswith(c)), ""):
        said = said[len(courtesy) :].lstrip()
    return said
