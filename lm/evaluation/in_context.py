"""What a model learns from examples in its context: from how many, and what it learns of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.config import Count, Positive, Size, check
from lm.data.storyworld.asking import Draw
from lm.evaluation import answers, chain_of_thought
from lm.evaluation import statistics as st
from lm.evaluation.card import (
    NotApplicable,
    Picture,
    Sample,
    Score,
    Section,
    Table,
    digest,
    picture,
)
from lm.evaluation.chain_of_thought import ReasoningSettings
from lm.evaluation.few_shot import BINARY, FORMATS, TASKS, Item, items, likeliest
from lm.evaluation.subject import Subject
from lm.inference import SamplingConfig
from lm.training.plots import INK, bare, figure_of

_MORE = 2  # tokens that are written beyond the longest choice
_UNRELATED = ("red", "blue")  # labels that say nothing of what they stand for (Wei et al. 2023)
_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2")


@dataclasses.dataclass(frozen=True)
class InContextSettings:
    """The `in_context` section: how many examples are shown, of how many things asked."""

    shots: tuple[Count, ...] = (0, 1, 2, 4, 8, 16, 32)  # examples; those that the context holds
    # Examples where labels, and formats, are compared: as many of `shots` as the context holds.
    label_shots: Positive = 8
    format_shots: Positive = 4
    items: Size = 24  # that are asked of each task
    stories: Size = 600  # that sentences are taken from
    reasoning: ReasoningSettings = dataclasses.field(default_factory=ReasoningSettings)

    def validate(self, prefix: str = "config.in_context") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        check(bool(self.shots), f"{prefix}.shots=() must have a number of examples, such as (0, 4)")


class _Put(NamedTuple):
    """Items as they are put to the model."""

    items: Sequence[Item]
    prompts: Sequence[str]
    shots: int

    def right(self, said: Sequence[str | None]) -> list[bool]:
        return [one == item.asked.label for one, item in zip(said, self.items)]


# What is asked, by (task, what it is for), where the context holds it.
_Puts = Mapping[tuple[str, Any], _Put]
_Said = Mapping[tuple[str, Any], list[str]]


def measure(subject: Subject, settings: InContextSettings, seed: int) -> Section:
    """Accuracy by number of examples; with other labels and formats; and with reasoning.

    Raises:
      ConfigError: more examples are asked for than a task has, or longer replies than the context.
      NotApplicable: the context does not even hold what is asked.
    """
    settings.reasoning.check_room(subject.max_length)
    shots = sorted({*settings.shots})
    found = items(settings.stories, settings.items, max(shots), seed)
    choices = {choice for some in found.values() for item in some for choice in item.choices}
    new = max(len(subject.tokenizer.encode(f" {choice}")) for choice in choices) + _MORE
    room = subject.max_length - new
    curves = _by_shots(subject, found, shots, room)
    labels = _by_labels(subject, found, settings, room, seed)
    formats = _by_formats(subject, found, settings, room)
    asked = {**curves, **labels, **formats}
    if not curves:
        raise NotApplicable(
            f"its context of {subject.max_length} tokens holds no example with its answer"
        )
    prompts = [
        (prompt, item.choices)
        for put in asked.values()
        for prompt, item in zip(put.prompts, put.items)
    ]
    chosen = _divided(asked, likeliest(subject, prompts))
    sampling = SamplingConfig(temperature=0, max_new_tokens=new, stop=("\n", "."))
    written = subject.write([p for put in curves.values() for p in put.prompts], sampling)
    replies = _divided(curves, [one.text for (one,) in written])
    table, scores = _curves(found, shots, curves, chosen, replies)
    more, of_labels = _labels(found, labels, chosen)
    spread, of_formats = _formats(found, formats, chosen)
    thought, thinking, samples = chain_of_thought.measure(subject, settings.reasoning, seed)
    return Section(
        "in_context",
        "In context",
        "What it learns from examples in its context, without training. A task's label is chosen "
        "(the likeliest of the choices, all their tokens counted) and written (greedily, parsed; "
        "what cannot be parsed counts as wrong). Examples are the first of one list, so that more "
        "are always the fewer and others; items of a story are a cluster. What the context does "
        "not hold is not asked.",
        [*scores, *more, *spread, *thought],
        [table, of_labels, of_formats, thinking],
        [_picture(found, shots, curves, chosen)],
        [*_samples(found, curves, replies), *samples],
    )


def _divided(asked: _Puts, said: Sequence[str]) -> dict[tuple[str, Any], list[str]]:
    """What was said to all prompts, one after the other, by what they were for."""
    left = iter(said)
    return {key: [next(left) for _ in put.prompts] for key, put in asked.items()}


def _put(
    subject: Subject, some: Sequence[Item], shots: int, form: str, task: str, room: int
) -> _Put | None:
    """Items with so many examples; None where the context does not hold all of them."""
    if any(len(item.shown) < shots for item in some):
        return None
    prompts = [FORMATS[task][form].prompt(item, shots) for item in some]
    longest = max(len(subject.text(prompt)) for prompt in prompts)
    return _Put(some, prompts, shots) if longest <= room else None


def _by_shots(
    subject: Subject, found: Mapping[str, list[Item]], shots: Sequence[int], room: int
) -> dict[tuple[str, Any], _Put]:
    """Each task with each number of examples."""
    every = {
        (task, k): _put(subject, some, k, "words", task, room)
        for task, some in found.items()
        for k in shots
    }
    return {key: put for key, put in every.items() if put}


def _by_labels(
    subject: Subject,
    found: Mapping[str, list[Item]],
    settings: InContextSettings,
    room: int,
    seed: int,
) -> dict[tuple[str, Any], _Put]:
    """Tasks of two labels with other labels in the examples.

    True ones; exchanged ones (Wei et al. 2023: does it follow the context, or what it knew before);
    random ones (Min et al. 2022: do the labels matter at all); and words that are unrelated.
    """
    puts = {}
    for task, labels in BINARY.items():
        draw, same = Draw(f"labels {task} {seed}"), dict(zip(labels, labels))
        swap, other = dict(zip(labels, labels[::-1])), dict(zip(labels, _UNRELATED))
        ways = {
            way: [item.relabelled(new) for item in found[task]]
            for way, new in (("true", same), ("exchanged", swap), ("unrelated", other))
        }
        ways["random"] = [
            item._replace(shown=[one._replace(label=draw.pick(labels)) for one in item.shown])
            for item in found[task]
        ]
        for k in sorted({*settings.shots} - {0}, reverse=True):
            if k > settings.label_shots:
                continue
            some = {
                (task, way): _put(subject, changed, k, "words", task, room)
                for way, changed in ways.items()
            }
            if all(some.values()):
                puts |= some
                break
    return puts


def _by_formats(
    subject: Subject, found: Mapping[str, list[Item]], settings: InContextSettings, room: int
) -> dict[tuple[str, Any], _Put]:
    """Each task in each format, with the most examples that the context holds in all of them."""
    puts = {}
    for task, some in found.items():
        for k in sorted({*settings.shots}, reverse=True):
            if k > settings.format_shots:
                continue
            each = {
                (task, ("format", form)): _put(subject, some, k, form, task, room)
                for form in FORMATS[task]
            }
            if all(each.values()):
                puts |= each
                break
    return puts


def _clusters(task: str, some: Sequence[Item]) -> list[Any]:
    return [(task, item.asked.cluster) for item in some]


def _chance(some: Sequence[Item]) -> float:
    return float(np.mean([1 / len(item.choices) for item in some]))


def _score(name: str, about: str, task: str, put: _Put, right: Sequence[bool], **more) -> Score:
    """The share of a task's items that are right."""
    groups = _clusters(task, put.items)
    return Score(
        name,
        st.share(right, groups),
        about=f"{about}; {put.shots} examples",
        chance=_chance(put.items),
        items=list(map(float, right)),
        clusters=groups,
        asked=digest([name, *put.prompts]),
        **more,
    )


