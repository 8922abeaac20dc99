"""A plan's tables: memory by kind, work, collectives, time; the ranking; what to change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lm.parallel.layout import Layout
from lm.parallel.mesh import describe
from lm.parallel.platform import compiling_for
from lm.planning.collectives import summed
from lm.planning.programs import Memory, Program
from lm.planning.roofline import Estimate
from lm.planning.search import Advice, advice
from lm.planning.sketch import sketch, strategy_of
from lm.planning.topology import Topology
from lm.training.memory import whole_state
from lm.training.report import binary, facts_table, model_line, si
from lm.training.workload import Workload

LABEL = "compiled, not measured"
STRATEGIES = {
    "zero": "ZeRO",
    "data": "data parallelism",
    "tensor": "tensor parallelism",
    "context": "the ring of keys and values",
    "expert": "experts",
    "stage": "the pipeline",
}


def seconds(value: float) -> str:
    """A time as text: `1.9 s`, `38.2 ms`, `410 µs`."""
    for scale, unit in ((1, "s"), (1e-3, "ms")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def decimal(size: float) -> str:
    """Bytes in decimal units, as traffic is counted: `3.2 GB`."""
    return f"{si(size)}B"


def show_training(
    console: Console, workload: Workload, topology: Topology, program: Program
) -> dict[str, Any]:
    """Prints all there is to say of a training step, and returns it in numbers."""
    layout, least = workload.layout, sketch(workload, topology)
    mesh = describe(layout.mesh)
    title = f"{program.name}, {mesh}, zero {layout.zero}"
    show(console, title, program, least.estimate.bytes, least.received)
    if not program.fits:
        console.print()
        console.print(_advice_table(advice(workload, topology, program), topology, workload))
    figures = {name: getattr(least.estimate, name) for name in ("flops", "bytes")}
    figures |= {"received": least.received, "memory": least.memory}
    return program.figures() | {"mesh": mesh, "zero": layout.zero, "least": figures}


def layout_words(layout: Layout) -> str:
    """`data=4 × stage=2 × 3 rounds`."""
    rounds = layout.mesh.shape["stage"] > 1 and layout.rounds > 1
    return describe(layout.mesh) + (f" × {layout.rounds} rounds" if rounds else "")


def plain_table(*columns: str, title: str = "") -> Table:
    """A borderless table whose first column is text and whose others are figures."""
    table = Table(
        box=None,
        padding=(0, 2, 0, 0),
        header_style="bold cyan",
        show_edge=False,
        title=title or None,
        title_justify="left",
        title_style="bold",
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    return table


def header(
    console: Console, topology: Topology, workload: Workload, preset: str, mesh: str = ""
) -> None:
    """What is planned, and for what; `preset` is the model's name or "".

    Of training where there is a `mesh`, in words.
    """
    chip, parts = topology.chip, workload.train.accumulation
    with compiling_for(topology.platform):
        model = model_line(workload.model)
    slices = f"{topology.slices} slices of " if topology.slices > 1 else ""
    table = facts_table()
    table.add_row("model", f"{preset}: {model}" if preset else model)
    if mesh:
        table.add_row(
            "workload",
            f"{workload.batch_size:,} × {workload.block_size:,} tokens a step"
            + (f" in {parts} parts" if parts > 1 else "")
            + f", {workload.optimizer.name}, remat {workload.model.remat}",
        )
    table.add_row("topology", f"{slices}{topology.name}: {len(topology.devices):,} devices")
    if topology.platform == "cpu":
        table.add_row("device", "a fake one: times below are of no machine in particular")
    table.add_row(
        "each",
        f"{chip.sixteen_bit / 1e12:,.0f} TFLOPs/s in bfloat16, {binary(chip.memory)} of HBM at "
        f"{chip.bandwidth / 1e9:,.0f} GB/s, {2 * chip.dimensions} links at "
        f"{chip.link / 1e9:,.0f} GB/s each way",
    )
    if mesh:
        table.add_row("mesh", mesh)
    console.print(table)


def show(
    console: Console,
    title: str,
    program: Program,
    least_bytes: float,
    least_received: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Prints all there is to say of a program.

    Args:
      console: where to.
      title: what it is.
      program: the program.
      least_bytes: to and from HBM, that it needs at least.
      least_received: bytes from other devices, likewise, by strategy.
    """
    console.rule(f"{title}: {LABEL}", align="left")
    console.print(_memory_table(program.memory, program.estimate is not None))
    if program.estimate is None:
        return
    for table in (
        _work_table(program, least_bytes, least_received),
        _collectives_table(program.estimate),
        _time_table(program, program.estimate),
    ):
        console.print()
        console.print(table)
    console.print(
        f"compiled in {program.compile_seconds:.0f} s; the compiler's own analysis counts loop "
        f"bodies once, {si(program.compiler_flops)}FLOPs, and some memory twice, "
        f"{si(program.compiler_temporaries)}B of temporaries",
        style="dim",
    )


