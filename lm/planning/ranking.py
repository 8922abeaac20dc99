"""Compiling the most promising meshes, one after the other, to see which is best."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from lm.config import AboveZero, ConfigError, Count, check
from lm.parallel.layout import lay_out
from lm.parallel.mesh import MeshConfig, mesh_sizes
from lm.planning.programs import Program, train_program
from lm.planning.report import LABEL, layout_words, plain_table, seconds
from lm.planning.search import candidates, naive_meshes
from lm.planning.topology import Topology
from lm.training.report import binary
from lm.training.workload import Workload


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """Trying several meshes."""

    meshes: Count = 0  # how many of the most promising to compile and rank; 0: config.mesh alone
    seconds: AboveZero = 420.0  # no further mesh is begun after this long
    naive: bool = True  # compile a deliberately naive one beside them


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A mesh that was compiled."""

    workload: Workload
    row: dict[str, Any]  # of the table
    program: Program | None  # None: it did not compile


def ranked(
    search: SearchConfig,
    workload: Workload,
    given: MeshConfig,
    zero: int,
    topology: Topology,
    console: Console,
) -> tuple[list[dict[str, Any]], Workload, Program]:
    """Compiles the most promising meshes and the `given` one, and prints their table.

    Returns:
      The table's rows, and the best mesh's workload and program.

    Raises:
      ConfigError: no mesh divides the model and the batch, or none compiled.
    """
    start, count = time.perf_counter(), len(topology.devices)
    tried = [(c.mesh, zero, "") for c in candidates(workload, topology, zero, search.meshes)]
    if all(mesh_sizes(given, count) != mesh_sizes(mesh, count) for mesh, *_ in tried):
        tried.append((given, zero, "as configured"))
    if search.naive:
        tried += [(*each, "naive") for each in naive_meshes(workload.model, count)]
    found: list[Ranked] = []
    left_out = 0
    for mesh, stage, note in tried:
        if note and any(other.row["note"] == note and other.row["fits"] for other in found):
            continue
        if time.perf_counter() - start > search.seconds and found and not note:
            left_out += 1
            continue
        one = _compiled(workload, mesh, stage, topology, note, console)
        row, said = one.row, ""
        if row["mfu"]:
            said = f": {binary(row['memory'])}, {seconds(row['seconds'])} a step"
        elif one.program is not None:
            said = f": {row['note']}"
        took = f"{time.perf_counter() - start:.0f} s"
        console.print(f"{took}: {row['mesh']}, zero {stage}{said}", style="dim")
        found.append(one)
    if left_out:
        console.print(f"{left_out} meshes left out after {search.seconds:.0f} s")
    found.sort(key=lambda one: (not one.row["fits"], one.row["seconds"]))
    best = next((one for one in found if one.row["zero"] == zero and one.program), found[0])
    check(
        best.program is not None,
        f"config.search.meshes={search.meshes}: none compiled: {best.row['note']}",
    )
    rows = [one.row for one in found]
    console.rule(f"meshes: {LABEL}", align="left")
    console.print(_table(rows))
    console.print()
    return rows, best.workload, best.program


def _compiled(workload, mesh: MeshConfig, zero: int, topology, note: str, console) -> Ranked:
    layout = lay_out("", mesh, zero, topology.devices)
    workload, words = dataclasses.replace(workload, layout=layout), layout_words(layout)
    row = dict(
        mesh=words, zero=zero, fits=False, memory=0.0, limit=topology.chip.memory,
        seconds=math.inf, mfu=0.0, tokens_per_second=0.0, note=note,
    )  # fmt: skip
    try:
        with console.status(f"compiling {words}"):
            program = train_program(workload, topology)
    except (ConfigError, jax.errors.JaxRuntimeError, ValueError) as error:
        return Ranked(workload, row | {"note": str(error).split("\n")[0][:60]}, None)
    figures = program.figures()
    row |= {"fits": program.fits, "memory": program.memory.total}
    row |= {k: figures[k] for k in ("seconds", "mfu", "tokens_per_second") if k in figures}
    if not program.fits:
        row["note"] = ", ".join(filter(None, (note, "does not fit")))
    return Ranked(workload, row, program)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    """The meshes that were compiled, best first."""
    table = plain_table("mesh", "zero", "memory", "of HBM", "step", "MFU", "tokens/s/device", "")
    table.columns[-1].justify = "left"
    for row in rows:
        table.add_row(
            row["mesh"],
            str(row["zero"]),
            binary(row["memory"]) if row["memory"] else "",
            f"{row['memory'] / row['limit']:.0%}" if row["memory"] else "",
            seconds(row["seconds"]) if row["mfu"] else "",
            f"{row['mfu']:.1%}" if row["mfu"] else "",
            f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else "",
            row["note"],
            style="" if row["fits"] else "dim",
        )
    return table
