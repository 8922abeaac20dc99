"""What a model learns from examples in its context: from how many, and what it learns of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence

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
    axes,
    digest,
    picture,
)
from lm.evaluation.chain_of_thought import ReasoningSettings
from lm.evaluation.few_shot import BINARY, FORMATS, TASKS, Item, items, likeliest
from lm.evaluation.subject import Subject
from lm.inference import SamplingConfig
from lm.training.plots import COLOURS

_MORE = 2  # tokens that are written beyond the longest choice
_UNRELATED = ("red", "blue")  # labels that say nothing of what they stand for (Wei et al. 2023)


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


@dataclasses.dataclass
class _Put:
    """A task's items as they are put to the model, and what it makes of them."""

    task: str
    items: Sequence[Item]
    prompts: Sequence[str]
    shots: int
    chosen: Sequence[str] = ()
    written: Sequence[str] = ()

    @property
    def clusters(self) -> list[Hashable]:
        return [(self.task, item.asked.cluster) for item in self.items]

    @property
    def chance(self) -> float:
        return float(np.mean([1 / len(item.choices) for item in self.items]))

    @property
    def parsed(self) -> list[str | None]:
        """The choices that it writes."""
        return [answers.one_of(w, item.choices) for w, item in zip(self.written, self.items)]

    def right(self, said: Sequence[str | None]) -> list[bool]:
        return [one == item.asked.label for one, item in zip(said, self.items)]

    def score(self, name: str, about: str, said: Sequence[str | None], **fields) -> Score:
        """The share of the items that are right."""
        fields = {"chance": self.chance, "asked": digest([name, *self.prompts]), **fields}
        about = f"{about}; {self.shots} examples"
        return Score.share(name, self.right(said), about=about, clusters=self.clusters, **fields)


# By task, and then by what it is put for: a number of examples, a kind of labels, a format.
_Puts = Mapping[str, Mapping[object, _Put]]


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

    def put(task: str, some: Sequence[Item], shots: int, form: str = "words") -> _Put | None:
        """Items with so many examples; None where the context does not hold all of them."""
        prompts = [FORMATS[task][form].prompt(item, shots) for item in some]
        longest = max(len(subject.text(prompt)) for prompt in prompts)
        fits = longest + new <= subject.max_length
        return _Put(task, some, prompts, shots) if fits else None

    def most(
        task: str, ways: Mapping[str, tuple[Sequence[Item], str]], least: int, limit: int
    ) -> dict[str, _Put]:
        """With the most examples that the context holds, of those asked for, in all ways."""
        for k in (k for k in reversed(shots) if least <= k <= limit):
            puts = {way: put(task, some, k, form) for way, (some, form) in ways.items()}
            if all(puts.values()):
                return puts
        return {}

    curves, labels, formats = {}, {}, {}
    for task, some in found.items():
        every = {k: put(task, some, k) for k in shots}
        curves[task] = {k: one for k, one in every.items() if one}
        ways = {form: (some, form) for form in FORMATS[task]}
        formats[task] = most(task, ways, 0, settings.format_shots)
    for task in BINARY:
        ways = {w: (some, "words") for w, some in _relabelled(task, found[task], seed).items()}
        labels[task] = most(task, ways, 1, settings.label_shots)
    if not any(curves.values()):
        raise NotApplicable(
            f"its context of {subject.max_length} tokens holds no example with its answer"
        )
    puts = [
        one for some in (curves, labels, formats) for of in some.values() for one in of.values()
    ]
    asked = [(p, item.choices) for one in puts for p, item in zip(one.prompts, one.items)]
    said = iter(likeliest(subject, asked))
    for one in puts:
        one.chosen = [next(said) for _ in one.prompts]
    puts = [one for of in curves.values() for one in of.values()]
    sampling = SamplingConfig(temperature=0, max_new_tokens=new, stop=("\n", "."))
    written = iter(subject.write([p for one in puts for p in one.prompts], sampling))
    for one in puts:
        one.written = [next(written)[0].text for _ in one.prompts]
    table, scores = _curves(curves, shots)
    more, of_labels = _labels(labels)
    spread, of_formats = _formats(formats)
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
        [_picture(curves, shots)],
        [*_samples(curves), *samples],
    )


def _relabelled(task: str, some: Sequence[Item], seed: int) -> dict[str, list[Item]]:
    """A task of two labels with other labels in the examples.

    True ones; exchanged ones (Wei et al. 2023: does it follow the context, or what it knew before);
    random ones (Min et al. 2022: do the labels matter at all); and words that are unrelated.
    """
    labels, draw = BINARY[task], Draw(f"labels {task} {seed}")
    ways = {
        way: [item.relabelled(dict(zip(labels, new))) for item in some]
        for way, new in (
            ("true", labels), ("exchanged", labels[::-1]), ("unrelated", _UNRELATED)
        )
    }  # fmt: skip
    ways["random"] = [
        item._replace(shown=[one._replace(label=draw.pick(labels)) for one in item.shown])
        for item in some
    ]
    return ways


