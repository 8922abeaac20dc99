"""Hallucination and uncertainty: what a model answers about stories whose truth is known.

An answer that is not right is abstained ("I do not know."), unparsed, or an error of one of two
kinds, after Maynez et al. (2020), whose intrinsic and extrinsic hallucinations they are:

- *factual*: it contradicts what the story tells, though each of its words is of the story;
- *faithfulness*: the story holds nothing of it: it names what the story does not, or answers what
  the story leaves open.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import expit

from lm.config import Positive, check
from lm.data.storyworld.asking import UNKNOWN, words
from lm.evaluation import statements
from lm.evaluation import uncertainty as un
from lm.evaluation.beginnings import Question, pairs, questions, sentence, without_courtesies
from lm.evaluation.card import Sample, Score, Section, Table, digest
from lm.evaluation.confidence import (
    calibration,
    reliability_diagram,
    risk_picture,
    telling_apart,
)
from lm.evaluation.statements import proportion, replied, yes_over_no
from lm.evaluation.subject import Subject, Written
from lm.inference import SamplingConfig

Outcome = Literal["right", "abstained", "factual", "faithfulness", "unparsed"]
OUTCOMES = ("right", "abstained", "factual", "faithfulness", "unparsed")

# Words that say nothing by themselves.
_EMPTY = frozenset(
    (
        *("a", "an", "the", "in", "on", "at", "by", "to", "of", "into", "under", "behind", "near"),
        *("next", "and", "is", "are", "was", "were", "has", "had", "have", "not", "no", "did"),
        *("it", "he", "she", "they", "her", "his", "their", "there", "with", "from", "s", "yes"),
    )
)


@dataclasses.dataclass(frozen=True)
class TruthSettings:
    """What to ask about held-out beginnings of stories."""

    stories: Positive = 250  # beginnings, each a cluster
    questions: Positive = 2  # that each answers, at most; one that it does not comes with them
    samples: Positive = 6  # replies drawn at temperature 1 beside the greedy one
    max_new_tokens: Positive = 24  # of a reply
    bins: Positive = 10  # of calibration errors
    draws: Positive = 500  # resamples, for the intervals of what is no mean

    def validate(self, prefix: str = "config.truth") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        check(self.stories >= 10, f"{prefix}.stories={self.stories} must be at least 10")
        check(self.draws >= 2, f"{prefix}.draws={self.draws} must be at least 2")


class Reply(NamedTuple):
    """A greedy reply to a question."""

    question: Question
    written: Written
    sentence: str | None  # the answer that it gives
    outcome: Outcome

    @property
    def right(self) -> bool:
        """Whether it is the best there is to say: the answer, or that there is none."""
        return self.outcome == ("right" if self.question.answerable else "abstained")


def measure(subject: Subject, settings: TruthSettings, seed: int) -> Section:
    """Statements told and, of a model that converses, questions and statements asked."""
    several = pairs(seed, settings.stories)
    parts = [statements.told(subject, several, settings.bins, settings.draws, seed)]
    samples, pictures = [], []
    about = (
        "Held-out beginnings of stories, with statements that are true, invented (they name what "
        "the story does not) or mixed up (they take the place or the owner that the story tells of "
        "another). Told: which one is likelier to follow the story, in the past tense."
    )
    if subject.template is None:
        about += (
            " The model has no chat template, so it cannot be asked, and cannot say that it does "
            "not know."
        )
    else:
        about += (
            ' Asked: "Is it true that …?". Questions have one right answer, or none in the story. '
            "Errors are factual where each word of the answer is of the story, of faithfulness "
            "where the story holds nothing of it (Maynez et al. 2020: intrinsic, extrinsic). "
            "Confidences and entropies are of the answers given: those that are right or errors; "
            "one to a question without an answer is an error. Hindsight knows what is right."
        )
        parts.append(statements.asked(subject, several, settings.bins, settings.draws, seed))
        found, samples, pictures = _answers(subject, settings, seed)
        parts.insert(0, found)
    drawn = {name: pair for part in parts for name, pair in part.confidences.items()}
    title = "Reliability: a calibrated model is on the diagonal"
    return Section(
        name="truth",
        title="Hallucination and uncertainty",
        about=about,
        scores=[score for part in parts for score in part.scores],
        tables=[table for part in parts for table in part.tables],
        pictures=[reliability_diagram(title, drawn, settings.bins), *pictures],
        samples=samples,
    )


def outcome(question: Question, said: str | None) -> Outcome:
    """What becomes of an answer (`sentence`), or of none."""
    if said is None:
        return "unparsed"
    if _bare(said) == _bare(UNKNOWN):
        return "abstained"
    if _bare(said) == _bare(question.answer):
        return "right"
    named = {*_bare(said).split()} - _EMPTY
    known = question.answerable and named <= {*_bare(question.story).split()}
    return "factual" if known else "faithfulness"


def meaning(reply: str) -> str:
    """What replies that say the same have in common: the answer's words, without courtesies."""
    return _bare(sentence(reply) or reply)


