"""A training step before anything is compiled: the least it must move, and the time that takes.

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

These are the least bytes. Times are by the rule of `lm.planning.roofline`, of one operation and of
the collectives that the compiler makes of these (`lm.planning.collectives.made`), some of which
move more. Memory is `lm.training.memory`'s.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from lm.models.matmul import compute_dtype
from lm.parallel import compiler
from lm.parallel.mesh import batch_ways
from lm.parallel.platform import compiling_for
from lm.parallel.sharding import ZERO_AXES
from lm.planning.collectives import Collective, made
from lm.planning.roofline import Estimate, Network, Operation, group_along
from lm.planning.topology import Topology
from lm.training.memory import arrays, expected_memory, held, kept
from lm.training.workload import Workload

MATRICES = 4  # of a layer, that are gathered at a time: of attention in and out, of the MLP
# Of the peak, that products reach by the compiler's own estimates: with the usual tiles, and with
# those of a chip whose programs may use more VMEM.
MATRIX_SHARE, MATRIX_SHARE_LARGE = 0.75, 0.9
# Of what is gathered and scattered beside compute, the part for which nothing is left to compute:
# a layer's first product waits for its weights, and its last gradient for other devices.
FIRST_AND_LAST = 0.12
# Of a step's FLOPs, what each remat policy computes once more.
RECOMPUTED = {
    "none": 0.0, "dots": 0.02, "projections": 0.22, "qkv": 0.25, "full": 1 / 3, "offload": 1 / 3
}  # fmt: skip
BESIDE = ("zero", "data")  # strategies whose collectives may run beside compute


class Sketch(NamedTuple):
    """A training step on one device."""

    memory: int  # bytes that it holds
    received: dict[str, float]  # bytes from other devices, at least, by strategy
    estimate: Estimate


def strategy_of(collective: Collective) -> str:
    """Which strategy of `Sketch.received` a collective serves."""
    axes = set(collective.axes)
    for axis in ("stage", "tensor", "data"):
        if axis in axes:
            return axis
    if "all-to-all" in collective.kind and "expert" in axes:
        return "expert"
    ring = collective.kind == "collective-permute" and not collective.part
    return "context" if ring and axes == {"context"} else "zero"


def sketch(workload: Workload, topology: Topology) -> Sketch:
    """The step of a workload whose layout is over the topology's devices.

    Those of an abstract mesh are taken to lie well in the torus (`Network.of`).

    Raises:
      ConfigError: a pipeline's rows cannot be cut into micro-batches.
    """
    with compiling_for(topology.platform):
        memory = expected_memory(workload)
        work, moved = _work(workload, memory)
        says = list(_says(workload))
    mesh, chip = workload.layout.mesh, topology.chip
    tuned = workload.train.compiler == "tuned" and compiler.has_sparse_cores(chip)
    network = Network.of(topology, mesh)
    received: dict[str, float] = {}
    collectives, beside = [], 0.0
    for strategy, kind, size, times in says:
        received[strategy] = received.get(strategy, 0.0) + size
        along = ZERO_AXES if strategy == "zero" else (strategy,)
        group = group_along(mesh, along)
        whole = all(network.spans(group_along(mesh, (axis,)))[1] for axis in along)
        unit = Collective(kind, 1.0, len(group), along, trips=times, group=group)
        if kind == "collective-permute":
            unit = dataclasses.replace(unit, group=group[:2])
        meant = dataclasses.replace(unit, bytes=size / times / unit.received)
        collective = made(meant, network.spans(group)[0], whole, tuned)
        seconds = times * network.seconds(collective)
        collectives.append(dataclasses.replace(collective, seconds=seconds))
        # What tensor parallelism says is waited for: the next product needs it.
        if collective.asynchronous and strategy in BESIDE:
            beside += (1 - FIRST_AND_LAST) * seconds
    share = MATRIX_SHARE_LARGE if tuned else MATRIX_SHARE
    busy = max(work / chip.sixteen_bit / share, moved / chip.bandwidth)
    if pipeline := workload.layout.pipeline(workload.microbatch):
        busy /= 1 - pipeline[1]
    exposed = sum(c.seconds for c in collectives) - beside + max(0.0, beside - busy)
    step = Operation("training step", "", 1.0, work, moved, busy, busy)
    estimate = Estimate([step], collectives, exposed, chip)
    return Sketch(sum(memory.values()), received, estimate)


def _parameters(workload: Workload, zero: int) -> float:
    """How many parameters lie on a device where ZeRO's stage is `zero`."""
    train = workload.train
    specs, _ = arrays(workload.model, workload.optimizer, train.steps, workload.adapter)
    return held(specs, workload.layout._replace(zero=zero), "parameters") / 4


