"""Conversations about stories, preferences between answers, and the reward that is true.

`conversation`, `preference` and `prompt` are pure functions of (seed, index), as `generate` is, and
give what a line of a JSON Lines file would hold. `gold` is the reward that the preferences follow:

    1 for the right answer, 0 for "I do not know." where there is one, -1 for an invented answer
    + 0.5 for one courtesy before it, such as "Sure!"
    - 0.1 for each word too many, up to 1

so that a reward model learnt from preferences can be told from the truth that it was to learn (Gao
et al. 2022, "Scaling laws for reward model overoptimization").

Sets that are held out are about other beginnings of stories than the rest, and ask some questions
in words that the rest never uses.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm.data.storyworld import _refuse, generate
from lm.data.storyworld import lexicon as lx
from lm.data.storyworld.asking import (
    UNKNOWN,
    WORDINGS,
    Asked,
    Draw,
    asked,
    beginning,
    count_words,
    reverse,
    words,
)

COURTESIES = ("Sure!", "Of course!", "Gladly!")

# Kinds of what is asked and how many tickets each holds in the lottery: no answer of its own wins
# a tenth of them, so one who always says the same is right as rarely.
KINDS = {
    **{"where": 14, "did": 6, "has": 8, "lost": 4, "feels": 9, "count": 9, "is a": 6, "name": 6},
    **{"lives": 4, "why": 8, "yes": 5, "no": 5, "unknown": 7, "reverse": 9, "words": 6},
    **{"continue": 6},
}
_WITHOUT_STORY = ("reverse", "words")
_TURNS = 10  # of the user, at most
_CHECKED = 0.5  # share of these in which the user gives an answer and asks whether it is right
_POLITE = 0.25  # share of the assistant's answers that are
_TOLD_APART = 0.25  # the least difference in reward that a preference is about
_HELD_OUT = 8  # one beginning in so many is held out
_REWORDED = 0.1  # share of held-out questions in words of their own

Line = dict[str, Any]


def conversation(seed: int, index: int, held_out: bool = False) -> Line:
    """`{"messages": [...]}`: a beginning of a story and one to ten questions with their answers.

    To half of the questions the user gives an answer, and asks whether it is right: who is to judge
    answers, as a reward model must, has to have learnt it somewhere.

    Raises:
      ConfigError: not 0 <= seed, or not 0 <= index < 2**64.
    """
    talk = _Talk("conversation", seed, index, held_out, _CHECKED)
    messages = talk.opening()
    for _ in range(int(talk.draw.random() * _TURNS)):
        messages += [{"role": "assistant", "content": talk.polite(talk.one.answer)}, talk.ask()]
    answer = talk.polite(talk.one.answer)
    return {"messages": [*messages, {"role": "assistant", "content": answer}]}


def prompt(seed: int, index: int, held_out: bool = False) -> Line:
    """A question, and all that `gold` needs to judge an answer to it.

    `{"prompt": [...], "kind": one of KINDS, "answer": the right one, "story": ...}`; to "Continue
    the story." `answer` is how it goes on in truth.

    Raises:
      ConfigError: as `conversation`.
    """
    return _Talk("prompt", seed, index, held_out).line()


def preference(seed: int, index: int, held_out: bool = False, noise: float = 0.0) -> Line:
    """A line of `prompt` with two answers, `chosen` and `rejected`, of which `gold` says which.

    A quarter of the pairs differ in what is answered alone (right, invented or "I do not know."), a
    quarter in courtesy alone, a quarter in length alone, and a quarter in all of it at random.

    Args:
      seed, index, held_out: see `conversation`.
      noise: the share of pairs in which the answers are exchanged, as people err.

    Raises:
      ConfigError: as `conversation`.
    """
    talk = _Talk("preference", seed, index, held_out)
    line, draw = talk.line(), talk.draw
    respect, rewards = draw.pick(("content", "courtesy", "length", "all")), [0.0, 0.0]
    while abs(rewards[0] - rewards[1]) < _TOLD_APART:
        one, other = talk.parts(), talk.parts()
        if respect != "all":
            other = one | {respect: other[respect]}
        answers = [" ".join(filter(None, parts.values())) for parts in (one, other)]
        rewards = [gold(line, answer) for answer in answers]
    if (rewards[0] < rewards[1]) != (draw.random() < noise):
        answers.reverse()
    return line | dict(zip(("chosen", "rejected"), answers))


def is_held_out(beginning: str) -> bool:
    """Whether this beginning of a story is one of those that held-out sets are about."""
    digest = hashlib.blake2b(beginning.encode(), digest_size=1).digest()
    return digest[0] % _HELD_OUT == 0


def gold(line: Mapping[str, Any], response: str) -> float:
    """The true reward of a response to a line of `prompt`, from -2 to 1.5."""
    courtesies, said = _without_courtesies(response)
    extra = len(said.split()) - len(line["answer"].split()) + max(courtesies - 1, 0)
    polite = 0.5 if courtesies else 0.0
    if line["kind"] == "continue":
        extra = max(courtesies - 1, 0) + max(len(said.split()) - 20, 0)
    return truth(line, response) + polite - min(1.0, 0.1 * max(0, extra))


def truth(line: Mapping[str, Any], response: str) -> float:
    """1 for the right answer, 0 for "I do not know." where there is one, -1 for another."""
    said, answer = _without_courtesies(response)[1], line["answer"]
    if line["kind"] == "continue":
        return 1.0 if _continues(line["story"], answer, said) else -1.0
    if said == answer or said.startswith(f"{answer} "):
        return 1.0
    return 0.0 if said == UNKNOWN else -1.0


def gold_reward(
    prompts: Sequence[Any], responses: Sequence[str], **fields: Sequence[Any]
) -> list[float]:
    """`gold` of many responses, each of whose lines' `fields` is at its place in a list."""
    return _of_each(gold, responses, fields)


