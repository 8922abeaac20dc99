"""Long arrays on disk, in files of bounded size.

An array of n items is the files NAME-00000.bin, NAME-00001.bin, …, each of `size` items but for the
last, which holds the rest; no file holds nothing. So where an item lies follows from its number,
and several machines can each write files of one array.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lm.data.storage import sync

# A file of tokens is then half or one gigabyte, one of offsets at most two.
SHARD_ITEMS = 1 << 28
# Mapped files hold a descriptor each, of which a process often has no more than 1,024.
_MOST_OPEN = 256


def shard_name(name: str, number: int) -> str:
    """The name of a file of the array `name`."""
    return f"{name}-{number:05d}.bin"


def shard_lengths(length: int, size: int) -> list[int]:
    """How many items each file of an array of `length` items holds."""
    return [min(size, length - start) for start in range(0, length, size)]


class ShardWriter:
    """Appends arrays to the files of one array."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, size: int = SHARD_ITEMS):
        self.folder = folder
        self.name = name
        self.dtype = np.dtype(dtype)
        self.size = size
        self.length = 0
        self._file: BinaryIO | None = None

    def append(self, items: np.ndarray) -> None:
        """Adds the items of a one-dimensional array of the same dtype."""
        items = np.ascontiguousarray(items, self.dtype)
        while len(items):
            within = self.length % self.size
            if self._file is None or not within:
                self.close()
                path = self.folder / shard_name(self.name, self.length // self.size)
                self._file = open(path, "wb")  # noqa: SIM115
            taken = items[: self.size - within]
            self._file.write(taken.data)
            self.length += len(taken)
            items = items[len(taken) :]

    def close(self) -> None:
        """Waits until all is on disk."""
        if self._file is not None:
            file, self._file = self._file, None
            with file:
                sync(file)


class Sharded:
    """An array in several files, read like a memory-mapped one: `x[i]`, `x[a:b]`, `x[indices]`."""

    def __init__(self, folder: Path, name: str, dtype: str, length: int, size: int):
        self.folder = folder
        self.name = name
        self.dtype = np.dtype(dtype)
        self.shape = (length,)
        self.size = size
        self._shard = functools.lru_cache(_MOST_OPEN)(self._map)

    def __len__(self) -> int:
        return self.shape[0]

    def _map(self, number: int) -> np.ndarray:
        length = min(self.size, len(self) - number * self.size)
        path = self.folder / shard_name(self.name, number)
        return np.memmap(path, self.dtype, mode="r", shape=(length,))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._stretch(start, max(start, stop))
            index = np.arange(start, stop, step)
        index = np.asarray(index)
        flat = index.reshape(-1)
        flat = np.where(flat < 0, flat + len(self), flat)
        if len(flat) and not (flat.min() >= 0 and flat.max() < len(self)):
            raise IndexError(f"index out of range for {len(self)} items")
        items = np.empty(flat.shape, self.dtype)
        # Rows are read by stretches, so that few places change from one file to another.
        which = flat // self.size
        cuts = np.flatnonzero(np.diff(which)) + 1
        for low, high in zip([0, *cuts], [*cuts, len(flat)]):
            if low < high:
                number = int(which[low])
                items[low:high] = self._shard(number)[flat[low:high] - number * self.size]
        return items.reshape(index.shape)[()]

    def _stretch(self, start: int, stop: int) -> np.ndarray:
        items = np.empty(stop - start, self.dtype)
        for number in range(start // self.size, -(-stop // self.size) if stop > start else 0):
            begin = number * self.size
            low, high = max(start, begin), min(stop, begin + self.size)
            items[low - start : high - start] = self._shard(number)[low - begin : high - begin]
        return items

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


def read_shards(
    folder: Path, name: str, dtype: str, length: int, size: int
) -> np.ndarray | Sharded:
    """The array `name` in `folder`, memory-mapped."""
    if not length:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    if length <= size:
        return np.memmap(folder / shard_name(name, 0), dtype, mode="r", shape=(length,))
    return Sharded(folder, name, dtype, length, size)


def load_shards(folder: Path, name: str, dtype: str, length: int, size: int) -> np.ndarray:
    """The array `name` in `folder`, in memory."""
    items = np.empty(length, dtype)
    for number, count in enumerate(shard_lengths(length, size)):
        path = folder / shard_name(name, number)
        items[number * size : number * size + count] = np.fromfile(path, dtype, count)
    return items


def right_sizes(folder: Path, name: str, dtype: str, length: int, size: int) -> bool:
    """Whether every file of an array is there, with as many bytes as it must have."""
    itemsize = np.dtype(dtype).itemsize
    return all(
        os.path.getsize(folder / shard_name(name, number)) == count * itemsize
        for number, count in enumerate(shard_lengths(length, size))
    )