def _work(workload: Workload, memory: dict[str, int]) -> tuple[float, float]:
    """FLOPs, what is recomputed included, and bytes to and from HBM."""
    model, train, layout = workload.model, workload.train, workload.layout
    work = workload.flops_per_token * workload.tokens / layout.mesh.size
    weights = _parameters(workload, 0) * compute_dtype(model.compute_dtype).itemsize
    updated = _parameters(workload, 3 if layout.zero else 0)
    device, host = kept(workload)
    moved = 2 * train.accumulation * weights + 12 * updated + 2 * memory["optimizer"]
    # What waits in the host's memory is written, copied there and back, and read.
    moved += train.accumulation * (2 * device + 4 * host)
    return work * (1 + RECOMPUTED[model.remat]), moved


def _says(workload: Workload):
    """(strategy, kind of collective, bytes received in all, how often) of what must be said."""
    model, layout, accumulation = workload.model, workload.layout, workload.train.accumulation
    sizes, zero = layout.mesh.shape, layout.zero
    tensor, context, stage = sizes["tensor"], sizes["context"], sizes["stage"]
    itemsize = compute_dtype(model.compute_dtype).itemsize
    layers = model.num_layers / stage
    times = layers * accumulation
    whole = _parameters(workload, 0)
    # Tokens on a device in all micro-batches; the rows of all stages pass through each.
    tokens = stage * workload.batch_size / batch_ways(layout.mesh) * workload.block_size / context
    stream = tokens * model.width * itemsize

    def share(ways: int) -> float:
        return (ways - 1) / ways

    ways = sizes["fsdp"] * sizes["expert"] * context
    if ways > 1:
        once, often = whole * itemsize * share(ways), MATRICES * times
        if zero == 0:
            yield "zero", "all-reduce", 2 * once, 3 * often
        else:
            gathers = 2 * accumulation if zero == 3 else 4 / itemsize
            scatters = accumulation if zero == 3 else 1
            yield "zero", "all-gather", gathers * once, 2 * often
            yield "zero", "reduce-scatter", scatters * once, often
    if sizes["data"] > 1:
        gradients = _parameters(workload, 3) if zero >= 2 else whole
        yield "data", "all-reduce", 2 * itemsize * gradients * share(sizes["data"]), MATRICES
    if tensor > 1:
        for kind in ("all-gather", "reduce-scatter"):
            yield "tensor", kind, 4 * layers * stream * share(tensor), 4 * times
    if context > 1:
        pair = 2 * tokens * model.kv_heads * model.head_width * itemsize
        size = 3 * layers * (context - 1) * pair / min(tensor, model.kv_heads)
        yield "context", "collective-permute", size, 3 * (context - 1) * times
    if sizes["expert"] > 1 and model.num_experts:
        size = 4 * layers * model.experts_per_token * stream / tensor * share(sizes["expert"])
        yield "expert", "all-to-all", size, 4 * times
    if stage > 1:
        size = 2 * stream * layout.rounds / tensor
        yield "stage", "collective-permute", size, 2 * 4 * stage * layout.rounds