def show_decoding(console: Console, words: str, steps: Sequence[Mapping[str, Any]]) -> None:
    """Prints decoding steps side by side: tokens a second beside what HBM allows.

    Args:
      console: where to.
      words: what they have in common.
      steps: for each its rows, whether it fits, and tokens a second of all devices.
    """
    console.rule(f"decoding, {words}: {LABEL}", align="left")
    columns = ("HBM limit", "roofline", "estimate", "of the limit", "a step", "memory", "")
    table = plain_table("tokens a second by rows", *columns)
    for step in steps:
        limit, rate = (step.get(f"tokens_per_second_{n}") for n in ("limit", "estimate"))
        row = [f"{step['rows']:,}", f"{limit:,.0f}"]
        if rate:
            row += [f"{step['tokens_per_second_roofline']:,.0f}", f"{rate:,.0f}"]
            row += [f"{rate / limit:.0%}", seconds(step["rows"] / rate)]
        else:
            row += [""] * 4
        memory = binary(step["memory"]["total"])
        table.add_row(*row, memory, "fits" if step["fits"] else "does not fit")
    console.print(table)
    console.print(
        "HBM limit: weights and keys and values of a full cache, read once by the devices that "
        "share them",
        style="dim",
    )


def _memory_table(memory: Memory, compiled: bool) -> Table:
    """Bytes on a device, by kind."""
    table = plain_table("memory of a device", "bytes", "of HBM")

    def row(name: str, size: float, style: str = "") -> None:
        table.add_row(name, binary(size), f"{size / memory.limit:.1%}", style=style)

    row("parameters", memory.parameters)
    if memory.optimizer:
        row("optimizer state", memory.optimizer)
    row("batch, cache and padding" if compiled else "batch and cache", memory.arguments)
    if compiled:
        row("outputs that are not updated in place", memory.outputs)
        if memory.kept:
            row("activations kept for the backward pass (from its loops)", memory.kept)
        row("other temporaries" if memory.kept else "temporaries", memory.temporaries - memory.kept)
        row("program", memory.code)
    else:
        row("temporaries that the compiler asked for", memory.temporaries)
    row("total", memory.total, "bold")
    verdict = "fits" if memory.fits and compiled else "does not fit"
    style = "green" if verdict == "fits" else "bold red"
    table.add_row(Text(f"{verdict} in {binary(memory.limit)}", style))
    return table


def _work_table(program: Program, least_bytes: float, least: Mapping[str, float]) -> Table:
    """FLOPs, bytes moved and bytes received, beside what is needed at least."""
    found = program.estimate
    table = plain_table("work of a device", "compiled", "at least", "ratio")

    def row(name: str, value: float, least: float, unit: str) -> None:
        ratio = f"{value / least:.2f}" if least else ""
        least_text = f"{si(least)}{unit}" if least else ""
        table.add_row(name, f"{si(value)}{unit}", least_text, ratio)

    row("FLOPs", found.flops, program.model_flops, "FLOPs")
    row("to and from HBM", found.bytes, least_bytes, "B")
    row("from other devices", found.communicated, sum(least.values()), "B")
    served: dict[str, float] = {}
    for collective in found.collectives:
        strategy = strategy_of(collective)
        served[strategy] = served.get(strategy, 0.0) + collective.total
    for strategy in least if len({*least, *served}) > 1 else ():
        row(f"  for {STRATEGIES[strategy]}", served.get(strategy, 0.0), least[strategy], "B")
    for strategy in served if least else ():
        if strategy not in least and served[strategy] > 0.001 * found.communicated:
            row(f"  for {STRATEGIES[strategy]} besides", served[strategy], 0.0, "B")
    return table


def _collectives_table(found: Estimate) -> Table:
    """Every kind of collective along every set of axes."""
    table = plain_table(
        "collective", "axes", "devices", "times", "bytes of one", "received", "time"
    )
    table.columns[1].justify = "left"
    for collective in summed(found.collectives):
        part = f", as {collective.part}" if collective.part else ""
        table.add_row(
            collective.kind + part,
            collective.along,
            f"{collective.size}",
            f"{collective.trips:,.0f}",
            decimal(collective.bytes),
            decimal(collective.total),
            seconds(collective.seconds),
        )
    if not found.collectives:
        table.add_row("none")
    return table


def _time_table(program: Program, found: Estimate) -> Table:
    """The terms, and the estimates with their MFU."""
    table = plain_table(f"time ({LABEL})", "", "MFU")

    def row(name: str, value: float, style: str = "", mfu: bool = True) -> None:
        reached = program.model_flops / value / found.chip.sixteen_bit if mfu and value else 0.0
        table.add_row(name, seconds(value), f"{reached:.1%}" if reached else "", style=style)

    row("matrix units: FLOPs at the peak", found.compute_seconds, mfu=False)
    row("HBM: bytes at its speed", found.memory_seconds, mfu=False)
    row("network: collectives one by one", found.network_seconds, mfu=False)
    row("  of them not hidden behind operations", found.exposed, mfu=False)
    row("bound: the longest of the three", found.ideal)
    row("roofline: each operation's longest, and what is not hidden", found.roofline)
    if found.compiler_seconds != found.operation_seconds:
        row("estimate: the compiler's cycles, and what is not hidden", found.seconds, "bold")
    table.add_row("tokens a second and device", f"{program.tokens / found.seconds:,.0f}")
    if not found.all_known:
        table.add_row(Text("a loop's length is not known: it counts once", "yellow"))
    return table


def _advice_table(found: Sequence[Advice], topology: Topology, workload: Workload) -> Table:
    """What to change, and what it is expected to bring."""
    limit = topology.chip.memory
    table = plain_table("to make it fit (on paper)", "memory", "of HBM", "")
    for change in found:
        table.add_row(
            change.change,
            binary(change.memory),
            f"{change.memory / limit:.0%}",
            "fits" if change.fits else "closer",
        )
    if not any(change.fits for change in found):
        table.add_row("nothing in this config does: use more or larger devices", style="bold red")
        least = math.ceil(whole_state(workload) / limit)
        table.add_row(f"parameters and optimizer state alone would fill {least} of these devices")
    return table
