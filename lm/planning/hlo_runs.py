"""How often every instruction of a compiled program runs.

The compiler's own cost analysis counts the body of a loop once. A model's layers are one loop, so
here instructions are counted as often as they run: a loop's trips are in its `known_trip_count`, or
follow from its condition, its step and where it starts. Of a conditional's branches the one with
most work counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from lm.planning.hlo import FOLLOWED, Computation, Instruction, Module
from lm.planning.hlo_costs import FREE, bytes_of, flops_of, updated


class _Number(NamedTuple):
    """An integer, or what a loop carries at index `carry` plus one."""

    carry: int | None
    offset: int


def _evaluate(module, computation: Computation, name: str, given) -> _Number | None:
    """What an integer is, as far as it is known when compiling.

    Args:
      module: the program.
      computation: where it is computed.
      name: of the instruction.
      given: (parameter's number, index in its tuple or None) → `_Number` or None.
    """
    instruction = computation.instructions[name]
    opcode = instruction.opcode

    def operand(index):
        return _evaluate(module, computation, instruction.operands[index], given)

    if opcode == "constant":
        return _Number(None, int(instruction.argument)) if _is_integer(instruction) else None
    if opcode == "parameter":
        return given(int(instruction.argument), None)
    if opcode == "get-tuple-element":
        of = computation.operand(instruction, 0)
        index = int(instruction.attribute("index"))
        if of.opcode == "tuple":
            return _evaluate(module, computation, of.operands[index], given)
        return given(int(of.argument), index) if of.opcode == "parameter" else None
    if opcode in FOLLOWED:
        return operand(0)
    if opcode in ("add", "subtract"):
        left, right = operand(0), operand(1)
        if left is None or right is None or right.carry is not None:
            if opcode == "add" and left and right and left.carry is None:
                return _Number(right.carry, right.offset + left.offset)
            return None
        return _Number(left.carry, left.offset + (right if opcode == "add" else _minus(right))[1])
    if opcode in ("fusion", "call"):
        callee = module.computations[instruction.called[0]]
        return _evaluate(
            module, callee, callee.root.name, lambda n, i: operand(n) if i is None else None
        )
    return None


def _minus(number: _Number) -> _Number:
    return _Number(number.carry, -number.offset)


def _is_integer(instruction: Instruction) -> bool:
    return re.fullmatch(r"-?\d+", instruction.argument) is not None


class Loop(NamedTuple):
    """How a `while` runs."""

    trips: int | None  # None: not known when compiling
    fixed: dict[int, _Number]  # what it carries unchanged, where that is a known number


def loop(module: Module, computation: Computation, instruction: Instruction, given) -> Loop:
    """How often the `while` `instruction` of `computation` runs; `given` as in `_evaluate`."""
    body = module.computations[instruction.attribute("body").lstrip("%")]
    condition = module.computations[instruction.attribute("condition").lstrip("%")]
    initial = computation.operand(instruction, 0)
    while initial.opcode in FOLLOWED:
        initial = computation.operand(initial, 0)
    start = {}
    if initial.opcode == "tuple":
        for index, name in enumerate(initial.operands):
            value = _evaluate(module, computation, name, given)
            if value is not None and value.carry is None:
                start[index] = value

    def carried(number, index):
        return _Number(index, 0) if number == 0 and index is not None else None

    step = {}
    for index, name in enumerate(body.root.operands):
        value = _evaluate(module, body, name, carried)
        if value is not None and value.carry == index:
            step[index] = value.offset
    fixed = {index: value for index, value in start.items() if step.get(index) == 0}

    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.attributes)
    if known:
        return Loop(int(known[1]), fixed)
    test, lookup = _comparison(module, condition, lambda n, i: fixed.get(i) or carried(n, i))
    if test is None:
        return Loop(None, fixed)
    (left, right), direction = lookup, test.attribute("direction")
    if left is None or right is None or (left.carry is None) == (right.carry is None):
        return Loop(None, fixed)
    if left.carry is None:
        left, right = right, left
        direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
    by, first = step.get(left.carry, 0), start.get(left.carry)
    if not by or first is None or ((by > 0) != (direction in ("LT", "LE")) and direction != "NE"):
        return Loop(None, fixed)
    distance = right.offset - left.offset - first.offset
    if direction in ("LE", "GE"):
        distance += 1 if direction == "LE" else -1
    return Loop(max(0, math.ceil(distance / by)), fixed)


def _comparison(module, computation: Computation, given):
    """The comparison that a loop's condition ends in, and what it compares."""
    instruction = computation.root
    while instruction.opcode in FOLLOWED:
        instruction = computation.operand(instruction, 0)
    if instruction.opcode in ("fusion", "call"):
        callee = module.computations[instruction.called[0]]

        def passed(number, index):
            if index is not None:
                return None
            return _evaluate(module, computation, instruction.operands[number], given)

        return _comparison(module, callee, passed)
    if instruction.opcode != "compare":
        return None, None
    sides = (_evaluate(module, computation, name, given) for name in instruction.operands)
    return instruction, tuple(sides)


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
    return list(_runs(module, module.entry, 1.0, True, lambda number, index: None))


def _beginning(computation: Computation, instruction: Instruction) -> tuple[str, str]:
    """`Run.begun` of what a `-done` or an `-update` belongs to."""
    while instruction.opcode.endswith(("-done", "-update")):
        instruction = computation.operand(instruction, 0)
    return computation.name, instruction.name


def _runs(module, computation, trips, known, given) -> Iterator[Run]:
    for instruction in computation.instructions.values():
        opcode = instruction.opcode
        if opcode == "while":
            found = loop(module, computation, instruction, given)
            body = module.computations[instruction.attribute("body").lstrip("%")]

            def inside(number, index, fixed=found.fixed):
                return fixed.get(index) if number == 0 else None

            times = trips * (1 if found.trips is None else found.trips)
            yield from _runs(module, body, times, known and found.trips is not None, inside)
        elif opcode == "conditional":
            branches = [
                list(_runs(module, module.computations[name], trips, known, lambda n, i: None))
                for name in instruction.called
            ]
            yield from max(branches, key=lambda runs: _work(module, runs))
        elif opcode == "call":
            yield from _called(module, instruction, trips, known)
        elif opcode in ("async-start", "call-start", "async-update", "call-update"):
            begun = _beginning(computation, instruction)
            start = computation.instructions[begun[1]]
            if bool(start.operands) == opcode.endswith("-start"):
                for run in _called(module, start, trips, known):
                    yield run._replace(begun=begun)
        elif instruction.name.startswith("async-collective-"):
            begun = (computation.name, f"channels {_channels(module, instruction)}")
            ends = instruction.name.startswith("async-collective-done")
            yield Run(computation, instruction, trips, known, begun, ends)
        elif opcode not in FREE and opcode != "copy-done":
            ends = opcode.endswith("-done")
            started = opcode.endswith("-start") and opcode != "copy-start"
            begun = _beginning(computation, instruction) if started or ends else ("", "")
            yield Run(computation, instruction, trips, known, begun, ends)


def _channels(module: Module, fusion: Instruction) -> list[str]:
    """Which collectives a fusion contains: their channels, of which each has its own."""
    inner = module.computations[fusion.called[0]].instructions.values()
    return sorted(filter(None, (i.attribute("channel_id") for i in inner)))


def _called(module: Module, instruction: Instruction, trips, known) -> Iterator[Run]:
    for name in instruction.called:
        yield from _runs(module, module.computations[name], trips, known, lambda n, i: None)


def _work(module: Module, branch: list[Run]) -> tuple[float, float]:
    flops = sum(run.trips * flops_of(module, run.computation, run.instruction) for run in branch)
    moved = sum(run.trips * bytes_of(module, run.computation, run.instruction) for run in branch)
    return flops, moved


def stacks(module: Module) -> float:
    """Bytes that loops of the forward pass stack up, a slice each trip, for the backward pass."""
    total = 0.0
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            if instruction.opcode != "while" or "transpose(" in instruction.source:
                continue
            trips = loop(module, computation, instruction, lambda number, index: None).trips
            body = module.computations[instruction.attribute("body").lstrip("%")]
            for name, array in zip(body.root.operands, instruction.arrays):
                grown = array.dims[:1] == (trips,) and updated(module, body, name) is not None
                total += array.moved if grown else 0.0
    return total
