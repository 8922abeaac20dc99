"""Matrices of eight bits with a scale for each block (DeepSeek-V3 report, §3.3.2), read as float32.

A matrix `NAME` [out, in] of float8_e4m3fn is in a file beside `NAME_scale_inv` [⌈out/128⌉,
⌈in/128⌉], float32: what the numbers of each block of 128 × 128 are multiplied by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from lm.models.huggingface.safetensors import Stored

BLOCK = 128
_SCALES = "_scale_inv"
Other = TypeVar("Other")


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A tensor that two tensors of files hold; as `Stored`."""

    numbers: Stored
    scales: Stored
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what `read` gives."""
        return self.numbers.shape

    @property
    def size(self) -> int:
        """Bytes of what `read` gives."""
        return 4 * self.numbers.size

    def read(self) -> np.ndarray:
        """All of the numbers, each the float32 nearest to it."""
        array = self.numbers.read().astype(np.float32)
        for row, scales in enumerate(np.repeat(self.scales.read(), BLOCK, 1)):
            array[row * BLOCK : (row + 1) * BLOCK] *= scales[: array.shape[1]]
        return array


def scaled(found: Mapping[str, Stored | Other]) -> dict[str, Stored | Scaled | Other]:
    """The tensors, with one in place of every two that hold eight-bit numbers and their scales."""
    result: dict[str, Stored | Scaled | Other] = dict(found)
    for name, numbers in found.items():
        scales = found.get(name + _SCALES)
        if scales is None or (numbers.dtype, scales.dtype) != ("F8_E4M3", "F32"):
            continue
        if scales.shape == tuple(-(-size // BLOCK) for size in numbers.shape[-2:]):
            result[name] = Scaled(numbers, result.pop(name + _SCALES))
    return result
