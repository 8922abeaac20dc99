"""A plan's tables: memory by kind, work, collectives, time; the ranking; what to change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lm.planning.analytic import strategy_of
from lm.planning.collectives import summed
from lm.planning.programs import Memory, Program
from lm.planning.roofline import Estimate
from lm.planning.search import Advice
from lm.planning.topology import Topology
from lm.training.report import binary, facts_table, si

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


def header(console: Console, topology: Topology, model: str, workload: str, mesh: str) -> None:
    """What is planned, and for what."""
    chip = topology.chip
    facts = facts_table()
    facts.add_row("model", model)
    facts.add_row("workload", workload)
    slices = f"{topology.slices} slices of " if topology.slices > 1 else ""
    facts.add_row("topology", f"{slices}{topology.name}: {len(topology.devices):,} devices")
    if topology.platform == "cpu":
        facts.add_row("device", "a fake one: times below are of no machine in particular")
    facts.add_row(
        "each",
        f"{chip.sixteen_bit / 1e12:,.0f} TFLOPs/s in bfloat16, {binary(chip.memory)} of HBM at "
        f"{chip.bandwidth / 1e9:,.0f} GB/s, {2 * chip.dimensions} links at "
        f"{chip.link / 1e9:,.0f} GB/s each way",
    )
    facts.add_row("mesh", mesh)
    console.print(facts)


def memory_table(memory: Memory, compiled: bool) -> Table:
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


def work_table(
    program: Program, model_flops: float, least_bytes: float, least: Mapping[str, float]
) -> Table:
    """FLOPs, bytes moved and bytes received, beside what is needed at least."""
    found = program.estimate
    table = plain_table("work of a device", "compiled", "at least", "ratio")

    def row(name: str, value: float, least: float, unit: str) -> None:
        ratio = f"{value / least:.2f}" if least else ""
        least_text = f"{si(least)}{unit}" if least else ""
        table.add_row(name, f"{si(value)}{unit}", least_text, ratio)

    row("FLOPs", found.flops, model_flops, "FLOPs")
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


def collectives_table(found: Estimate) -> Table:
    """Every kind of collective along every set of axes."""
    table = plain_table(
        "collective", "axes", "devices", "times", "bytes of one", "received", "time"
    )
    table.columns[1].justify = "left"
    times: dict[tuple, float] = {}
    for collective, spent in zip(found.collectives, found.collective_seconds):
        key = (collective.kind, collective.along, collective.size, collective.part)
        times[key] = times.get(key, 0.0) + spent
    for collective in summed(found.collectives):
        key = (collective.kind, collective.along, collective.size, collective.part)
        part = f", as {collective.part}" if collective.part else ""
        table.add_row(
            collective.kind + part,
            collective.along,
            f"{collective.size}",
            f"{collective.trips:,.0f}",
            decimal(collective.bytes),
            decimal(collective.total),
            seconds(times[key]),
        )
    if not found.collectives:
        table.add_row("none")
    return table


def time_table(found: Estimate, model_flops: float, tokens: float) -> Table:
    """The terms, and the estimates with their MFU."""
    table = plain_table(f"time ({LABEL})", "", "MFU")
    peak = found.chip.sixteen_bit

    def row(name: str, value: float, style: str = "", mfu: bool = True) -> None:
        share = f"{model_flops / value / peak:.1%}" if mfu and value else ""
        table.add_row(name, seconds(value), share, style=style)

    row("matrix units: FLOPs at the peak", found.compute_seconds, mfu=False)
    row("HBM: bytes at its speed", found.memory_seconds, mfu=False)
    row("network: collectives one by one", found.network_seconds, mfu=False)
    row("  of them not hidden behind operations", found.exposed, mfu=False)
    row("bound: the longest of the three", found.ideal)
    row("roofline: each operation's longest, and what is not hidden", found.roofline)
    if found.compiler_seconds != found.operation_seconds:
        row("estimate: the compiler's cycles, and what is not hidden", found.seconds, "bold")
    table.add_row("tokens a second and device", f"{tokens / found.seconds:,.0f}")
    if not found.all_known:
        table.add_row(Text("a loop's length is not known: it counts once", "yellow"))
    return table


def outcome(row: dict) -> str:
    """A compiled mesh in a few words."""
    if not row["mfu"]:
        return row["note"]
    return f"{binary(row['memory'])}, {seconds(row['seconds'])} a step"


def ranking_table(rows: Sequence[dict]) -> Table:
    """The meshes that were compiled, best first."""
    table = plain_table("mesh", "zero", "memory", "of HBM", "step", "MFU", "tokens/s/device", "")
    table.columns[-1].justify = "left"
    for row in rows:
        fine = row["fits"]
        table.add_row(
            row["mesh"],
            str(row["zero"]),
            binary(row["memory"]) if row["memory"] else "",
            f"{row['memory'] / row['limit']:.0%}" if row["memory"] else "",
            seconds(row["seconds"]) if row["mfu"] else "",
            f"{row['mfu']:.1%}" if row["mfu"] else "",
            f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else "",
            row["note"],
            style="" if fine else "dim",
        )
    return table


def advice_table(found: Sequence[Advice], limit: float, state: float) -> Table:
    """What to change, and what it is expected to bring.

    Args:
      found: the changes.
      limit: bytes of a device.
      state: bytes of all parameters and optimizer state, once.
    """
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
        least = math.ceil(state / limit)
        table.add_row(f"parameters and optimizer state alone would fill {least} of these devices")
    return table
