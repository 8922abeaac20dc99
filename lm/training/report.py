"""What a run is about to do: devices, mesh, parameters, FLOPs and memory, printed at the start."""

from __future__ import annotations

import math
import pathlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lm.config import ConfigError
from lm.data import BatchIterator
from lm.data.conversation_rows import Conversations
from lm.models import ModelConfig, count, param_specs
from lm.models.huggingface.families import family_for
from lm.models.matmul import compute_dtype
from lm.parallel.chips import peak_flops
from lm.parallel.layout import Layout
from lm.parallel.mesh import describe
from lm.parallel.platform import device_memory
from lm.parallel.reduce import axes_of
from lm.parallel.sharding import ParamSpec, parameter_shardings
from lm.tokenizers import Tokenizer
from lm.tokenizers.export import huggingface_files
from lm.training.memory import expected_memory
from lm.training.schedules import make_schedule, warmup_of
from lm.training.setup import Training
from lm.training.workload import Workload

WIDE = 100  # columns from which the table names the logical axes too


def describe_run(console: Console, training: Training) -> None:
    """Prints the start-up report, in tables that fit the console's width."""
    workload, specs = training.workload, training.specs
    model, layout, mesh = workload.model, workload.layout, workload.layout.mesh
    steps = workload.train.steps
    dtype = compute_dtype(model.compute_dtype)
    peak = peak_flops(mesh.devices.flat[0], dtype)
    seconds = workload.flops_per_token * workload.tokens / (peak.flops * mesh.size)

    asked, warmup = workload.optimizer.warmup_steps, warmup_of(workload.optimizer, steps)
    if warmup != asked:
        console.print(
            f"optimizer.warmup_steps={asked} is more than the run's {steps} steps: cut to a tenth "
            f"of them, {warmup}",
            soft_wrap=True,
        )
    facts = facts_table()
    facts.add_row("devices", _devices(mesh))
    facts.add_row("mesh", describe(mesh) + (f", ZeRO {layout.zero}" if mesh.size > 1 else ""))
    if pipeline := layout.pipeline(workload.microbatch):
        facts.add_row("pipeline", _pipeline(layout, *pipeline))
    facts.add_row("model", f"{model_line(model)}, computed in {dtype.name}")
    if workload.adapter.kind != "none":
        facts.add_row("adapters", _adapters(training))
    console.print(facts)
    console.print(parameters_table(specs, console.width, mesh))
    facts = facts_table()
    facts.add_row(
        "compute",
        f"{si(workload.flops_per_token)}FLOPs a token × {workload.tokens:,} tokens a step",
    )
    facts.add_row(
        "peak",
        f"{si(peak.flops * mesh.size)}FLOPs a second in {dtype.name} ({peak.source}): "
        f"at best {_seconds(seconds)} a step",
    )
    facts.add_row("memory", _memory(expected_memory(workload), mesh))
    console.print(facts)


def _pipeline(layout: Layout, microbatches: int, bubble: float) -> str:
    stages, rounds = layout.mesh.shape["stage"], layout.rounds
    times = f"{rounds}·" if rounds > 1 else ""
    return (
        f"{microbatches} micro-batches through {stages} stages"
        + (f", {rounds} times" if rounds > 1 else "")
        + f": idle for {bubble:.1%} = (S - 1)/({times}M + S - 1)"
    )


def _adapters(training: Training) -> str:
    adapter, trained = training.workload.adapter, count(training.specs)
    model = param_specs(training.model).items()
    frozen = count({name: spec for name, spec in model if name not in training.specs})
    base = jax.tree.leaves(training.frozen["base"])
    takes = binary(sum(leaf.size * leaf.dtype.itemsize for leaf in base))
    return (
        f"{adapter.kind} of rank {adapter.rank}: {trained:,} parameters are trained, beside "
        f"{frozen:,} frozen ones ({adapter.base}: {takes})"
    )


def _devices(mesh) -> str:
    kinds = Counter((device.device_kind, device.platform) for device in mesh.devices.flat)
    names = [
        f"{number} × {kind}" + (f" ({platform})" if platform.lower() not in kind.lower() else "")
        for (kind, platform), number in kinds.items()
    ]
    processes = jax.process_count()
    return f"{', '.join(names)} in {processes} process{'es' if processes > 1 else ''}"


def describe_data(console: Console, batches: BatchIterator) -> None:
    """Prints how much there is to train on."""
    tokens = sum(corpus.num_tokens for corpus in batches.corpora)
    learned = [c.learned for c in batches.corpora if isinstance(c, Conversations)]
    share = f", {sum(map(np.sum, learned)):,} of them to learn" if learned else ""
    notes = "".join(f"; {note}" for note in batches.notes)
    console.print(
        f"data: {tokens:,} training tokens{share}, {batches.batches_per_epoch:,} steps an epoch, "
        f"{batches.padding_fraction:.1%} padding{notes}",
        soft_wrap=True,
    )


def why_not_convertible(model: ModelConfig, tokenizer: Tokenizer) -> list[str]:
    """What keeps the model from being converted to a Hugging Face directory, if anything does."""
    try:
        family_for(model)
        huggingface_files(tokenizer)
        return []
    except ConfigError as error:
        return [f"this model will not convert to Hugging Face: {error}"]


