"""What an instruction of a compiled program costs, each time it runs.

FLOPs     of dots and convolutions, 2 for each product that meets a value (not padding), in
          fusions too; and of kernels that state theirs
bytes     read and written in HBM, of each fusion as a whole: what lies between its operations
          stays on the chip, as do arrays that the compiler placed there (a TPU's S(1), VMEM). Of
          an operand that is only sliced, the slice; of a result updated in place, the update
"""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

import numpy as np

from lm.planning.hlo import Instruction

# Neither read nor write: names, tuples and the ends of what a `-start` began.
FREE = frozenset(
    (
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "domain"),
        *("partition-id", "replica-id", "after-all", "add-dependency"),
        *("opt-barrier", "optimization-barrier", "while", "conditional", "call"),
    )
)
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))

# ---- FLOPs -----------------------------------------------------------------------------------


def products(instruction: Instruction) -> list[Instruction]:
    """The dots and convolutions that an instruction consists of."""
    if instruction.opcode in ("dot", "convolution"):
        return [instruction]
    if instruction.opcode != "fusion":
        return []
    inner = instruction.called[0].instructions.values()
    return [product for one in inner for product in products(one)]


def product_flops(instruction: Instruction) -> float:
    """FLOPs of a dot or a convolution."""
    left, kernel = (operand.arrays[0] for operand in instruction.operands[:2])
    if instruction.opcode == "dot":
        contracted = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims") or "")
        return 2.0 * instruction.arrays[0].size * math.prod(left.dims[int(d)] for d in contracted)
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels"))
    groups = int(instruction.attribute("batch_group_count") or 1)
    total = 2.0 * left.dims[labels[1].index("b")] / groups
    total *= kernel.dims[labels[2].index("i")] * kernel.dims[labels[2].index("o")]
    window = _window(instruction.attribute("window") or "{}")
    for place, letter in enumerate(sorted(set(labels[1]) - {"b", "f"})):
        total *= _meetings(
            left.dims[labels[1].index(letter)],
            kernel.dims[labels[2].index(letter)],
            instruction.arrays[0].dims[labels[3].index(letter)],
            *(values[place] if place < len(values) else default for values, default in window),
        )
    return total


def _window(text: str):
    """(values for each spatial dimension, default) of stride, pad, lhs_dilate and rhs_dilate."""
    fields = dict(part.split("=") for part in text.strip("{}").split())

    def split(key, default, convert):
        return [convert(v) for v in fields[key].split("x")] if key in fields else [], default

    return (
        split("stride", 1, int),
        split("pad", 0, lambda pair: int(pair.split("_")[0])),
        split("lhs_dilate", 1, int),
        split("rhs_dilate", 1, int),
    )


@functools.cache
def _meetings(size, kernel, outputs, stride, pad, dilation, kernel_dilation) -> int:
    """How many (output, kernel) places read a value, and not padding or a hole of dilation."""
    if kernel == 1 and pad == 0 and dilation == 1:
        return outputs
    places, count = np.arange(outputs, dtype=np.int64) * stride - pad, 0
    for offset in range(kernel):
        read = places + offset * kernel_dilation
        inside = (read >= 0) & (read <= (size - 1) * dilation) & (read % dilation == 0)
        count += int(inside.sum())
    return count


def stated(instruction: Instruction, what: str) -> float:
    """What a kernel states of itself, `flops` or `bytes_accessed`; 0 if it does not."""
    if instruction.opcode != "custom-call":
        return 0.0
    found = re.search(rf'"{what}":"?(\d+)', instruction.attributes)
    return float(found[1]) if found else 0.0


# Products of [queries, keys] by [keys, width of a head] that kernels of attention take, by what is
# in their names: the scores and the mixing of values; and backwards those, and their gradients.
_ATTENTION = (
    (re.compile("fwd|forward"), 2),
    (re.compile("dkv|backward_key"), 4),
    (re.compile("dq|backward_query"), 3),
)


def attention_flops(instruction: Instruction) -> float:
    """FLOPs of a Pallas kernel of attention that does not state them, if all pairs are seen.

    Its first two operands of rank four are queries [B, H, T, C] and keys [B, K, S, C]. 0 for any
    other instruction.
    """
    if 'custom_call_target="tpu_custom_call"' not in instruction.attributes:
        return 0.0
    if stated(instruction, "flops"):
        return 0.0
    if pages := _Pages.of(instruction):
        return pages.flops
    if not re.search("splash|flash|ring", instruction.name):
        return 0.0
    arrays = [array for operand in instruction.operands for array in operand.arrays]
    ranked = [a.dims for a in arrays if len(a.dims) == 4]
    counts = [count for pattern, count in _ATTENTION if pattern.search(instruction.name)]
    if len(ranked) < 2 or not counts:
        return 0.0
    return counts[0] * 2.0 * math.prod(ranked[0]) * ranked[1][2]


