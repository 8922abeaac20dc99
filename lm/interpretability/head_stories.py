"""Stories with their ground truth, token by token: classes of words, subjects, whom pronouns mean.

`read` says which tokens are of which class, which is the subject of the sentence, and which named
the one whom a pronoun means. `pronoun_choice` is a task (`lm.interpretability.head_tests`) for a
model of stories: their beginnings up to a "she" or "he", each with its mirror image, in which girls
are boys and boys girls.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from lm.data.storyworld import generate
from lm.data.storyworld import lexicon as lx
from lm.data.storyworld.story import Reference, Story
from lm.evaluation.documents import FAR
from lm.evaluation.subject import Subject, spells
from lm.interpretability.head_tests import Task, task_of

CLASSES = ("name", "pronoun", "noun", "adjective", "verb", "function word")
_PAIRS = (
    *zip(lx.GIRLS, lx.BOYS),
    *zip(lx.ANIMAL_NAMES["she"], lx.ANIMAL_NAMES["he"]),
    *(("girl", "boy"), ("Mom", "Dad"), ("Grandma", "Grandpa"), ("She", "He"), ("she", "he")),
)
_MIRROR = {**dict(_PAIRS), **{he: she for she, he in _PAIRS}}
_NAMED = {*_MIRROR} - {"girl", "boy", "She", "He", "she", "he"}
_GENDERED = {"she", "he", "her", "him", "his"}
_WORD = re.compile(r"[A-Za-z]+")
_VERBS = "was is had has went ran saw said sat gave took found came fell got told made ate put let"
_FUNCTION = "the a an and but so in on at to of with by from up back for not then too that"


def _classes() -> dict[str, int]:
    things = [*lx.THINGS.values()]
    animals = [animal.noun for animal in lx.WALKERS]
    words = (
        _NAMED,
        (*_GENDERED, "it", "its", "they", "them", "their", "I", "you", "we", "us", "my", "your"),
        (*animals, *(t.noun for t in things), *(p.name for p in lx.ALL_PLACES), "girl", "boy"),
        {a for t in things for a in t.adjectives} | {*lx.CHILD_TRAITS, *lx.ANIMAL_TRAITS},
        _VERBS.split(),
        _FUNCTION.split(),
    )
    return {word.lower(): n for n, some in enumerate(words, 1) for word in some}


class Reading(NamedTuple):
    """Stories, a row each, segment 0 behind them; targets as `heads.attention_to` takes them.

    Of "she", "he", "her", "him" and "his": everything said before of the one who is meant, and of
    another character that was named about as far before.
    """

    tokens_BT: np.ndarray
    segments_BT: np.ndarray
    classes_BT: np.ndarray  # 1 + number in `CLASSES`; 0: none of them
    subject_BTS: np.ndarray  # of a later token of the sentence
    antecedent_BTS: np.ndarray
    distractor_BTS: np.ndarray


def read(subject: Subject, seed: int, stories: int = 64) -> Reading | None:
    """Stories that it was not trained on; None where its tokens are not parts of the text."""
    classes, rows = _classes(), []
    for index in range(1, stories + 1):
        story = generate(FAR + seed, index)
        ids, ends = _tokens(subject, story.text)
        if ids is None:
            return None
        T = min(len(ids), subject.max_length)
        marks, kinds = np.zeros((3, T, T), bool), np.zeros(T, np.int32)
        for word in _WORD.finditer(story.text):
            kind = classes.get(word[0].lower(), 5 if word[0].endswith("ed") else 0)
            kinds[_within(ends[:T], *word.span())] = kind
        said = _said(story)
        starts = [0, *np.cumsum([len(sentence) + 1 for sentence in story.sentences]).tolist()]
        for fact in story.facts:
            first, last = starts[fact.sentence], starts[fact.sentence + 1]
            own = [s for s in said if s.entity == fact.subject and first <= s.start < last]
            if own and (at := _within(ends[:T], own[0].start, own[0].end)):
                later = [t for t in _within(ends[:T], first, last) if t > at[-1]]
                marks[0][np.ix_(later, at)] = True
        for reference in story.references:
            at = _within(ends[:T], reference.start, reference.end)
            if at and reference.pronoun.lower() in _GENDERED:
                for mark, entity in zip(marks[1:], _two(said, reference) or ()):
                    mark[at[-1], _all(ends[:T], said, entity, reference.start)] = True
        rows.append((np.array(ids[:T], np.int32), np.ones(T, np.int32), kinds, marks))
    width = max(len(row[0]) for row in rows)

    def padded(x: np.ndarray) -> np.ndarray:
        return np.pad(x, [(0, width - x.shape[-1] if size == x.shape[-1] else 0)
                          for size in x.shape])  # fmt: skip

    tokens, segments, kinds, marks = (np.array([padded(x) for x in each]) for each in zip(*rows))
    return Reading(tokens, segments, kinds, *marks.swapaxes(0, 1))


def pronoun_choice(subject: Subject, seed: int, pairs: int = 64) -> Task | None:
    """Beginnings of stories up to a "she" or "he", each with its mirror image.

    In half of them the one who is meant was named last, in half another one was: no head finds the
    antecedent by its distance. None where the model's tokens allow no such pairs.
    """
    texts, spans, answers, near = [], [], [], [0, 0]
    for index in range(1, 60 * pairs):
        if sum(near) == pairs:
            break
        story = generate(FAR + seed, index)
        found = _choice(story)
        if found is None or near[found[2]] >= pairs // 2:
            continue
        reference, entities, nearer = found
        prefix, said = story.text[: reference.start].rstrip(), _said(story)
        (ids, ends), (mirrored, _) = (_tokens(subject, text) for text in (prefix, _mirror(prefix)))
        words = reference.pronoun, _MIRROR[reference.pronoun]
        answer, wrong = (subject.tokenizer.encode(f" {word}") for word in words)
        if ids is None or mirrored is None or len(ids) != len(mirrored):
            continue
        if len(ids) >= subject.max_length or len(answer) + len(wrong) != 2:
            continue
        near[nearer] += 1
        texts += [ids, mirrored]
        # A mirror image has the same tokens but for some names, though not the same letters.
        spans += [[_all(ends, said, entity, reference.start) for entity in entities]] * 2
        answers += [answer + wrong, wrong + answer]
    if min(near) < 4:
        return None
    length = max(map(len, texts))
    targets = np.zeros((2, len(texts), length, length), bool)
    for row, (text, both) in enumerate(zip(texts, spans)):
        for kind, span in enumerate(both):
            targets[kind, row, len(text) - 1, span] = True
    name = "whom the next pronoun means"
    return task_of(name, texts, targets, np.array(answers).T)


class _Said(NamedTuple):
    """Letters that say something of an entity; `named`: by its name, or by what it is."""

    start: int
    end: int
    entity: str
    named: bool


def _choice(story: Story) -> tuple | None:
    """The first "she" or "he" that could have been the other: it, whom they mean, what is nearer.

    Two characters of either gender have been named by names that show it.
    """
    said, kinds = _said(story), {c.name: c.pronoun for c in story.characters}
    for reference in story.references:
        if reference.pronoun.lower() in ("her", "him", "his"):
            return None  # "her" may be "him" or "his" in a mirror
        if reference.pronoun.lower() in ("she", "he"):
            other = _MIRROR[kinds[reference.entity]]
            both = [s for s in said if s.entity == reference.entity or kinds[s.entity] == other]
            if (found := _two(both, reference, nearest=True)) and {*found} <= _NAMED:
                last = [s.entity for s in both if s.named and s.end <= reference.start]
                return reference, found, last[-1] == reference.entity
    return None


def _two(said: list[_Said], reference: Reference, nearest: bool = False) -> tuple | None:
    """Whom a pronoun means, and one who was named about as far before, or last."""
    before = [s for s in said if s.end <= reference.start and s.named]
    own = [s.start for s in before if s.entity == reference.entity]
    others = [s for s in before if s.entity not in reference.entities]
    if not own or not others:
        return None
    far = (lambda s: -s.start) if nearest else (lambda s: abs(s.start - own[-1]))
    return reference.entity, min(others, key=far).entity


def _all(ends_T: np.ndarray, said: list[_Said], entity: str, before: int) -> list[int]:
    """The tokens that say something of an entity before a place."""
    own = [s for s in said if s.entity == entity and s.end <= before]
    return sorted({t for s in own for t in _within(ends_T, s.start, s.end)})


def _said(story: Story) -> list[_Said]:
    """What is said of characters that are "he" or "she", in order; groups left out."""
    people = [one for one in story.characters if one.pronoun in ("he", "she")]
    found = {_Said(r.start, r.end, r.entity, False) for r in story.references
             if r.entity in {one.name for one in people}}  # fmt: skip
    for one in people:
        for phrase in one.phrases:
            # "goat named Poppy" says who she is as a whole.
            for match in re.finditer(rf"(\w+ named )?\b{re.escape(phrase)}\b", story.text, re.I):
                found.add(_Said(*match.span(), one.name, True))
    return sorted(found)


def _mirror(text: str) -> str:
    return _WORD.sub(lambda match: _MIRROR.get(match[0], match[0]), text)


def _tokens(subject: Subject, text: str) -> tuple[list[int] | None, np.ndarray]:
    """A text's ids, and where in it each ends; none where they do not spell it out."""
    if not spells(subject.tokenizer, text):
        return None, np.zeros(0)
    own = subject.tokenizer.encode(text)
    before = subject.text(text)[: -len(own)]
    ends = np.cumsum(subject.tokenizer.byte_lengths()[own])
    if ends[-1] != len(text.encode()):
        return None, ends
    return [*before, *own], np.concatenate([np.zeros(len(before), int), ends])


def _within(ends_T: np.ndarray, start: int, end: int) -> list[int]:
    """The tokens that have some of the characters from `start` to `end`."""
    starts_T = np.concatenate([[0], ends_T[:-1]])
    return np.flatnonzero((starts_T < end) & (ends_T > start)).tolist()
