"""Sets the cards of several models side by side, score by score, with what sets them apart."""

from __future__ import annotations

import dataclasses
import pathlib

import ml_collections
from rich.console import Console
from rich.table import Table

from lm.config import Path, check, check_choice, defaults, view
from lm.evaluation.comparison import Compared, compare, read_card, tables, write_comparison
from lm.evaluation.page import CARD
from lm.jobs import evaluate
from lm.runs.directory import CONFIG


@dataclasses.dataclass(frozen=True)
class CompareJob:
    """Which models to compare."""

    job: str = "compare"
    # Directories with a card.json, which configs/evaluate.py writes, or of runs, which are examined
    # first. The others are compared with the first one.
    runs: tuple[Path, ...] = ()
    suites: tuple[str, ...] = ()  # of runs that are examined; (): all

    def validate(self, prefix: str = "config") -> None:
        """Raises `ConfigError` unless there are two at least, each with a card or a model."""
        check(len(self.runs) > 1, f"{prefix}.runs={self.runs} must name two directories, or more")
        for name in self.runs:
            folder = pathlib.Path(name).expanduser()
            check(folder.is_dir(), f"{prefix}.runs={name!r} is not a directory")
            check(
                any((folder / file).is_file() for file in (CARD, CONFIG)),
                f"{prefix}.runs={name!r} is neither a run nor has it a {CARD}",
            )
        for name in self.suites:
            check_choice(f"{prefix}.suites", name, evaluate.SUITES)


def run(
    config: ml_collections.ConfigDict, workdir: str
) -> dict[tuple[str, str], list[Compared | None]]:
    """Writes `workdir/compare.html` and `workdir/compare.json`, and prints every score.

    The card of a run that is examined first stays in `workdir`, in a directory of the run's name.

    Returns:
      See `lm.evaluation.comparison.compare`.

    Raises:
      ConfigError: fewer than two directories, or one without a card or a model; see
        `lm.jobs.evaluate`.
    """
    job = view(CompareJob, config)
    directory = pathlib.Path(workdir).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    folders = [pathlib.Path(name).expanduser() for name in job.runs]
    names = [folder.resolve().name for folder in folders]
    for number, (folder, name) in enumerate(zip(folders, names)):
        if not (folder / CARD).is_file():
            twice = names.count(name) > 1
            asked = defaults(evaluate.EvaluateJob)
            asked.init_from, asked.suites = str(folder), job.suites
            folders[number] = directory / (f"{number + 1}-{name}" if twice else name)
            evaluate.run(asked, str(folders[number]))
    cards = [read_card(folder) for folder in folders]
    compared = compare(cards)
    console = Console(highlight=False)
    for one in tables(cards, compared):
        table = Table(title=one.title, title_justify="left", box=None, pad_edge=False)
        for number, name in enumerate(one.head):
            table.add_column(name, justify="right" if number else "left", overflow="fold")
        for row in one.rows:
            table.add_row(*row)
        console.print(table, markup=False)
    path = write_comparison(directory, cards, compared)
    console.print(f"comparison: {path}", markup=False, soft_wrap=True)
    return compared
