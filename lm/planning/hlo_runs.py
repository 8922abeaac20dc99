"""How often every instruction of a compiled program runs.

The compiler's own cost analysis counts the body of a loop once. A model's layers are one loop, so
here instructions are counted as often as they run. How often a loop does follows from its integers:
where they start, what a trip makes of them, and the condition, all known when compiling. Of a
conditional's branches the one with most work counts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import NamedTuple

from lm.planning.hlo import FOLLOWED, Computation, Instruction, Module
from lm.planning.hlo_costs import FREE, bytes_of, flops_of, updated

MOST_TRIPS = 10**6  # a loop that goes on for longer is one whose length is not known
_ARITHMETIC = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul}
_COMPARISONS = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt,
    "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne,
}  # fmt: skip

# (a parameter's number, index in its tuple or None) → the integer, or None where it is not known
Given = Callable[[int, int | None], int | None]


def _unknown(number: int, index: int | None) -> None:
    """`Given` nothing."""


def _integer(module: Module, computation: Computation, name: str, given: Given) -> int | None:
    """What the instruction `name` computes, where that is an integer known when compiling."""
    instruction = computation.instructions[name]
    opcode = instruction.opcode

    def operand(index: int) -> int | None:
        return _integer(module, computation, instruction.operands[index], given)

    if opcode == "constant":
        digits = instruction.argument
        return int(digits) if digits.removeprefix("-").isdecimal() else None
    if opcode == "parameter":
        return given(int(instruction.argument), None)
    if opcode == "get-tuple-element":
        of, index = computation.operand(instruction, 0), int(instruction.attribute("index"))
        if of.opcode == "tuple":
            return _integer(module, computation, of.operands[index], given)
        return given(int(of.argument), index) if of.opcode == "parameter" else None
    if opcode in FOLLOWED:
        return operand(0)
    if opcode in _ARITHMETIC or opcode == "compare":
        compute = _ARITHMETIC.get(opcode) or _COMPARISONS[instruction.attribute("direction")]
        left, right = operand(0), operand(1)
        return None if left is None or right is None else compute(left, right)
    if opcode in ("fusion", "call"):
        callee = module.computations[instruction.called[0]]
        return _integer(
            module, callee, callee.root.name, lambda n, i: operand(n) if i is None else None
        )
    return None


class Loop(NamedTuple):
    """How a `while` runs."""

    trips: int | None  # None: not known when compiling
    fixed: dict[int, int]  # what it carries unchanged, by its index, where that is a known integer


def loop(
    module: Module, computation: Computation, instruction: Instruction, given: Given = _unknown
) -> Loop:
    """How often the `while` `instruction` of `computation` runs, given what that is given."""
    body, condition = (
        module.computations[instruction.attribute(key).lstrip("%")] for key in ("body", "condition")
    )
    initial = computation.operand(instruction, 0)
    while initial.opcode in FOLLOWED:
        initial = computation.operand(initial, 0)
    carried: dict[int, int] = {}
    for index, name in enumerate(initial.operands if initial.opcode == "tuple" else ()):
        value = _integer(module, computation, name, given)
        if value is not None:
            carried[index] = value

    def now(number: int, index: int | None) -> int | None:
        return None if index is None else carried.get(index)

    fixed, trips = dict(carried), 0
    while (more := _integer(module, condition, condition.root.name, now)) and trips < MOST_TRIPS:
        after = {i: _integer(module, body, body.root.operands[i], now) for i in carried}
        carried = {index: value for index, value in after.items() if value is not None}
        fixed = {index: value for index, value in fixed.items() if carried.get(index) == value}
        trips += 1
    return Loop(None if more is None or trips == MOST_TRIPS else trips, fixed)


class Run(NamedTuple):
    """An instruction of a program, and how often it runs."""

    computation: Computation
    instruction: Instruction
    trips: float
    known: bool  # False inside a loop of unknown length, which is counted as one trip
    # Computation and name of what began it, where it runs beside what follows until its end;
    # ("", "") where what follows waits for it.
    begun: tuple[str, str] = ("", "")
    ends: bool = False  # whether it only waits for what was begun


def runs(module: Module) -> list[Run]:
    """Every instruction that runs by itself, fusions whole, loops and calls followed, in order.

    What is begun says so, and what waits for it is among the runs. That is `all-reduce-start` and
    `all-reduce-done`; `call-start` on a TPU's SparseCores, which begins once a `call-update` gives
    it its operands; and fusions named `async-collective-start` and `async-collective-done`, which
    have the collective inside them, as have the fusions that go on with it in between.
    """
    return list(_runs(module, module.entry, 1.0, True, _unknown))


def _runs(
    module: Module, computation: Computation, trips: float, known: bool, given: Given
) -> Iterator[Run]:
    def called(names, times=trips, known=known, given=_unknown) -> Iterator[Run]:
        for name in names:
            yield from _runs(module, module.computations[name], times, known, given)

    for instruction in computation.instructions.values():
        opcode = instruction.opcode
        if opcode == "while":
            count, fixed = loop(module, computation, instruction, given)
            body = instruction.attribute("body").lstrip("%")
            times = trips * (1 if count is None else count)
            is_known = known and count is not None
            yield from called([body], times, is_known, lambda n, i, fixed=fixed: fixed.get(i))
        elif opcode == "conditional":
            branches = [list(called([name])) for name in instruction.called]
            yield from max(branches, key=lambda branch: _work(module, branch))
        elif opcode == "call":
            yield from called(instruction.called)
        elif opcode in ("async-start", "call-start", "async-update", "call-update"):
            begun = _beginning(computation, instruction)
            start = computation.instructions[begun[1]]
            if bool(start.operands) == opcode.endswith("-start"):
                yield from (run._replace(begun=begun) for run in called(start.called))
        elif instruction.name.startswith("async-collective-"):
            begun = (computation.name, f"channels {_channels(module, instruction)}")
            ends = instruction.name.startswith("async-collective-done")
            yield Run(computation, instruction, trips, known, begun, ends)
        elif opcode not in FREE and opcode != "copy-done":
            ends = opcode.endswith("-done")
            started = opcode.endswith("-start") and opcode != "copy-start"
            begun = _beginning(computation, instruction) if started or ends else ("", "")
            yield Run(computation, instruction, trips, known, begun, ends)


def _beginning(computation: Computation, instruction: Instruction) -> tuple[str, str]:
    """`Run.begun` of what a `-done` or an `-update` belongs to."""
    while instruction.opcode.endswith(("-done", "-update")):
        instruction = computation.operand(instruction, 0)
    return computation.name, instruction.name


def _channels(module: Module, fusion: Instruction) -> list[str]:
    """Which collectives a fusion contains: their channels, of which each has its own."""
    inner = module.computations[fusion.called[0]].instructions.values()
    return sorted(filter(None, (i.attribute("channel_id") for i in inner)))


def _work(module: Module, branch: list[Run]) -> tuple[float, float]:
    return tuple(
        sum(run.trips * cost(module, run.computation, run.instruction) for run in branch)
        for cost in (flops_of, bytes_of)
    )


def stacks(module: Module) -> float:
    """Bytes that loops of the forward pass stack up, a slice each trip, for the backward pass."""
    total = 0.0
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            if instruction.opcode != "while" or "transpose(" in instruction.source:
                continue
            trips = loop(module, computation, instruction).trips
            body = module.computations[instruction.attribute("body").lstrip("%")]
            for name, array in zip(body.root.operands, instruction.arrays):
                grown = array.dims[:1] == (trips,) and updated(module, body, name) is not None
                total += array.moved if grown else 0.0
    return total
