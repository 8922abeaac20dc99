"""Pairs of an English sentence and its one right translation into an invented language, Ilvani.

`pair(seed, index)` is a pure function of two integers. It draws a structure (clauses, noun phrases,
tenses) and spells it out twice, so the translation is exact, and compositional: each word and each
construction is always rendered in the same way. The English reads unambiguously by three rules:
prepositional phrases and adverbs belong to the verb of a main clause, a relative clause holds a
verb and one plain noun phrase, and a comma stands before `and` or `but` between clauses only.

    The old dog that saw Tom will not give two red balls to the cats.
    kolusa varu ke tomam vekteke mirerisele bomum sile dua danbaraz.

How Ilvani differs (`language_words` has the words and how suffixes take their vowels):

    order           A clause is its subject, then the rest of the English clause in reverse: adverb,
                    places, receiver, object, verb.  Adjectives follow their noun, the nearest
                    first, then the number or possessor, then the relative clause.
    nouns           stem + plural -rU + definite -sA (for "the") + case: accusative -(A)m for
                    objects, -lA for receivers and aims ("to"), -vA in, -tUl on, -dUr from,
                    -kUm with, genitive -nU for possessors.  "under", "behind" and "near" are words
                    after the noun phrase.  After a number a noun has no plural.
    adjectives      agree with a plural noun in -rU.
    verbs           stem + tense (past -tA, present -jU, future -bAr) + negation -(A)z + plural
                    subject -(A)n + -kA if the clause is relative, which begins with "ke".
    joining         X and Y: X Y-pA, after the case.  Clauses: "ta" for and, "mo" for but.
                    "A because B" is "B sun A", and "When B, A" is "B lir A".
    writing         no capitals and no commas.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from lm.data.storyworld import _refuse
from lm.data.storyworld import language_words as lw

MAX_WORDS = 40  # of an English sentence

_TENSES = (lw.PAST, lw.PRESENT, lw.FUTURE)
_NUMBERS, _ADJECTIVES, _ADVERBS = map(tuple, (lw.NUMBERS, lw.ADJECTIVES, lw.ADVERBS))
_WHERE = ("in", "on", "from", *lw.POSTPOSITIONS)
# Determiners and kinds of verbs, as often as they come.
_DETERMINERS = ("the",) * 6 + ("a",) * 4 + ("number", "possessor")
_VERBS = (lw.TRANSITIVE,) * 4 + (lw.INTRANSITIVE,) * 2 + (lw.GIVING, lw.GOING)


class Phrase(NamedTuple):
    """A noun phrase: a name, or a noun with what belongs to it."""

    noun: lw.Noun | None
    name: str = ""
    determiner: str = ""  # "the", "a", a number, or a possessor's name
    plural: bool = False  # "the dogs"; numbers make a plural without it
    adjectives: tuple[str, ...] = ()
    relative: Relative | None = None

    @property
    def several(self) -> bool:
        """Whether a verb of which this is the subject is plural."""
        return self.plural or self.determiner in lw.NUMBERS


class Relative(NamedTuple):
    """A relative clause: "that saw the cat", or with `subject`, "that the cat saw"."""

    verb: lw.Verb
    past: bool
    other: Phrase
    subject: bool


class Clause(NamedTuple):
    """A main clause; subjects and objects are one or two phrases."""

    subjects: tuple[Phrase, ...]
    verb: lw.Verb
    tense: str
    negated: bool
    objects: tuple[Phrase, ...] = ()
    places: tuple[tuple[str, Phrase], ...] = ()  # (preposition, phrase), receivers and aims first
    adverb: str = ""

    @property
    def several(self) -> bool:
        """Whether the verb is plural."""
        return len(self.subjects) > 1 or self.subjects[0].several


class Sentence(NamedTuple):
    """Clauses by twos or alone: (main, "" | "because" | "when", subordinate or None), joined."""

    parts: tuple[tuple[Clause, str, Clause | None], ...]
    joints: tuple[str, ...]  # "and" or "but", one fewer than parts


def pair(seed: int, index: int) -> tuple[str, str]:
    """Pair number `index` of the stream `seed`: an English sentence and its translation.

    Sentences have 2 to 40 English words. The same in every process and on every Python.

    Args:
      seed: which stream, 0 <= seed.
      index: which pair of it, 0 <= index < 2**64.

    Raises:
      ConfigError: a negative seed or an index out of range.
    """
    if seed < 0 or not 0 <= index < 1 << 64:
        _refuse(seed, index)
    draw = _Draw(seed << 64 | index)
    while True:
        drawn = draw.sentence()
        source = english(drawn)
        if source.count(" ") < MAX_WORDS:
            return source, ilvani(drawn)


class _Draw(random.Random):
    """Draws structures. `wealth`, drawn anew for each sentence, decides how much is in them."""

    wealth = 0.0

    def sentence(self) -> Sentence:
        self.wealth = self.random()
        parts, joints = [self._part()], []
        while self._maybe(0.35) and len(parts) < 3:
            joints.append(self.choice(("and", "but")))
            parts.append(self._part())
        return Sentence(tuple(parts), tuple(joints))

    def _maybe(self, chance: float) -> bool:
        return self.random() < chance * 2 * self.wealth

    def _part(self) -> tuple[Clause, str, Clause | None]:
        main = self._clause()
        if self._maybe(0.2):
            return main, self.choice(("because", "when")), self._clause()
        return main, "", None

    def _clause(self) -> Clause:
        verbs = self.choice(_VERBS)
        objects: tuple[Phrase, ...] = ()
        places: list[tuple[str, Phrase]] = []
        if verbs is lw.TRANSITIVE:
            objects = self._phrases(lw.BEINGS + lw.THINGS)
        elif verbs is lw.GIVING:
            objects = self._phrases(lw.THINGS)
            places.append(("to", self._phrase(lw.BEINGS)))
        elif verbs is lw.GOING:
            places.append(("to", self._phrase(lw.PLACES)))
        if self._maybe(0.25):
            places.append((self.choice(_WHERE), self._phrase(lw.PLACES)))
        if self._maybe(0.12):
            places.append(("with", self._phrase(lw.BEINGS)))
        return Clause(
            self._phrases(lw.BEINGS),
            self.choice(verbs),
            self.choice(_TENSES),
            self.random() < 0.2,
            objects,
            tuple(places),
            self.choice(_ADVERBS) if self._maybe(0.2) else "",
        )

    def _phrases(self, nouns: tuple[lw.Noun, ...]) -> tuple[Phrase, ...]:
        if self._maybe(0.15):
            return self._phrase(nouns, False), self._phrase(nouns, False)
        return (self._phrase(nouns),)

    def _phrase(self, nouns: tuple[lw.Noun, ...], relative: bool = True) -> Phrase:
        noun = self.choice(nouns)
        being = noun in lw.BEINGS
        if being and self.random() < 0.2:
            return Phrase(None, self.choice(lw.NAMES))
        determiner = self.choice(_DETERMINERS)
        if determiner == "number":
            determiner = self.choice(_NUMBERS)
        elif determiner == "possessor":
            determiner = "the" if noun in lw.PEOPLE else self.choice(lw.NAMES)
        adjectives = _ADJECTIVES if being else lw.LOOKS
        number = self._maybe(0.45) + self._maybe(0.15)
        return Phrase(
            noun,
            "",
            determiner,
            determiner not in ("a", *_NUMBERS) and self.random() < 0.3,
            tuple(self.sample(adjectives, number)) if number else (),
            self._relative(noun) if relative and self._maybe(0.15) else None,
        )

    def _relative(self, noun: lw.Noun) -> Relative:
        subject = noun not in lw.BEINGS or self.random() < 0.5
        nouns = lw.BEINGS if subject else lw.BEINGS + lw.THINGS
        other = self._phrase(nouns, relative=False)
        return Relative(self.choice(lw.TRANSITIVE), self.random() < 0.7, other, subject)


def english(sentence: Sentence) -> str:
    """The sentence in English."""
    parts = []
    for main, relation, other in sentence.parts:
        words = _english_clause(main)
        if relation == "because":
            words = f"{words} because {_english_clause(other)}"
        elif relation == "when":
            words = f"when {_english_clause(other)}, {words}"
        parts.append(words)
    text = parts[0]
    for joint, part in zip(sentence.joints, parts[1:], strict=True):
        text = f"{text}, {joint} {part}"
    return f"{text[0].upper()}{text[1:]}."


def _english_clause(clause: Clause) -> str:
    words = [" and ".join(map(_english_phrase, clause.subjects))]
    verb, many = clause.verb, clause.several
    if clause.tense == lw.FUTURE:
        words += ["will", "not"] if clause.negated else ["will"]
    elif clause.negated:
        words += ["did" if clause.tense == lw.PAST else "do" if many else "does", "not"]
    plain = clause.negated or clause.tense == lw.FUTURE
    words.append(verb.base if plain else _english_verb(verb, clause.tense == lw.PAST, many))
    words += [" and ".join(map(_english_phrase, clause.objects))] if clause.objects else []
    for preposition, phrase in clause.places:
        words += [preposition, _english_phrase(phrase)]
    words += [clause.adverb] if clause.adverb else []
    return " ".join(words)


def _english_verb(verb: lw.Verb, past: bool, many: bool) -> str:
    return verb.past if past else verb.base if many else verb.sings


def _english_phrase(phrase: Phrase) -> str:
    if phrase.name:
        return phrase.name
    noun = phrase.noun.many if phrase.several else phrase.noun.one
    words = " ".join([*phrase.adjectives, noun])
    determiner = phrase.determiner
    if determiner == "a":
        determiner = "an" if words[0] in "aeiou" else "a"
    elif determiner in lw.NAMES:
        determiner += "'s"
    words = f"{determiner} {words}"
    relative = phrase.relative
    if relative is None:
        return words
    other = _english_phrase(relative.other)
    many = relative.other.several if relative.subject else phrase.several
    verb = _english_verb(relative.verb, relative.past, many)
    return f"{words} that {other} {verb}" if relative.subject else f"{words} that {verb} {other}"


def ilvani(sentence: Sentence) -> str:
    """The sentence in Ilvani."""
    parts = []
    for main, relation, other in sentence.parts:
        words = _ilvani_clause(main)
        if other is not None:
            particle = lw.BECAUSE if relation == "because" else lw.WHEN
            words = f"{_ilvani_clause(other)} {particle} {words}"
        parts.append(words)
    text = parts[0]
    for joint, part in zip(sentence.joints, parts[1:], strict=True):
        text = f"{text} {lw.JOINED[joint]} {part}"
    return f"{text}."


def _ilvani_clause(clause: Clause) -> str:
    words = [_ilvani_phrases(clause.subjects)]
    words += [lw.ADVERBS[clause.adverb]] if clause.adverb else []
    for preposition, phrase in reversed(clause.places):
        words.append(_ilvani_phrase(phrase, lw.CASES.get(preposition, "")))
        if preposition in lw.POSTPOSITIONS:
            words.append(lw.POSTPOSITIONS[preposition])
    words += [_ilvani_phrases(clause.objects, lw.ACCUSATIVE)] if clause.objects else []
    suffixes = [clause.tense]
    suffixes += [lw.NOT] if clause.negated else []
    suffixes += [lw.MANY] if clause.several else []
    words.append(lw.attach(clause.verb.stem, *suffixes))
    return " ".join(words)


def _ilvani_phrases(phrases: tuple[Phrase, ...], case: str = "") -> str:
    first, *second = phrases
    return " ".join([_ilvani_phrase(first, case), *(_ilvani_phrase(p, case, True) for p in second)])


def _ilvani_phrase(phrase: Phrase, case: str = "", also: bool = False) -> str:
    endings = [suffix for suffix in (case, lw.ALSO if also else "") if suffix]
    if phrase.name:
        return lw.attach(phrase.name.lower(), *endings)
    marks = [lw.PLURAL] if phrase.plural else []
    marks += [lw.DEFINITE] if phrase.determiner == "the" else []
    words = [lw.attach(phrase.noun.stem, *marks, *endings)]
    for adjective in reversed(phrase.adjectives):
        stem = lw.ADJECTIVES[adjective]
        words.append(lw.attach(stem, lw.PLURAL) if phrase.plural else stem)
    if phrase.determiner in lw.NUMBERS:
        words.append(lw.NUMBERS[phrase.determiner])
    elif phrase.determiner in lw.NAMES:
        words.append(lw.attach(phrase.determiner.lower(), lw.GENITIVE))
    relative = phrase.relative
    if relative is not None:
        many = relative.other.several if relative.subject else phrase.several
        words += [
            lw.THAT,
            _ilvani_phrase(relative.other, "" if relative.subject else lw.ACCUSATIVE),
        ]
        suffixes = [lw.PAST if relative.past else lw.PRESENT, *([lw.MANY] if many else [])]
        words.append(lw.attach(relative.verb.stem, *suffixes, lw.RELATIVE))
    return " ".join(words)
