"""Tasks that are shown by examples in the context: what is asked, in what form, what is chosen."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lm.config import check
from lm.data.storyworld import generate
from lm.data.storyworld import lexicon as lx
from lm.data.storyworld.asking import Draw
from lm.evaluation.documents import FAR
from lm.evaluation.subject import Subject, choices


class Example(NamedTuple):
    """A text with its label."""

    text: str
    label: str
    cluster: Hashable  # what it shares with others: its story


class Item(NamedTuple):
    """An example whose label is asked for, after others whose labels are shown."""

    asked: Example
    shown: Sequence[Example]  # as many as are ever shown; fewer are the first of them
    choices: Sequence[str]  # in no order that tells

    def relabelled(self, new: Mapping[str, str]) -> Item:
        """With other labels, of the examples that are shown and of what is asked."""
        return Item(
            self.asked._replace(label=new[self.asked.label]),
            [one._replace(label=new[one.label]) for one in self.shown],
            [new[choice] for choice in self.choices],
        )


class Format(NamedTuple):
    """How an example is written, and what stands between two."""

    before: str  # with {} for the text; the label comes after it, and after a space
    after: str  # of a label that is shown
    between: str

    def prompt(self, item: Item, number: int) -> str:
        """Up to where the label is to come, after `number` examples."""
        shown = [
            f"{self.before.format(one.text)} {one.label}{self.after}" for one in item.shown[:number]
        ]
        return self.between.join([*shown, self.before.format(item.asked.text)])


# The same in other signs, as in Sclar et al. (2023).
_SIGNS = {
    "arrow": Format("{} ->", "", "\n"),
    "colon": Format("{}:", ".", "\n"),
    "question": Format("Q: {} A:", "", "\n"),
    "lines": Format("Input: {}\nOutput:", "", "\n\n"),
}
# And in words that a little story may have.
_WORDS = {
    "copy": Format("The {} and the", ".", " "),
    "mapping": Format("The {}", ".", " "),
    "place": Format("{} It was the", ".", " "),
    "feeling": Format("{} It was a", " day.", " "),
    "names": Format("{} smiled, and", " was glad.", " "),
}
FORMATS = {task: {"words": words, **_SIGNS} for task, words in _WORDS.items()}

# Task → what is to be learnt from its examples.
TASKS = {
    "copy": "a word is to be said again",
    "mapping": "each of four colours stands for one of four things, others in each prompt",
    "place": "a sentence of a story: where it is",
    "feeling": "a sentence of a story: whether somebody is happy or sad, though it says neither",
    "names": "a name of the stories: she or he",
}
BINARY = {"feeling": ("happy", "sad"), "names": ("she", "he")}
_COLOURS = ("red", "blue", "green", "yellow")
_GOOD = ("proud", "warm", "glad", "better", "well", "full", "not afraid", "not lonely")
_BAD = (*("hungry", "afraid", "lonely", "cold", "tired", "worried", "angry", "ill", "thirsty"),)
_OTHERS = 3  # choices that are wrong, where a task has more labels than four


def items(stories: int, number: int, most: int, seed: int) -> dict[str, list[Item]]:
    """`number` items of each task, with `most` examples each.

    Args:
      stories: how many stories sentences are taken from, one of each at most.
      number: of items, or as many as there are examples.
      most: examples that are shown.
      seed: of all that is drawn.

    Raises:
      ConfigError: a task has not as many examples.
    """
    found = {}
    for name in TASKS:
        draw = Draw(f"in context {name} {seed}")
        if name == "mapping":
            found[name] = [_mapping(draw, most, i) for i in range(number)]
            continue
        pool = draw.order(_pool(name, stories, seed))
        check(
            len(pool) > most,
            f"config.in_context.shots={most} asks for more examples than there are: the task "
            f"{name!r} has {len(pool)}, one of which is asked; lower it"
            + (" or raise config.in_context.stories" if name in ("place", "feeling") else ""),
        )
        labels = sorted({one.label for one in pool})
        found[name] = []
        for i, asked in enumerate(pool[:number]):
            shown = draw.order(pool[:i] + pool[i + 1 :])[:most]
            wrong = draw.order(label for label in labels if label != asked.label)[:_OTHERS]
            found[name].append(Item(asked, shown, draw.order([asked.label, *wrong])))
    return found


def _mapping(draw: Draw, most: int, number: int) -> Item:
    """Colours come in rounds of all four, so that four examples show the whole mapping."""
    things = draw.order(lx.THINGS)[: len(_COLOURS)]
    of = dict(zip(_COLOURS, things))
    rounds = (draw.order(_COLOURS) for _ in itertools.count())
    colours = itertools.islice(itertools.chain.from_iterable(rounds), most)
    asked = draw.pick(_COLOURS)
    shown = [Example(colour, of[colour], number) for colour in colours]
    return Item(Example(asked, of[asked], number), shown, draw.order(things))


def _pool(name: str, stories: int, seed: int) -> list[Example]:
    if name == "copy":
        words = {*lx.THINGS, *(animal.noun for animal in lx.HERD)}
        words |= {place.name for place in lx.ALL_PLACES}
        return [Example(word, word, word) for word in sorted(words)]
    if name == "names":
        known = (("she", (*lx.GIRLS, *lx.ANIMAL_NAMES["she"])),)
        known += (("he", (*lx.BOYS, *lx.ANIMAL_NAMES["he"])),)
        return [Example(one, label, one) for label, names in known for one in names]
    told, found = (_places if name == "place" else _feelings), {}
    for number in range(1, stories):
        # By turns happy and sad, where both are looked for.
        wanted = BINARY[name][number % 2] if name in BINARY else ""
        some = told(generate(FAR + seed, number))
        one = next((one for one in some if not wanted or one.label == wanted), None)
        if one and one.text not in found:
            found[one.text] = one._replace(cluster=number)
    return _balanced([*found.values()]) if name in BINARY else [*found.values()]


def _balanced(pool: list[Example]) -> list[Example]:
    """As many of each label."""
    of: dict[str, list[Example]] = {}
    for one in pool:
        of.setdefault(one.label, []).append(one)
    return [one for some in zip(*of.values()) for one in some]


def _places(story) -> Iterable[Example]:
    names = {place.name for place in lx.OUTDOORS}
    for sentence, facts in itertools.groupby(story.facts, key=lambda fact: fact.sentence):
        text = story.sentences[sentence]
        words = text.lower().replace(".", " ").replace(",", " ").split()
        places = {fact.object for fact in facts if fact.relation == "at"} & names
        if len(places) == 1 and [word for word in words if word in names] == [*places]:
            yield Example(text, places.pop(), None)


def _feelings(story) -> Iterable[Example]:
    for sentence, facts in itertools.groupby(story.facts, key=lambda fact: fact.sentence):
        text = story.sentences[sentence]
        felt = [fact.object for fact in facts if fact.relation == "feels"]
        if not felt or "happy" in text or "sad" in text:
            continue
        if all(one in _GOOD for one in felt) or all(one in _BAD for one in felt):
            yield Example(text, "happy" if felt[0] in _GOOD else "sad", None)


def likeliest(subject: Subject, asked: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """For each prompt the likeliest of its choices, all tokens of each counted."""
    spaced = [(prompt, [f" {choice}" for choice in some]) for prompt, some in asked]
    totals = [[one.scored.total for one in of] for of in choices(subject.likely, spaced)]
    return [some[int(np.argmax(of))] for (_, some), of in zip(asked, totals)]