def exactness(
    prompts: Sequence[Any], responses: Sequence[str], **fields: Sequence[Any]
) -> list[float]:
    """`exact` of many responses, as 1 or 0; see `gold_reward`."""
    return _of_each(exact, responses, fields)


def exact(line: Mapping[str, Any], response: str) -> bool:
    """Whether a response is the right answer and nothing more than it, but for courtesy."""
    return _without_courtesies(response)[1] == line["answer"]


def _of_each(
    judge: Callable[[Line, str], float], responses: Sequence[str], fields: Mapping[str, Any]
) -> list[float]:
    lines = zip(*(fields[name] for name in ("kind", "answer", "story")))
    return [
        float(judge(dict(zip(("kind", "answer", "story"), line)), response))
        for line, response in zip(lines, responses)
    ]


def _continues(story: str, answer: str, said: str) -> bool:
    """Whether it is a sentence of its own about none but those known from story and answer."""
    found = words(said)
    whole = len(found) > 2 and said[-1] in '.!?"' and not said[0].islower()
    if not whole or said == UNKNOWN or said in story:
        return False
    if any(one == two for one, two in itertools.pairwise(said.lower().split())):
        return False
    return not (_BEINGS & {*found}) - {*words(f"{story} {answer}")}


def _without_courtesies(response: str) -> tuple[int, str]:
    """How many courtesies a response begins with, and the rest."""
    said, number = response.strip(), 0
    while found := next((c for c in COURTESIES if said.startswith(c)), ""):
        said, number = said[len(found) :].lstrip(), number + 1
    return number, said


class _Talk:
    """A conversation as it goes on: `one`, of a `kind`, is what was asked last."""

    def __init__(self, purpose: str, seed: int, index: int, held_out: bool, checked: float = 0.0):
        if seed < 0 or not 0 <= index < 1 << 64:
            _refuse(seed, index)
        self.draw = draw = Draw(f"{purpose} {seed} {index} {held_out}")
        self.held_out, self.checked = held_out, checked
        self.given = ""  # an answer to `one`, which then is whether it is right
        self.kind = self._ticket(KINDS)
        self.story, self.known = "", {}
        of_none = self.kind in _WITHOUT_STORY
        told = not of_none or draw.random() < 0.5
        while told and self.kind not in self.known and not (of_none and self.story):
            whole = generate(seed, int(draw.random() * 2**53))
            cut = 3 + int(draw.random() * 3)
            story = beginning(whole, cut)
            if is_held_out(story.text) == held_out:
                self.story, self.known = story.text, asked(story, whole.sentences[cut], draw)
        self.one = self._one()

    def opening(self) -> list[dict[str, str]]:
        """The user tells of what is to be asked, and asks."""
        return [_user("\n".join(filter(None, (self.story, self._worded()))))]

    def ask(self) -> dict[str, str]:
        """The user asks on."""
        kinds = (*self.known, *_WITHOUT_STORY)
        self.kind = self._ticket({kind: n for kind, n in KINDS.items() if kind in kinds})
        self.one = self._one()
        return _user(self._worded())

    def line(self) -> Line:
        """What `prompt` says it is."""
        known = {"kind": self.kind, "answer": self.one.answer, "story": self.story}
        return {"prompt": self.opening(), **known}

    def polite(self, answer: str) -> str:
        """`answer`, now and then after a courtesy."""
        polite = self.draw.random() < _POLITE
        return f"{self.draw.pick(COURTESIES)} {answer}" if polite else answer

    def parts(self) -> dict[str, str]:
        """A reply to `one`: a courtesy or none; a right answer, an invented one or that one does
        not know; a sentence too many or none."""
        draw, wrong = self.draw, self.one.wrong or self._elsewhere()
        return {
            "courtesy": draw.pick(COURTESIES) if draw.random() < 0.5 else "",
            "content": draw.pick((self.one.answer, self.one.answer, wrong, wrong, UNKNOWN)),
            "length": self._elsewhere() if draw.random() < 0.25 else "",
        }

    def _elsewhere(self) -> str:
        """A sentence of another story."""
        return self.draw.pick(generate(0, int(self.draw.random() * 2**53)).sentences)

    def _one(self) -> Asked:
        tasks = {"reverse": reverse, "words": count_words}
        if self.kind in tasks:
            one = tasks[self.kind](self.draw)
        else:
            one = self.draw.pick(self.known[self.kind])
        self.given = ""
        if one.wrong and self.kind != "reverse" and self.draw.random() < self.checked:
            right = one.answer != UNKNOWN and self.draw.random() < 0.5
            self.given = one.answer if right else one.wrong
            answer, wrong = ("Yes.", "No.") if right else ("No.", "Yes.")
            one = one._replace(answer=UNKNOWN if one.answer == UNKNOWN else answer, wrong=wrong)
        return one

    def _worded(self) -> str:
        *usual, reserved = WORDINGS[self.one.kind]
        new = self.held_out and self.draw.random() < _REWORDED
        question = (reserved if new else self.draw.pick(usual)).format(*self.one.about)
        return f"{question} {self.given} Is that right?" if self.given else question

    def _ticket(self, kinds: Mapping[str, int]) -> str:
        return self.draw.pick([kind for kind, tickets in kinds.items() for _ in range(tickets)])


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


_BEINGS = frozenset(
    (
        *lx.GIRLS,
        *lx.BOYS,
        *(name for names in lx.ANIMAL_NAMES.values() for name in names),
        *(animal.noun for animal in lx.HERD),
        *("Grandma", "Grandpa", "Mom", "Dad", "baker", "farmer", "gardener", "teacher", "seller"),
    )
)
