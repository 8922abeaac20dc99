"""What a training step must cost at least, on paper: before anything is compiled, and beside it.

Of one device, with the sizes of the mesh's axes t (tensor), c (context), e (expert), s (stage), n
(what ZeRO splits parameters over: fsdp · expert · context) and d (data); P parameters on it before
ZeRO, x bytes of the residual stream of its tokens in the compute dtype, g = (ways - 1) / ways:

    zero 3     gathers parameters for the forward and the backward pass, scatters gradients: 3·2P·g
    zero 1, 2  scatters gradients, gathers updated parameters: (2 + 4)·P·g; zero 0: as data
    data       reduces gradients: 2·2P/n·g
    tensor     gathers and scatters x twice a layer in each direction: 8·x·g a layer
    context    each key and value travels the ring in the forward pass, again in the backward pass,
               and their gradients once: 3·kv·(c - 1) a layer
    expert     tokens to their experts and back, in each direction: 4·k·x·g a layer
    stage      x to the next stage, its gradient back: 2·x·rounds

    HBM        bfloat16 weights read in both passes, the optimizer's update, and what the forward
               pass keeps written and read back
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import numpy as np

from lm.jobs.plan_programs import Workload
from lm.models import ModelConfig, costs, param_specs, skeleton
from lm.models.numerics import compute_dtype
from lm.parallel.collectives import Collective
from lm.parallel.mesh import BATCH_AXES, MeshConfig, mesh_sizes
from lm.parallel.pipeline import bubble_fraction, choose_microbatches
from lm.parallel.platform import compiling_for
from lm.parallel.roofline import Network
from lm.parallel.sharding import ZERO_AXES
from lm.parallel.topology import Topology
from lm.training import flops
from lm.training.optimizer import make_optimizer

MATRICES = 4  # of a layer, that are gathered at a time: of attention in and out, of the MLP
MATRIX_SHARE = 0.8  # of the peak, that large products reach by the compiler's own estimates


@dataclasses.dataclass(frozen=True)
class Paper:
    """A training step on one device, on paper. Bytes and FLOPs a step; times in seconds."""

    memory: float
    flops: float  # with what the remat policy recomputes
    bytes: float  # to and from HBM
    received: dict[str, float]  # bytes from other devices, by strategy
    compute_seconds: float
    memory_seconds: float
    network_seconds: dict[str, float]
    bubble: float  # share of the time that a pipeline is not full

    @property
    def busy(self) -> float:
        """Seconds a step if other devices answered at once."""
        return max(self.compute_seconds / MATRIX_SHARE, self.memory_seconds) / (1 - self.bubble)

    @property
    def seconds(self) -> float:
        """Seconds a step where nothing hides what devices say to each other."""
        return self.busy + sum(self.network_seconds.values())

    @property
    def hidden_seconds(self) -> float:
        """Seconds a step where what ZeRO and data parallelism say is hidden behind compute."""
        beside = sum(self.network_seconds.get(name, 0.0) for name in ("zero", "data"))
        return max(self.seconds - beside, beside)


def strategy_of(collective: Collective) -> str:
    """Which strategy of `Paper.received` a compiled collective serves."""
    axes = set(collective.axes)
    for axis in ("stage", "tensor", "data"):
        if axis in axes:
            return axis
    if "all-to-all" in collective.kind and "expert" in axes:
        return "expert"
    ring = collective.kind == "collective-permute" and not collective.part
    return "context" if ring and axes == {"context"} else "zero"


@functools.lru_cache(maxsize=8)
def _counted(model: ModelConfig):
    specs = param_specs(skeleton(model))
    routed = sum(s.size for s in specs.values() if "expert" in s.axes)
    table = sum(s.size for s in specs.values() if "layers" not in s.axes)
    return specs, sum(s.size for s in specs.values()), routed, table


@functools.lru_cache(maxsize=8)
def _state_bytes(workload: Workload) -> float:
    """Bytes of the optimizer's state for each parameter."""
    specs, total, *_ = _counted(workload.model)
    optimizer = make_optimizer(workload.optimizer, workload.train.steps, specs)
    shapes = {n: jax.ShapeDtypeStruct(s.shape, "float32") for n, s in specs.items()}
    leaves = jax.tree.leaves(jax.eval_shape(optimizer.init, shapes))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / total


def on_paper(
    workload: Workload, mesh_config: MeshConfig, zero: int, topology: Topology, grid=None
) -> Paper:
    """The training step on paper.

    Args:
      workload: what is trained.
      mesh_config: over the topology's devices.
      zero: ZeRO stage.
      topology: the devices.
      grid: their mesh (`make_mesh`), for where they are in the torus; neighbours unless given.
    """
    sizes = mesh_sizes(mesh_config, len(topology.devices))
    with compiling_for(topology.platform):
        return _on_paper(workload, mesh_config, sizes, zero, topology, grid)


