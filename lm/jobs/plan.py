"""Planning without hardware: does a run fit, and how fast will it be?

Compiles the training step that would run, and prefill and a step of decoding, for devices that this
machine has not got, and reads memory, FLOPs, traffic and time off the result.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import time
from typing import Annotated, Any

import jax
import ml_collections
from rich.console import Console

from lm.config import AboveZero, Bounds, ConfigError, Count, Size, SizeOrZero, check, to_dict, view
from lm.jobs.plan_scaling import ScalingConfig, weak_scaling
from lm.models import ModelConfig, costs
from lm.models.presets import Overrides, preset
from lm.objectives import ObjectiveConfig, check_objective
from lm.parallel.layout import lay_out, resolve
from lm.parallel.mesh import MeshConfig, describe, make_mesh, mesh_sizes
from lm.parallel.platform import compiling_for
from lm.planning import report as report
from lm.planning.analytic import on_paper, whole_state
from lm.planning.programs import Program, decode_programs, train_program
from lm.planning.search import advice, candidates, divisors, naive_meshes
from lm.planning.topology import Topology, open_topology
from lm.training.config import TrainConfig
from lm.training.optimizer import OptimizerConfig
from lm.training.report import model_line
from lm.training.workload import Workload

PIPED_WIDTH = 140  # columns where standard output is no terminal


@dataclasses.dataclass(frozen=True)
class PlannedData:
    """The shape of a batch; a plan needs no data."""

    block_size: SizeOrZero = 0  # tokens a sequence; 0: the model's context
    source_length: SizeOrZero = 0  # of an encoder-decoder's source; 0: as long as the block
    batch_size: SizeOrZero = 0  # sequences a step, over all devices; 0: rows_per_device on each
    rows_per_device: Size = 1  # where batch_size is 0: sequences for each device there is
    packed: bool = False  # rows hold several documents, with segments and positions


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """Inference with the same model on the same devices."""

    enabled: bool = False  # compile prefill and a decoding step too
    batch_size: SizeOrZero = 0  # rows, over all devices; 0: 8 for each share of the mesh
    prompt_length: Size = 1024  # tokens read at once by prefill
    cache_length: SizeOrZero = 0  # tokens the cache has room for; 0: data.block_size
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)  # as it is: chosen


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """Trying several meshes."""

    meshes: Count = 0  # how many of the most promising to compile and rank; 0: config.mesh alone
    seconds: AboveZero = 420.0  # no further mesh is begun after this long
    naive: bool = True  # compile a deliberately naive one beside them


@dataclasses.dataclass(frozen=True)
class PlanJob:
    """What would run, and on what."""

    job: str = "plan"
    preset: str = ""  # a name of `lm.models.presets`; "": `model` says everything
    model: Overrides = dataclasses.field(default_factory=Overrides)  # what is not as it says
    topology: str = "v5p:4x4x4"  # v4, v5e, v5p, v6e or tpu7x and its shape; cpu:8: fake devices
    slices: Size = 1  # so many of them, connected by the data centre's network
    data: PlannedData = dataclasses.field(default_factory=PlannedData)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    strategy: str = ""  # as in training
    zero: Annotated[int, Bounds(-1, 3)] = -1  # as in training
    search: SearchConfig = dataclasses.field(default_factory=SearchConfig)
    decode: DecodePlan = dataclasses.field(default_factory=DecodePlan)
    scaling: ScalingConfig = dataclasses.field(default_factory=ScalingConfig)


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
    """Prints the plan, and writes it to `workdir`/plan.json.

    Returns:
      What the file holds.

    Raises:
      ConfigError: an unknown topology, model or field; sizes that do not divide; libtpu is missing.
    """
    job = view(PlanJob, config)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPED_WIDTH)
    if job.scaling.presets:
        result = weak_scaling(job.scaling, job.optimizer, job.train, console)
        return _written(result, workdir, console)
    topology = open_topology(job.topology, job.slices)
    workload = _workload(job, topology)
    mesh_config, zero = resolve(job.strategy, job.mesh, job.zero)
    result: dict[str, Any] = {"config": to_dict(job), "topology": topology.name}
    if job.search.meshes:
        ranked, best = _search(job, workload, mesh_config, zero, topology, console)
        result["ranking"] = ranked
        mesh_config, program = best
    else:
        _introduce(job, workload, mesh_config, zero, topology, console)
        layout = lay_out("", mesh_config, zero, topology.devices)
        program = train_program(workload, layout, topology)
    result["training"] = _show_training(workload, mesh_config, zero, topology, program, console)
    if job.decode.enabled:
        result["decoding"] = _decode(job, workload, topology, console)
    return _written(result, workdir, console)


def _written(result: dict[str, Any], workdir: str, console: Console) -> dict[str, Any]:
    directory = pathlib.Path(workdir)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "plan.json"
    path.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    console.print(f"\nwritten to {path}", style="dim")
    return result


def _workload(job: PlanJob, topology: Topology) -> Workload:
    fields = {name: value for name, value in vars(job.model).items() if value is not None}
    if job.preset:
        model = preset(job.preset, **fields)
    else:
        model = view(ModelConfig, fields, "config.model")
    check(
        model.vocab_size > 0,
        "config.model.vocab_size=0 must be positive: a plan has no tokenizer to ask; or name a "
        "config.preset",
    )
    block = job.data.block_size or model.max_length
    check(block > 0, "config.data.block_size=0 must be positive where model.max_length is 0")
    both = model.architecture == "encoder_decoder"
    source = (job.data.source_length or block) if both else 0
    check(
        not model.max_length or model.positions != "learned" or block <= model.max_length,
        f"config.data.block_size={block} is longer than config.model.max_length={model.max_length}",
    )
    model = dataclasses.replace(model, max_length=max(model.max_length, block, source))
    check_objective(job.objective, model, "config")
    rows = job.data.batch_size or job.data.rows_per_device * len(topology.devices)
    return Workload(
        model, block, rows, source, job.data.packed, job.objective, job.optimizer, job.train
    )


def _introduce(job: PlanJob, workload: Workload, mesh, zero, topology, console) -> None:
    with compiling_for(topology.platform):
        line = model_line(workload.model)
    name = f"{job.preset}: " if job.preset else ""
    text = (
        f"{workload.batch_size:,} × {workload.block_size:,} tokens a step"
        + (f" in {job.train.accumulation} parts" if job.train.accumulation > 1 else "")
        + f", {workload.optimizer.name}, remat {workload.model.remat}"
    )
    words = "searched for" if mesh is None else _words(mesh, topology)
    report.header(console, topology, name + line, text, f"{words}, zero {zero}")


def _words(mesh_config: MeshConfig, topology: Topology) -> str:
    words = describe(make_mesh(mesh_config, topology.devices))
    if mesh_config.stage != 1 and mesh_config.rounds > 1:
        words += f" × {mesh_config.rounds} rounds"
    return words


def model_flops(workload: Workload, topology: Topology) -> float:
    """FLOPs a step of one device's share, as every MFU of this project counts them."""
    each = costs.training_flops_per_token(
        workload.model, workload.block_size, workload.source_length or None
    )
    return each * workload.tokens / len(topology.devices)