def _curves(
    found: Mapping[str, list[Item]],
    shots: Sequence[int],
    curves: _Puts,
    chosen: _Said,
    replies: _Said,
) -> tuple[Table, list[Score]]:
    """All of the curves as a table; without examples and with the most as scores."""
    rows, scores, gains, clusters = [], [], [], []
    for task, some in found.items():
        asked = [k for k in shots if (task, k) in curves]
        for k in shots:
            if k not in asked:
                rows.append((task, k, "not asked: longer than the context", "", "", ""))
                continue
            put = curves[task, k]
            said = [answers.one_of(r, i.choices) for r, i in zip(replies[task, k], some)]
            both = [
                _score(
                    f"{task}_{name}_{k}",
                    f"{about}: {TASKS[task]}",
                    task,
                    put,
                    put.right(values),
                    better="higher",
                    unparsed=unparsed,
                )
                for name, about, values, unparsed in (
                    ("chosen", "the likeliest choice", chosen[task, k], None),
                    ("written", "what it writes", said, said.count(None)),
                )
            ]
            scores += both if k in (asked[0], asked[-1]) else []
            values = [score.estimate.bracketed for score in both]
            rows.append((task, k, *values, said.count(None), f"{_chance(some):.2f}"))
        if len(asked) > 1:
            few, many = (curves[task, k].right(chosen[task, k]) for k in (asked[0], asked[-1]))
            gains += [float(after) - before for before, after in zip(few, many)]
            clusters += _clusters(task, some)
    if gains:
        about = "accuracy of choices with the most examples less that with the fewest, all tasks"
        same = digest(prompt for put in curves.values() for prompt in put.prompts)
        gain = st.mean(gains, clusters)
        scores.insert(
            0,
            Score(
                "gain", gain, "higher", about, items=gains, clusters=clusters, asked=same, chance=0
            ),
        )
    head = ("task", "examples", "chosen", "written", "unparsed", "chance")
    return Table("Accuracy by number of examples", head, rows), scores