def _on_paper(workload, mesh_config, sizes, zero, topology, grid) -> Paper:
    model, chip = workload.model, topology.chip
    _, total, routed, table = _counted(model)
    itemsize = compute_dtype(model.compute_dtype).itemsize
    tensor, context, stage = sizes["tensor"], sizes["context"], sizes["stage"]
    ways = math.prod(sizes[axis] for axis in ZERO_AXES)
    # Parameters on a device before ZeRO: tables are not split over stages.
    dense = ((total - routed - table) / stage + table) / tensor
    experts = routed / stage / tensor / sizes["expert"]
    split = (dense / ways + experts * sizes["expert"] / ways) if ways > 1 else dense + experts
    rows = workload.batch_size / math.prod(sizes[axis] for axis in BATCH_AXES)
    tokens = rows * workload.block_size / context  # a device, all micro-batches
    stream = tokens * model.width * itemsize * stage  # the rows of all stages pass through each
    layers = model.num_layers / stage

    received, gathered = {}, dense * itemsize + experts * itemsize
    if ways > 1:
        share = (ways - 1) / ways
        times = 3 * workload.train.accumulation if zero == 3 else 1 + 4 / itemsize
        received["zero"] = gathered * share * (times if zero else 2)
    if sizes["data"] > 1:
        share = (sizes["data"] - 1) / sizes["data"]
        received["data"] = 2 * itemsize * (split if zero >= 2 else dense + experts) * share
    if tensor > 1:
        received["tensor"] = 8 * layers * stream * (tensor - 1) / tensor
    if context > 1:
        pair = 2 * tokens * stage * model.kv_heads * model.head_width * itemsize
        received["context"] = 3 * layers * (context - 1) * pair / min(tensor, model.kv_heads)
    if sizes["expert"] > 1 and model.num_experts:
        share = (sizes["expert"] - 1) / sizes["expert"]
        received["expert"] = 4 * layers * model.experts_per_token * stream / tensor * share
    if stage > 1:
        received["stage"] = 2 * stream * mesh_config.rounds / tensor

    kept, once = _kept(model, workload.block_size, workload.source_length or None)
    here = tokens / workload.block_size * stage / workload.train.accumulation / tensor
    activations = here * (kept / stage * workload.train.accumulation + once)
    work = costs.training_flops_per_token(
        model, workload.block_size, workload.source_length or None
    )
    work *= workload.tokens / len(topology.devices)
    again = {"none": 0.0, "dots": 0.02, "projections": 0.22, "qkv": 0.25, "full": 1 / 3}
    work *= 1 + again[model.remat]
    optimizer = _state_bytes(workload)
    state = dense + experts if zero < 1 else split
    moved = 2 * workload.train.accumulation * gathered + state * (2 * 4 + 2 * optimizer + 4)
    moved += 2 * activations
    memory = (split if zero == 3 else dense + experts) * 4 + state * optimizer
    memory += (split if zero >= 2 else dense + experts) * 4  # gradients
    memory += here * (kept / stage + once) + 2 * gathered / max(1, layers)
    accumulation = workload.train.accumulation
    counts = {
        "zero": 3 * MATRICES * layers * accumulation,
        "data": MATRICES,
        "tensor": 8 * layers * accumulation,
        "context": 3 * (context - 1) * layers * accumulation,
        "expert": 4 * layers * accumulation,
        "stage": 2 * 4 * stage * mesh_config.rounds,
    }
    times = _times(received, counts, sizes, topology, grid)
    bubble = 0.0
    if stage > 1:
        others = math.prod(sizes[axis] for axis in BATCH_AXES if axis != "stage")
        rows_here = workload.batch_size // workload.train.accumulation
        count = choose_microbatches(mesh_config.microbatches, stage, rows_here, others)
        bubble = bubble_fraction(stage, count, mesh_config.rounds)
    return Paper(
        memory,
        work,
        moved,
        received,
        work / chip.sixteen_bit,
        moved / chip.bandwidth,
        times,
        bubble,
    )


@functools.lru_cache(maxsize=64)
def _kept(model: ModelConfig, length: int, source_length: int | None) -> tuple[float, float]:
    """Bytes of a row that the backward pass keeps of all layers, and of one that is recomputed."""
    if model.cell != "attention":
        return float(flops.kept_by_row(model, length, source_length or length)), 0.0
    item = compute_dtype(model.compute_dtype).itemsize
    heads = model.num_heads * model.head_width
    pairs = model.kv_heads * model.head_width
    hidden = model.feed_forward * (2 if model.gated else 1)
    if model.num_experts:
        hidden = model.experts_per_token * model.expert_feed_forward * 2
    layer = {
        "full": model.width,
        "qkv": model.width + heads + 2 * pairs,
        "projections": 2 * model.width + heads + 2 * pairs,
        "dots": 2 * model.width + 2 * heads + 2 * pairs + hidden,
        "none": 4 * model.width + 2 * heads + 2 * pairs + 2 * hidden,
    }
    whole = layer["none"]
    recomputed = 0.0 if model.remat == "none" else whole * item * length
    return float(model.num_layers * layer[model.remat] * item * length), recomputed


def _times(
    received: Mapping[str, float],
    counts: Mapping[str, float],
    sizes: Mapping[str, int],
    topology: Topology,
    grid,
) -> dict[str, float]:
    """Seconds of what each strategy receives, in so many collectives."""
    axes = {"zero": ZERO_AXES, "data": ("data",)}
    network = None if grid is None else Network.of(topology, grid)
    seconds = {}
    for name, size in received.items():
        along = axes.get(name, (name,))
        ways = math.prod(sizes[axis] for axis in along)
        kind = {"expert": "all-to-all", "context": "collective-permute"}.get(name, "all-gather")
        if name == "stage":
            kind = "collective-permute"
        if network is None:
            seconds[name] = size / (2 * topology.chip.link)
            continue
        numbers = np.arange(grid.devices.size).reshape(tuple(grid.shape.values()))
        index = tuple(slice(None) if axis in along else 0 for axis in grid.shape)
        group = tuple(int(n) for n in numbers[index].ravel())
        if kind == "collective-permute":
            one = Collective(kind, size / counts[name], ways, along, group=group[:2])
        else:
            whole = size * ways / (ways - 1) / counts[name]
            one = Collective(kind, whole, ways, along, group=group)
        seconds[name] = counts[name] * network.seconds(one)
    return seconds