def _show_training(workload, mesh_config, zero, topology, program: Program, console) -> dict:
    """Prints all there is to say of a training step, and returns it."""
    grid = make_mesh(mesh_config, topology.devices)
    least = on_paper(workload, mesh_config, zero, topology, grid)
    flops = model_flops(workload, topology)
    title = f"{program.name}, {describe(grid)}, zero {zero}: {report.LABEL}"
    console.rule(title, align="left")
    tokens = workload.tokens / len(topology.devices)
    _show(program, flops, tokens, least.bytes, least.received, console)
    if not program.fits:
        changes = advice(workload, mesh_config, zero, topology, program)
        console.print()
        state = whole_state(workload)
        console.print(report.advice_table(changes, topology.chip.memory, state))
    return _facts(program, flops, tokens) | {
        "mesh": describe(grid),
        "zero": zero,
        "fits": program.fits,
        "least": {
            "flops": least.flops,
            "bytes": least.bytes,
            "received": least.received,
            "memory": least.memory,
        },
    }


def _show(
    program: Program,
    flops: float,
    tokens: float,
    least_bytes: float,
    least_received: dict[str, float],
    console: Console,
) -> None:
    console.print(report.memory_table(program.memory, program.estimate is not None))
    if program.estimate is not None:
        for table in (
            report.work_table(program, flops, least_bytes, least_received),
            report.collectives_table(program.estimate),
            report.time_table(program.estimate, flops, tokens),
        ):
            console.print()
            console.print(table)
        once = program.compiler_flops
        console.print(
            f"compiled in {program.compile_seconds:.0f} s; the compiler's own analysis counts loop "
            f"bodies once, {report.si(once)}FLOPs, and some memory twice, "
            f"{report.si(program.compiler_temporaries)}B of temporaries",
            style="dim",
        )


