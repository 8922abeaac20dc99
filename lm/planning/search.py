"""Which meshes are worth compiling, in what order, and what to change where nothing fits."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

from lm.config import ConfigError
from lm.models import ModelConfig
from lm.models.config import REMAT
from lm.parallel.layout import Layout, lay_out
from lm.parallel.mesh import AXES, BATCH_AXES, MeshConfig, make_mesh, mesh_sizes
from lm.planning.analytic import Paper, on_paper
from lm.planning.programs import Program
from lm.planning.topology import Topology
from lm.training.workload import Workload

LEAST_TOKENS = 1024  # of a sequence on one device: shorter pieces wait for each other
REFINED = 24  # of the best on paper, how many are placed in the torus before choosing


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh, and what it costs on paper."""

    mesh: MeshConfig
    zero: int
    paper: Paper

    def layout(self, topology: Topology) -> Layout:
        """It, over the topology's devices."""
        return lay_out("", self.mesh, self.zero, topology.devices)


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def meshes(workload: Workload, devices: int) -> Iterator[MeshConfig]:
    """Every mesh over so many devices that the model and the batch divide into evenly.

    `tensor` divides heads, key/value heads or a multiple of them, and the MLP; `stage` the layers;
    `context` leaves each device `LEAST_TOKENS` tokens of a row or more; `expert` the experts.
    """
    model, rows = workload.model, workload.batch_size // workload.train.accumulation
    attention = model.cell == "attention"
    for tensor in divisors(devices):
        widths = (model.num_heads, model.expert_feed_forward if model.num_experts else 0)
        uneven = any(width % tensor for width in (*widths, model.feed_forward))
        grouped = model.kv_heads % tensor and tensor % model.kv_heads
        if tensor > 1 and (uneven or grouped or not attention):
            continue
        for stage in divisors(devices // tensor):
            layers = model.num_layers - model.dense_layers
            pipelined = attention and model.architecture == "decoder" and layers % stage == 0
            if stage > 1 and not pipelined:
                continue
            for context in divisors(devices // tensor // stage):
                block = workload.block_size
                if context > 1 and (block % (2 * context) or block < LEAST_TOKENS * context):
                    continue
                left = devices // tensor // stage // context
                experts = divisors(math.gcd(left, model.num_experts)) if model.num_experts else [1]
                for expert, data in itertools.product(experts, divisors(left)):
                    if left // expert % data:
                        continue
                    sizes = dict(
                        data=data,
                        fsdp=left // expert // data,
                        tensor=tensor,
                        context=context,
                        expert=expert,
                        stage=stage,
                    )
                    if rows % math.prod(sizes[axis] for axis in BATCH_AXES) == 0:
                        yield MeshConfig(**sizes)


def candidates(workload: Workload, topology: Topology, zero: int, count: int) -> list[Candidate]:
    """The most promising meshes, best on paper first, of which `count` are different in kind.

    What does not fit on paper comes last, however fast. Of every set of axes that are used the best
    comes before the second best of any, so that a mistake on paper is not compiled `count` times.

    Raises:
      ConfigError: no mesh divides the model and the batch.
    """
    every = []
    for mesh in meshes(workload, len(topology.devices)):
        try:
            every.append(Candidate(mesh, zero, on_paper(workload, mesh, zero, topology)))
        except ConfigError:  # rows that no number of micro-batches divides
            continue
    if not every:
        raise ConfigError(
            f"config.search.meshes={count}: no mesh of {len(topology.devices)} devices divides a "
            f"batch of {workload.batch_size} rows and the model: give config.data.rows_per_device"
        )

    def order(candidate: Candidate):
        paper = candidate.paper
        too_large = paper.memory > topology.chip.memory
        return too_large, paper.memory if too_large else paper.seconds

    best = sorted(every, key=order)
    seen: dict[tuple[str, ...], int] = {}

    def kind_first(candidate: Candidate):
        axes = tuple(axis for axis in AXES if getattr(candidate.mesh, axis) > 1)
        seen[axes] = seen.get(axes, -1) + 1
        return candidate.paper.memory > topology.chip.memory, seen[axes]

    ranked = sorted(best, key=kind_first)[: max(REFINED, count)]
    placed = []
    for candidate in ranked:
        grid = make_mesh(candidate.mesh, topology.devices)
        paper = on_paper(workload, candidate.mesh, zero, topology, grid)
        placed.append(dataclasses.replace(candidate, paper=paper))
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
    seconds: float  # a step, after it, by the same measure as `Paper.seconds`
    fits: bool

    @property
    def kind(self) -> str:
        """Which part of the config it changes: `mesh`, `model.remat`."""
        if self.change.endswith("config.zero=3"):
            return "zero"
        field = self.change.split("=")[0].removeprefix("config.")
        return "mesh" if field.startswith("mesh.") else field


def advice(
    workload: Workload, mesh: MeshConfig, zero: int, topology: Topology, program: Program
) -> list[Advice]:
    """What would make a program fit, the fastest that does first, then what brings it closer.

    Of changes of one kind (the mesh, remat, accumulation, …) the best one.

    Memory is that on paper, scaled so that the program as it is has what its compilation showed.
    """
    now = on_paper(workload, mesh, zero, topology)
    scale = program.memory.total / now.memory
    found = []
    for change, other, other_mesh, other_zero in _changes(workload, mesh, zero, topology):
        try:
            paper = on_paper(other, other_mesh, other_zero, topology)
        except ConfigError:
            continue
        if paper.memory < 0.98 * now.memory:
            memory = scale * paper.memory
            fits = memory <= topology.chip.memory
            found.append(Advice(change, memory, paper.seconds, fits))
    found.sort(key=lambda a: (not a.fits, a.seconds if a.fits else a.memory))
    best: dict[str, Advice] = {}
    for one in found:
        best.setdefault(one.kind, one)
    return list(best.values())


def _changes(workload: Workload, mesh: MeshConfig, zero: int, topology: Topology):
    """(in words, workload, mesh, zero) of each change worth a thought."""
    model, train = workload.model, workload.train
    if zero < 3:
        yield "config.zero=3", workload, mesh, 3
    for remat in REMAT[REMAT.index(model.remat) + 1 :]:  # from what keeps most
        changed = dataclasses.replace(model, remat=remat)
        yield (
            f"config.model.remat={remat}",
            dataclasses.replace(workload, model=changed),
            mesh,
            zero,
        )
    sizes = mesh_sizes(mesh, len(topology.devices))
    rows = workload.batch_size // math.prod(sizes[axis] for axis in BATCH_AXES)
    for times in (2, 4, 8):
        if rows % (train.accumulation * times) == 0:
            changed = dataclasses.replace(train, accumulation=train.accumulation * times)
            yield (
                f"config.train.accumulation={changed.accumulation}",
                dataclasses.replace(workload, train=changed),
                mesh,
                zero,
            )
    if workload.optimizer.name == "adamw" and workload.optimizer.momentum_dtype == "float32":
        changed = dataclasses.replace(workload.optimizer, momentum_dtype="bfloat16")
        yield (
            "config.optimizer.momentum_dtype=bfloat16",
            dataclasses.replace(workload, optimizer=changed),
            mesh,
            zero,
        )
    possible = set(meshes(workload, len(topology.devices)))
    for axis in ("fsdp", "tensor", "context", "stage"):
        for giver in ("data", "fsdp", "tensor"):
            for ways in (2, 4, 8):
                if giver == axis or sizes[giver] % ways:
                    continue
                moved = {**sizes, giver: sizes[giver] // ways, axis: sizes[axis] * ways}
                other = MeshConfig(
                    **moved, microbatches=mesh.microbatches if moved["stage"] > 1 else 0
                )
                if other in possible:
                    split = 3 if axis == "fsdp" else zero
                    words = _mesh_words(other) + (" config.zero=3" if split != zero else "")
                    yield words, workload, other, split
    if workload.batch_size % 2 == 0 and rows > 1:
        yield (
            f"config.data.batch_size={workload.batch_size // 2}",
            dataclasses.replace(workload, batch_size=workload.batch_size // 2),
            mesh,
            zero,
        )


def _mesh_words(mesh: MeshConfig) -> str:
    return " ".join(f"config.mesh.{axis}={getattr(mesh, axis)}" for axis in _used(mesh))


def _used(mesh: MeshConfig) -> list[str]:
    return [axis for axis in AXES if getattr(mesh, axis) != 1 or axis == "data"]
