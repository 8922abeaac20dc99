"""Which jumps survive a smooth metric: every checkpoint of several runs, in one picture."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import ml_collections
import numpy as np
from rich.console import Console
from rich.table import Table

import lm
from lm.config import Path, Positive, Seed, check, view
from lm.data import tasks
from lm.evaluation.card import plain
from lm.evaluation.curves import METRICS, Curve, draw, jump
from lm.evaluation.emergence import answers, corpora, fits, questions, reversals
from lm.evaluation.subject import Subject
from lm.files import write_json
from lm.models import costs, param_specs
from lm.parallel.platform import keep_programs
from lm.runs.directory import CHECKPOINTS
from lm.training.checkpoints import some_steps


@dataclasses.dataclass(frozen=True)
class EmergenceJob:
    """Which runs to follow, and in what."""

    job: str = "emergence"
    seed: Seed = 0  # of the questions
    runs: tuple[Path, ...] = ()  # directories of runs on `lm.data.tasks`; sizes are compared, too
    items: Positive = 200  # held-out questions of each task
    every: Positive = 1  # of the kept checkpoints one in so many; the last one always

    def validate(self, prefix: str = "config") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        check(bool(self.runs), f"{prefix}.runs=() must name the directories of runs")


def run(config: ml_collections.ConfigDict, workdir: str) -> list[dict[str, Any]]:
    """Draws `workdir/emergence.png`, writes `emergence.json`, and prints where each number rose.

    Returns:
      For each run and each set of questions its means, by step (`lm.evaluation.emergence.Answers`).

    Raises:
      ConfigError: no such run, or one that was not trained on `lm.data.tasks`.
    """
    job = view(EmergenceJob, config)
    keep_programs()
    console = Console(highlight=False)
    directory = pathlib.Path(workdir).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    curves = [curve for name in job.runs for curve in _followed(job, name, console)]
    path = draw(curves, directory / "emergence.png")
    for curve in curves:
        console.print(_table(curve))
    found = [plain(curve) for curve in curves]
    write_json(directory / "emergence.json", found)
    console.print(f"picture: {path}", markup=False, soft_wrap=True)
    return found


def _followed(job: EmergenceJob, name: str, console: Console) -> list[Curve]:
    """A curve for each set of questions."""
    folder = pathlib.Path(name).expanduser()
    steps = some_steps(folder / CHECKPOINTS, job.every) or [None]
    subject = Subject(lm.load(folder, steps[0]))
    learnt = corpora(subject)
    check(
        bool(learnt),
        f"config.runs={name!r} was not trained on tasks: its data.path is none of those of "
        "lm/data/tasks.py, such as 'addition_3_reversed'",
    )
    sets = {}
    for corpus in learnt:
        if corpus == "reversal":
            sets |= reversals(int(subject.run.config["seed"]))
        else:
            numbers = range(job.items)
            sets[corpus] = [tasks.item(corpus, job.seed, n, held_out=True) for n in numbers]
    sets = {
        what: items[:: max(1, len(items) // job.items)][: job.items] for what, items in sets.items()
    }
    check(
        all(fits(subject, items) for items in sets.values()),
        f"config.runs={name!r}: its context of {subject.max_length} tokens has no room for the "
        "questions with their answers: train it with a larger data.block_size",
    )
    asked = {what: questions(subject, items) for what, items in sets.items()}
    size = costs.parameters(subject.run.skeleton.config, param_specs(subject.run.skeleton)).total
    label, corpus = folder.resolve().name, ", ".join(learnt)
    curves = {what: Curve(label, corpus, what, size, [], []) for what in asked}
    for step in steps:
        subject = subject.at(lm.load(folder, step))
        for what, some in asked.items():
            means = answers(subject, some).means()
            curves[what].steps.append(subject.run.step)
            curves[what].means.append(means)
            console.print(
                f"{label} step {subject.run.step}: {what}: exact match {means['exact']:.3f}, "
                f"log-likelihood {means['logprob']:.2f}",
                markup=False,
                soft_wrap=True,
            )
    return list(curves.values())


def _table(curve: Curve) -> Table:
    """Of each number where it began and ended, and how much of its way it went in the jump."""
    first, last = jump(curve)
    table = Table(
        "", title=f"{curve.run}: {curve.what}", box=None, pad_edge=False, title_justify="left"
    )
    for head in ("first", "last", f"of its way in steps {first:.0f} to {last:.0f}"):
        table.add_column(head, justify="right", no_wrap=True)
    for field, words in METRICS.items():
        values = curve.values(field)
        if not np.isfinite(values).all():  # such as the Brier score of what has no choices
            continue
        way = f"{curve.within(field, first, last):.0%}"
        table.add_row(words, f"{values[0]:.3f}", f"{values[-1]:.3f}", way)
    return table
