"""The storyteller: keeps the state of the world and of the discourse while sentences are written.

Plots write sentences as f-strings and name every character and thing through the methods here.
They decide between a name and a pronoun by the one rule of the story world:

    A pronoun refers to the entity of its class (he, she, it, they) mentioned last. It is used only
    if no other entity of that class was mentioned in the same or in the previous sentence; within
    a sentence that has already named the referent, only the same sentence counts. `I` and `my` are
    the speaker's, `you` and `your` the addressee's; they do not count as mentions.

Each pronoun is written with an invisible mark (a control character that numbers the entity)
behind it, so the exact spans and referents can be read off afterwards, and only if asked for.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

from lm.data.storyworld import lexicon as lx

T = TypeVar("T")

# Control characters that no text contains; mark number k stands for the k-th entity of the story.
MARKS = "".join(map(chr, (*range(1, 9), *range(14, 32))))
UNMARK = dict.fromkeys(map(ord, MARKS))

_FORMS = {
    "he": ("him", "his"),
    "she": ("her", "her"),
    "it": ("it", "its"),
    "they": ("them", "their"),
}


def _in_speech(pronoun: str) -> property:
    return property(lambda entity: pronoun + entity.mark, doc=f"`{pronoun}`, as said, and marked.")


class Entity:
    """A character, thing or group (`members`) of one story, with its marked pronouns."""

    __slots__ = (
        *("name", "the", "noun", "a", "cls", "kind", "members", "person", "alias", "animal", "loc"),
        *("mark", "he", "him", "his", "seen"),
    )

    def __init__(self, name: str, the: str, noun: str, a: str, cls: str, mark: str):
        self.name = name
        self.the = the
        self.noun = noun
        self.a = a
        self.cls = cls
        self.mark = mark
        self.kind: str | None = None
        self.members: tuple[Entity, ...] = ()
        self.person = self.alias = False
        self.animal: lx.Animal | None = None
        self.loc: Any = None
        self.seen = -9
        him, his = _FORMS[cls]
        self.he = cls + mark
        self.him = him + mark
        self.his = his + mark

    I, my, me = _in_speech("I"), _in_speech("my"), _in_speech("me")  # noqa: E741
    you, You, your = _in_speech("you"), _in_speech("You"), _in_speech("your")
    we, We, us = _in_speech("we"), _in_speech("We"), _in_speech("us")


def article(phrase: str) -> str:
    """`phrase` with 'a' or 'an' before it."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


