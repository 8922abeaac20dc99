"""How often every instruction of a compiled program runs.

The compiler's own cost analysis counts the body of a loop once. A model's layers are one loop, so
here instructions are counted as often as they run. How often a loop does follows from its integers:
where they start, what a trip makes of them, and the condition, as far as they are known here;
else the compiler may say it. Of a conditional's branches the one with most work counts.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from lm.planning.hlo import FOLLOWED, Computation, Instruction
from lm.planning.hlo_costs import FREE, bytes_of, flops_of, updated

MOST_TRIPS = 10**6  # a loop that goes on for longer is one whose length is not known
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARITHMETIC = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul}
_COMPARISONS = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt,
    "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne,
}  # fmt: skip

# (a parameter's number, index in its tuple or None) → the integer, or None where it is not known
Given = Callable[[int, int | None], int | None]


def _unknown(number: int, index: int | None) -> None:
    """`Given` nothing."""


def _integer(value: Instruction, given: Given) -> int | None:
    """What an instruction computes, where that is an integer known when compiling."""
    opcode, operands = value.opcode, value.operands
    if opcode == "constant":
        digits = value.argument
        return int(digits) if digits.removeprefix("-").isdecimal() else None
    if opcode == "parameter":
        return given(int(value.argument), None)
    if opcode == "get-tuple-element":
        index = int(value.attribute("index"))
        if operands[0].opcode == "tuple":
            return _integer(operands[0].operands[index], given)
        is_given = operands[0].opcode == "parameter"
        return given(int(operands[0].argument), index) if is_given else None
    if opcode in FOLLOWED:
        return _integer(operands[0], given)
    if opcode in _ARITHMETIC or opcode == "compare":
        compute = _ARITHMETIC.get(opcode) or _COMPARISONS[value.attribute("direction")]
        left, right = (_integer(operand, given) for operand in operands)
        return None if left is None or right is None else compute(left, right)
    if opcode in ("fusion", "call"):
        return _integer(
            value.called[0].root,
            lambda number, index: _integer(operands[number], given) if index is None else None,
        )
    return None


class Loop(NamedTuple):
    """How a `while` runs."""

    trips: int | None  # None: not known when compiling
    fixed: dict[int, int]  # what it carries unchanged, by its index, where that is a known integer


def loop(instruction: Instruction, given: Given = _unknown) -> Loop:
    """How often a `while` runs, given what its computation is given."""
    module = instruction.home.module
    condition = module[instruction.attribute("condition").lstrip("%")].root
    after = instruction.called[0].root.operands
    initial = instruction.operands[0]
    while initial.opcode in FOLLOWED:
        initial = initial.operands[0]
    carried: dict[int, int] = {}
    for index, value in enumerate(initial.operands if initial.opcode == "tuple" else ()):
        start = _integer(value, given)
        if start is not None:
            carried[index] = start

    def now(number: int, index: int | None) -> int | None:
        return None if index is None else carried.get(index)

    fixed, trips = dict(carried), 0
    while (more := _integer(condition, now)) and trips < MOST_TRIPS:
        then = {index: _integer(after[index], now) for index in carried}
        carried = {index: value for index, value in then.items() if value is not None}
        fixed = {index: value for index, value in fixed.items() if carried.get(index) == value}
        trips += 1
    if more is None or trips == MOST_TRIPS:
        said = _TRIPS.search(instruction.attributes)
        trips = int(said[1]) if said else None
    return Loop(trips, fixed)


class Run(NamedTuple):
    """An instruction of a program, and how often it runs."""

    instruction: Instruction
    trips: float
    known: bool  # False inside a loop of unknown length, which is counted as one trip
    # What began it, where it runs beside what follows until its end: the computation and a name
    # there. ("", "") where what follows waits for it.
    begun: tuple[str, str] = ("", "")
    ends: bool = False  # whether it only waits for what was begun


def runs(program: Computation) -> list[Run]:
    """Every instruction that runs by itself, fusions whole, loops and calls followed, in order.

    What is begun says so, and what waits for it is among the runs. That is `all-reduce-start` and
    `all-reduce-done`; `call-start` on a TPU's SparseCores, which begins once a `call-update` gives
    it its operands; and fusions named `async-collective-start` and `async-collective-done`, which
    have the collective inside them, as have the fusions that go on with it in between.
    """
    return list(_runs([program], 1.0, True))


def _runs(
    computations: Iterable[Computation], trips: float, known: bool, given: Given = _unknown
) -> Iterator[Run]:
    for instruction in (i for c in computations for i in c.instructions.values()):
        opcode, called = instruction.opcode, instruction.called
        if opcode == "while":
            count, fixed = loop(instruction, given)
            times = trips * (1 if count is None else count)
            is_known = known and count is not None
            yield from _runs(called, times, is_known, lambda n, i, fixed=fixed: fixed.get(i))
        elif opcode == "conditional":
            yield from max((list(_runs([c], trips, known)) for c in called), key=_work)
        elif opcode == "call":
            yield from _runs(called, trips, known)
        elif opcode in ("async-start", "call-start", "async-update", "call-update"):
            start = _beginning(instruction)
            if bool(start.operands) == opcode.endswith("-start"):
                begun = (start.home.name, start.name)
                yield from (r._replace(begun=begun) for r in _runs(start.called, trips, known))
        elif instruction.name.startswith("async-collective-"):
            # Which collectives the fusion contains: their channels, of which each has its own.
            inner = called[0].instructions.values()
            channels = sorted(filter(None, (i.attribute("channel_id") for i in inner)))
            begun = (instruction.home.name, f"channels {channels}")
            ends = instruction.name.startswith("async-collective-done")
            yield Run(instruction, trips, known, begun, ends)
        elif opcode not in FREE and opcode != "copy-done":
            ends = opcode.endswith("-done")
            begun = ("", "")
            if ends or (opcode.endswith("-start") and opcode != "copy-start"):
                begun = (instruction.home.name, _beginning(instruction).name)
            yield Run(instruction, trips, known, begun, ends)


def _beginning(instruction: Instruction) -> Instruction:
    """What a `-done` or an `-update` belongs to."""
    while instruction.opcode.endswith(("-done", "-update")):
        instruction = instruction.operands[0]
    return instruction


def _work(branch: list[Run]) -> tuple[float, float]:
    flops = sum(run.trips * flops_of(run.instruction) for run in branch)
    return flops, sum(run.trips * bytes_of(run.instruction) for run in branch)


def stacks(program: Computation) -> float:
    """Bytes that loops of the forward pass stack up, a slice each trip, for the backward pass."""
    total = 0.0
    for instruction in (i for c in program.module.values() for i in c.instructions.values()):
        if instruction.opcode != "while" or "transpose(" in instruction.source:
            continue
        trips = loop(instruction).trips
        for value, array in zip(instruction.called[0].root.operands, instruction.arrays):
            grown = array.dims[:1] == (trips,) and updated(value) is not None
            total += array.moved if grown else 0.0
    return total
