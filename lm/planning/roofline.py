"""How long a compiled program would take: an estimate from its text and a chip's data sheet.

Compiled, not measured. The rule:

    an operation   takes the longest of: its FLOPs at the chip's peak, its bytes at the speed of HBM
                   (the roofline; Williams et al. 2009); or where the compiler for TPUs states an
                   estimate in cycles, that at the chip's clock
    operations     follow one another, as the compiler has scheduled them
    collectives    take the bytes that cross the most loaded link at the link's speed, and a
                   microsecond a hop. What the compiler starts and later waits for runs beside the
                   operations between, one after the other; any other stops everything

On a torus a group that fills a dimension which wraps sends both ways round, at twice a link's
speed; on a line, or a part of a ring, at a link's; where groups interleave they share links. The
dimensions a group extends along add up (the same model as in "How to Scale Your Model", Austin et
al. 2025), unless the compiler states that it uses fewer links.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from lm.parallel.chips import Chip
from lm.planning import hlo_costs
from lm.planning.collectives import Collective, collectives
from lm.planning.hlo import COLLECTIVES, Instruction, parse
from lm.planning.hlo_runs import Run, runs, stacks
from lm.planning.topology import Topology

HOP_SECONDS = 1e-6
_EIGHT_BIT = ("s8", "u8", "s4", "u4")
# float32 products at a higher precision than the default take so many bfloat16 passes.
_PASSES = {"high": 3, "highest": 6}
_NO_ESTIMATE = 2**60  # cycles from here on are the compiler's word for not knowing
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def group_along(mesh: Mesh | AbstractMesh, axes: tuple[str, ...]) -> tuple[int, ...]:
    """Numbers of the devices that the first one works with along these axes."""
    numbers = np.arange(mesh.size).reshape(tuple(mesh.shape.values()))
    index = tuple(slice(None) if axis in axes else 0 for axis in mesh.shape)
    return tuple(int(n) for n in numbers[index].ravel())


@dataclasses.dataclass(frozen=True)
class Network:
    """Where the devices of a mesh are in a torus, and how fast they talk."""

    topology: Topology
    coordinates: np.ndarray  # [devices in the mesh's order, dimensions]
    slices: np.ndarray  # [devices]

    @classmethod
    def of(cls, topology: Topology, mesh: Mesh | AbstractMesh) -> Network:
        """The network that connects the devices of `mesh`.

        Those of an abstract one lie in the order in which most axes fill dimensions of the torus.
        """
        if isinstance(mesh, AbstractMesh):
            orders = topology.orders
        else:
            index = {device.id: i for i, device in enumerate(topology.devices)}
            orders = [[index[device.id] for device in mesh.devices.flat]]
        found = [cls(topology, topology.coordinates[o], topology.slice_of[o]) for o in orders]
        groups = [group_along(mesh, (axis,)) for axis, size in mesh.shape.items() if size > 1]
        return max(found, key=lambda network: sum(network.spans(group)[1] for group in groups))

    def spans(self, group: Sequence[int]) -> tuple[int, bool]:
        """Dimensions of the torus that a group extends along, and whether over all of each."""
        places = self.coordinates[np.array(group)]
        counts = [len(np.unique(column)) for column in places.T]
        spanned = [n == size for n, size in zip(counts, self.topology.shape) if n > 1]
        return len(spanned), all(spanned)

    def seconds(self, collective: Collective) -> float:
        """Of one run of a collective."""
        members = np.array(collective.group)
        slices = len(set(self.slices[members]))
        if collective.kind == "collective-permute":
            return self._permute(members, collective.bytes)
        within = members[self.slices[members] == self.slices[members[0]]]
        seconds = self._within(within, collective) if len(within) > 1 else 0.0
        if slices > 1:
            share = collective.received / len(members) * slices / self.topology.chip.network
            seconds += share * (slices - 1) / slices
        return seconds

    def _permute(self, pair, size: float) -> float:
        if self.slices[pair[0]] != self.slices[pair[1]]:
            return size / self.topology.chip.network
        distances = [
            self._distance(d, abs(int(np.diff(self.coordinates[pair, d])[0])))
            for d in range(self.coordinates.shape[1])
        ]
        if not any(distances):
            return 0.0
        return size * max(distances) / self.topology.chip.link + HOP_SECONDS * sum(distances)

    def _distance(self, dimension: int, steps: int) -> int:
        if self.topology.wraps(dimension):
            return min(steps, self.topology.shape[dimension] - steps)
        return steps

    def _within(self, members, collective: Collective) -> float:
        """Of a collective between devices of one slice."""
        link = self.topology.chip.link
        rate, hops, exchange = 0.0, 0.0, 0.0
        for dimension in range(self.coordinates.shape[1]):
            places = np.unique(self.coordinates[members, dimension])
            count = len(places)
            if count == 1:
                continue
            ring = count == self.topology.shape[dimension] and self.topology.wraps(dimension)
            shared = max(1, int(places[-1] - places[0] + 1) // count)
            rate += 2 * link if ring else link / shared
            hops += count / 2 if ring else count - 1
            # All-to-all: every byte travels a quarter of a ring, or a third of a line and all of
            # one half's to the other through the middle.
            exchange = max(exchange, count / 8 if ring else shared * count / 4)
        if not rate:  # two cores of one chip
            return collective.received / self.topology.chip.bandwidth
        if "all-to-all" in collective.kind:
            return collective.bytes * exchange / link + HOP_SECONDS * hops
        if collective.links:
            rate = min(rate, collective.links * link)
        rounds = 2 if collective.kind == "all-reduce" else 1
        return collective.received / rate + rounds * HOP_SECONDS * hops


@dataclasses.dataclass(frozen=True)
class Operation:
    """What one instruction costs, each time and without its collectives."""

    name: str
    source: str
    trips: float
    flops: float
    bytes: float
    roofline: float  # seconds
    estimate: float  # seconds by the compiler's cycles, or `roofline` where it states none


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a program does on one device, and how long it would take. Times are in seconds."""

    operations: Sequence[Operation]
    collectives: Sequence[Collective]
    exposed: float  # of their time, what nothing hides
    chip: Chip
    all_known: bool = True  # False where a loop's length was not known and counted as one
    stacked: float = 0.0  # bytes that loops of the forward pass stack up for the backward pass

    def _sum(self, name: str) -> float:
        return math.fsum(op.trips * getattr(op, name) for op in self.operations)

    @functools.cached_property
    def flops(self) -> float:
        """Of matrix products."""
        return self._sum("flops")

    @functools.cached_property
    def bytes(self) -> float:
        """To and from HBM."""
        return self._sum("bytes")

    @functools.cached_property
    def communicated(self) -> float:
        """Bytes that the device receives from others."""
        return math.fsum(c.total for c in self.collectives)

    @property
    def compute_seconds(self) -> float:
        """All FLOPs at the chip's peak for 16 bits."""
        return self.flops / self.chip.sixteen_bit

    @property
    def memory_seconds(self) -> float:
        """All bytes at the speed of HBM."""
        return self.bytes / self.chip.bandwidth

    @functools.cached_property
    def network_seconds(self) -> float:
        """All collectives, one after the other."""
        return math.fsum(c.seconds for c in self.collectives)

    @functools.cached_property
    def operation_seconds(self) -> float:
        """All operations, each by its own roofline."""
        return self._sum("roofline")

    @functools.cached_property
    def compiler_seconds(self) -> float:
        """All operations by the compiler's estimate."""
        return self._sum("estimate")

    @property
    def ideal(self) -> float:
        """With all of compute, HBM and network at once: no order of operations is faster."""
        return max(self.compute_seconds, self.memory_seconds, self.network_seconds)

    @property
    def roofline(self) -> float:
        """By the rule, without the compiler's cycles."""
        return max(self.operation_seconds + self.exposed, self.ideal)

    @property
    def seconds(self) -> float:
        """By the rule; copies that run beside operations cannot make it less than the bound."""
        return max(self.compiler_seconds + self.exposed, self.ideal)

    def mfu(self, model_flops: float) -> float:
        """The share of the chip's peak that a program of so many model FLOPs reaches."""
        return model_flops / self.seconds / self.chip.sixteen_bit