class Teller:
    """Writes one story.

    Randomness is `random.Random(int).random()`, whose stream Python promises to keep across
    versions; every choice is derived from it here.
    """

    def __init__(self, number: int):
        self.random = random.Random(number).random
        self.sentences: list[str] = []
        self.facts: list[tuple[int, tuple]] = []
        self.causes: list[tuple[int, int, str, str]] = []
        self.entities: list[Entity] = []
        self.cast: list[Entity] = []
        self.taken: set[str] = set()
        self.last: dict[str, Entity | None] = dict.fromkeys(_FORMS)
        self.rival = dict.fromkeys(_FORMS, -9)
        self.dated = False

    # Choice.

    def pick(self, options: Sequence[T]) -> T:
        """One of `options`, uniformly."""
        return options[int(self.random() * len(options))]

    def either(self, *options: str) -> str:
        """One of several wordings, uniformly."""
        return options[int(self.random() * len(options))]

    def two(self, options: Sequence[T]) -> tuple[T, T]:
        """Two different ones of `options`."""
        first = int(self.random() * len(options))
        second = first + 1 + int(self.random() * (len(options) - 1))
        return options[first], options[second % len(options)]

    def chance(self, share: float) -> bool:
        """True with probability `share`."""
        return self.random() < share

    def when(self) -> str:
        """A time phrase such as 'one day, ', or nothing if the story already has its time."""
        if self.dated:
            return ""
        self.dated = True
        return self.pick(lx.DAYS) + ", "

    # Cast.

    def _add(self, name: str, the: str, noun: str, a: str, cls: str) -> Entity:
        entity = Entity(name, the, noun, a, cls, MARKS[len(self.entities)])
        self.entities.append(entity)
        self.taken.add(name)
        return entity

    def _person(self, name: str, the: str, noun: str, a: str, cls: str) -> Entity:
        entity = self._add(name, the, noun, a, cls)
        entity.person = True
        self.cast.append(entity)
        return entity

    def _gender(self, beside: Entity | None) -> str:
        if beside is None:
            return "he" if self.random() < 0.5 else "she"
        other = "she" if beside.cls == "he" else "he"
        return other if self.random() < 0.7 else beside.cls

    def _free_of(self, options: Sequence[T], key: Any = None) -> T:
        while True:
            option = self.pick(options)
            if (option if key is None else key(option)) not in self.taken:
                return option

    def child(self, beside: Entity | None = None) -> Entity:
        """A girl or boy, of the other gender than `beside` more often than not."""
        cls = self._gender(beside)
        name = self._free_of(lx.GIRLS if cls == "she" else lx.BOYS)
        noun = "girl" if cls == "she" else "boy"
        trait = self.pick(lx.CHILD_TRAITS)
        entity = self._person(name, name, noun, f"{article(trait)} {noun} named {name}", cls)
        entity.kind = trait
        return entity

    def animal(
        self,
        beside: Entity | None = None,
        kinds: Sequence[lx.Animal] = lx.WALKERS,
        named: float = 0.6,
    ) -> Entity:
        """An animal of one of `kinds`, with a name of its own in a share `named` of cases."""
        animal = self._free_of(kinds, lambda kind: kind.noun)
        cls = animal.pronoun or self._gender(beside)
        trait, noun = self.pick(lx.ANIMAL_TRAITS), animal.noun
        self.taken.add(noun)
        a = f"{article(trait)} {noun}"
        if self.random() < named:
            name = self._free_of(lx.ANIMAL_NAMES[cls])
            entity = self._person(name, name, noun, f"{a} named {name}", cls)
            entity.alias = True
        else:
            entity = self._person(noun, "the " + noun, noun, a, cls)
        entity.animal = animal
        entity.kind = trait
        return entity

    def hero(self, beside: Entity | None = None) -> Entity:
        """A child or an animal."""
        return self.child(beside) if self.random() < 0.5 else self.animal(beside)

    def adult(self, *names: str) -> Entity:
        """A grown-up known by a name ('Grandma') or a trade ('the baker')."""
        name = self.pick(names)
        if name in _FAMILY:
            return self._person(name, name, "", name, _FAMILY[name])
        return self._person(name, "the " + name, name, article(name), self._gender(None))

    def thing(self, thing: lx.Thing | str, *adjectives: str) -> Entity:
        """A thing; `a` is its first mention ('a red ball'), `kind` its adjective or ''."""
        if isinstance(thing, str):
            noun, adjective = thing, self.pick(adjectives) if adjectives else ""
        else:
            noun, adjective = thing.noun, self.pick(thing.adjectives)
        full = f"{adjective} {noun}" if adjective else noun
        entity = self._add(noun, "the " + noun, noun, article(full), "it")
        entity.kind = adjective
        return entity

    def plural(self, noun: str, adjective: str = "") -> Entity:
        """Several things under one name: 'apples', spoken of as 'they'."""
        entity = self._add(noun, "the " + noun, noun, f"{adjective} {noun}".strip(), "they")
        entity.kind = adjective
        return entity

    def group(self, *members: Entity) -> Entity:
        """Characters acting together: 'Mia and Tom', 'they'."""
        the = " and ".join([member.the for member in members])
        entity = self._person(the, the, "", the, "they")
        self.cast.pop()
        entity.members = members
        return entity

    # Mention.

    def mention(self, entity: Entity) -> None:
        """Notes that the sentence being written names or refers to `entity`."""
        for member in entity.members:
            self.mention(member)
        last = self.last[entity.cls]
        if last is not entity:
            if last is not None:
                self.rival[entity.cls] = last.seen
            self.last[entity.cls] = entity
        entity.seen = len(self.sentences)

    def _clear(self, entity: Entity) -> bool:
        """Whether a pronoun for `entity` is unambiguous here; counts as its mention if so."""
        recent = len(self.sentences) - 1
        if entity.members:
            last = self.last["they"]
            if last is not None and last is not entity and last.seen >= recent:
                return False
            if self.last["they"] is entity and self.rival["they"] >= recent:
                return False
            for other in self.cast:
                if (other.seen >= recent) != (other in entity.members):
                    return False
        elif (
            self.last[entity.cls] is not entity
            or entity.seen < recent
            or self.rival[entity.cls] >= recent
        ):
            return False
        if self.random() < 0.15:
            return False
        self.mention(entity)
        return True

    def n(self, entity: Entity) -> str:
        """The entity by name: 'Mia', 'the dog', 'the ball'."""
        introduced = entity.seen >= 0
        self.mention(entity)
        if introduced and entity.alias and self.random() < 0.25:
            return "the " + entity.noun
        return entity.the

    def call(self, entity: Entity) -> str:
        """The name itself, as in an address: 'Thank you, Rex!'."""
        self.mention(entity)
        return entity.the

    def a(self, entity: Entity) -> str:
        """The entity introduced: 'a little dog named Rex', 'a red ball'."""
        self.mention(entity)
        return entity.a

    def bare(self, entity: Entity) -> str:
        """The noun alone, for 'my ball'."""
        self.mention(entity)
        return entity.noun

    def s(self, entity: Entity) -> str:
        """The entity as subject: a pronoun if that is clear, else by name."""
        return entity.he if self._clear(entity) else self.n(entity)

    def o(self, entity: Entity) -> str:
        """The entity as object: a pronoun if that is clear, else by name."""
        return entity.him if self._clear(entity) else self.n(entity)

    def p(self, entity: Entity) -> str:
        """The entity as owner: 'her' if that is clear, else 'Mia's'."""
        return entity.his if self._clear(entity) else self.n(entity) + "'s"

    def _here(self, entity: Entity) -> bool:
        cls = entity.cls
        now = len(self.sentences)
        clear = self.last[cls] is entity and (entity.seen == now) and self.rival[cls] < now
        self.mention(entity)
        return clear

    def he(self, entity: Entity) -> str:
        """Subject pronoun for one already named in this sentence."""
        return entity.he if self._here(entity) else entity.the

    def him(self, entity: Entity) -> str:
        """Object pronoun for one already named in this sentence."""
        return entity.him if self._here(entity) else entity.the

    def his(self, entity: Entity) -> str:
        """Possessive pronoun for one already named in this sentence."""
        return entity.his if self._here(entity) else entity.the + "'s"

    # Telling.

    def say(self, sentence: str, *facts: tuple) -> int:
        """Adds a sentence and the facts (subject, relation, object) it makes true; its index."""
        index = len(self.sentences)
        self.sentences.append(sentence[0].upper() + sentence[1:])
        for fact in facts:
            self.facts.append((index, fact))
            if fact[1] == "at":
                subject = fact[0]
                subject.loc = fact[2]
                for member in subject.members:
                    member.loc = fact[2]
        return index

    def remark(self, *sentences: str) -> int:
        """Adds one of several sentences that make nothing true."""
        return self.say(self.either(*sentences))

    def because(self, cause: int, effect: int, question: str, answer: str) -> None:
        """Notes that sentence `cause` is the reason for sentence `effect`."""
        self.causes.append((cause, effect, question, answer))

    def text(self) -> str:
        """The story so far, marks included."""
        return " ".join(self.sentences)


_FAMILY = {"Grandma": "she", "Grandpa": "he", "Mom": "she", "Dad": "he"}
