"""Weak scaling on paper: the same work on every chip, from one chip to thousands."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from lm.config import Path, Size, check
from lm.models.config import REMAT
from lm.models.presets import PRESETS, preset
from lm.parallel.mesh import describe
from lm.planning.programs import train_program
from lm.planning.report import decimal, plain_table, seconds
from lm.planning.search import candidates
from lm.planning.sketch import BESIDE, strategy_of
from lm.planning.topology import open_topology
from lm.training.config import TrainConfig
from lm.training.optimizer import OptimizerConfig
from lm.training.report import binary, si
from lm.training.workload import Workload

# Slices of v5p, as near to a cube as they are made.
SLICES = {
    1: "1x1x1", 2: "1x1x2", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4",
    128: "4x4x8", 256: "4x8x8", 512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16",
}  # fmt: skip

INTRODUCTION = """\
# Weak scaling on paper

Every chip gets the same work; the table says what becomes of it as chips are added. Nothing
here was measured: the figures are a plan's sketch of a step (`lm/planning/sketch.py`), for slices
of TPU v5p, of the fastest mesh it finds that fits, by ZeRO 3. Made by

    python main.py --config=configs/plan_scaling.py

All columns are of one chip and one step. *FLOPs* includes what the remat policy recomputes, the
MFU does not. *Memory* is what a run expects at its start (`lm/training/memory.py`); *HBM* and
*network* are the least that must be moved. Products reach 90 % of the peak, which is about what
the compiler estimates for products of this size; links carry 100 GB/s each way, and every hop
takes a microsecond. *Efficiency* is the share of the step in which a chip does not wait for
others: for collectives as the compiler makes them, some of what ZeRO and data parallelism say
beside compute; *if hidden*, where all of that is.
*Compiled* are the bytes received, the step and the MFU of the same mesh's compiled program, by
the rule of `lm/planning/roofline.py`, where it was compiled (`--config.scaling.compiled`).

Steps, MFU and efficiency, on paper and compiled, are with `train.compiler='tuned'`: the options
of `lm/parallel/compiler.py`, which programs were compiled with but which no TPU has run yet. Runs
leave them out unless asked. `--config.train.compiler=default` makes the table without them.
"""


@dataclasses.dataclass(frozen=True)
class ScalingConfig:
    """A table of chips instead of one plan, where `presets` names models. On TPU v5p, by ZeRO 3."""

    presets: tuple[Literal[tuple(PRESETS)], ...] = ()  # names of lm.models.presets; (): no table
    rows: tuple[Size, ...] = (2,)  # sequences a chip, of each model in turn
    block_size: tuple[Size, ...] = (8192,)  # tokens of each, of each model in turn
    remat: tuple[Literal[REMAT], ...] = ("full",)  # of each model in turn
    compiled: tuple[
        Literal[SLICES], ...
    ] = ()  # numbers of chips for which the step is compiled as well
    page: Path = ""  # a Markdown page to write besides

    def validate(self, prefix: str = "config.scaling") -> None:
        """Raises ConfigError on an unknown model or size, or too few values for the models."""
        for name in ("rows", "block_size", "remat"):
            count = len(getattr(self, name))
            check(
                count in (1, len(self.presets)) or not self.presets,
                f"{prefix}.{name} has {count} values, and there are {len(self.presets)} presets",
            )


def weak_scaling(
    config: ScalingConfig, optimizer: OptimizerConfig, train: TrainConfig, console: Console
) -> dict[str, Any]:
    """Prints the table of every model, writes the page, and returns the figures."""
    result, page = {}, []
    for index, name in enumerate(config.presets):
        rows, block, remat = (
            values[index % len(values)] for values in (config.rows, config.block_size, config.remat)
        )
        model = preset(name, remat=remat)
        model = dataclasses.replace(model, max_length=max(model.max_length, block))
        figures = []
        for chips in SLICES:
            workload = Workload(model, block, rows * chips, optimizer=optimizer, train=train)
            figures.append(_figures(workload, chips, chips in config.compiled))
        title = f"{name}: {rows} × {block:,} tokens a chip and step, remat {remat}, TPU v5p"
        table = _table(figures, bool(config.compiled))
        console.rule(title, align="left")
        console.print(table)
        console.print()
        page += [f"## {title}", "", *_markdown(table), ""]
        result[name] = figures
    if config.page:
        pathlib.Path(config.page).write_text(
            f"{INTRODUCTION}\n" + "\n".join(page), encoding="utf-8"
        )
        console.print(f"written to {config.page}", style="dim")
    return result


def _figures(workload: Workload, chips: int, compile_too: bool) -> dict[str, Any]:
    topology = open_topology(f"v5p:{SLICES[chips]}")
    best = candidates(workload, topology, 3, 1)[0]
    found, flops = best.sketch.estimate, workload.flops_per_token * workload.tokens / chips
    beside = math.fsum(c.seconds for c in found.collectives if strategy_of(c) in BESIDE)
    busy = found.compiler_seconds
    hidden = max(busy, beside) + found.network_seconds - beside
    figure = dict(
        chips=chips,
        topology=topology.name,
        mesh=describe(best.workload.layout.mesh),
        memory=best.sketch.memory,
        fits=best.sketch.memory <= topology.chip.memory,
        flops=found.flops,
        bytes=found.bytes,
        received=sum(best.sketch.received.values()),
        seconds=found.seconds,
        mfu=found.mfu(flops),
        efficiency=busy / found.seconds,
        hidden_efficiency=busy / hidden,
    )
    if compile_too and figure["fits"]:
        program = train_program(best.workload, topology)
        figure |= {"compiled_memory": program.memory.total, "compiled_fits": program.fits}
        if found := program.estimate:
            figure |= dict(
                compiled_flops=found.flops,
                compiled_bytes=found.bytes,
                compiled_received=found.communicated,
                compiled_seconds=found.seconds,
                compiled_mfu=found.mfu(flops),
            )
    return figure


def _table(figures: list[dict[str, Any]], compiled: bool) -> Table:
    columns = ["chips", "mesh", "memory", "FLOPs", "HBM", "network", "step", "MFU"]
    columns += ["efficiency", "if hidden"]
    table = plain_table(*columns, *(["compiled", "step", "MFU"] if compiled else []))
    table.columns[1].justify = "left"
    for f in figures:
        if not f["fits"]:
            table.add_row(f"{f['chips']:,}", "does not fit", binary(f["memory"]), style="dim")
            continue
        row = [
            f"{f['chips']:,}",
            f["mesh"],
            binary(f["memory"]),
            si(f["flops"]).strip(),
            decimal(f["bytes"]),
            decimal(f["received"]),
            seconds(f["seconds"]),
            f"{f['mfu']:.1%}",
            f"{f['efficiency']:.1%}",
            f"{f['hidden_efficiency']:.1%}",
        ]
        if "compiled_seconds" in f:
            row += [decimal(f["compiled_received"]), seconds(f["compiled_seconds"])]
            row += [f"{f['compiled_mfu']:.1%}"]
        table.add_row(*row)
    return table


def _markdown(table: Table) -> list[str]:
    """The lines of a table in Markdown."""
    columns = [[str(c.header), *map(str, c.cells)] for c in table.columns]
    rows = [" | ".join(cells) for cells in zip(*columns)]
    marks = " | ".join("---:" if c.justify == "right" else "---" for c in table.columns)
    return [f"| {row} |" for row in (rows[0], marks, *rows[1:])]
