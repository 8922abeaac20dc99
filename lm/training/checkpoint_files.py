"""The files of one checkpoint: its arrays, through Orbax, and what they should hold.

The manifest, which is written last, has the size of every file, the CRC-32 of all but those with
values, and a checksum of the values of every array. Those are computed where the arrays are, by the
devices, from the state that is saved and from the state that was read: nothing is read from disk
for their sake, each device sums its own shards, and the sum does not depend on how an array is
sharded. It covers all that happened to a value between the two.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import tempfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from lm.config import ConfigError, check
from lm.files import replacing

MANIFEST = "manifest.json"
T = TypeVar("T")
array_name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
# What Orbax raises comes to whoever saves or loads; it also logs it, from each of its threads.
for name in ("absl", "asyncio"):
    logging.getLogger(name).addFilter(lambda record: "/orbax/" not in record.pathname)


class Damaged(ConfigError):
    """What a checkpoint holds is not what was saved: a few words that say where."""


def save_tree(path: pathlib.Path, tree: Any) -> ocp.AsyncResponse[None]:
    """Starts to write `tree` to `path`; the response's `result()` waits for all processes."""
    with _orbax_context():
        return ocp.save_async(_plain(path.parent) / path.name, tree)


def load_tree(path: pathlib.Path, abstract: Any, partial: bool) -> Any:
    """The tree at `path` shaped like `abstract`; `partial` leaves out what it does not name.

    Raises:
      Damaged: it cannot be decoded, or an array is not the one that was saved.
      ConfigError: it cannot be read, or does not fit `abstract`.
    """
    there = _check_fits(path, abstract, partial)

    def as_saved(name, leaf):  # to be converted only once its checksum was compared
        dtype = there[array_name(name)].dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

    target = jax.tree.map_with_path(as_saved, abstract)
    context = _orbax_context()
    context.pytree.loading.partial_load = partial
    if jax.process_count() > 1 and own_devices_only(abstract):
        here = jax.process_index()
        context.multiprocessing.primary_host = here
        context.multiprocessing.active_processes = {here}
        context.multiprocessing.barrier_sync_key_prefix = f"alone_{here}"
    with context:
        tree = _read(path, lambda path: ocp.load(path, target))
    saved = read_manifest(path).get("arrays", {})
    arrays = {name: array for name, array in named_arrays(tree).items() if name in saved}
    for name, value in checksums(arrays).items():
        if int(value) != saved[name]:
            raise Damaged(f"{name} does not match its checksum")

    def as_wanted(leaf, like):
        return leaf if leaf.dtype == like.dtype else leaf.astype(like.dtype)

    return jax.tree.map(as_wanted, tree, abstract)


def _check_fits(path: pathlib.Path, abstract: Any, partial: bool) -> dict[str, Any]:
    """Descriptions of the arrays at `path`, by name.

    Orbax reads missing arrays as nothing and casts silently; both would be a wrong resume.

    Raises:
      ConfigError: they are not those of `abstract`.
    """
    tree = _read(path, ocp.metadata).metadata
    if tree is None:  # Orbax says so where it cannot read them
        raise Damaged("the index of its arrays cannot be read")
    saved, wanted = named_arrays(tree), named_arrays(abstract)
    wrong = []
    for name in sorted(wanted if partial else wanted | saved, key=lambda n: n[:7] != "params/"):
        there, here = (arrays.get(name) for arrays in (saved, wanted))
        if there is None or here is None:
            place = "configuration" if there is None else "checkpoint"
            wrong.append(f"{name} is only in the {place}")
            continue
        kinds = [(tuple(x.shape), "" if partial else np.dtype(x.dtype)) for x in (there, here)]
        if kinds[0] != kinds[1]:
            was, now = (f"{np.dtype(x.dtype).name}{list(x.shape)}" for x in (there, here))
            wrong.append(f"{name} is {was} there and {now} here")
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    if wrong:
        raise ConfigError(
            f"{path} was saved with another configuration: {wrong[0]}{more}; restore the "
            "configuration it was saved with, or choose an empty --workdir"
        )
    return saved


def _read(path: pathlib.Path, read: Callable[[pathlib.Path], T]) -> T:
    try:
        return read(_plain(path.parent) / path.name)
    except ConfigError:
        raise
    except Exception as error:
        known = isinstance(error, OSError | MemoryError | jax.errors.JaxRuntimeError)
        if known or jax.process_count() > 1:  # the others may have read their part of it
            raise ConfigError(f"{path} could not be read: {reason(error)}") from error
        raise Damaged(f"cannot be decoded: {reason(error)}") from error