def _bare(text: str) -> str:
    return " ".join(words(text.lower()))


def _answers(subject: Subject, settings: TruthSettings, seed: int):
    """Answers to questions: the part of the section, samples of them, and a picture."""
    several = questions(seed, settings.stories, settings.questions)
    prompts = [one.prompt for one in several]
    greedy = SamplingConfig(temperature=0, max_new_tokens=settings.max_new_tokens)
    replies = []
    for question, (written,) in zip(several, subject.answer(prompts, greedy)):
        said = sentence(written.text)
        replies.append(Reply(question, written, said, outcome(question, said)))
    sampling = dataclasses.replace(greedy, temperature=1.0, num_samples=settings.samples)
    drawn = subject.answer(prompts, sampling, seed)
    scores, tables = _outcomes(replies)
    scores += _majority(several, drawn)
    entropies = _entropies(drawn)
    clusters, number = [one.story for one in several], digest(several)
    for name, about in (
        ("predictive entropy", "−mean log p of sampled replies (Monte Carlo), all questions"),
        ("semantic entropy", "over meanings, p ∝ Σ p of the samples (Farquhar et al. 2024)"),
    ):
        fields = {"about": f"nats; {about}", "clusters": clusters, "asked": number}
        scores.append(Score.mean(name, entropies[name], **fields))
    given = [i for i, one in enumerate(replies) if one.outcome in ("right", *OUTCOMES[2:4])]
    confidences, pictures = {}, []
    if len({clusters[i] for i in given}) > 1:
        answers = [replies[i] for i in given]
        samples = [drawn[i] for i in given]
        right = np.array([one.right for one in answers])
        own, number = [clusters[i] for i in given], digest(one.question for one in answers)
        sure = _confidences(subject, answers, samples)
        for name in ("probability", "p(true)", "self-consistency"):
            pair = confidences[f"answer's {name}"] = (sure[name], right)
            scores += calibration(name, *pair, own, number, settings.bins, settings.draws)
        measures = sure | {f"−{name}": -x[given] for name, x in entropies.items()}
        more, tables_of = telling_apart(measures, right, own, settings.draws)
        scores, tables = scores + more, tables + tables_of
        if more:
            title = "Risk and coverage: how much is wrong if only the surest answers are given"
            pictures.append(risk_picture(title, measures, right))
    return statements.Found(scores, tables, confidences), _samples(replies), pictures