def estimate(text: str, topology: Topology, mesh: Mesh, attention_share: float = 1.0) -> Estimate:
    """The estimate for a program compiled for the devices of `mesh`.

    Args:
      text: `Compiled.as_text()`.
      topology: what its devices are.
      mesh: over which the program is split.
      attention_share: of all pairs of query and key, those that are seen: what kernels of attention
        that do not state their FLOPs compute.
    """
    program = parse(text)
    every = runs(program)
    network, chip = Network.of(topology, mesh), topology.chip
    operations, found = [], []
    clock = _Clock()
    for run in every:
        if run.ends:
            clock.wait(run.begun)
            continue
        operation = _operation(run, chip, attention_share)
        busy, spoken = operation.trips * operation.estimate, 0.0
        if any(run.begun):  # takes no time of what is counted as operations
            operation = dataclasses.replace(operation, roofline=0.0, estimate=0.0)
        operations.append(operation)
        for collective in collectives([run], mesh.shape):
            seconds = network.seconds(collective) * collective.trips
            found.append(dataclasses.replace(collective, seconds=seconds))
            spoken += seconds
        clock.run(busy, spoken, run.begun)
    known = all(run.known for run in every)
    return Estimate(operations, found, clock.waited, chip, known, stacks(program))


class _Clock:
    """The order of events on a device: one operation at a time, and one collective beside it.

    Loops pass in one go: an instruction that runs n times takes n times as long, and so does what
    runs beside it.
    """

    def __init__(self):
        self.now = 0.0
        self.waited = 0.0  # of it, for other devices
        self._ends: dict[tuple[str, str], float] = {}  # of what is under way

    def run(self, busy: float, spoken: float, begun: tuple[str, str]) -> None:
        """An operation of `busy` seconds whose collectives take `spoken`; `begun` as in a `Run`."""
        if any(begun):
            free = max(self._ends.values(), default=0.0)
            self._ends[begun] = max(self.now, free) + busy + spoken
            return
        if spoken:  # has the network to itself
            self._ends = {name: max(end, self.now) + spoken for name, end in self._ends.items()}
        self.waited += spoken
        self.now += spoken + busy

    def wait(self, begun: tuple[str, str]) -> None:
        """Until what `begun` names has ended."""
        rest = max(0.0, self._ends.pop(begun, 0.0) - self.now)
        self.waited += rest
        self.now += rest


