"""The safetensors format: named arrays in files, read and written one at a time.

A file is the length of its header (8 bytes, little-endian), the header (JSON: each tensor's dtype,
shape and place), and the numbers. A large model has several, and an index of which tensor is where.
https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from lm.config import ConfigError, check
from lm.files import is_plain, parse_json, read_json

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The format's name of each dtype that weights may have.
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# And of those that hold numbers of fewer bits, or are to be multiplied.
_READ = {**DTYPES, "U8": np.dtype(np.uint8), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
_NAMES = {dtype.name: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file: what it is, and where.

    Attributes:
      file: its file.
      dtype: as the format names it: F32, BF16, I64, F8_E4M3, …
      shape: its shape.
      start: where its numbers begin in the file.
      size: their bytes.
    """

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self) -> np.ndarray:
        """The numbers, mapped into memory: only what is looked at is read.

        Raises:
          ConfigError: a dtype that is neither in `DTYPES` nor U8 nor F8_E4M3.
        """
        check(
            self.dtype in _READ,
            f"{self.file} has a tensor of dtype {self.dtype}, not one of {', '.join(DTYPES)}: "
            "quantized or double-precision weights must be converted first",
        )
        dtype = _READ[self.dtype]
        if self.size == 0:
            return np.empty(self.shape, dtype)
        count = self.size // dtype.itemsize
        return np.memmap(self.file, dtype, "r", self.start, (count,)).reshape(self.shape)


def find(directory: str | os.PathLike[str]) -> dict[str, Stored]:
    """Every tensor of the model in `directory`, by name.

    Raises:
      ConfigError: no safetensors there, a file that is truncated or damaged, or one that the index
        names and that is not there.
    """
    directory = pathlib.Path(directory)
    if (directory / FILE).is_file():
        return read_header(directory / FILE)
    if (directory / INDEX).is_file():
        return _find_sharded(directory)
    others = sorted(p.name for p in directory.glob("*.bin")) + sorted(
        p.name for p in directory.glob("*.pt*")
    )
    check(
        not others,
        f"{directory} has its weights in {others[0] if others else ''}, not in {FILE}: convert "
        'them with transformers, AutoModelForCausalLM.from_pretrained(DIR).save_pretrained("NEW")',
    )
    raise ConfigError(f"{directory} has no weights: neither {FILE} nor {INDEX}")


def _find_sharded(directory: pathlib.Path) -> dict[str, Stored]:
    index = directory / INDEX
    places = read_json(index).get("weight_map")
    check(
        isinstance(places, dict) and all(isinstance(file, str) for file in places.values()),
        f"{index} is damaged: its weight_map does not say which tensor is in which file",
    )
    found: dict[str, Stored] = {}
    for name in sorted(set(places.values())):
        check(is_plain(name), f"{index} names {name!r}, which is no file's name in this directory")
        check(
            (directory / name).is_file(),
            f"{index} names {name}, which is not there: the download is incomplete",
        )
        found |= read_header(directory / name)
    for name, file in places.items():
        check(
            name in found and found[name].file.name == file,
            f"{index} says that {name} is in {file}, but it is not",
        )
    return found


