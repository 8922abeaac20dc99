"""What checkpoints there are on disk, and reading them.

`lm.training.checkpoints` says how a checkpoint looks and writes it.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from lm.config import ConfigError
from lm.parallel import hosts
from lm.training.manifests import (
    MANIFEST,
    array_name,
    damage,
    differing,
    is_array,
    named_arrays,
)

BEST = "eval_loss"  # the metric, recorded with a save, whose lowest value makes it the best one
T = TypeVar("T")
_log = logging.getLogger(__name__)
# What Orbax raises comes to whoever saves or loads; it also logs it, from each of its threads.
for name in ("absl", "asyncio"):
    logging.getLogger(name).addFilter(lambda record: "/orbax/" not in record.pathname)


class CheckpointError(ConfigError):
    """A checkpoint that cannot be written or read: one line naming the directory and the remedy."""


class Damaged(CheckpointError):
    """What a checkpoint holds is not what was saved: a few words that say where."""


def restore_parameters(
    directory: str | os.PathLike[str],
    step: int | str | None = None,
    abstract: Any = None,
) -> tuple[int, dict[str, jax.Array]]:
    """The step and the parameters (the state's `params`) of a checkpoint, and nothing else of it.

    Reads only; safe while a run is writing to `directory`. Parameters for devices of this process
    alone it reads alone; if they are for devices of several, all of these must call this.

    Args:
      directory: the run's `checkpoints` directory.
      step: a step, "best" (lowest `eval_loss`), or "latest" or None: the newest intact one.
      abstract: dict name -> `jax.ShapeDtypeStruct`; its shardings place the parameters and its
        dtypes convert them. None loads all as saved, onto the first device.

    Raises:
      CheckpointError: no such checkpoint, a damaged one, or other parameters than `abstract`.
    """

    def read(path: pathlib.Path) -> dict[str, jax.Array]:
        wanted = abstract
        if wanted is None:
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            wanted = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
                describe(path)["params"],
                is_leaf=is_array,
            )
        return load_tree(path, {"params": wanted}, partial=True)["params"]

    alone = abstract is None or _own_devices_only(abstract)
    return _choose(pathlib.Path(directory).absolute(), step, read, alone)


class SavedParameters(Mapping[str, jax.Array]):
    """The parameters of a checkpoint, each read when it is asked for and not kept.

    Arguments and errors are those of `restore_parameters`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        step: int | str | None,
        abstract: Mapping[str, jax.ShapeDtypeStruct],
    ):
        self._abstract = dict(abstract)
        self.step, self._path = _choose(
            pathlib.Path(directory).absolute(), step, self._verified, _own_devices_only(abstract)
        )

    def _verified(self, path: pathlib.Path) -> pathlib.Path:
        """`path`; each parameter was read from it once, for damage is to be found beforehand."""
        self._path = path
        check_fits(path, {"params": self._abstract}, partial=True)
        for name in self:
            self[name]
        return path

    def __getitem__(self, name: str) -> jax.Array:
        wanted = {"params": {name: self._abstract[name]}}
        return load_tree(self._path, wanted, partial=True)["params"][name]

    def __iter__(self):
        return iter(self._abstract)

    def __len__(self) -> int:
        return len(self._abstract)


def _own_devices_only(abstract: Any) -> bool:
    """Whether arrays like these lie on devices of this process alone."""
    placed = [leaf.sharding for leaf in jax.tree.leaves(abstract) if leaf.sharding is not None]
    return all(sharding.is_fully_addressable for sharding in placed)


def _choose(
    directory: pathlib.Path, step: int | str | None, read: Callable[[pathlib.Path], T], alone: bool
) -> tuple[int, T]:
    """The step that `step` means, and what `read` makes of its checkpoint; it is intact."""
    if step is None or step == "latest":
        found = newest(directory, read, alone=alone)
        if found is None:
            raise CheckpointError(f"{directory} holds no checkpoint")
        return found
    if step == "best":
        step = best_step(directory)
        _require(step is not None, f"{directory} holds no checkpoint with an {BEST}")
    _require(isinstance(step, int), f"step={step!r} must be a number, 'latest' or 'best'")
    return step, exactly(directory, step, read, alone=alone)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckpointError(message)


