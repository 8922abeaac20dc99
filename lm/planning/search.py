"""Which meshes are worth compiling, in what order, and what to change where nothing fits."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

from jax.sharding import AbstractMesh

from lm.config import ConfigError
from lm.models import ModelConfig
from lm.models.config import REMAT
from lm.parallel.layout import Layout, lay_out
from lm.parallel.mesh import AXES, BATCH_AXES, MeshConfig, mesh_sizes
from lm.planning.programs import Program
from lm.planning.sketch import Sketch, sketch
from lm.planning.topology import Topology
from lm.training.workload import Workload

LEAST_TOKENS = 1024  # of a sequence on one device: shorter pieces wait for each other
REFINED = 24  # of the best sketches, how many are placed in the torus before choosing


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A workload over a mesh, and what that costs by its sketch."""

    mesh: MeshConfig
    workload: Workload
    sketch: Sketch


def over(workload: Workload, mesh: MeshConfig, zero: int, devices: int) -> Workload:
    """A workload over so many devices, wherever they are: enough for a `sketch`."""
    sizes = mesh_sizes(mesh, devices)
    abstract = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    layout = Layout(abstract, zero, mesh.microbatches, mesh.rounds, mesh.reduce_dtype)
    return dataclasses.replace(workload, layout=layout)


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def meshes(workload: Workload, devices: int) -> Iterator[MeshConfig]:
    """Every mesh over so many devices that the model and the batch divide into evenly.

    `tensor` divides heads, key/value heads or a multiple of them, and the MLP; `stage` the layers;
    `context` leaves each device `LEAST_TOKENS` tokens of a row or more; `expert` the experts.
    """
    model, block = workload.model, workload.block_size
    attention = model.cell == "attention"
    layers = model.num_layers - model.first_layers
    widths = (model.num_heads, model.feed_forward)
    widths += (model.expert_feed_forward,) if model.num_experts else ()

    def possible(tensor: int, stage: int, context: int, expert: int) -> bool:
        uneven = any(width % tensor for width in widths)
        grouped = model.kv_heads % tensor and tensor % model.kv_heads
        pipelined = attention and model.architecture == "decoder" and layers % stage == 0
        short = block % (2 * context) or block < LEAST_TOKENS * context
        return (
            (tensor == 1 or (attention and not uneven and not grouped))
            and (stage == 1 or pipelined)
            and (context == 1 or not short)
            and (expert == 1 or (model.num_experts > 0 and model.num_experts % expert == 0))
        )

    for tensor, stage, context, expert in itertools.product(divisors(devices), repeat=4):
        left, rest = divmod(devices, tensor * stage * context * expert)
        if rest or not possible(tensor, stage, context, expert):
            continue
        for data in divisors(left):
            mesh = MeshConfig(data, left // data, tensor, context, expert, stage)
            ways = math.prod(getattr(mesh, axis) for axis in BATCH_AXES)
            if workload.microbatch % ways == 0:
                yield mesh


def candidates(workload: Workload, topology: Topology, zero: int, count: int) -> list[Candidate]:
    """The most promising meshes, best by their sketches first, of which `count` differ in kind.

    What does not fit comes last, however fast. Of every set of axes that are used the best comes
    before the second best of any, so that a mistake of sketches is not compiled `count` times.

    Raises:
      ConfigError: no mesh divides the model and the batch.
    """
    devices = len(topology.devices)

    def drawn(mesh: MeshConfig, workload: Workload) -> Candidate:
        return Candidate(mesh, workload, sketch(workload, topology))

    every = []
    for mesh in meshes(workload, devices):
        try:
            every.append(drawn(mesh, over(workload, mesh, zero, devices)))
        except ConfigError:  # rows that no number of micro-batches divides
            continue
    if not every:
        raise ConfigError(
            f"config.search.meshes={count}: no mesh of {devices} devices divides a "
            f"batch of {workload.batch_size} rows and the model: give config.data.rows_per_device"
        )

    def order(candidate: Candidate) -> tuple[bool, float]:
        found = candidate.sketch
        too_large = found.memory > topology.chip.memory
        return too_large, found.memory if too_large else found.estimate.seconds

    best = sorted(every, key=order)
    seen: dict[tuple[str, ...], int] = {}

    def kind_first(candidate: Candidate) -> tuple[bool, int]:
        axes = tuple(axis for axis in AXES if getattr(candidate.mesh, axis) > 1)
        seen[axes] = seen.get(axes, -1) + 1
        return order(candidate)[0], seen[axes]

    placed = []
    for mesh in [c.mesh for c in sorted(best, key=kind_first)][: max(REFINED, count)]:
        layout = lay_out("", mesh, zero, topology.devices)
        placed.append(drawn(mesh, dataclasses.replace(workload, layout=layout)))
    return sorted(placed, key=order)[:count]


def naive_meshes(model: ModelConfig, devices: int) -> list[tuple[MeshConfig, int]]:
    """Meshes of someone in a hurry, with their ZeRO stages: the second is for when none else fits.

    Tensor parallel as wide as heads allow; the rest data parallel, or ZeRO 3.
    """
    fitting = [n for n in divisors(devices) if model.num_heads % n == 0]
    tensor = fitting[-1] if model.cell == "attention" else 1
    left = devices // tensor
    return [(MeshConfig(data=left, tensor=tensor), 0), (MeshConfig(fsdp=left, tensor=tensor), 3)]


# ---- What to change --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Advice:
    """A change of the config, and what it is expected to bring."""

    change: str
    memory: float  # bytes a device, after it
    seconds: float  # a step, after it, by its sketch
    fits: bool


def advice(workload: Workload, topology: Topology, program: Program) -> list[Advice]:
    """What would make a program fit, the fastest that does first, then what brings it closer.

    Of changes of one kind (the mesh, remat, accumulation, …) the best one.

    Memory is that of sketches, scaled so that the program as it is has what its compilation showed.
    """
    devices, layout = len(topology.devices), workload.layout
    given = MeshConfig(**layout.mesh.shape, microbatches=layout.microbatches, rounds=layout.rounds)
    now = sketch(over(workload, given, layout.zero, devices), topology)
    found: dict[str, list[Advice]] = {}
    for kind, change, changed in _changes(workload, given, devices):
        try:
            after = sketch(changed, topology)
        except ConfigError:
            continue
        if after.memory < 0.98 * now.memory:
            memory = after.memory * program.memory.total / now.memory
            fits = memory <= topology.chip.memory
            one = Advice(change, memory, after.estimate.seconds, fits)
            found.setdefault(kind, []).append(one)

    def order(one: Advice) -> tuple[bool, float]:
        return not one.fits, one.seconds if one.fits else one.memory

    return sorted((min(same, key=order) for same in found.values()), key=order)


def _changes(
    workload: Workload, mesh: MeshConfig, devices: int
) -> Iterator[tuple[str, str, Workload]]:
    """(kind, in words, the workload) of each change worth a thought."""
    model, train, zero = workload.model, workload.train, workload.layout.zero
    rows = workload.batch_size // math.prod(getattr(mesh, axis) for axis in BATCH_AXES)

    def of(section: str, **fields) -> tuple[str, str, Workload]:
        ((field, value),) = fields.items()
        changed = dataclasses.replace(getattr(workload, section), **fields)
        name = f"config.{section}.{field}"
        workload_then = dataclasses.replace(workload, **{section: changed})
        return name, f"{name}={value}", over(workload_then, mesh, zero, devices)

    if zero < 3:
        yield "zero", "config.zero=3", over(workload, mesh, 3, devices)
    for remat in REMAT[REMAT.index(model.remat) + 1 :]:  # from what keeps most
        yield of("model", remat=remat)
    for times in (2, 4, 8):
        if rows % (train.accumulation * times) == 0:
            yield of("train", accumulation=train.accumulation * times)
    if workload.optimizer.name == "adamw" and workload.optimizer.momentum_dtype == "float32":
        yield of("optimizer", momentum_dtype="bfloat16")
    possible = set(meshes(workload, devices))
    for axis, giver, ways in itertools.product(
        ("fsdp", "tensor", "context", "stage"), ("data", "fsdp", "tensor"), (2, 4, 8)
    ):
        if giver == axis or getattr(mesh, giver) % ways:
            continue
        moved = {giver: getattr(mesh, giver) // ways, axis: getattr(mesh, axis) * ways}
        plain = {axis: getattr(mesh, axis) for axis in AXES} | moved
        if MeshConfig(**plain) in possible:
            micro = mesh.microbatches if plain["stage"] > 1 else 0
            other = MeshConfig(**plain, microbatches=micro)
            split = 3 if axis == "fsdp" else zero
            used = [a for a in AXES if plain[a] != 1 or a == "data"]
            words = " ".join(f"config.mesh.{a}={plain[a]}" for a in used)
            words += " config.zero=3" if split != zero else ""
            kind = "zero" if split != zero else "mesh"
            yield kind, words, over(workload, other, split, devices)
    if workload.batch_size % 2 == 0 and rows > 1:
        half = dataclasses.replace(workload, batch_size=workload.batch_size // 2)
        words = f"config.data.batch_size={half.batch_size}"
        yield "data.batch_size", words, over(half, mesh, zero, devices)
