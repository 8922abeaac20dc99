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

These are the least bytes. Times are of the collectives that the compiler makes of them
(`lm.planning.collectives.made`), of which some move more.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping

import jax
import numpy as np

from lm.models import ModelConfig, costs, param_specs, skeleton
from lm.models.matmul import compute_dtype
from lm.parallel import compiler
from lm.parallel.mesh import BATCH_AXES, MeshConfig, mesh_sizes
from lm.parallel.pipeline import bubble_fraction, choose_microbatches
from lm.parallel.platform import compiling_for
from lm.parallel.sharding import ZERO_AXES
from lm.planning.collectives import Collective, made
from lm.planning.roofline import Network
from lm.planning.topology import Topology
from lm.training.memory import kept_by_row
from lm.training.optimizer import make_optimizer
from lm.training.workload import Workload

MATRICES = 4  # of a layer, that are gathered at a time: of attention in and out, of the MLP
# Of the peak, that products reach by the compiler's own estimates: with the usual tiles, and with
# those of a chip whose programs may use more VMEM.
MATRIX_SHARE, MATRIX_SHARE_LARGE = 0.75, 0.9
# Of what is gathered and scattered beside compute, the part for which nothing is left to compute:
# a layer's first product waits for its weights, and its last gradient for other devices.
FIRST_AND_LAST = 0.12


@dataclasses.dataclass(frozen=True)
class Paper:
    """A training step on one device, on paper. Bytes and FLOPs a step; times in seconds."""

    memory: float
    flops: float  # with what the remat policy recomputes
    bytes: float  # to and from HBM
    received: dict[str, float]  # bytes from other devices, by strategy
    compute_seconds: float
    memory_seconds: float
    network_seconds: dict[str, float]  # by strategy
    beside_seconds: float  # of them, what runs beside compute
    bubble: float  # share of the time that a pipeline is not full
    matrix_share: float = MATRIX_SHARE

    @property
    def busy(self) -> float:
        """Seconds a step if other devices answered at once."""
        return max(self.compute_seconds / self.matrix_share, self.memory_seconds) / (
            1 - self.bubble
        )

    @property
    def seconds(self) -> float:
        """Seconds a step, where the compiler hides what it can behind compute."""
        waited = sum(self.network_seconds.values()) - self.beside_seconds
        return max(self.busy, self.beside_seconds) + waited

    @property
    def hidden_seconds(self) -> float:
        """Seconds a step if all that ZeRO and data parallelism say were hidden behind compute."""
        beside = sum(self.network_seconds.get(name, 0.0) for name in ("zero", "data"))
        return max(self.busy, beside) + sum(self.network_seconds.values()) - beside


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
    tables = [s.size for s in specs.values() if "layers" not in s.axes]
    return specs, sum(s.size for s in specs.values()), routed, sum(tables), max(tables, default=0)


@functools.lru_cache(maxsize=8)
def _state_bytes(workload: Workload) -> float:
    """Bytes of the optimizer's state for each parameter."""
    specs, total, *_ = _counted(workload.model)
    optimizer = make_optimizer(workload.optimizer, workload.train.steps, specs)
    shapes = {n: jax.ShapeDtypeStruct(s.shape, "float32") for n, s in specs.items()}
    leaves = jax.tree.leaves(jax.eval_shape(optimizer.init, shapes))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / total


def whole_state(workload: Workload) -> float:
    """Bytes of all parameters and of the optimizer's state, once."""
    return _counted(workload.model)[1] * (4 + _state_bytes(workload))


def on_paper(
    workload: Workload, mesh_config: MeshConfig, zero: int, topology: Topology, grid=None
) -> Paper:
    """The training step on paper.

    Args:
      workload: what is trained.
      mesh_config: over the topology's devices.
      zero: ZeRO stage.
      topology: the devices.
      grid: their mesh (`make_mesh`), for where they are in the torus; placed well unless given.
    """
    sizes = mesh_sizes(mesh_config, len(topology.devices))
    with compiling_for(topology.platform):
        return _on_paper(workload, mesh_config, sizes, zero, topology, grid)


def _on_paper(workload, mesh_config, sizes, zero, topology, grid) -> Paper:
    model, chip = workload.model, topology.chip
    _, total, routed, table, largest = _counted(model)
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

    kept, once, away = _kept(model, workload.block_size, workload.source_length or None)
    here = tokens / workload.block_size * stage / workload.train.accumulation / tensor
    activations = here * (kept / stage * workload.train.accumulation + once)
    work = costs.training_flops_per_token(
        model, workload.block_size, workload.source_length or None
    )
    work *= workload.tokens / len(topology.devices)
    again = {"none": 0.0, "dots": 0.02, "projections": 0.22, "qkv": 0.25}
    work *= 1 + again.get(model.remat, 1 / 3)  # full, offload
    optimizer = _state_bytes(workload)
    state = dense + experts if zero < 1 else split
    moved = 2 * workload.train.accumulation * gathered + state * (2 * 4 + 2 * optimizer + 4)
    # What waits in the host's memory is written, copied there and back, and read.
    moved += 2 * activations + 4 * here * away / stage * workload.train.accumulation
    memory = (split if zero == 3 else dense + experts) * 4 + state * optimizer
    memory += (split if zero >= 2 else dense + experts) * 4  # gradients
    memory += here * (kept / stage + once) + 2 * gathered / max(1, layers)
    if tensor > 1:  # what its products read, whole, and the gradients of that
        memory += 4 * stream / workload.train.accumulation * (1 - 1 / tensor)
    memory += largest / tensor * itemsize  # a table in the compute dtype, to multiply with
    if zero == 3 and ways > 1:
        memory += split * itemsize  # all layers' shares in the compute dtype, before their loop
        memory += largest / tensor * 4  # a table's gradient, before it is scattered
    accumulation = workload.train.accumulation
    counts = {
        "zero": 3 * MATRICES * layers * accumulation,
        "data": MATRICES,
        "tensor": 8 * layers * accumulation,
        "context": 3 * (context - 1) * layers * accumulation,
        "expert": 4 * layers * accumulation,
        "stage": 2 * 4 * stage * mesh_config.rounds,
    }
    spoken = {**_SPOKEN, "zero": _zero_spoken(zero, itemsize)}
    tuned = workload.train.compiler == "tuned" and compiler.has_sparse_cores(chip)
    times, beside = _times(received, counts, spoken, sizes, topology, grid, tuned)
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
        beside,
        bubble,
        MATRIX_SHARE_LARGE if tuned else MATRIX_SHARE,
    )