def read_header(file: pathlib.Path) -> dict[str, Stored]:
    """Every tensor of one file, by name.

    Raises:
      ConfigError: a file that is truncated or damaged.
    """
    total = file.stat().st_size
    with file.open("rb") as data:
        first = data.read(8)
        length = int.from_bytes(first, "little")
        check(
            first != b"version ",
            f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` where it is from",
        )
        check(
            len(first) == 8 and 8 + length <= total,
            f"{file} is truncated or no safetensors file: it has {total} bytes, and its header "
            f"should take {8 + length if len(first) == 8 else 'more than 8'}",
        )
        check(
            length <= _LONGEST_HEADER,
            f"{file} has a header of {length:,} bytes, where the format allows {_LONGEST_HEADER:,}",
        )
        header = parse_json(data.read(length), f"{file}: its header")
    try:
        header.pop("__metadata__", None)
        found = {name: _stored(file, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} has a damaged header: {error!r}"[:300]) from None
    end = 8 + length
    for name, entry in sorted(found.items(), key=lambda item: (item[1].start, item[1].size)):
        itemsize = _READ[entry.dtype].itemsize if entry.dtype in _READ else None
        fits = itemsize is None or entry.size == itemsize * math.prod(entry.shape)
        check(
            entry.start == end and entry.size >= 0 and fits,
            f"{file} has a damaged header: {name} ({entry.dtype}{list(entry.shape)}) is said to be "
            f"the {entry.size} bytes from {entry.start} on, after others that end at {end}",
        )
        end += entry.size
    check(
        end == total,
        f"{file} is truncated: it has {total} bytes of {end}; download it again"
        if end > total
        else f"{file} has {total - end} bytes at its end that its header does not know of",
    )
    return found


def _stored(file: pathlib.Path, entry: Mapping[str, Any], body: int) -> Stored:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in (start, end, *shape)):
        raise ValueError(f"shape {shape}, data_offsets {[start, end]}")
    return Stored(file, str(entry["dtype"]), shape, body + start, end - start)


def write(
    directory: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str | Mapping[str, str],
    tensors: Iterable[tuple[str, np.ndarray]],
    shard_bytes: int,
) -> list[pathlib.Path]:
    """Writes tensors as they come: one file, or several with an index.

    Args:
      directory: is there, and has no weights yet.
      shapes: of all tensors, in the order in which they come.
      dtype: that they (or each by name) are converted to: float32, bfloat16 or float16.
      tensors: name, array; each is written before the next is asked for.
      shard_bytes: the most a file may hold, unless one tensor alone is larger.

    Returns:
      The files with tensors in them.

    Raises:
      ConfigError: the disk is full, or a number too large for the dtype.
    """
    dtypes = dict.fromkeys(shapes, dtype) if isinstance(dtype, str) else dtype
    shards: list[dict[str, int]] = [{}]
    for name, shape in shapes.items():
        size = DTYPES[_NAMES[dtypes[name]]].itemsize * math.prod(shape)
        if shards[-1] and sum(shards[-1].values()) + size > shard_bytes:
            shards.append({})
        shards[-1][name] = size
    count = len(shards)
    files = [
        directory / (FILE if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors")
        for i in range(1, count + 1)
    ]
    coming = iter(tensors)
    try:
        for file, sizes in zip(files, shards):
            write_file(file, {name: shapes[name] for name in sizes}, dtypes, coming)
        if count > 1:
            total = sum(sum(sizes.values()) for sizes in shards)
            places = {name: file.name for file, sizes in zip(files, shards) for name in sizes}
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written: {error.strerror or error}") from None
    return files


def write_file(
    file: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str | Mapping[str, str],
    coming: Iterator[tuple[str, np.ndarray]],
) -> None:
    """Writes one file of the next tensors that come; arguments and errors as of `write`."""
    dtypes = dict.fromkeys(shapes, dtype) if isinstance(dtype, str) else dtype
    header, end = {}, 0
    for name, shape in shapes.items():
        there = _NAMES[dtypes[name]]
        start, end = end, end + DTYPES[there].itemsize * math.prod(shape)
        header[name] = {"dtype": there, "shape": list(shape), "data_offsets": [start, end]}
    # transformers asks which framework's layout it is; only PyTorch's is in use.
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as data:
        data.write(len(text).to_bytes(8, "little") + text)
        for name, array in itertools.islice(coming, len(shapes)):
            if array.shape != tuple(header[name]["shape"]):
                raise ValueError(f"{name} is {array.shape}, not {header[name]['shape']}")
            array = np.ascontiguousarray(converted(array, dtypes[name], name))
            data.write(array.reshape(-1).view(np.uint8).data)
        data.flush()
        os.fsync(data.fileno())


def converted(array: np.ndarray, dtype: str | np.dtype, name: str) -> np.ndarray:
    """`array` in `dtype`; itself where it is that already.

    Raises:
      ConfigError: finite numbers of the tensor `name` that `dtype` does not reach.
    """
    dtype = np.dtype(dtype)
    with np.errstate(over="ignore"):
        result = array.astype(dtype, copy=False)
    if dtype == np.float16 and array.dtype != dtype:
        lost = ~np.isfinite(result) & np.isfinite(array)
        if lost.any():
            value = float(array[lost].reshape(-1)[0])
            raise ConfigError(
                f"{name} has numbers such as {value:.4g}, beyond float16's 65504: use bfloat16 or "
                "float32"
            )
    return result


@contextlib.contextmanager
def readable(what: str):
    """Turns errors of the file system, and want of memory, into a ConfigError that names `what`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{what} cannot be read: {error.strerror or error}") from None
    except MemoryError:
        raise ConfigError(f"{what} does not fit into the memory of this machine") from None
