"""MXFP4: numbers of four bits with a common power of two for 32 of them, read as bfloat16.

A tensor `NAME` of which products sum over the last axis is in a file as `NAME_blocks`
[…, groups, 16], two numbers a byte, the lower half first, and `NAME_scales` […, groups], powers of
two from 2^-127 on, uint8 (Rouhani et al. 2023, §5; gpt-oss's model card, §2.1). It stands for the
last two axes of the parameter the other way around.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from lm.models.huggingface.safetensors import Stored

_BLOCKS, _SCALES = "_blocks", "_scales"
_BYTES = 16  # of a group
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # two bits of exponent and one of mantissa


@dataclasses.dataclass(frozen=True)
class Packed:
    """A tensor that two tensors of files hold; as `Stored`."""

    blocks: Stored
    scales: Stored
    dtype: str = "BF16"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what `read` gives."""
        *leading, rows, groups, _ = self.blocks.shape
        return (*leading, 2 * _BYTES * groups, rows)

    @property
    def size(self) -> int:
        """Bytes of what `read` gives."""
        return 4 * self.blocks.size

    def read(self) -> np.ndarray:
        """All of the numbers, each exact, unless it is beyond bfloat16."""
        blocks, scales = self.blocks.read(), self.scales.read()
        pairs = np.empty(blocks.shape, np.uint32)
        for index in np.ndindex(blocks.shape[:-3]):  # less than all at once
            places = scales[index][..., None].astype(np.uint16) << 8 | blocks[index]
            pairs[index] = _pairs()[places]
        numbers = pairs.view(ml_dtypes.bfloat16)
        return numbers.reshape(*blocks.shape[:-2], -1).swapaxes(-1, -2)


@functools.cache
def _pairs() -> np.ndarray:
    """The two bfloat16 numbers, side by side, of each scale and byte: uint32 [256 · 256]."""
    signed = np.array([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        powers = np.exp2(np.arange(256, dtype=np.float64) - 127).astype(np.float32)
        bits = (powers[:, None] * signed).astype(ml_dtypes.bfloat16).view(np.uint16)
    byte = np.arange(256)
    return np.stack([bits[:, byte & 15], bits[:, byte >> 4]], -1).view(np.uint32).reshape(-1)


def unpacked(found: Mapping[str, Stored]) -> dict[str, Stored | Packed]:
    """The tensors, with one in place of every two that hold four-bit numbers and their scales."""
    result: dict[str, Stored | Packed] = dict(found)
    for name, blocks in found.items():
        own = name.removesuffix(_BLOCKS)
        scales = found.get(own + _SCALES)
        if own == name or scales is None or len(blocks.shape) < 3:
            continue
        if (scales.dtype, blocks.dtype, blocks.shape) == ("U8", "U8", (*scales.shape, _BYTES)):
            result[own] = Packed(result.pop(name), result.pop(own + _SCALES))
    return result