def own_devices_only(abstract: Any) -> bool:
    """Whether arrays like these lie on devices of this process alone."""
    placed = [leaf.sharding for leaf in jax.tree.leaves(abstract) if leaf.sharding is not None]
    return all(sharding.is_fully_addressable for sharding in placed)


def _orbax_context() -> ocp.Context:
    """How Orbax writes here: few files, and no work twice."""
    context = ocp.Context()
    # Made in the background, a directory that cannot be created would leave Orbax's other threads,
    # and the end of the process, waiting for it for 20 minutes.
    context.asynchronous.create_directories_asynchronously = False
    saving = context.array.saving
    saving.use_compression = False  # trained float32 weights shrink by a twelfth: not worth it
    saving.array_metadata_store = None
    saving.enable_write_sharding_file = False
    # Copies share the writing of an array, each by a program that cuts out its part.
    saving.min_slice_bytes_for_replica_parallel = 2**20
    saving.enable_post_merge_validation = False  # the manifest has the sizes and checksums
    return context


def _plain(directory: pathlib.Path) -> pathlib.Path:
    """`directory` under a name that Orbax and TensorStore take for what it is.

    They expand wildcards, take a backslash for a slash, need UTF-8, and know URLs. Where the path
    has such things, a link among the temporary files stands for it: the same on all hosts, as Orbax
    asks for one name; therefore it stays there.
    """
    path = str(directory)
    odd = re.search(r"[][*?\\:\x00-\x1f\udc80-\udcff]|^/(gs|s3|az|hf)/", path)
    if not odd or os.name != "posix":
        return directory
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    link = pathlib.Path(tempfile.gettempdir(), f"lm-{os.getuid()}-{digest}")
    try:
        link.symlink_to(path)
    except FileExistsError:
        ours = link.is_symlink() and link.lstat().st_uid == os.getuid()
        check(ours and os.readlink(link) == path, f"{link} is in the way: remove it")
    return link


def reason(error: Exception) -> str:
    """What went wrong and what to do about it, in one line, whichever library raised it."""
    text = " ".join(str(error).split())[:300]
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.ENOSPC or "No space left" in text:
        return (
            "no space left on the disk; free some, lower config.checkpoint.keep or choose another "
            "--workdir"
        )
    if code == errno.EFBIG or "File too large" in text:
        return "a file would be larger than allowed here (ulimit -f); choose another --workdir"
    if code == errno.EDQUOT or "quota exceeded" in text.lower():
        return "the disk quota is used up; free some space or choose another --workdir"
    if code is not None or any(sign in text for sign in ("Permission denied", "Read-only file")):
        return f"{text}; choose a --workdir you may write to"
    return f"{type(error).__name__}: {text}"


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """The manifest of the checkpoint at `path`."""
    return json.loads((path / MANIFEST).read_text(encoding="utf-8"))


def damage(path: pathlib.Path) -> str | None:
    """Why the checkpoint at `path` cannot be trusted, in a few words, or None when it is intact.

    Compares its name with the step, and the size and CRC-32 of every file with the manifest; the
    values of arrays are compared when they are read.
    """
    try:
        manifest = read_manifest(path)
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
            if crc is not None and _crc32(path / name) != crc:
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
    found = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            values = file.parent.name == "d"  # OCDBT's name for its data, which `sums` cover
            crc = None if sums is None or values else _crc32(file)
            found[file.relative_to(path).as_posix()] = (file.stat().st_size, crc)
    arrays = {name: int(value) for name, value in (sums or {}).items()}
    manifest = {"step": step, "metrics": metrics, "files": found, "arrays": arrays}
    manifest["crc"] = zlib.crc32(json.dumps(manifest).encode())
    with replacing(path / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=1).encode())


def _crc32(path: pathlib.Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return crc


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


def fingerprint(params: Mapping[str, jax.Array]) -> str:
    """Sixteen hexadecimal digits that say which parameters, as float32, these are.

    However they lie on devices; see `checksums`.
    """
    sums = checksums({name: jnp.asarray(x, jnp.float32) for name, x in params.items()})
    said = sorted((name, params[name].shape, int(value)) for name, value in sums.items())
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def _is_array(leaf: Any) -> bool:  # or a description of one
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def named_arrays(tree: Any) -> dict[str, Any]:
    """Every array of `tree` by its path; nodes that hold none (optax's EmptyState) drop out."""
    flat, _ = jax.tree.flatten_with_path(tree, is_leaf=_is_array)
    return {array_name(path): leaf for path, leaf in flat if _is_array(leaf)}
