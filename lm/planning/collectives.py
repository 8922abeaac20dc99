"""What devices say to each other in a compiled program: which collective, over which mesh axes.

In HLO a collective names devices by number: groups that each work together, or pairs of a sender
and a receiver. Number i is device i of the mesh's devices in row-major order, so the numbers say
along which axes of the mesh a group extends.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from lm.planning.hlo import COLLECTIVES, Instruction
from lm.planning.hlo_costs import read_of, updated
from lm.planning.hlo_runs import Run


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective, as often as it runs.

    `bytes` is the size on one device of the whole array that it is about: of what an all-gather
    makes, of what a reduce-scatter starts from, of what the others read.
    """

    kind: str
    bytes: float
    size: int  # devices that work together
    axes: tuple[str, ...]  # of the mesh
    trips: float = 1.0
    whole: bool = True  # whether a group is all of those axes, and not a part of one
    asynchronous: bool = False  # whether the compiler lets it run beside something else
    links: int = 0  # to neighbours, that a device sends over at once; 0: the compiler does not say
    seconds: float = 0.0  # of all trips, if the network has nothing else to do
    group: tuple[int, ...] = ()  # one group, or for a permutation one (sender, receiver)
    source: str = ""  # its name in the traced program
    # What it stands for: of a permutation, the collective that the compiler cut into turns, to
    # multiply in between; of an all-reduce, an all-gather (of shares among zeros) or a
    # reduce-scatter (of which each device then takes its share).
    part: str = ""

    @property
    def received(self) -> float:
        """Bytes that a device receives, each time, where every byte takes the shortest way."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.bytes
        share = (self.size - 1) / self.size * self.bytes
        return 2 * share if self.kind == "all-reduce" else share

    @property
    def total(self) -> float:
        """Bytes received, over all trips."""
        return self.trips * self.received

    @property
    def along(self) -> str:
        """The axes in words: `data·fsdp`; `fsdp (4)` where a group is only 4 of it."""
        axes = "·".join(self.axes) or "–"
        return axes if self.whole else f"{axes} ({self.size})"


def collectives(runs: Iterable[Run], mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Every collective of what runs, in order; those between fewer than two devices left out.

    `mesh_shape` is the sizes of the mesh's axes, outermost first.
    """
    found = []
    for run in runs:
        names = (computation.name for computation in run.instruction.called)
        if run.ends or any(name.startswith("async_collective_fusion") for name in names):
            continue  # counted where it began
        for one, kind in _inside(run.instruction):
            collective = _collective(one, kind, mesh_shape)
            if collective.size > 1 and collective.bytes:
                found.append(
                    dataclasses.replace(
                        collective,
                        trips=run.trips,
                        asynchronous=any(run.begun),
                        links=_links(run.instruction),
                        source=one.source or run.instruction.source,
                        part=_part(one, kind, collective.size),
                    )
                )
    return found


def _inside(instruction: Instruction) -> Iterator[tuple[Instruction, str]]:
    """(instruction, kind) of the collectives that an instruction consists of.

    A TPU's reduce-scatter is a fusion of an all-reduce and of taking one's own share of it.
    """
    kind = instruction.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
        yield instruction, kind
    elif instruction.opcode == "fusion":
        for one in instruction.called[0].instructions.values():
            for found, kind in _inside(one):
                cut = kind == "all-reduce" and _is_cut(one)
                yield found, "reduce-scatter" if cut else kind


def _links(instruction: Instruction) -> int:
    """Links that a TPU's collective sends over at once.

    Its compiler cuts the array into colours, of which each takes its own way round: one direction
    along one dimension of the torus after the other, or around a ring through all devices. A
    SparseCore's states its colours, a TensorCore's their number, or that it is one ring.
    """
    if '"emitter":"1D' in instruction.attributes:
        return 2
    if colours := instruction.attributes.count('"phase_rings"'):
        return colours
    found = re.search(r"colors:(\d+)", instruction.attributes)
    return int(found[1]) if found else 0


def _part(instruction: Instruction, kind: str, size: int) -> str:
    """`Collective.part` of a collective between `size` devices."""
    if "permute" in kind:
        for mark, of in (("_body_ag", "all-gather"), ("_body_rs", "reduce-scatter")):
            if "windowed_dot_general" + mark in instruction.home.name:
                return of
    if kind == "all-reduce":
        whole = sum(operand.bytes for operand in instruction.operands)
        shares = [updated(operand) for operand in instruction.operands]
        if None not in shares and sum(shares) * size <= 1.1 * whole:
            return "all-gather"
        if 0 < read_of(instruction) * size <= 1.1 * whole:
            return "reduce-scatter"
    return ""