def _outcomes(replies: Sequence[Reply]) -> tuple[list[Score], list[Table]]:
    """How many replies are what."""
    halves = {
        "answerable": [one for one in replies if one.question.answerable],
        "unanswerable": [one for one in replies if not one.question.answerable],
    }

    def score(name: str, of: Sequence[Reply], what: Outcome, about: str, better: str):
        stories = [one.question.story for one in of]
        asked = digest(one.question for one in of)
        unparsed = sum(one.outcome == "unparsed" for one in of)
        hit = [one.outcome == what for one in of]
        cut = sum(one.written.truncated for one in of)
        fields = {"unparsed": unparsed, "truncated": cut, "better": better}
        return proportion(name, hit, stories, asked, about, **fields)

    can, cannot = halves.values()
    scores = [
        *score("answerable: right", can, "right", "questions that the story answers", "higher"),
        *score("answerable: abstained", can, "abstained", '"I do not know."', "lower"),
        *score("unanswerable: abstained", cannot, "abstained", "the right reply", "higher"),
        *score("factual errors", replies, "factual", "of all questions", "lower"),
        *score("faithfulness errors", replies, "faithfulness", "of all questions", "lower"),
        *score("unparsed", replies, "unparsed", "replies without a short answer", "lower"),
    ]
    kinds = {"all": replies, **halves}
    for one in sorted(halves["answerable"], key=lambda one: one.question.kind):
        kinds.setdefault(one.question.kind, []).append(one)
    rows = [
        [kind, len(of), *(sum(one.outcome == what for one in of) for what in OUTCOMES)]
        for kind, of in kinds.items()
        if of
    ]
    head = ["questions", "asked", "right", "abstained", "factual", "faithfulness", "unparsed"]
    return scores, [Table("What replies are: answers, errors of two kinds, or none", head, rows)]


def _majority(several: Sequence[Question], drawn: Sequence[Sequence[Written]]) -> list[Score]:
    """How often what most samples mean is right."""
    right, stories = [], []
    for question, samples in zip(several, drawn):
        if question.answerable:
            counts = collections.Counter(meaning(one.text) for one in samples)
            right.append(counts.most_common(1)[0][0] == _bare(question.answer))
            stories.append(question.story)
    about = "self-consistency (Wang et al. 2022): what most samples mean, of answerable questions"
    asked = digest(one for one in several if one.answerable)
    return proportion("answerable: majority right", right, stories, asked, about)


def _entropies(drawn: Sequence[Sequence[Written]]) -> dict[str, np.ndarray]:
    """The entropies of the samples of each question, nats [N], by name."""
    found = collections.defaultdict(list)
    for samples in drawn:
        logprobs, lengths = [one.logprob for one in samples], [one.tokens for one in samples]
        of = un.clusters([meaning(one.text) for one in samples], str.__eq__)
        found["predictive entropy"].append(un.predictive_entropy(logprobs))
        found["entropy per token"].append(un.predictive_entropy(logprobs, lengths))
        found["semantic entropy"].append(un.semantic_entropy(logprobs, of))
        found["discrete semantic entropy"].append(un.discrete_semantic_entropy(of))
    return {name: np.array(values) for name, values in found.items()}


def _confidences(
    subject: Subject, answers: Sequence[Reply], drawn: Sequence[Sequence[Written]]
) -> dict[str, np.ndarray]:
    """How sure a model is of its greedy answers, from 0 to 1 [N], by name.

    The probability of the answer and the end of the turn, after the courtesy before it; the same
    by token (geometric mean); p(true), of "Yes." against "No." when it is asked whether the answer
    is right (Kadavath et al. 2022); and the share of samples that mean the same.
    """
    texts, asked = [], []
    for question, written, said, _ in answers:
        rest = without_courtesies(written.text)
        courtesy = written.text.strip().removesuffix(rest).strip()
        texts.append(replied(subject, question.prompt, courtesy, said))
        asked.append(f"{question.prompt} {said} Is that right?")
    scored = [one.scored for one in subject.likely_ids(texts)]
    same = [
        np.mean([meaning(sample.text) == meaning(one.written.text) for sample in samples])
        for one, samples in zip(answers, drawn)
    ]
    return {
        "probability": np.exp([one.total for one in scored]),
        "probability per token": np.exp([one.total / len(one.logprob) for one in scored]),
        "p(true)": expit(yes_over_no(subject, asked)),
        "self-consistency": np.array(same),
    }


def _samples(replies: Sequence[Reply]) -> list[Sample]:
    """Replies of every outcome in turn, for a reader."""
    of = collections.defaultdict(list)
    for one in replies:
        name = "answerable" if one.question.answerable else "unanswerable"
        parts = {"story": one.question.story, "question": one.question.asked}
        parts |= {"right": one.question.answer, "reply": one.written.text.strip()}
        parts["outcome"] = f"{one.outcome} ({name})"
        of[one.outcome, name].append(Sample(parts, one.right))
    return [several[turn] for turn in range(4) for several in of.values() if turn < len(several)]