def _operation(run: Run, chip: Chip, attention_share: float) -> Operation:
    instruction = run.instruction
    kernel = attention_share * hlo_costs.attention_flops(instruction)
    flops, moved = hlo_costs.flops_of(instruction) + kernel, hlo_costs.bytes_of(instruction)
    busy = (hlo_costs.stated(instruction, "flops") + kernel) / chip.sixteen_bit
    for product in hlo_costs.products(instruction):
        busy += hlo_costs.product_flops(product) / _rate(product, chip)
    roofline = max(busy, moved / chip.bandwidth)
    opcode = instruction.opcode.removesuffix("-start")
    # The network's time is longer than what a collective reads and writes; a copy runs beside what
    # follows.
    if opcode in COLLECTIVES or instruction.opcode == "copy-start":
        roofline = 0.0
    cycles = _CYCLES.search(instruction.attributes)
    known = cycles and chip.clock and int(cycles[1]) < _NO_ESTIMATE
    stated = int(cycles[1]) / chip.clock if known else roofline
    name, source = instruction.name, instruction.source
    return Operation(name, source, run.trips, flops, moved, roofline, stated)


def _rate(product: Instruction, chip: Chip) -> float:
    """FLOPs a second of a product of such numbers at the precision that it asks for."""
    dtype = product.operands[0].arrays[0].dtype
    if dtype in _EIGHT_BIT:
        return chip.eight_bit or chip.sixteen_bit
    if dtype != "f32":
        return chip.sixteen_bit
    asked = re.findall(r"\w+", product.attribute("operand_precision") or "")
    return chip.sixteen_bit / max((_PASSES.get(precision, 1) for precision in asked), default=1)