def _labels(
    found: Mapping[str, list[Item]], labels: _Puts, chosen: _Said
) -> tuple[list[Score], Table]:
    """How often it follows labels that are not the right ones."""
    abouts = {
        "true": "share that is the right label",
        "exchanged": "share that is the wrong label, which is that of the examples",
        "random": "share that is the right label, where those of the examples are drawn",
        "unrelated": "share that is the word which stands for the right label",
    }
    scores, rows = [], []
    for task in BINARY:
        if (task, "true") not in labels:
            rows.append((task, 0, *["not asked"] * len(abouts)))
            continue
        some = [
            _score(
                f"{task}_labels_{way}",
                about,
                task,
                labels[task, way],
                labels[task, way].right(chosen[task, way]),
                better="none" if way == "exchanged" else "higher",
            )
            for way, about in abouts.items()
        ]
        scores += some
        shown = [score.estimate.bracketed for score in some]
        rows.append((task, labels[task, "true"].shots, *shown))
    title = "Other labels in the examples: the share that follows them (random: that is right)"
    return scores, Table(title, ("task", "examples", *abouts), rows)


def _formats(
    found: Mapping[str, list[Item]], formats: _Puts, chosen: _Said
) -> tuple[list[Score], Table]:
    """The same items in several formats: mean accuracy, and the best less the worst."""
    scores, rows, names = [], [], [*next(iter(FORMATS.values()))]
    for task, some in found.items():
        keys = [(task, ("format", form)) for form in names]
        if keys[0] not in formats:
            rows.append((task, 0, *["not asked"] * len(names), "", ""))
            continue
        right_FN = np.array([formats[key].right(chosen[key]) for key in keys], float)
        groups, k = _clusters(task, some), formats[keys[0]].shots
        mean = st.share(right_FN.mean(0), groups)
        spread = st.bootstrap(
            lambda i, x=right_FN: float(np.ptp(x[:, i].mean(1))), len(some), groups
        )
        spread = spread._replace(low=max(0.0, spread.low), high=min(1.0, spread.high))
        scores += [
            Score(
                f"{task}_formats_mean",
                mean,
                "higher",
                f"accuracy of choices, mean of {len(names)} formats; {k} examples",
                chance=_chance(some),
                items=right_FN.mean(0).tolist(),
                clusters=groups,
                asked=digest(prompt for key in keys for prompt in formats[key].prompts),
            ),
            Score(
                f"{task}_formats_spread",
                spread,
                "lower",
                f"accuracy in the best format less that in the worst; {k} examples; chance: of "
                "formats that do not matter",
                chance=_spread_by_chance(right_FN),
            ),
        ]
        cells = [f"{value:.2f}" for value in right_FN.mean(1)]
        rows.append((task, k, *cells, mean.bracketed, spread.bracketed))
    head = ("task", "examples", *names, "mean", "spread")
    return scores, Table("Accuracy of choices by format", head, rows)


def _spread_by_chance(right_FN: np.ndarray, draws: int = 500) -> float:
    """The mean spread where what each item came to is dealt out to the formats at random."""
    rng = np.random.default_rng(0)
    dealt = (rng.permuted(right_FN, axis=0).mean(1) for _ in range(draws))
    return float(np.mean([np.ptp(one) for one in dealt]))


def _picture(
    found: Mapping[str, list[Item]], shots: Sequence[int], curves: _Puts, chosen: _Said
) -> Picture:
    """Accuracy of choices by number of examples, with intervals."""
    figure = figure_of(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.add_subplot()
    bare(axes)
    for number, (task, colour) in enumerate(zip(found, _COLOURS)):
        asked = [k for k in shots if (task, k) in curves]
        if not asked:
            continue
        groups = _clusters(task, found[task])
        values = [st.share(curves[task, k].right(chosen[task, k]), groups) for k in asked]
        axes.errorbar(
            [shots.index(k) + (number - 2) * 0.05 for k in asked],
            [one.value for one in values],
            yerr=[
                [max(0, one.value - one.low) for one in values],
                [max(0, one.high - one.value) for one in values],
            ],
            color=colour,
            label=task,
            marker="o",
            markersize=4,
            linewidth=1.5,
            elinewidth=0.8,
        )
    axes.set_ylim(0, 1.02)
    axes.set_xticks(range(len(shots)), map(str, shots))
    axes.set_xlabel("examples in the context", color=INK)
    axes.set_ylabel("accuracy of choices", color=INK)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, ncols=len(found), loc="lower right")
    return picture("Accuracy by number of examples", figure)


def _samples(found: Mapping[str, list[Item]], curves: _Puts, replies: _Said) -> list[Sample]:
    """One reply of each task, with not so many examples that nobody reads them."""
    samples = []
    for task, some in found.items():
        asked = [k for name, k in curves if name == task]
        if asked:
            k = max((k for k in asked if k <= 8), default=min(asked))
            label, reply = some[0].asked.label, replies[task, k][0]
            parts = {"prompt": curves[task, k].prompts[0], "written": reply, "right": label}
            right = answers.one_of(reply, some[0].choices) == label
            samples.append(Sample(parts, right))
    return samples