def orbax_context() -> ocp.Context:
    """How Orbax writes here: few files, and no work twice."""
    context = ocp.Context()
    # Made in the background, a directory that cannot be created would leave Orbax's other threads,
    # and the end of the process, waiting for it for 20 minutes.
    context.asynchronous.create_directories_asynchronously = False
    saving = context.array.saving
    saving.use_compression = False  # trained float32 weights shrink by a twelfth: not worth it
    saving.array_metadata_store = None
    saving.enable_write_sharding_file = False
    saving.enable_post_merge_validation = False  # the manifest has the sizes and checksums
    return context


def plain(directory: pathlib.Path) -> pathlib.Path:
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
        _require(ours and os.readlink(link) == path, f"{link} is in the way: remove it")
    return link


def load_tree(path: pathlib.Path, abstract: Any, partial: bool) -> Any:
    """The tree at `path` shaped like `abstract`; `partial` leaves out what it does not name.

    Raises:
      Damaged: it cannot be decoded, or an array is not the one that was saved.
      CheckpointError: it cannot be read, or does not fit `abstract`.
    """
    there = check_fits(path, abstract, partial)

    def as_saved(name, leaf):  # to be converted only once its checksum was compared
        dtype = there[array_name(name)].dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

    target = jax.tree.map_with_path(as_saved, abstract)
    context = orbax_context()
    context.pytree.loading.partial_load = partial
    if jax.process_count() > 1 and _own_devices_only(abstract):
        here = jax.process_index()
        context.multiprocessing.primary_host = here
        context.multiprocessing.active_processes = {here}
        context.multiprocessing.barrier_sync_key_prefix = f"alone_{here}"
    with context:
        tree = _read(path, lambda path: ocp.load(path, target))
    name = differing(path, tree)
    if name is not None:
        raise Damaged(f"{name} does not match its checksum")

    def as_wanted(leaf, like):
        return leaf if leaf.dtype == like.dtype else leaf.astype(like.dtype)

    return jax.tree.map(as_wanted, tree, abstract)


def describe(path: pathlib.Path) -> Any:
    """The tree at `path` with a shape and dtype for every array."""
    tree = _read(path, ocp.metadata).metadata
    if tree is None:  # Orbax says so where it cannot read them
        raise Damaged("the index of its arrays cannot be read")
    return tree


