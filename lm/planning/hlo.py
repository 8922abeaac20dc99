"""The text of a compiled program, `Compiled.as_text()`, as computations of instructions.

The syntax is that of XLA's printer, for CPU, GPU and TPU, with or without types before operands.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_LEAF = re.compile(r"([a-z][a-z0-9]*)\[([^\]]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_END = re.compile(r"\}(, execution_thread=|$)")  # of a computation, perhaps of another core's
_BITS = re.compile(r"\d+")
_SPACE = re.compile(r"S\((\d+)\)")
_PARENTHESES = re.compile(r"[()]")

FOLLOWED = frozenset(["copy", "bitcast", "convert", "reshape", "copy-start", "copy-done"])
COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
_CALLS = (
    *("calls", "to_apply", "body", "branch_computations", "called_computations"),
    *("true_computation", "false_computation"),
)


class Array(NamedTuple):
    """One array: of a tuple, one leaf."""

    dtype: str
    dims: tuple[int, ...]
    space: int  # of memory; 0: HBM (or the host's, for a CPU's program)

    @property
    def size(self) -> int:
        """How many numbers."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """In any memory."""
        return self.size * _itemsize(self.dtype)

    @property
    def moved(self) -> float:
        """Bytes, if it is in HBM."""
        return self.bytes if self.space == 0 else 0.0


@functools.cache
def _itemsize(dtype: str) -> float:
    if dtype in ("token", "opaque"):
        return 0
    found = _BITS.search(dtype)
    return int(found[0]) / 8 if found else 1  # pred


@dataclasses.dataclass(eq=False)
class Instruction:
    """One line: `name = arrays opcode(operands), attributes`."""

    home: Computation = dataclasses.field(repr=False)
    name: str
    opcode: str
    arrays: tuple[Array, ...]
    argument: str  # what stands in the parentheses: a constant's value, a parameter's number
    attributes: str

    @functools.cached_property
    def operands(self) -> tuple[Instruction, ...]:
        """The instructions that it reads."""
        return tuple(self.home.instructions[name] for name in _NAME.findall(self.argument))

    @functools.cached_property
    def called(self) -> tuple[Computation, ...]:
        """The computations that it runs; of a `while` its body."""
        found = (self.attribute(key) for key in _CALLS)
        names = (name for value in found if value for name in _NAME.findall(value))
        return tuple(self.home.module[name] for name in names)

    @property
    def users(self) -> list[Instruction]:
        """The instructions that read it."""
        return self.home.users.get(self.name, [])

    @property
    def bytes(self) -> float:
        """Of all its arrays, in any memory."""
        return sum(array.bytes for array in self.arrays)

    @property
    def moved(self) -> float:
        """Bytes of all its arrays that are in HBM."""
        return sum(array.moved for array in self.arrays)

    def attribute(self, key: str) -> str | None:
        """The value of `key=…`: a word, or what its brackets hold, brackets included."""
        found = re.search(rf"(?:^|, ){key}=", self.attributes)
        return None if found is None else _value(self.attributes, found.end())

    @functools.cached_property
    def source(self) -> str:
        """The name of the operation in the traced program: `jit(step)/while/body/dot_general`."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(eq=False)
class Computation:
    """Instructions in order, by name."""

    name: str
    module: dict[str, Computation] = dataclasses.field(repr=False)  # all of the program, by name
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    root: Instruction | None = None  # what it computes

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """By number."""
        every = self.instructions.values()
        return {int(i.argument): i for i in every if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each one."""
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(operand.name for operand in instruction.operands):
                users.setdefault(name, []).append(instruction)
        return users


def parse(text: str) -> Computation:
    """The ENTRY computation of the program that `text` prints; the others are in its `module`.

    Raises:
      ValueError: it has no ENTRY computation.
    """
    module: dict[str, Computation] = {}
    entry = computation = None
    for line in _lines(text):
        if head := _HEAD.match(line):
            computation = module[head[2]] = Computation(head[2], module)
            entry = computation if head[1] else entry
        elif computation and (found := _LINE.match(line)):
            instruction = _instruction(computation, found[2], line[found.end() :])
            computation.instructions[instruction.name] = instruction
            computation.root = instruction if found[1] else computation.root
    if entry is None:
        raise ValueError("the text has no ENTRY computation: it is not HLO")
    return entry


def _value(text: str, start: int) -> str:
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] in "([{") - (text[index] in ")]}")
        if text[index] == "," and depth == 0:
            return text[start:index]
    return text[start:]


def _lines(text: str) -> Iterator[str]:
    """The lines of all computations; an instruction whose attributes have line breaks is one."""
    pending = ""
    for line in text.splitlines():
        if _END.match(line) or _LINE.match(line) or _HEAD.match(line):
            if pending:
                yield pending
            pending = line
        elif pending and not _END.match(pending):
            pending += line
    if pending:
        yield pending


def _instruction(home: Computation, name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text[0] == "(" else text.index(" ")
    arrays = tuple(_array(*leaf.groups()) for leaf in _LEAF.finditer(text[:end]))
    rest = text[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    attributes = rest[stop + 1 :].removeprefix(", ")
    return Instruction(home, name, rest[:start], arrays, rest[start + 1 : stop], attributes)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for found in _PARENTHESES.finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def _array(dtype: str, dims: str, layout: str | None) -> Array:
    space = _SPACE.search(layout or "")
    sizes = (int(size.strip("<=")) for size in dims.split(",") if size)
    return Array(dtype, tuple(sizes), int(space[1]) if space else 0)
