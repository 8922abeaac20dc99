"""What a model's heads do, whether they are needed for it, and how they came to do it."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import Any

import ml_collections
import numpy as np
from rich.console import Console

import lm
from lm.config import Path, Positive, Seed, Size, check, view
from lm.evaluation.card import Section
from lm.evaluation.page import made_by, write_report
from lm.evaluation.subject import Subject
from lm.interpretability import head_history, head_report, head_stories
from lm.interpretability.head_tests import Bar, induction_task, pronoun_task, run_task
from lm.parallel.platform import keep_programs
from lm.runs.directory import CHECKPOINTS
from lm.training.checkpoints import some_steps
from lm.training.plots import save


@dataclasses.dataclass(frozen=True)
class HeadsJob:
    """Which model to look into, and how closely."""

    job: str = "heads"
    seed: Seed = 0  # of the texts
    init_from: Path = ""  # a run directory, or a Hugging Face directory
    rows: Size = 24  # texts that attention is scored on, of each kind
    pairs: Size = 16  # of texts that heads are tested on, of each task
    every: Positive = 1  # of the kept checkpoints one in so many; the last one always
    bar: Bar = dataclasses.field(default_factory=Bar)

    def validate(self, prefix: str = "config") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        check(bool(self.init_from), f"{prefix}.init_from='' must name a model's directory")


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
    """Writes `heads.html`, `heads.json` and `heads.png` into `workdir`, and prints the verdicts.

    Returns:
      Of each task a dict from (layer, head) to its verdict, where there is one.

    Raises:
      ConfigError: no such model, or one that has no attention, or is no decoder of text.
    """
    job = view(HeadsJob, config)
    keep_programs()
    console = Console(highlight=False)
    folder = pathlib.Path(job.init_from).expanduser()
    steps = some_steps(folder / CHECKPOINTS, job.every) or [None]
    run = lm.load(folder, steps[-1])
    model = run.skeleton.config
    for field, needed in (("architecture", "decoder"), ("cell", "attention")):
        value = getattr(model, field)
        what = f"config.init_from={job.init_from!r} is of {field}={value!r}"
        check(value == needed, f"{what}, and heads are scored of {needed!r}")
    directory = pathlib.Path(workdir).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    subject, shape = Subject(run), (model.num_layers, model.num_heads)
    found, verdicts, sections = {}, {}, []
    for make in (pronoun_task, head_stories.pronoun_choice, induction_task):
        start = time.monotonic()
        if (task := make(subject, job.seed, job.pairs)) is None:
            continue
        tested = run_task(model, run.params, task)
        said = {at: job.bar.verdict(tested, *at) for at in np.ndindex(shape)}
        found[task.name], verdicts[task.name] = (task, tested), {k: v for k, v in said.items() if v}
        section = head_report.tested(subject, job.bar, task, tested, said, job.seed)
        sections.append(_timed(section, start))
    start = time.monotonic()
    texts = head_history.texts(subject, job.seed, job.rows)
    sections.append(_timed(head_report.scored(subject, texts), start))
    start = time.monotonic()
    history, lines = _followed(folder, steps, found, verdicts, texts, console)
    titles = "of heads", "share of right answers", "in-context-learning score, nats"
    figure = head_history.draw(history, lines, titles)
    save(figure, directory / "heads.png")
    sections.append(_timed(head_report.trained(history, lines, figure), start))
    name = folder.resolve().name
    facts = {"model": name, "layers × heads": f"{shape[0]} × {shape[1]}"}
    about = "What its heads attend to, which of them are needed, and how they came to do it."
    command = made_by("configs/interpret/heads.py", job)
    more = {"steps": history.steps, "history": history.values}
    page = directory / "heads.html"
    write_report(page, f"{name}: heads", about, facts, command, sections, more=more)
    for task, some in verdicts.items():
        preference = found[task][1].preference
        console.print(f"{task}: right in {preference:.0%}", markup=False, soft_wrap=True)
        for (layer, head), said in some.items():
            if not said.startswith("untested"):
                console.print(f"  head {layer}.{head}: {said}", markup=False, soft_wrap=True)
    console.print(f"page: {page}", markup=False, soft_wrap=True)
    return verdicts


def _timed(section: Section, start: float) -> Section:
    return dataclasses.replace(section, seconds=time.monotonic() - start)


def _followed(folder, steps, found, verdicts, texts, console) -> tuple[head_history.History, list]:
    """Numbers of each checkpoint, and the names of those of heads and those of the model."""
    values: dict[str, list[float]] = {}
    of_heads: dict[str, None] = {}
    of_model: dict[str, None] = {}
    learnt: dict[str, None] = {}
    done = []

    def note(names: dict[str, None], name: str, value: float) -> None:
        names[name] = None
        values.setdefault(name, []).append(float(value))

    for step in steps:
        run = lm.load(folder, step)
        config, params = run.skeleton.config, run.params
        done.append(run.step)
        for name, (task, last) in found.items():
            ranked = [at for at, said in verdicts[name].items() if not said.startswith("untested")]
            ranked.sort(key=lambda at: (verdicts[name][at] != "specialised", -last.denoised_LH[at]))
            one = run_task(config, params, task, ranked[:2])
            for at in ranked[:2]:
                who = f"{at[0]}.{at[1]}: {name}"
                note(of_heads, f"{who}: attention", one.attention_LH[at])
                note(of_heads, f"{who}: patched", one.denoised_LH[at])
            note(of_model, name, one.preference)
        for name, scores in head_history.attention_scores(config, params, texts).items():
            for layer, head in np.ndindex(scores.shape):
                values.setdefault(f"{layer}.{head}: {name}", []).append(float(scores[layer, head]))
        learning = head_history.in_context_learning(config, params, texts)
        note(learnt, "in-context-learning score", learning)
        console.print(f"step {run.step}: in-context-learning score {learning:.3f}", markup=False)
    for name in ("previous token", "induction"):
        most = max((n for n in values if n.endswith(f": {name}")), key=lambda n: values[n][-1])
        of_heads[most] = None
    return head_history.History(done, values), [[*of_heads], [*of_model], [*learnt]]