def flops_of(instruction: Instruction) -> float:
    """FLOPs of running an instruction once."""
    return sum(map(product_flops, products(instruction))) + stated(instruction, "flops")


class _Pages(NamedTuple):
    """What JAX's kernel for attention over pages is given; all rows have all their pages."""

    tokens: int  # of all rows
    heads: int
    width: int  # of one
    keys: int  # that each token sees; of rows that are read, their own
    page: float  # bytes of a page for each token that it holds
    rows: int

    @classmethod
    def of(cls, instruction: Instruction) -> _Pages | None:
        if not instruction.name.startswith("ragged_paged_attention"):
            return None
        table, query, pool = (instruction.operands[i].arrays[0] for i in (1, -2, -1))
        rows, pages = table.dims
        keys = pages * pool.dims[1] if query.dims[0] == rows else query.dims[0] // rows
        token = pool.moved / pool.dims[0] / pool.dims[1]
        return cls(*query.dims, keys, token, rows)

    @property
    def flops(self) -> float:
        return 4.0 * self.tokens * self.heads * self.width * self.keys

    @property
    def bytes(self) -> float:
        return self.rows * self.keys * self.page


# ---- Bytes -----------------------------------------------------------------------------------


def bytes_of(instruction: Instruction) -> float:
    """Bytes that running an instruction once reads and writes in HBM."""
    opcode, operands = instruction.opcode, instruction.operands
    if opcode in FREE or opcode.endswith("-done"):
        return 0.0
    if opcode == "custom-call" and 'custom_call_target="AllocateBuffer"' in instruction.attributes:
        return 0.0
    result = instruction.moved
    if opcode == "custom-call" and (pages := _Pages.of(instruction)):
        return result + pages.bytes + sum(operand.moved for operand in operands[:-1])
    if opcode == "fusion":
        parameters = instruction.called[0].parameters
        read = sum(
            min(operand.moved, read_of(parameters[number]))
            for number, operand in enumerate(operands)
            if operand.moved and number in parameters
        )
        return read + _written(instruction)
    if opcode in _SLICES:
        return result + min(result, operands[0].moved)
    if opcode == "dynamic-update-slice":
        return 2 * operands[1].arrays[0].moved
    if opcode == "scatter":
        return 3 * operands[-1].arrays[0].moved
    if opcode == "copy-start":
        result = instruction.arrays[0].moved
    elif opcode.endswith("-start"):  # the result is beside what it was made of
        result = min(result, instruction.arrays[-1 if len(instruction.arrays) < 3 else 1].moved)
    return result + sum(operand.moved for operand in operands)


def read_of(value: Instruction) -> float:
    """Bytes of a value that the others of its computation read, wherever it is."""
    if value.home.root is value:
        return value.bytes
    total = 0.0
    for user in value.users:
        if user.opcode in _SLICES and user.operands[0] is value:
            total += user.bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] is value:
            continue
        elif user.opcode == "scatter" and user.operands[0] is value:
            continue
        elif user.opcode in ("bitcast", "get-tuple-element", "copy-start", "copy-done"):
            total += read_of(user)
        elif user.opcode == "fusion" and user.attribute("output_to_operand_aliasing"):
            total += read_of(user)  # the same array, tiled otherwise
        elif user.opcode == "fusion":
            parameters = user.called[0].parameters
            for number, operand in enumerate(user.operands):
                if operand is value and number in parameters:
                    total += read_of(parameters[number])
        else:
            return value.bytes
    return total


def _written(fusion: Instruction) -> float:
    """Bytes of a fusion's results that it writes."""
    root = fusion.called[0].root
    values = root.operands if root.opcode == "tuple" else (root,)
    if len(values) != len(fusion.arrays):
        return fusion.moved
    return sum(
        min(array.moved, updated(value) or array.bytes)
        for value, array in zip(values, fusion.arrays)
    )


def updated(value: Instruction) -> float | None:
    """Bytes of the update, where a value is another one updated in place; else None."""
    while value.opcode == "bitcast":
        value = value.operands[0]
    if value.opcode == "fusion":
        root = value.called[0].root
        return updated(root) if root.opcode != "tuple" else None
    if value.opcode == "scatter":
        return 2 * value.operands[-1].arrays[0].bytes  # what is there is read, too
    return value.operands[1].arrays[0].bytes if value.opcode == "dynamic-update-slice" else None