def _read(path: pathlib.Path, read: Callable[[pathlib.Path], T]) -> T:
    try:
        return read(plain(path.parent) / path.name)
    except CheckpointError:
        raise
    except (OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        raise CheckpointError(f"{path} could not be read: {reason(error)}") from error
    except Exception as error:
        if jax.process_count() > 1:  # the others may have read their part of it
            raise CheckpointError(f"{path} could not be read: {reason(error)}") from error
        raise Damaged(f"cannot be decoded: {reason(error)}") from error


def check_fits(path: pathlib.Path, abstract: Any, partial: bool) -> dict[str, Any]:
    """Descriptions of the arrays at `path`, by name.

    Orbax reads missing arrays as nothing and casts silently; both would be a wrong resume.

    Raises:
      CheckpointError: they are not those of `abstract`.
    """
    saved, wanted = named_arrays(describe(path)), named_arrays(abstract)

    def show(leaf: Any) -> str:
        return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"

    differences = []
    names = wanted if partial else {**wanted, **saved}
    for name in sorted(names, key=lambda name: not name.startswith("params/")):
        there, here = saved.get(name), wanted.get(name)
        if there is None or here is None:
            differences.append(
                f"{name} is only in the {'checkpoint' if there else 'configuration'}"
            )
        elif tuple(there.shape) != tuple(here.shape) or (
            not partial and np.dtype(there.dtype) != np.dtype(here.dtype)
        ):
            differences.append(f"{name} is {show(there)} there and {show(here)} here")
    if differences:
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        raise CheckpointError(
            f"{path} was saved with another configuration: {differences[0]}{more}; restore the "
            "configuration it was saved with, or choose an empty --workdir"
        )
    return saved


def step_path(directory: pathlib.Path, step: int) -> pathlib.Path:
    """Where the checkpoint of a step stands."""
    return directory / f"{step:08d}"


def saved_paths(directory: pathlib.Path) -> list[pathlib.Path]:
    """All directories that are named as complete checkpoints are, the steps rising.

    Raises:
      CheckpointError: `directory` cannot be read, which is not to be taken for an empty one.
    """
    try:
        paths = [path for path in directory.iterdir() if path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {reason(error)}") from error
    numbers = [path for path in paths if re.fullmatch("[0-9]{1,12}", path.name)]
    return sorted(numbers, key=lambda path: (int(path.name), path.name))


def saved_steps(directory: pathlib.Path) -> list[int]:
    """The steps of the checkpoints that stand where `step_path` says, rising."""
    paths = [(int(path.name), path) for path in saved_paths(directory)]
    return [step for step, path in paths if path == step_path(directory, step)]


def best_step(directory: pathlib.Path) -> int | None:
    """The step with the lowest `eval_loss`, if there was an evaluation."""
    losses = {}
    for step in saved_steps(directory):
        try:
            manifest = json.loads(
                (step_path(directory, step) / MANIFEST).read_text(encoding="utf-8")
            )
            losses[step] = float(manifest["metrics"][BEST])
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue  # no evaluation at that step, or a damaged manifest
    losses = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    return min(losses, key=lambda step: losses[step]) if losses else None


def newest(
    directory: pathlib.Path,
    read: Callable[[pathlib.Path], T],
    checksums: bool = True,
    alone: bool = False,
) -> tuple[int, T] | None:
    """The newest intact checkpoint's step and what `read` makes of it; None where there is none.

    One that is damaged, be it that `read` says so, is named in a one-line warning, and the one
    before it is taken. Process 0 says which there are and what the manifests say, as all must read
    the same; if `alone`, this process asks nobody.

    Raises:
      CheckpointError: there are checkpoints, and all of them are damaged.
    """

    ask = _own if alone else _agreed
    faults = []
    for name in ask(lambda: [path.name for path in reversed(saved_paths(directory))]):
        path = directory / name
        fault = ask(functools.partial(damage, path, checksums))
        if fault is None:
            try:
                result = read(path)
            except Damaged as error:
                fault = str(error)
            else:
                for line in faults:
                    _log.warning("%s/%s: using the checkpoint before it", directory, line)
                return int(name), result
        faults.append(f"{name} is damaged ({fault})")
    _require(
        not faults,
        f"{directory} holds no intact checkpoint: {', '.join(faults)}. Put one back from a copy; "
        "to begin anew, choose another --workdir or remove this directory",
    )
    return None


def exactly(
    directory: pathlib.Path,
    step: int,
    read: Callable[[pathlib.Path], T],
    checksums: bool = True,
    alone: bool = False,
) -> T:
    """What `read` makes of the checkpoint of `step`; see `newest`.

    Raises:
      CheckpointError: it is not there, or damaged.
    """
    steps, path = saved_steps(directory), step_path(directory, step)
    others = f"only of {', '.join(map(str, steps))}" if steps else "nor of any other"
    _require(step in steps, f"{directory} holds no checkpoint of step {step}, {others}")

    fault = (_own if alone else _agreed)(functools.partial(damage, path, checksums))
    if fault is None:
        try:
            return read(path)
        except Damaged as error:
            fault = str(error)
    raise CheckpointError(f"{path} is damaged ({fault}): choose another")


def _own(function: Callable[[], T]) -> T:
    return function()


def _agreed(function: Callable[[], T]) -> T:
    """What `function` returns, which JSON can say, on process 0."""
    return json.loads(hosts.from_first(lambda: json.dumps(function())))


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