@functools.lru_cache(maxsize=64)
def _kept(model: ModelConfig, length: int, source_length: int | None) -> tuple[float, float, float]:
    """Bytes of a row that the backward pass needs.

    Returns:
      What a device keeps of all layers, what it holds of one that is recomputed, and what of all
      layers waits in its host's memory.
    """
    if model.cell != "attention":
        return float(kept_by_row(model, length, source_length or length)), 0.0, 0.0
    item = compute_dtype(model.compute_dtype).itemsize
    heads = model.num_heads * model.head_width
    pairs = model.kv_heads * model.head_width
    hidden = model.feed_forward * (2 if model.gated else 1)
    if model.num_experts:
        hidden = model.experts_per_token * model.expert_feed_forward * 2
    layer = {
        "offload": model.width,
        "full": model.width,
        "qkv": model.width + heads + 2 * pairs,
        "projections": 2 * model.width + heads + 2 * pairs,
        "dots": 2 * model.width + 2 * heads + 2 * pairs + hidden,
        "none": 4 * model.width + 2 * heads + 2 * pairs + 2 * hidden,
    }
    every = float(model.num_layers * layer[model.remat] * item * length)
    recomputed = 0.0 if model.remat == "none" else float(layer["none"] * item * length)
    return (0.0, recomputed, every) if model.remat == "offload" else (every, recomputed, 0.0)


# The collectives of a strategy, each with its share of the bytes received. ZeRO's by its stage.
_SPOKEN: dict[str, dict[str, float]] = {
    "data": {"all-reduce": 1.0},
    "tensor": {"all-gather": 0.5, "reduce-scatter": 0.5},
    "context": {"collective-permute": 1.0},
    "expert": {"all-to-all": 1.0},
    "stage": {"collective-permute": 1.0},
}


def _zero_spoken(zero: int, itemsize: int) -> dict[str, float]:
    if zero == 0:
        return {"all-reduce": 1.0}
    scattered = 1 / 3 if zero == 3 else 1 / (1 + 4 / itemsize)
    return {"all-gather": 1 - scattered, "reduce-scatter": scattered}


def _times(
    received: Mapping[str, float],
    counts: Mapping[str, float],
    spoken: Mapping[str, Mapping[str, float]],
    sizes: Mapping[str, int],
    topology: Topology,
    grid,
    tuned: bool,
) -> tuple[dict[str, float], float]:
    """Seconds of what each strategy receives, and of them those beside compute.

    Args:
      received: bytes, by strategy.
      counts: how often each of its kinds of collectives runs.
      spoken: which those are, and the share that each has of the bytes.
      sizes: of the mesh's axes.
      topology: the devices.
      grid: their mesh, or None: groups along as few dimensions of the torus as hold them.
      tuned: whether the SparseCores speak to other devices.
    """
    network = None if grid is None else Network.of(topology, grid)
    seconds, beside = {}, 0.0
    for name, size in received.items():
        along = ZERO_AXES if name == "zero" else (name,)
        ways = math.prod(sizes[axis] for axis in along)
        group = None if grid is None else _group(grid, along)
        dimensions, whole = _dimensions(ways, topology)
        if group is not None:
            dimensions, _ = network.spans(group)
            whole = all(network.spans(_group(grid, (axis,)))[1] for axis in along)
        seconds[name] = 0.0
        for kind, share in spoken[name].items():
            count = counts[name] * share
            once = size * share / count
            if kind == "collective-permute":
                meant = Collective(kind, once, ways, along, group=group[:2] if group else ())
            else:
                meant = Collective(kind, 1.0, ways, along, group=group or ())
                meant = dataclasses.replace(meant, bytes=once / meant.received)
            one = made(meant, dimensions, whole, tuned)
            if network is None:
                each = one.received / topology.chip.link / (one.links or 1)
            else:
                each = network.seconds(one)
            seconds[name] += count * each
            # What tensor parallelism says is waited for: the next product needs it.
            if one.asynchronous and name in ("zero", "data"):
                beside += (1 - FIRST_AND_LAST) * count * each
    return seconds, beside


def _group(grid, along) -> tuple[int, ...]:
    """Numbers of the devices that the first one works with along these axes."""
    numbers = np.arange(grid.devices.size).reshape(tuple(grid.shape.values()))
    index = tuple(slice(None) if axis in along else 0 for axis in grid.shape)
    return tuple(int(n) for n in numbers[index].ravel())


def _dimensions(ways: int, topology: Topology) -> tuple[int, bool]:
    """`Network.spans` of a group of so many devices, placed as well as they can be."""
    for count in range(1, len(topology.shape) + 1):
        held = [math.prod(sides) for sides in itertools.combinations(topology.shape, count)]
        if ways in held:
            return count, True
        if ways < max(held):
            return count, False
    return len(topology.shape), False