def _facts(program: Program, flops: float, tokens: float) -> dict[str, Any]:
    """A program in numbers, for plan.json."""
    facts = {"memory": dataclasses.asdict(program.memory) | {"total": program.memory.total}}
    facts["compiler_temporaries"] = program.compiler_temporaries
    found = program.estimate
    if found is None:
        return facts
    names = ("flops", "bytes", "communicated", "ideal", "roofline", "seconds", "exposed")
    facts |= {name: getattr(found, name) for name in names}
    facts["terms"] = {
        "compute": found.compute_seconds,
        "memory": found.memory_seconds,
        "network": found.network_seconds,
        "compiler": found.compiler_seconds,
    }
    facts["collectives"] = [
        {"kind": c.kind, "axes": c.along, "times": c.trips, "bytes": c.bytes, "received": c.total}
        for c in report.summed(found.collectives)
    ]
    facts["model_flops"] = flops
    facts["mfu"] = flops / found.seconds / found.chip.sixteen_bit
    facts["tokens_per_second"] = tokens / found.seconds
    return facts


# ---- Ranking ---------------------------------------------------------------------------------


def _search(job: PlanJob, workload: Workload, given: MeshConfig, zero: int, topology, console):
    """Compiles the most promising meshes and the `given` one; their table's rows, and the best."""
    start = time.perf_counter()
    _introduce(job, workload, None, zero, topology, console)
    found = [(c.mesh, zero, "") for c in candidates(workload, topology, zero, job.search.meshes)]
    count = len(topology.devices)
    if all(mesh_sizes(given, count) != mesh_sizes(mesh, count) for mesh, *_ in found):
        found.append((given, zero, "as configured"))
    if job.search.naive:
        naive = naive_meshes(workload.model, count)
        found += [(*mesh_and_zero, "naive") for mesh_and_zero in naive]
    rows, programs, left_out = [], [], 0
    for mesh_config, stage, note in found:
        if note and any(row["note"] == note and row["fits"] for row in rows):
            continue
        late = time.perf_counter() - start > job.search.seconds
        if late and rows and not note:
            left_out += 1
            continue
        words = _words(mesh_config, topology)
        with console.status(f"compiling {words}"):
            row, program = _ranked(workload, mesh_config, stage, topology, words, note)
        took = f"{time.perf_counter() - start:.0f} s"
        said = "" if program is None else ": " + report.outcome(row)
        console.print(f"{took}: {words}, zero {stage}{said}", style="dim")
        rows.append(row)
        programs.append((mesh_config, program))
    if left_out:
        console.print(f"{left_out} meshes left out after {job.search.seconds:.0f} s")
    order = sorted(range(len(rows)), key=lambda i: (not rows[i]["fits"], rows[i]["seconds"]))
    best = next((i for i in order if rows[i]["zero"] == zero and programs[i][1]), order[0])
    check(
        programs[best][1] is not None,
        f"config.search.meshes={job.search.meshes}: none compiled: {rows[best]['note']}",
    )
    console.rule(f"meshes: {report.LABEL}", align="left")
    console.print(report.ranking_table([rows[i] for i in order]))
    console.print()
    return [rows[i] for i in order], programs[best]


