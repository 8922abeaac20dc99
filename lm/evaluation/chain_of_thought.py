"""Questions that are answered at once, after steps, and many times over."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np

from lm.config import Bounds, Positive, check
from lm.data.storyworld import instructions
from lm.data.storyworld import lexicon as lx
from lm.data.storyworld.asking import Draw
from lm.evaluation import answers
from lm.evaluation import statistics as st
from lm.evaluation.card import Sample, Score, Table, digest
from lm.evaluation.documents import FAR, learnt_documents
from lm.evaluation.subject import Subject, Written
from lm.inference import SamplingConfig

_ANSWER, _END = "Answer:", "\n\n"
_STORIES = ("where", "count")  # kinds of the story world's questions
_MOVES = 3


@dataclasses.dataclass(frozen=True)
class ReasoningSettings:
    """The `in_context.reasoning` section: questions with steps, and many answers to each."""

    questions: Annotated[int, Bounds(1, 500)] = 24  # of each kind
    examples: Positive = 2  # worked ones before each; fewer where the context does not hold them
    samples: Positive = 8  # answers that are drawn for each: what a majority says, and pass@k
    temperature: Annotated[float, Bounds(0, 1000, "(]")] = 0.7  # of these
    max_new_tokens: Positive = 48

    def check_room(self, context: int) -> None:
        """Raises `ConfigError` where a length that somebody chose leaves no room for a question."""
        usual = self.max_new_tokens == ReasoningSettings.max_new_tokens
        check(
            usual or self.max_new_tokens < context,
            f"config.in_context.reasoning.max_new_tokens={self.max_new_tokens} leaves no room for "
            f"a question in the model's context of {context} tokens: lower it",
        )


class Question(NamedTuple):
    """A question and what it takes to judge a reply."""

    asked: str
    steps: str  # that lead to the answer; "" where none are known
    answer: str
    says: Callable[[str], Any]  # what a reply answers; None: it cannot be parsed
    right: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class _Way:
    """How a kind of question is put to a model."""

    subject: Subject
    asked: Sequence[Question]
    prompts: list[Any]  # texts, or messages
    examples: int
    steps: bool

    @property
    def about(self) -> str:
        return "after steps" if self.steps else "at once"

    def written(
        self, settings: ReasoningSettings, seed: int, samples: int, temperature: float
    ) -> list[list[Written]]:
        """Replies to each question, up to where the next would begin."""
        chats = converses(self.subject)
        sampling = SamplingConfig(
            temperature=temperature,
            max_new_tokens=settings.max_new_tokens,
            num_samples=samples,
            stop=() if chats else (_END, "Question:", *(() if self.steps else ("\n",))),
        )
        write = self.subject.answer if chats else self.subject.write
        return write(self.prompts, sampling, seed)

    def said(self, number: int, written: Written) -> Any:
        """What a reply answers; after steps only what it announces as its answer."""
        _, found, after = written.text.rpartition(_ANSWER)
        if self.steps and not found:
            return None
        return self.asked[number].says(after if self.steps else written.text)

    def right(self, said: Sequence[Any]) -> list[bool]:
        """Whether each question is answered rightly."""
        return [one is not None and bool(q.right(one)) for q, one in zip(self.asked, said)]


def measure(
    subject: Subject, settings: ReasoningSettings, seed: int
) -> tuple[list[Score], Table, list[Sample]]:
    """Accuracy at once and after steps, of a majority of samples, and pass@k.

    A chain of thought (Wei et al. 2022) is shown by worked examples; self-consistency is what most
    samples say (Wang et al. 2022); pass@k (Chen et al. 2021) is the chance that one of k is right.
    """
    scores: list[Score] = []
    samples: list[Sample] = []
    powers = [1 << i for i in range(settings.samples.bit_length())]
    rows = []
    for kind, some in _questions(settings, converses(subject), seed).items():
        row: dict[str, Any] = {"questions": kind}
        rows.append(row)
        if isinstance(some, str):
            row["asked"] = f"left out: {some}"
            continue
        asked, examples = some
        ways, direct = [], []
        for name, steps in (("direct", False), ("steps", True)):
            if steps and not asked[0].steps:
                continue
            way = _way(subject, asked, examples, steps, settings)
            if way is None:
                row[name] = "not asked: longer than the context"
                continue
            ways.append(way)
            replies = [one for (one,) in way.written(settings, seed, 1, 0)]
            said = [way.said(i, one) for i, one in enumerate(replies)]
            right = way.right(said)
            form = "conversation" if converses(subject) else "text"
            row["asked"] = f"as a {form}, {way.examples} worked examples"
            about = f"{kind}: share of replies that are right, {way.about}"
            score = Score.share(
                f"{kind}_{name}",
                right,
                about=about,
                unparsed=said.count(None),
                truncated=sum(not one.ended for one in replies),
                chance=0.25 if kind == "handing" else None,
                asked=digest([f"{kind}_{name}", *(one.asked for one in asked)]),
            )
            scores.append(score)
            row[name] = score.estimate.bracketed
            row["unparsed"] = row.get("unparsed", 0) + said.count(None)
            shown = {"question": asked[0].asked, f"written {way.about}": replies[0].text}
            samples.append(Sample({**shown, "right": asked[0].answer}, right[0]))
            if steps and direct:
                gap, p = st.difference(right, direct)
                row["steps − direct"] = f"{gap.value:+.2f}, p = {p:.2f}"
            direct = right
        if ways:
            many = ways[-1].written(settings, seed, settings.samples, settings.temperature)
            more, cells = _of_many(kind, ways[-1], many, powers)
            scores += more
            row |= cells
    head = (
        *("questions", "asked", "direct", "steps", "steps − direct", "unparsed"),
        *(f"majority of {settings.samples}", *(f"pass@{k}" for k in powers)),
    )
    cells = [[row.get(name, "") for name in head] for row in rows]
    return scores, Table("With and without steps, and of several samples", head, cells), samples


def converses(subject: Subject) -> bool:
    """Whether it is to be asked in conversations: it has a template, and has learnt to use it."""
    return subject.template is not None and not learnt_documents(subject.run.config)


def _questions(settings: ReasoningSettings, chats: bool, seed: int) -> dict[str, Any]:
    """For each kind questions and worked examples, or why there are none."""
    number, found = settings.questions + settings.examples, {}
    for kind, made in (("sums", _sum), ("handing", _handing)):
        draw = Draw(f"{kind} {seed}")
        some = {one.asked: one for one in (made(draw) for _ in range(20 * number))}
        several = [*some.values()][:number]
        found[kind] = several[settings.examples :], several[: settings.examples]
    if not chats:
        return {**found, "stories": "it has learnt no conversations"}
    lines = (instructions.prompt(FAR + seed, i, held_out=True) for i in itertools.count())
    some = itertools.islice((li for li in lines if li["kind"] in _STORIES), settings.questions)
    return {**found, "stories": ([_of_story(line) for line in some], [])}


def _sum(draw: Draw) -> Question:
    """Of three numbers of one digit, one after the other."""
    a, b, c = (1 + int(9 * draw.random()) for _ in range(3))
    steps = f"{a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}."
    answer = a + b + c
    return Question(
        f"What is {a} + {b} + {c}?", steps, str(answer), answers.number, lambda said: said == answer
    )


def _handing(draw: Draw) -> Question:
    """Who has one of two things, after both have changed hands among four people."""
    people = draw.order((*lx.GIRLS, *lx.BOYS))[:4]
    things = draw.order(("ball", "hat", "kite", "drum", "book", "doll"))[:2]
    has = dict(zip(things, people))
    told = [f"{who} had the {thing}." for thing, who in has.items()]
    course = {thing: [who] for thing, who in has.items()}
    for _ in range(_MOVES):
        thing = draw.pick(things)
        to = draw.other(people, (has[thing],))
        told.append(f"{has[thing]} gave the {thing} to {to}.")
        has[thing] = to
        course[thing].append(to)
    thing = draw.pick([thing for thing in things if len(course[thing]) > 1])
    steps = " ".join(f"{who} had the {thing}." for who in course[thing])
    return Question(
        f"{' '.join(told)} Who has the {thing}?",
        steps,
        has[thing],
        lambda reply: answers.one_of(reply, people),
        lambda said: said == has[thing],
    )


def _of_story(line: dict[str, Any]) -> Question:
    """A line of `instructions.prompt`."""
    return Question(
        line["prompt"][0]["content"],
        "",
        line["answer"],
        lambda reply: reply.strip() or None,
        lambda said: instructions.truth(line, said) == 1,
    )


def _way(
    subject: Subject,
    asked: Sequence[Question],
    examples: Sequence[Question],
    steps: bool,
    settings: ReasoningSettings,
) -> _Way | None:
    """With as many examples as the context holds; None where it has no room for one.

    Questions that come without examples are asked alone.
    """
    for number in range(len(examples), 0 if examples else -1, -1):
        if converses(subject):
            prompts = [_messages(examples[:number], one, steps) for one in asked]
            lengths = [len(subject.question(prompt)) for prompt in prompts]
        else:
            prompts = [_text(examples[:number], one, steps) for one in asked]
            lengths = [len(subject.text(prompt)) for prompt in prompts]
        if max(lengths) + settings.max_new_tokens <= subject.max_length:
            return _Way(subject, asked, prompts, number, steps)
    return None


def _reply(one: Question, steps: bool) -> str:
    return f"{one.steps}\n{_ANSWER} {one.answer}" if steps else one.answer


def _messages(examples: Iterable[Question], asked: Question, steps: bool) -> list[dict[str, str]]:
    said = []
    for one in examples:
        said += [("user", one.asked), ("assistant", _reply(one, steps))]
    return [{"role": role, "content": text} for role, text in (*said, ("user", asked.asked))]


def _text(examples: Iterable[Question], asked: Question, steps: bool) -> str:
    opening = "Steps:" if steps else _ANSWER
    worked = [f"Question: {one.asked}\n{opening} {_reply(one, steps)}" for one in examples]
    return _END.join([*worked, f"Question: {asked.asked}\n{opening}"])


def _of_many(
    kind: str, way: _Way, many: Sequence[Sequence[Written]], powers: Sequence[int]
) -> tuple[list[Score], dict[str, str]]:
    """What most samples say, and pass@k."""
    said = [[way.said(i, one) for one in some] for i, some in enumerate(many)]
    number, most = len(many[0]), []
    for some in said:
        parsed = collections.Counter(one for one in some if one is not None)
        most.append(parsed.most_common(1)[0][0] if parsed else None)
    fields = {
        "unparsed": sum(one is None for some in said for one in some),
        "truncated": sum(not one.ended for some in many for one in some),
        "asked": digest(one.asked for one in way.asked),
    }
    about = f"{kind}: share right of what most of {number} samples say, {way.about}"
    scores = [Score.share(f"{kind}_majority", way.right(most), about=about, **fields)]
    cells = {f"majority of {number}": scores[0].estimate.bracketed}
    counts = np.sum([way.right(drawn) for drawn in zip(*said)], 0).tolist()
    for k in powers:
        each = [st.pass_at_k(count, number, k) for count in counts]
        about = f"{kind}: chance that one of {k} samples is right, {way.about}"
        score = Score.share(f"{kind}_pass@{k}", each, about=about, **fields)
        cells[f"pass@{k}"] = f"{score.estimate.value:.2f}"
        scores += [score] if k in (1, powers[-1]) else []
    return scores, cells
