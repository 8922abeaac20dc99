"""Tasks whose difficulty is known, asked so that a jump can be told from a metric that makes one.

An answer of L tokens, each right with probability p, is right as a whole with about p^L: what rises
slowly in p seems to appear all at once in the exact match (Schaeffer et al. 2023, "Are emergent
abilities of large language models a mirage?"; Wei et al. 2022). So the same answers are counted in
several ways: all or nothing, token by token, in edits, and by how likely the right one is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lm.config import Count, Positive, check_choice
from lm.data import tasks
from lm.data.tasks import Item
from lm.evaluation.card import NotApplicable, Sample, Score, Section, Table, digest
from lm.evaluation.subject import Subject, spells
from lm.evaluation.uncertainty import brier_of_choices
from lm.inference import SamplingConfig
from lm.tokenizers import learned


@dataclasses.dataclass(frozen=True)
class TasksSettings:
    """Which tasks to set, and how many of each."""

    items: Positive = 40  # held-out questions of each task
    # Of `lm.data.tasks.NAMES`; (): all that it can write, strings of 4, 6 and 8 letters.
    names: tuple[str, ...] = ()
    shots: Count = 3  # solved questions before each, for a model that has no chat template

    def validate(self, prefix: str = "config.tasks") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        for name in self.names:
            check_choice(f"{prefix}.names", name, tasks.NAMES)


class Questions(NamedTuple):
    """Questions as a model's tokens; [N] of each.

    Attributes:
      items: what is asked.
      pairs: each question with its answer, and where the answer begins.
      ends: how many tokens after the answer end it.
      choices: per item the answers that differ in one character, as `pairs` has them, and which of
        them is right; () where it has no choices.
      asked: each question alone, as `Subject.answer` or, without a template, `write` takes it.
    """

    items: Sequence[Item]
    pairs: list[tuple[list[int], int]]
    ends: list[int]
    choices: list[tuple[list[tuple[list[int], int]], int]]
    asked: list[str]


class Answers(NamedTuple):
    """What a model makes of questions; [N] of each."""

    exact: np.ndarray  # whether the whole answer and its end are what it would write
    tokens: np.ndarray  # share of the answer's that are likeliest, given the right ones before
    power: np.ndarray  # mean of `tokens` to the power of the answer's length in tokens
    logprob: np.ndarray  # of the right answer, nats per token
    brier: np.ndarray  # of one character, from 0 to 2; NaN where there are no choices
    edits: np.ndarray  # between what it writes and the answer, characters; NaN if it was not to
    written: list[str]

    def means(self) -> dict[str, float]:
        """Of each number, by name."""
        numbers = self._asdict()
        del numbers["written"]
        return {name: float(np.mean(values)) for name, values in numbers.items()}


def measure(subject: Subject, settings: TasksSettings, seed: int) -> Section:
    """Sets every task, and scores the answers in each way.

    Raises:
      NotApplicable: it can write none of the tasks.
    """
    found: dict[str, tuple[list[Item], Answers]] = {}
    for name in settings.names or _usual(subject):
        items = [tasks.item(name, seed, n, held_out=True) for n in range(settings.items)]
        shots = [tasks.item(name, seed, n) for n in range(settings.shots)]
        if writable(subject, [*items, *shots]) and fits(subject, items, shots):
            found[name] = items, answers(subject, questions(subject, items, shots))
    if not found:
        raise NotApplicable("its tokenizer or its context has no room for the tasks' questions")
    return Section(
        "tasks",
        "Tasks of known difficulty",
        "Sums of one to five digits, and strings of letters, none of which is in the training part "
        "of these tasks. The same answers are counted all or nothing, token by token (given the "
        "right ones before), in edits, and by how likely the right answer is: a jump that shows in "
        "the first alone is the metric's (Schaeffer et al. 2023). Where the model has no chat "
        f"template, {settings.shots} solved questions stand before each.",
        [*_by_kind(found), *_together(found)],
        [_by_task(found), _by_carries(found)],
        samples=[
            Sample({"asked": i.prompt, "came": a.written[0], "right": i.answer}, bool(a.exact[0]))
            for items, a in found.values()
            for i in items[:1]
        ],
    )


def _by_kind(found: Mapping[str, tuple[list[Item], Answers]]) -> list[Score]:
    scores = []
    for kind in dict.fromkeys(tasks.task(name).kind for name in found):
        some = [found[name] for name in found if tasks.task(name).kind == kind]
        items = [one for part, _ in some for one in part]
        exact, tokens = (np.concatenate([a[field] for _, a in some]) for field in (0, 1))
        asked = digest(items)
        chance = np.array([1 / len(one.choices) for one in items])
        lengths = np.array([len(one.answer) for one in items])
        about, guess = "share of answers wholly right", float(np.mean(chance**lengths))
        name, fields = f"{kind}: exact match", {"asked": asked, "chance": guess}
        scores.append(Score.share(name, exact, about=about, **fields))
        about, fields["chance"] = "share of an answer's tokens right", float(chance.mean())
        scores.append(Score.share(f"{kind}: tokens", tokens, about=about, **fields))
    return scores


def _together(found: Mapping[str, tuple[list[Item], Answers]]) -> list[Score]:
    asked = digest(one for items, _ in found.values() for one in items)
    names = [name for name, (items, _) in found.items() for _ in items]
    scores = []
    for name, field, better, about in (
        ("log-likelihood", "logprob", "higher", "of right answers, nats per token"),
        ("edit distance", "edits", "lower", "characters between what is written and the answer"),
        ("Brier score", "brier", "lower", "of one character among its choices, from 0 to 2"),
    ):
        values = np.concatenate([getattr(a, field) for _, a in found.values()])
        scores.append(Score.mean(name, values, better, about, names, asked))
    return scores


def _by_task(found: Mapping[str, tuple[list[Item], Answers]]) -> Table:
    head = ("task", "exact match", "tokens", "tokens to the power of the length")
    rows = []
    for name, (_, a) in found.items():
        m = a.means()
        rows.append((name, *(m[field] for field in Answers._fields[:-1])))
    return Table("By size", (*head, "log-likelihood", "Brier", "edits"), rows)


def _by_carries(found: Mapping[str, tuple[list[Item], Answers]]) -> Table:
    rows: dict[tuple[str, int], list[tuple[float, ...]]] = {}
    for name, (items, a) in found.items():
        kind = tasks.task(name).kind
        if kind in tasks.SUMS:
            for one, *values in zip(items, a.exact, a.tokens, a.logprob):
                rows.setdefault((kind, one.carries), []).append(tuple(values))
    head = ("sum", "carries", "questions", "exact match", "tokens", "log-likelihood")
    table = [(*key, len(v), *map(float, np.mean(v, 0))) for key, v in sorted(rows.items())]
    return Table("By how often one carries", head, table)


def reversals(seed: int) -> dict[str, list[Item]]:
    """The questions of the reversal curse: as told, and backwards where that was told, or not."""
    told, back, half = tasks.forward(seed), tasks.backward(seed), tasks.PAIRS // 2
    return {
        "forward": told,
        "backward, trained": back[:half],
        "backward, held out": back[half:],
    }


def corpora(subject: Subject) -> list[str]:
    """What a run was trained on of `lm.data.tasks`: names, as they stand in its `data.path`."""
    path = subject.run.config.get("data", {}).get("path", ())
    paths = path.split(",") if isinstance(path, str) else path
    names = [name.strip() for name in paths]
    return [name for name in names if name in tasks.NAMES or name == "reversal"]


def _usual(subject: Subject) -> list[str]:
    """All tasks, of strings each second length; sums as the model has learnt to write them."""
    form = any(name.endswith("_reversed") for name in corpora(subject))
    every = [(name, tasks.task(name)) for name in tasks.NAMES]
    return [
        name
        for name, one in every
        if (one.kind in tasks.SUMS and one.lowest_first == form)
        or (one.kind in tasks.STRINGS and one.size % 2 == 0)
    ]


def writable(subject: Subject, items: Sequence[Item]) -> bool:
    """Whether the tokenizer can write these questions and answers."""
    text = "".join(one.prompt + one.answer for one in items)
    return spells(subject.tokenizer, text + ("" if subject.template else "\n"))


def fits(subject: Subject, items: Sequence[Item], shots: Sequence[Item] = ()) -> bool:
    """Whether the context has room for each question with its answer."""
    before = _before(subject, shots)
    written = (_written(subject, before, one.prompt, one.answer)[0] for one in items)
    return all(len(ids) - 1 <= subject.max_length for ids in written)


def questions(subject: Subject, items: Sequence[Item], shots: Sequence[Item] = ()) -> Questions:
    """Questions and answers as the model's tokens.

    A model with a chat template is asked as a user would; before another's question stand `shots`,
    each with its answer in a line.
    """
    before = _before(subject, shots)
    pairs, ends, choices, asked = [], [], [], []
    for number, one in enumerate(items):
        ids, start, end = _written(subject, before, one.prompt, one.answer)
        pairs.append((ids, start))
        ends.append(end)
        asked.append(before + one.prompt)
        place = number % len(one.answer)
        several = []
        for choice in one.choices:
            reply = one.answer[:place] + choice
            ids, start, end = _written(subject, before, one.prompt, reply)
            several.append((ids[: len(ids) - end], start))
        right = one.choices.index(one.answer[place]) if one.choices else 0
        choices.append((several, right))
    return Questions(items, pairs, ends, choices, asked)


def _before(subject: Subject, shots: Sequence[Item]) -> str:
    return "" if subject.template else "".join(f"{s.prompt}{s.answer}\n" for s in shots)


def _written(subject: Subject, before: str, prompt: str, reply: str) -> tuple[list[int], int, int]:
    """A question with a reply: ids, where the reply begins, and how many ids at the end end it."""
    if subject.template is None:
        ids, start = subject.pair(before + prompt, f"{reply}\n")
        return ids, start, len(ids) - len(subject.pair(before + prompt, reply)[0])
    said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    ids, flags = learned(subject.template, said, given=1)
    if flags[0]:
        ids, flags = [subject.tokenizer.bos_id, *ids], [False, *flags]
    ids = ids[: len(flags) - flags[::-1].index(True)]
    return ids, flags.index(True), int(ids[-1] in subject.tokenizer.special_ids.values())


def answers(subject: Subject, asked: Questions, write: bool = True) -> Answers:
    """Scores a model's answers in every way.

    The whole is right if each token is the likeliest, which is what greedy writing comes to.

    Args:
      subject: whose questions they are (`questions`), at this checkpoint or at another.
      asked: see there.
      write: whether it is to write, too, which `edits` and `written` need.
    """
    choices = [pair for several, _ in asked.choices for pair in several]
    found = subject.likely_ids([*asked.pairs, *choices])
    number = len(asked.items)
    own, others = found[:number], iter(found[number:])
    exact, tokens, logprob, brier, lengths = [], [], [], [], []
    for (scored, _), end, (several, right) in zip(own, asked.ends, asked.choices):
        length = max(1, len(scored.rank) - end)
        exact.append(float(scored.greedy))
        tokens.append(float(np.mean(scored.rank[:length] == 0)))
        logprob.append(float(scored.logprob[:length].mean()))
        lengths.append(length)
        logs = np.array([next(others).scored.total for _ in several])
        p = np.exp(logs - logs.max()) if len(logs) else logs
        brier.append(brier_of_choices([p / p.sum()], [right]) if len(logs) else np.nan)
    written, edits = [""] * number, np.full(number, np.nan)
    if write:
        longest = max(len(ids) - start for ids, start in asked.pairs)
        room = subject.max_length - max(start for _, start in asked.pairs)
        most = max(1, min(longest + 1, room))
        written = _write(subject, asked, most)
        edits = np.array([distance(w, one.answer) for w, one in zip(written, asked.items)], float)
    power = np.mean(tokens) ** np.array(lengths)
    numbers = map(np.array, (exact, tokens, power, logprob, brier, edits))
    return Answers(*numbers, written)


def _write(subject: Subject, asked: Questions, most: int) -> list[str]:
    stop = () if subject.template else ("\n",)
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=most, stop=stop)
    write = subject.answer if subject.template else subject.write
    return [one.text.strip() for (one,) in write(asked.asked, sampling)]


def distance(one: str, other: str) -> int:
    """How many characters must be put in, taken out or exchanged (Levenshtein 1966)."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]