def _ranked(workload, mesh_config, zero, topology, words, note):
    row = dict(
        mesh=words, zero=zero, fits=False, memory=0.0, limit=topology.chip.memory,
        seconds=math.inf, mfu=0.0, tokens_per_second=0.0, note=note,
    )  # fmt: skip
    try:
        layout = lay_out("", mesh_config, zero, topology.devices)
        program = train_program(workload, layout, topology)
    except (ConfigError, jax.errors.JaxRuntimeError, ValueError) as error:
        return row | {"note": str(error).split("\n")[0][:60]}, None
    tokens = workload.tokens / len(topology.devices)
    facts = _facts(program, model_flops(workload, topology), tokens)
    row |= {"fits": program.fits, "memory": program.memory.total}
    row |= {k: facts[k] for k in ("seconds", "mfu", "tokens_per_second") if k in facts}
    if not program.fits:
        row["note"] = ", ".join(filter(None, (note, "does not fit")))
    return row, program


# ---- Decoding --------------------------------------------------------------------------------


def _decode(job: PlanJob, workload: Workload, topology: Topology, console: Console) -> dict:
    """Prefill, and a token more of every row."""
    model, plan = workload.model, job.decode
    check(
        model.architecture == "decoder" and model.cell == "attention",
        f"config.decode.enabled=True is for decoders, not {model.architecture!r} of "
        f"{model.cell!r} cells",
    )
    mesh_config = plan.mesh
    if mesh_config == MeshConfig():
        mesh_config = decode_mesh(model, topology)
    mesh = make_mesh(mesh_config, topology.devices)
    shares = mesh.size // mesh.shape["tensor"] // mesh.shape["context"]
    rows = plan.batch_size or 8 * shares
    length = plan.cache_length or workload.block_size
    check(
        plan.prompt_length <= length,
        f"config.decode.prompt_length={plan.prompt_length} is longer than the cache's {length}",
    )
    found = decode_programs(model, mesh_config, topology, rows, plan.prompt_length, length)
    results = {"mesh": describe(mesh), "rows": rows, "cache_length": length}
    for program in found:
        prefill = program.name == "prefill"
        tokens = rows * (plan.prompt_length if prefill else 1) / mesh.size
        each = (
            costs.prefill_flops_per_token(model, plan.prompt_length)
            if prefill
            else costs.decode_flops_per_token(model, length)
        )
        context = f"{plan.prompt_length:,} tokens" if prefill else f"a cache of {length:,}"
        console.print()
        console.rule(
            f"{program.name}, {describe(mesh)}: {rows} rows, {context}: {report.LABEL}",
            align="left",
        )
        least = (
            program.memory.parameters
            + costs.cache_bytes(model, plan.prompt_length if prefill else length, "bfloat16")
            * rows
            / mesh.size
        )
        _show(program, each * tokens, tokens, least, {}, console)
        results[program.name] = _facts(program, each * tokens, tokens)
    return results


def decode_mesh(model: ModelConfig, topology: Topology) -> MeshConfig:
    """Tensor parallel over as few devices as hold the weights twice over, the rest data."""
    devices = len(topology.devices)
    weights = 2 * costs.parameters(model).total
    fitting = [n for n in divisors(devices) if model.num_heads % n == 0]
    enough = [n for n in fitting if weights / n < topology.chip.memory / 2]
    tensor = enough[0] if enough else fitting[-1]
    grouped = [n for n in fitting if n >= tensor and model.kv_heads % n == 0]
    tensor = grouped[0] if grouped else tensor
    return MeshConfig(data=devices // tensor, tensor=tensor)
