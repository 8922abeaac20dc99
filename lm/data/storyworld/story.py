"""A story with its ground truth, derived from the telling when first asked for."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import cached_property
from typing import Any, NamedTuple

from lm.data.storyworld import teller as tl
from lm.data.storyworld.lexicon import ALL_PLACES


class Fact(NamedTuple):
    """`subject relation object`, made true by sentence number `sentence` (from 0).

    Relations that change the state of the world: 'at' (the object is a place name or a phrase such
    as 'under a bench'), 'has', 'lost by', 'gave' (always followed by a 'has'), 'ate', 'feels' and
    'owns'. All others ('is a', 'likes', 'wants', 'did', 'made', ...) just hold.
    """

    subject: str
    relation: str
    object: str
    sentence: int


class Reference(NamedTuple):
    """`text[start:end] == pronoun`, in sentence number `sentence`, refers to `entities`."""

    sentence: int
    start: int
    end: int
    pronoun: str
    entities: tuple[str, ...]

    @property
    def entity(self) -> str:
        """The referent as one name: 'Mia', or 'Mia and Tom' for a group."""
        return " and ".join(self.entities)


class Cause(NamedTuple):
    """Sentence `cause` tells why sentence `effect` happened; the same one if it says 'because'."""

    cause: int
    effect: int
    question: str
    answer: str


class Character(NamedTuple):
    """A character or thing: its name in facts, and the phrases the text uses for it."""

    name: str
    phrases: tuple[str, ...]
    pronoun: str
    person: bool


class State(NamedTuple):
    """The world when the story ends, by entity name: who is where, has and feels what."""

    location: dict[str, str]
    holder: dict[str, str]
    feeling: dict[str, str]
    owner: dict[str, str]


class _Record(NamedTuple):
    sentences: tuple[str, ...]  # marks included
    facts: tuple[tuple[int, tuple], ...]
    causes: tuple[tuple[int, int, str, str], ...]
    entities: tuple[tl.Entity, ...]


@dataclasses.dataclass(frozen=True)
class Story:
    """One story: `text` at once, and everything that is true of it on demand."""

    text: str
    seed: int
    index: int
    _record: _Record = dataclasses.field(repr=False, compare=False)

    @cached_property
    def sentences(self) -> tuple[str, ...]:
        """The sentences; `" ".join(sentences) == text`."""
        return tuple(sentence.translate(tl.UNMARK) for sentence in self._record.sentences)

    @cached_property
    def facts(self) -> tuple[Fact, ...]:
        """What the story says is true, in telling order; facts of a group hold of each member."""
        found = []
        for sentence, (subject, relation, target) in self._record.facts:
            for one in getattr(subject, "members", None) or (subject,):
                found.append(Fact(_name(one), relation, _name(target), sentence))
        return tuple(found)

    @cached_property
    def references(self) -> tuple[Reference, ...]:
        """Every pronoun of the text, in order, with its character span and referent."""
        found, offset = [], 0
        entities = self._record.entities
        for number, sentence in enumerate(self._record.sentences):
            start, shift = 0, offset
            for end, character in enumerate(sentence):
                if character in _MARKED:
                    entity = entities[_MARKED[character]]
                    names = tuple(member.name for member in entity.members) or (entity.name,)
                    found.append(
                        Reference(number, start + shift, end + shift, sentence[start:end], names)
                    )
                    shift -= 1
                    start = end + 1
                elif not character.isalpha():
                    start = end + 1
            offset = shift + len(sentence) + 1
        return tuple(found)

    @cached_property
    def causes(self) -> tuple[Cause, ...]:
        """Which sentence is the reason for which, with the question and its answer in words."""
        return tuple(Cause(*cause) for cause in self._record.causes)

    @cached_property
    def words(self) -> Counter[str]:
        """How often each word occurs, in lower case; a possessive counts as its word and `'s`."""
        return Counter(tokenize(self.text))

    @cached_property
    def characters(self) -> tuple[Character, ...]:
        """The characters and things of the story (groups left out)."""
        found = []
        for entity in self._record.entities:
            if not entity.members:
                named = entity.alias or entity.name == entity.the
                phrases = (entity.the, *(("the " + entity.noun,) if entity.alias else ()))
                phrases += () if named else (entity.noun,)
                if entity.cls == "they":
                    phrases += (entity.noun[:-1],)
                found.append(Character(entity.name, phrases, entity.cls, entity.person))
        return tuple(found)

    @cached_property
    def state(self) -> State:
        """The world at the end of the story: the replay of `facts`."""
        state = State({}, {}, {}, {})
        for fact in self.facts:
            apply(state, fact)
        return state


def apply(state: State, fact: Fact) -> None:
    """Updates `state` with one fact, in place."""
    subject, relation, target, _ = fact
    if relation == "at":
        state.location[subject] = target
        state.holder.pop(subject, None)
    elif relation == "has":
        state.holder[target] = subject
        state.location.pop(target, None)
    elif relation == "lost by":
        state.holder.pop(subject, None)
    elif relation == "ate":
        state.holder.pop(target, None)
    elif relation == "is" and target == "gone":
        state.location.pop(subject, None)
    elif relation == "feels":
        state.feeling[subject] = target
    elif relation == "owns":
        state.owner[target] = subject


def record(teller: tl.Teller, seed: int, index: int) -> Story:
    """The finished story of `teller`."""
    return Story(
        text=" ".join(teller.sentences).translate(tl.UNMARK),
        seed=seed,
        index=index,
        _record=_Record(
            tuple(teller.sentences),
            tuple(teller.facts),
            tuple(teller.causes),
            tuple(teller.entities),
        ),
    )


def tokenize(text: str) -> list[str]:
    """The words of a story text in lower case, without punctuation, `'s` on its own."""
    return text.lower().translate(_PUNCTUATION).replace("'s ", " 's ").split()


def place_phrase(place: str) -> str:
    """The phrase that answers 'where': 'park' -> 'in the park'; phrases stay as they are."""
    return _PHRASES.get(place, place)


def _name(value: Any) -> str:
    return value if isinstance(value, str) else value.name


_MARKED = {mark: number for number, mark in enumerate(tl.MARKS)}
_PUNCTUATION = {ord(mark): " " for mark in '.,!?"'}
_PHRASES: dict[str, str] = {place.name: place.at for place in ALL_PLACES}
