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


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = arrays opcode(operands), attributes`."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    argument: str  # what stands in the parentheses: a constant's value, a parameter's number
    attributes: str

    def attribute(self, key: str) -> str | None:
        """The value of `key=…`: a word, or what its brackets hold, brackets included."""
        found = re.search(rf"(?:^|, ){key}=", self.attributes)
        return None if found is None else _value(self.attributes, found.end())

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it runs."""
        return tuple(n for key in _CALLS for n in _NAME.findall(self.attribute(key) or ""))

    @functools.cached_property
    def source(self) -> str:
        """The name of the operation in the traced program: `jit(step)/while/body/dot_general`."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


def _value(text: str, start: int) -> str:
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] in "([{") - (text[index] in ")]}")
        if text[index] == "," and depth == 0:
            return text[start:index]
    return text[start:]


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in order, by name."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction

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
            for name in dict.fromkeys(instruction.operands):
                users.setdefault(name, []).append(instruction)
        return users

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        """The instruction that an operand names."""
        return self.instructions[instruction.operands[index]]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: Computation


def parse(text: str) -> Module:
    """The program that `text` prints.

    Raises:
      ValueError: it has no ENTRY computation.
    """
    computations, entry, name, root, body = {}, None, "", None, {}
    is_entry = False
    for line in _lines(text):
        if _END.match(line):
            computations[name] = Computation(name, body, root or list(body.values())[-1])
            entry = computations[name] if is_entry else entry
        elif found := _LINE.match(line):
            instruction = _instruction(found[2], line[found.end() :])
            body[instruction.name] = instruction
            root = instruction if found[1] else root
        elif head := _HEAD.match(line):
            is_entry, name, root, body = bool(head[1]), head[2], None, {}
    if entry is None:
        raise ValueError("the text has no ENTRY computation: it is not HLO")
    return Module(computations, entry)


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


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text[0] == "(" else text.index(" ")
    arrays = tuple(_array(*leaf.groups()) for leaf in _LEAF.finditer(text[:end]))
    rest = text[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    argument, attributes = rest[start + 1 : stop], rest[stop + 1 :].removeprefix(", ")
    operands = tuple(_NAME.findall(argument))
    return Instruction(name, rest[:start], arrays, operands, argument, attributes)


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