def _curves(curves: _Puts, shots: Sequence[int]) -> tuple[Table, list[Score]]:
    """All of the curves as a table; without examples and with the most as scores."""
    rows, scores, gains, clusters = [], [], [], []
    for task, puts in curves.items():
        for k in shots:
            if k not in puts:
                rows.append((task, k, "not asked: longer than the context", "", "", ""))
                continue
            put = puts[k]
            lost = put.parsed.count(None)
            both = [
                put.score(f"{task}_{name}_{k}", f"{about}: {TASKS[task]}", said, unparsed=unparsed)
                for name, about, said, unparsed in (
                    ("chosen", "the likeliest choice", put.chosen, None),
                    ("written", "what it writes", put.parsed, lost),
                )
            ]
            scores += both if k in (min(puts), max(puts)) else []
            values = [score.estimate.bracketed for score in both]
            rows.append((task, k, *values, lost, f"{put.chance:.2f}"))
        if len(puts) > 1:
            few, many = (put.right(put.chosen) for put in (puts[min(puts)], puts[max(puts)]))
            gains += [float(after) - before for before, after in zip(few, many)]
            clusters += puts[min(puts)].clusters
    if gains:
        about = "accuracy of choices with the most examples less that with the fewest, all tasks"
        same = digest(p for puts in curves.values() for put in puts.values() for p in put.prompts)
        scores.insert(0, Score.mean("gain", gains, "higher", about, clusters, same, chance=0))
    head = ("task", "examples", "chosen", "written", "unparsed", "chance")
    return Table("Accuracy by number of examples", head, rows), scores


def _labels(labels: _Puts) -> tuple[list[Score], Table]:
    """How often it follows labels that are not the right ones."""
    abouts = {
        "true": "share that is the right label",
        "exchanged": "share that is the wrong label, which is that of the examples",
        "random": "share that is the right label, where those of the examples are drawn",
        "unrelated": "share that is the word which stands for the right label",
    }
    scores, rows = [], []
    for task, puts in labels.items():
        if not puts:
            rows.append((task, 0, *["not asked"] * len(abouts)))
            continue
        better = {"exchanged": "none"}
        some = [
            puts[way].score(
                f"{task}_labels_{way}", about, puts[way].chosen, better=better.get(way, "higher")
            )
            for way, about in abouts.items()
        ]
        scores += some
        rows.append((task, puts["true"].shots, *(score.estimate.bracketed for score in some)))
    title = "Other labels in the examples: the share that follows them (random: that is right)"
    return scores, Table(title, ("task", "examples", *abouts), rows)


def _formats(formats: _Puts) -> tuple[list[Score], Table]:
    """The same items in several formats: mean accuracy, and the best less the worst."""
    scores, rows, names = [], [], [*next(iter(FORMATS.values()))]
    for task, puts in formats.items():
        if not puts:
            rows.append((task, 0, *["not asked"] * len(names), "", ""))
            continue
        right_FN = np.array([put.right(put.chosen) for put in puts.values()], float)
        put = puts[names[0]]
        mean = Score.share(
            f"{task}_formats_mean",
            right_FN.mean(0),
            about=f"accuracy of choices, mean of {len(names)} formats; {put.shots} examples",
            clusters=put.clusters,
            asked=digest(prompt for put in puts.values() for prompt in put.prompts),
            chance=put.chance,
        )
        spread = st.bootstrap(
            lambda i, x=right_FN: float(np.ptp(x[:, i].mean(1))), len(put.items), put.clusters
        )
        spread = spread._replace(low=max(0.0, spread.low), high=min(1.0, spread.high))
        about = (
            f"accuracy in the best format less that in the worst; {put.shots} examples; chance: of "
            "formats that do not matter"
        )
        fields = {"about": about, "chance": _spread_by_chance(right_FN), "fraction": True}
        scores += [mean, Score(f"{task}_formats_spread", spread, "lower", **fields)]
        cells = [f"{value:.2f}" for value in right_FN.mean(1)]
        rows.append((task, put.shots, *cells, mean.estimate.bracketed, spread.bracketed))
    head = ("task", "examples", *names, "mean", "spread")
    return scores, Table("Accuracy of choices by format", head, rows)


def _spread_by_chance(right_FN: np.ndarray, draws: int = 500) -> float:
    """The mean spread where what each item came to is dealt out to the formats at random."""
    rng = np.random.default_rng(0)
    dealt = (rng.permuted(right_FN, axis=0).mean(1) for _ in range(draws))
    return float(np.mean([np.ptp(one) for one in dealt]))


def _picture(curves: _Puts, shots: Sequence[int]) -> Picture:
    """Accuracy of choices by number of examples, with intervals."""
    drawn = axes("examples in the context", "accuracy of choices", (7.2, 3.8))
    for number, ((task, puts), colour) in enumerate(zip(curves.items(), COLOURS)):
        if not puts:
            continue
        values = [st.share(put.right(put.chosen), put.clusters) for put in puts.values()]
        ends = [[max(0, x.value - x.low), max(0, x.high - x.value)] for x in values]
        drawn.errorbar(
            [shots.index(k) + (number - 2) * 0.05 for k in puts],
            [one.value for one in values],
            yerr=np.transpose(ends),
            **{"color": colour, "label": task, "marker": "o", "markersize": 4},
            **{"linewidth": 1.5, "elinewidth": 0.8},
        )
    drawn.set_ylim(0, 1.02)
    drawn.set_xticks(range(len(shots)), map(str, shots))
    legend = {"fontsize": 9, "ncols": len(curves), "loc": "upper center"}
    legend["bbox_to_anchor"] = (0.5, -0.14)
    return picture("Accuracy by number of examples", drawn.figure, **legend)


def _samples(curves: _Puts) -> list[Sample]:
    """One reply of each task, with not so many examples that nobody reads them."""
    samples = []
    for puts in filter(None, curves.values()):
        put = puts[max((k for k in puts if k <= 8), default=min(puts))]
        label = put.items[0].asked.label
        parts = {"prompt": put.prompts[0], "written": put.written[0], "right": label}
        samples.append(Sample(parts, put.parsed[0] == label))
    return samples