def resuming(
    workload: Workload, start: int, saved: dict[str, Any] | None, directory: pathlib.Path
) -> str:
    """What to say of a run in `directory` that has `start` steps behind it.

    That its learning rate jumps, too, where it set out, as its `saved` config says, for another
    number of steps.
    """
    steps = workload.train.steps
    if start >= steps:
        return (
            f"finished: {start} of {steps} steps are done; with a larger config.train.steps it "
            "goes on"
        )
    line = f"resuming at step {start} of {steps}"
    planned = (saved or {}).get("train", {}).get("steps", steps)
    if planned == steps:
        return line
    was, now = (float(make_schedule(workload.optimizer, n)(start)) for n in (planned, steps))
    if math.isclose(was, now, rel_tol=1e-3):
        return line
    return (
        f"{line}\nnote: the learning rate goes from {was:.3g} to {now:.3g} here, for its schedule "
        f"now spans {steps} steps, not {planned}; one that warms up anew starts with "
        f"--config.init_from={directory} and another --workdir"
    )


def facts_table() -> Table:
    """An empty table of names and what is to say of each."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    return table


def model_line(config: ModelConfig) -> str:
    """A model's architecture in a line or two."""
    layers = f"{config.num_layers} layers"
    if config.architecture == "encoder_decoder":
        layers = f"{config.encoder_layers} + {layers}"
    kind = config.architecture.replace("_", "-")
    head = "tied head" if config.tie_embeddings else "untied head"
    head = head if config.has_output_head else "no output head"
    if config.classifier != "none":
        labels = f"a classifier of {config.num_labels} label{'s' * (config.num_labels > 1)}"
        head = f"{head} and {labels}" if config.has_output_head else labels
    if config.cell != "attention":
        looks = ", additive attention" if kind != "decoder" and config.cross_attention else ""
        return f"{config.cell} {kind} of {layers}, width {config.width}{looks}, {head}"
    heads = f"{config.num_heads} heads"
    if config.kv_heads != config.num_heads:
        heads += f" over {config.kv_heads}"
    latent = f" over a latent of {config.kv_rank:,}" if config.kv_rank else ""
    hidden = f"{config.activation} {config.feed_forward:,}" if config.feed_forward else "no MLP"
    if config.num_experts:
        shared = f" + {config.shared_experts}" if config.shared_experts else ""
        hidden = (
            f"{config.experts_per_token} of {config.num_experts}{shared} experts of "
            f"{config.activation} {config.expert_feed_forward:,}"
        )
    sinks = " with sinks" if config.attention_sinks else ""
    width = f"width {config.width}"
    if config.table_width != config.width:
        width += f" (embeddings of {config.table_width})"
    norm = "no norms" if config.norm == "none" else f"{config.norm_position}-{config.norm}"
    local = sum(config.is_local(layer) for layer in range(config.num_layers))
    slowed = "" if config.rotary_scaling == "none" else f" ({config.rotary_scaling})"
    sides = " to either side" if config.architecture == "encoder" else ""
    window = f", {local} layers with a window of {config.window:,}{sides}" if local else ""
    rotated = sum(config.layer_kind(layer).rotated for layer in range(config.num_layers))
    some = f" in {rotated} layers" if rotated < config.num_layers else ""
    return (
        f"{kind} of {layers}, {width}, {heads} of {config.head_width}{latent}{sinks}"
        f"{window}, {hidden}, {'parallel ' if config.parallel else ''}{norm}, "
        f"{config.positions} positions{slowed}{some}, {head}"
    )


def parameters_table(
    specs: Mapping[str, ParamSpec], width: int, mesh: jax.sharding.Mesh | None = None
) -> Table:
    """Every parameter and their total, to be printed `width` columns wide.

    Name, shape (768/fsdp: split over that axis of `mesh`), logical axes where there is room,
    count, and bytes in float32.
    """
    shardings = parameter_shardings(specs, mesh) if mesh is not None else {}
    wide = width >= WIDE
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold cyan", show_edge=False)
    table.add_column("parameter", no_wrap=True)
    table.add_column("shape", no_wrap=wide, overflow="fold")
    if wide:
        table.add_column("axes", style="dim", no_wrap=True)
    table.add_column("count", justify="right", no_wrap=True, min_width=len(f"{count(specs):,}"))
    table.add_column("bytes", justify="right", no_wrap=True, min_width=len("1023.9 MiB") - 1)
    for name, spec in specs.items():
        entries = [axes_of(entry) for entry in shardings[name].spec] if shardings else []
        entries += [()] * (len(spec.shape) - len(entries))
        shape = Text(" × " if wide else "×").join(
            Text.assemble(str(size), ("/" + "·".join(axes), "yellow") if axes else "")
            for size, axes in zip(spec.shape, entries)
        )
        axes = [" ".join(axis or "–" for axis in spec.axes)] if wide else []
        table.add_row(name, shape, *axes, f"{spec.size:,}", binary(4 * spec.size))
    total = (f"{count(specs):,}", binary(4 * count(specs)))
    table.add_row("total", *[""] * (1 + wide), *total, style="bold")
    return table


def _memory(memory: Mapping[str, int], mesh) -> Text:
    total, each = sum(memory.values()), " on each device" if mesh.size > 1 else ""
    parts = " + ".join(f"{binary(size)} {kind}" for kind, size in memory.items())
    text = Text(f"about {binary(total)}{each}: {parts}")
    limit = device_memory()
    if limit and total > limit:
        text.append(
            f"\nmore than the {binary(limit)} available: lower data.batch_size, or raise "
            "train.accumulation, model.remat or mesh.fsdp",
            style="bold red",
        )
    return text


def binary(size: float) -> str:
    """Bytes as text: `512 B`, `1.5 KiB`, `474.7 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1023.95:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def si(value: float) -> str:
    """A number with its decimal prefix, to put before a unit: `2.4 M`."""
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * scale:
            return f"{value / scale:.3g} {prefix}"
    return f"{value:.3g} "


def _seconds(value: float) -> str:
    if value >= 100:
        return f"{value:.0f} s"
    return f"{value:.2g} s" if value >= 1 else f"{1000 * value:.2g} ms"
