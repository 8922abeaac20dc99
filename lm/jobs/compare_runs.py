"""Several runs side by side: their losses in one picture, and how they ended in one table."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import statistics
from typing import Any, Literal

import ml_collections
from rich.console import Console
from rich.table import Table

from lm.config import Path, check, view
from lm.training.metrics import FILE, read_metrics
from lm.training.plots import plot_runs, series


@dataclasses.dataclass(frozen=True)
class CompareRunsJob:
    """Which runs to compare."""

    job: str = "compare_runs"
    runs: tuple[Path, ...] = ("runs",)  # directories of runs, or such as have runs in them
    against: Literal["step", "tokens"] = "step"  # what the horizontal axis counts


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, dict[str, float]]:
    """Draws `workdir/losses.png`, and prints a line for each run.

    Returns:
      By run: the last `step`, `loss` and `eval_loss`, the `best` of the latter, and the median of
      `tokens_per_second`; NaN where there is none.

    Raises:
      ConfigError: no such run, or one without a finite loss.
    """
    job = view(CompareRunsJob, config)
    folders = _folders(job.runs)
    names = [folder.resolve().name for folder in folders]
    runs = {
        name if names.count(name) == 1 else str(folder): read_metrics(folder)
        for name, folder in zip(names, folders)
    }
    results = {name: _summary(records) for name, records in runs.items()}
    directory = pathlib.Path(workdir).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    path = plot_runs(runs, directory / "losses.png", job.against)

    console = Console(highlight=False)
    table = Table("run", box=None, pad_edge=False)
    for column in ("step", "loss", "eval loss", "best", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in results.items():
        losses = [_shown(row[field], ".4f") for field in ("loss", "eval_loss", "best")]
        rate = _shown(row["tokens_per_second"], ",.0f")
        table.add_row(name, f"{row['step']:,}", *losses, rate)
    console.print(table, markup=False)
    console.print(f"losses: {path}", markup=False, soft_wrap=True)
    return results


def _folders(given: tuple[str, ...]) -> list[pathlib.Path]:
    """The directories of all runs: those given, and those that lie in others given."""
    folders = []
    for name in given:
        folder = pathlib.Path(name).expanduser()
        check(folder.is_dir(), f"config.runs={name!r} is not a directory")
        inside = sorted(file.parent for file in folder.glob(f"*/{FILE}"))
        found = [folder] if (folder / FILE).is_file() else inside
        check(bool(found), f"config.runs={name!r} is no run, and has none in it: no {FILE}")
        folders += [folder for folder in found if folder not in folders]
    check(bool(folders), "config.runs=() must name the directories of runs")
    return folders


def _summary(records: list[dict[str, Any]]) -> dict[str, float]:
    losses, held_out = (series(records, name)[1] for name in ("loss", "eval_loss"))
    rates = series(records, "tokens_per_second")[1]
    return {
        "step": max((record["step"] for record in records), default=0),
        "loss": losses[-1] if losses else math.nan,
        "eval_loss": held_out[-1] if held_out else math.nan,
        "best": min(held_out, default=math.nan),
        "tokens_per_second": statistics.median(rates) if rates else math.nan,
    }


def _shown(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "–"
