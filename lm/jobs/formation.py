"""How small models came to what they do: every checkpoint of runs that learn an algorithm."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import ml_collections
from rich.console import Console
from rich.table import Table

import lm
from lm.config import Path, Positive, Seed, check, view
from lm.data.algorithmic import ADDITIONS, PERIODS
from lm.evaluation.card import plain
from lm.files import write_json
from lm.interpretability import grokking, induction
from lm.parallel.platform import keep_programs
from lm.runs.directory import CHECKPOINTS
from lm.runs.run import Run
from lm.training.checkpoints import some_steps


@dataclasses.dataclass(frozen=True)
class FormationJob:
    """Which runs to follow."""

    job: str = "formation"
    seed: Seed = 0  # of the texts that are asked
    # Directories of runs on `lm.data.algorithmic`: repeats, of which several are drawn together, or
    # modular addition, of which each is drawn by itself
    runs: tuple[Path, ...] = ()
    texts: Positive = 256  # repeats that each checkpoint is asked
    every: Positive = 1  # of the kept checkpoints one in so many; the last one always

    def validate(self, prefix: str = "config") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        check(bool(self.runs), f"{prefix}.runs=() must name the directories of runs")


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
    """Draws `workdir/induction.png`, `workdir/grokking.png` or both, and writes `formation.json`.

    Returns:
      What is in the file: of "induction" and of "grokking" a list with a course for each run.

    Raises:
      ConfigError: no such run, or one that has learnt something else.
    """
    job = view(FormationJob, config)
    keep_programs()
    console = Console(highlight=False)
    directory = pathlib.Path(workdir).expanduser()
    corpora = [_corpus(name) for name in job.runs]
    directory.mkdir(parents=True, exist_ok=True)
    repeats, sums = [], []
    for name, corpus in zip(job.runs, corpora):
        runs, label = _checkpoints(name, job.every), pathlib.Path(name).expanduser().resolve().name
        if corpus in PERIODS:
            repeats.append(induction.course(runs, label, corpus, job.seed, job.texts))
        else:
            sums.append(grokking.course(runs, label, ADDITIONS[corpus]))
    pictures = []
    if repeats:
        console.print(_induction_table(repeats))
        pictures.append(induction.draw(repeats, directory / "induction.png"))
    for number, one in enumerate(sums):
        console.print(_grokking_table(one))
        file = "grokking.png" if not number else f"grokking_{number + 1}.png"
        pictures.append(grokking.draw(one, directory / file))
    found = {"induction": plain(repeats), "grokking": plain(sums)}
    write_json(directory / "formation.json", found)
    for path in pictures:
        console.print(f"picture: {path}", markup=False, soft_wrap=True)
    return found


def _corpus(name: str) -> str:
    """What a run has learnt from."""
    path = lm.load(name).config.get("data", {}).get("path", "")
    known = {*PERIODS, *ADDITIONS}
    check(
        isinstance(path, str) and path in known,
        f"config.runs={name!r} was trained on data.path={path!r}: it must be one of those of "
        "lm/data/algorithmic.py, such as 'repeats' or 'modular_addition_59'",
    )
    return path


def _checkpoints(name: str, every: int) -> list[Run]:
    folder = pathlib.Path(name).expanduser()
    return [lm.load(folder, step) for step in some_steps(folder / CHECKPOINTS, every)]


def _induction_table(courses: list[induction.Course]) -> Table:
    """The best head's score on random periods, on texts of the run's own, and when it rose."""
    table = Table("run", title="Repeats of random periods, at the end", box=None, pad_edge=False)
    for head in ("repeat loss", "accuracy", "in context", "best head", "its own", "rose in steps"):
        table.add_column(head, justify="right", no_wrap=True)
    for one in courses:
        last = one.points[-1]
        numbers = (last.repeat_loss, last.accuracy, last.in_context, one.prefix, one.own_prefix)
        rose = "–" if one.change is None else "{:.0f} to {:.0f}".format(*one.change)
        table.add_row(one.run, *(f"{value:.2f}" for value in numbers), rose)
    return table


def _grokking_table(course: grokking.Course) -> Table:
    title = f"{course.run}: key frequencies {', '.join(map(str, course.key))}"
    table = Table("step", title=title, box=None, pad_edge=False, title_justify="left")
    fields = [field.name for field in dataclasses.fields(grokking.Point)][1:]
    for field in fields:
        table.add_column(field.replace("_", " "), justify="right")
    some = course.points[:: max(1, len(course.points) // 10)]
    for one in (*some, *([course.points[-1]] if some[-1] is not course.points[-1] else [])):
        table.add_row(str(one.step), *(f"{getattr(one, field):.3f}" for field in fields))
    return table
