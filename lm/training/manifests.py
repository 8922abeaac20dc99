"""What a checkpoint should hold: written last, and compared when it is read.

The manifest has the size of every file, the CRC-32 of all but the large ones, and a checksum of the
values of every array. Those are computed where the arrays are, by the devices, from the state that
is saved and from the state that was read: nothing is read from disk for their sake, each device
sums its own shards, and the sum does not depend on how an array is sharded. It covers all that
happened to a value between the two. Large files hold values, and an index that Orbax checks.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.files import write_durably

MANIFEST = "manifest.json"
array_name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
_LARGE = 1 << 20  # bytes, from which on a file of Orbax's data gets no CRC-32


def damage(path: str | os.PathLike[str], checksums: bool = True) -> str | None:
    """Why the checkpoint at `path` cannot be trusted, in a few words, or None when it is intact.

    Compares its name with the step, and the size, and with `checksums` the CRC-32, of every file
    with the manifest. `differing` compares the arrays.
    """
    path = pathlib.Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        crc = manifest.pop("crc", None)  # which an older one lacks
        if crc is not None and crc != zlib.crc32(json.dumps(manifest).encode()):
            return f"{MANIFEST} does not match its checksum"
        if path.name != f"{manifest['step']:08d}":
            return f"it is that of step {manifest['step']}, renamed"
        for name, (size, crc) in manifest["files"].items():
            if ".." in name.split("/") or name.startswith("/"):
                return f"{MANIFEST} names {name!r}, which is not in it"
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if not (path / name).is_file():
                return f"{name} is no file"
            if checksums and crc is not None and _crc32(path / name) != crc:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{pathlib.Path(error.filename).relative_to(path)} is missing"
    except OSError as error:
        return f"{error.filename or path} cannot be read: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is not readable"
    return None


def write_manifest(
    path: pathlib.Path, step: int, metrics: dict[str, float], sums: dict[str, jax.Array] | None
) -> None:
    """Records every file below `path`, and `checksums` of the arrays; None records sizes only."""
    files = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            size = file.stat().st_size
            values = file.parent.name == "d" and size >= _LARGE  # OCDBT's name for its data
            crc = None if sums is None or values else _crc32(file)
            files[file.relative_to(path).as_posix()] = (size, crc)
    arrays = {name: int(value) for name, value in (sums or {}).items()}
    manifest = {"step": step, "metrics": metrics, "files": files, "arrays": arrays}
    manifest["crc"] = zlib.crc32(json.dumps(manifest).encode())
    write_durably(path / MANIFEST, json.dumps(manifest, indent=1))


def differing(path: pathlib.Path, tree: Any) -> str | None:
    """The first array of `tree`, read from the checkpoint at `path`, that is not what was saved."""
    saved = json.loads((path / MANIFEST).read_text(encoding="utf-8")).get("arrays", {})
    found = checksums({name: x for name, x in named_arrays(tree).items() if name in saved})
    return next((name for name, value in found.items() if int(value) != saved[name]), None)


def checksums(tree: Any) -> dict[str, jax.Array]:
    """A checksum, uint32, of the values of every array in `tree`: any one that changes changes it.

    On the devices; of arrays on a single one it is not waited for. All processes that hold a part
    of an array must call this.
    """
    arrays = named_arrays(tree)
    if any(len(array.sharding.device_set) > 1 for array in arrays.values()):
        jax.block_until_ready(arrays)
    sums = {}
    for name, array in arrays.items():
        devices, kind = array.sharding.device_set, array.sharding.memory_kind
        offloaded = kind and kind != next(iter(devices)).default_memory().kind
        if offloaded:
            array = jax.device_put(array, array.sharding.with_memory_kind("device"))
        sums[name] = _checksum(array)
        # One offloaded array at a time fits beside the rest. CPU devices, whose threads are few,
        # wait for each other for ever if several programs that reduce over them are under way.
        if offloaded or len(devices) > 1:
            sums[name].block_until_ready()
    return sums


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """Σᵢ mix(bitsᵢ + golden·i) modulo 2³², where `mix` is a bijection (MurmurHash3's finalizer).

    So a change of one element always changes the sum, and any other change with probability
    1 − 2⁻³². The order of summation does not matter.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    kind = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
    index = jnp.uint32(0)
    for axis, size in enumerate(bits.shape):
        index = index * np.uint32(size & 0xFFFFFFFF) + jax.lax.broadcasted_iota(
            jnp.uint32, bits.shape, axis
        )
    h = bits + index * np.uint32(0x9E3779B9)
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)


def is_array(leaf: Any) -> bool:
    """Whether it has a shape and a dtype, be it an array or a description of one."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def named_arrays(tree: Any) -> dict[str, Any]:
    """Every array of `tree` by its path; nodes that hold none (optax's EmptyState) drop out."""
    flat, _ = jax.tree.flatten_with_path(tree, is_leaf=is_array)
    return {array_name(path): leaf for path, leaf in flat if is_array(leaf)}


def _crc32(path: pathlib.Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return crc