def _is_cut(instruction: Instruction) -> bool:
    users = instruction.users
    while len(users) == 1 and users[0].opcode in ("bitcast", "copy", "convert", "reshape"):
        users = users[0].users
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def _collective(instruction: Instruction, kind: str, mesh_shape) -> Collective:
    size_in = sum(operand.bytes for operand in instruction.operands)
    if "permute" in kind:
        pairs = np.array(_numbers(instruction.attribute("source_target_pairs"))).reshape(-1, 2)
        axes = axes_of_pairs(pairs, mesh_shape)
        furthest = max(pairs, key=lambda pair: abs(pair[0] - pair[1]))
        size = math.prod(mesh_shape[axis] for axis in axes)
        return Collective(kind, size_in, size, axes, group=tuple(map(int, furthest)))
    groups = replica_groups(
        instruction.attribute("replica_groups") or "{}", math.prod(mesh_shape.values())
    )
    axes, whole = axes_of_groups(groups, mesh_shape)
    size = groups.shape[1]
    full = size_in * size if kind == "all-gather" else size_in
    return Collective(kind, full, size, axes, whole=whole, group=tuple(map(int, groups[0])))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def replica_groups(text: str, devices: int) -> np.ndarray:
    """The groups [number of groups, size] that `replica_groups=` gives.

    `{{0,1},{2,3}}` lists them; `{}` is one group of all; `[2,4]<=[4,2]T(1,0)` is the numbers from 0
    up, shaped [4, 2], transposed, and then cut into 2 groups of 4; `mesh['a'=4,'b'=2] {'b'}` is all
    numbers shaped as the mesh, in groups along the axes named (`'a':(2)2` is the inner half of a).
    """
    if re.match(r"\{\s*\{", text):
        rows = [_numbers(row) for row in re.findall(r"\{([\d, ]+)\}", text)]
        longest = max(map(len, rows))
        return np.array([row for row in rows if len(row) == longest])
    if text.startswith("mesh["):
        return _groups_of_mesh(text)
    iota = _IOTA.match(text)
    return np.arange(devices)[None] if iota is None else _counted(iota)


_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


def _counted(iota: re.Match) -> np.ndarray:
    shape, numbers = _numbers(iota[1]), np.arange(math.prod(_numbers(iota[2])))
    numbers = numbers.reshape(_numbers(iota[2]))
    if iota[3]:
        numbers = numbers.transpose(_numbers(iota[3]))
    return numbers.reshape(shape)


def _groups_of_mesh(text: str) -> np.ndarray:
    mesh, _, chosen = text.partition("{")
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    order = re.search(r"device_ids=\((.*?)\)(?:$|,|\s)", mesh)
    iota = _IOTA.search(order[1]) if order else None
    numbers = np.arange(math.prod(sizes.values())) if iota is None else _counted(iota)
    # Every axis as (before, chosen part, after), of which only the middle varies in a group.
    parts = {name: (1, 1, size) for name, size in sizes.items()}
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen):
        whole = sizes[name]
        before, size = (int(before), int(size)) if size else (1, whole)
        parts[name] = (before, size, whole // before // size)
    shaped = numbers.reshape([size for part in parts.values() for size in part])
    middle = [3 * i + 1 for i in range(len(parts))]
    rest = [i for i in range(shaped.ndim) if i not in middle]
    size = math.prod(part[1] for part in parts.values())
    return shaped.transpose(rest + middle).reshape(-1, size)


def axes_of_groups(
    groups: np.ndarray, mesh_shape: Mapping[str, int]
) -> tuple[tuple[str, ...], bool]:
    """The mesh axes along which groups of devices extend, and whether over all of each."""
    places = np.stack(np.unravel_index(groups, tuple(mesh_shape.values())))  # [axes, groups, size]
    varies = (places != places[:, :, :1]).any((1, 2))
    axes = tuple(axis for axis, varied in zip(mesh_shape, varies) if varied)
    return axes, groups.shape[1] == math.prod(mesh_shape[axis] for axis in axes)


def axes_of_pairs(pairs: np.ndarray, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which senders and receivers differ."""
    places = np.stack(np.unravel_index(pairs, tuple(mesh_shape.values())))  # [axes, pairs, 2]
    varies = (places[..., 0] != places[..., 1]).any(1)
    return tuple(axis for axis, varied in zip(mesh_shape, varies) if varied)


def summed(every: list[Collective]) -> list[Collective]:
    """Collectives of one kind along the same axes as one each, the largest first.

    Their `trips` and `seconds` are added up, and `bytes` is the mean of one.
    """

    def key(c: Collective):
        return c.kind, c.axes, c.size, c.whole, c.part

    merged = []
    for _, same in itertools.groupby(sorted(every, key=key), key):
        same = list(same)
        trips = sum(c.trips for c in same)
        mean = sum(c.trips * c.bytes for c in same) / trips if trips else 0.0
        seconds = sum(c.seconds for c in same)
        merged.append(dataclasses.replace(same[0], trips=trips, bytes=mean, seconds=seconds))
    return sorted(merged, key=lambda c: -c.total)


def made(collective: Collective, dimensions: int, whole: bool, tuned: bool) -> Collective:
    """A collective as the compiler makes it, by what libtpu 0.0.50 compiled for 64 to 256 chips.

    Args:
      collective: an all-gather, reduce-scatter or all-reduce as it is meant; others stay.
      dimensions: of the torus, that its group extends along.
      whole: whether over all of each of these.
      tuned: whether with `lm.parallel.compiler.options`, on a chip that has SparseCores.
    """
    kind = collective.kind
    if kind not in ("all-gather", "reduce-scatter", "all-reduce"):
        return collective
    every = 2 * dimensions  # both ways along each dimension at once; else a ring through all
    if tuned:
        scattered = kind == "reduce-scatter" and dimensions > 2
        links = every if whole and not scattered else 2
        return dataclasses.replace(collective, links=links, asynchronous=True)
    if kind == "all-reduce":
        return dataclasses.replace(collective, links=every)
    if dimensions > 2 and whole:
        return dataclasses.replace(collective, kind="all-reduce", links=every, part=kind)
    return dataclasses.replace(collective, links=2 if kind == "all-gather" else 1)
