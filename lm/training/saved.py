"""What checkpoints there are on disk, and reading them.

`lm.training.checkpoints` says how a checkpoint looks and writes it.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from lm.config import ConfigError
from lm.training.manifests import MANIFEST, damage

BEST = "eval_loss"  # the metric, recorded with a save, whose lowest value makes it the best one
_log = logging.getLogger(__name__)


class CheckpointError(ConfigError):
    """A checkpoint that cannot be written or read: one line naming the directory and the remedy."""


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
    directory = pathlib.Path(directory).absolute()
    alone = abstract is None or _own_devices_only(abstract)
    chosen = _choose(directory, step, alone)
    path = step_path(directory, chosen)
    if abstract is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
            _describe(path)["params"],
            is_leaf=_is_array,
        )
    return chosen, load_tree(path, {"params": abstract}, partial=True)["params"]


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
        directory = pathlib.Path(directory).absolute()
        self._abstract = dict(abstract)
        self.step = _choose(directory, step, _own_devices_only(self._abstract))
        self._path = step_path(directory, self.step)
        _check_fits(self._path, {"params": self._abstract}, partial=True)

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


def _choose(directory: pathlib.Path, step: int | str | None, alone: bool) -> int:
    """The step that `step` means; its checkpoint is intact."""
    if step is None or step == "latest":
        chosen = newest_intact(directory, checksums=True, alone=alone)
        _require(chosen is not None, f"{directory} holds no intact checkpoint")
    else:
        if step == "best":
            chosen = best_step(directory)
            _require(chosen is not None, f"{directory} holds no checkpoint with an {BEST}")
        else:
            chosen = step
            _require(isinstance(step, int), f"step={step!r} must be a number, 'latest' or 'best'")
        require_intact(directory, chosen, checksums=True, alone=alone)
    return chosen


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


def load_tree(path: pathlib.Path, abstract: Any, partial: bool) -> Any:
    """The tree at `path` shaped like `abstract`; `partial` leaves out what it does not name."""
    _check_fits(path, abstract, partial)
    context = orbax_context()
    context.pytree.loading.partial_load = partial
    if jax.process_count() > 1 and _own_devices_only(abstract):
        here = jax.process_index()
        context.multiprocessing.primary_host = here
        context.multiprocessing.active_processes = {here}
        context.multiprocessing.barrier_sync_key_prefix = f"alone_{here}"
    try:
        with context:
            return ocp.load(path, abstract)
    except Exception as error:
        raise CheckpointError(f"{path} could not be read: {reason(error)}") from error


def _describe(path: pathlib.Path) -> Any:
    """The tree at `path` with a shape and dtype for every array."""
    try:
        return ocp.metadata(path).metadata
    except Exception as error:
        raise CheckpointError(f"{path} could not be read: {reason(error)}") from error


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _arrays(tree: Any) -> dict[str, Any]:
    """Every array of `tree` by its path; nodes that hold none (optax's EmptyState) drop out."""
    flat, _ = jax.tree.flatten_with_path(tree, is_leaf=_is_array)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in flat
        if _is_array(leaf)
    }


def _check_fits(path: pathlib.Path, abstract: Any, partial: bool) -> None:
    """Orbax reads missing arrays as nothing and casts silently; both would be a wrong resume."""
    saved, wanted = _arrays(_describe(path)), _arrays(abstract)

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


def step_path(directory: pathlib.Path, step: int) -> pathlib.Path:
    """Where the checkpoint of a step stands."""
    return directory / f"{step:08d}"


def saved_steps(directory: pathlib.Path) -> list[int]:
    """The steps of all complete checkpoints, rising."""
    try:
        names = [path.name for path in directory.iterdir() if (path / MANIFEST).exists()]
    except OSError:
        return []
    return sorted(int(name) for name in names if name.isdigit())


def best_step(directory: pathlib.Path) -> int | None:
    """The step with the lowest `eval_loss`, if there was an evaluation."""
    losses = {}
    for step in saved_steps(directory):
        try:
            manifest = json.loads(
                (step_path(directory, step) / MANIFEST).read_text(encoding="utf-8")
            )
            losses[step] = float(manifest["metrics"][BEST])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no evaluation at that step, or a damaged manifest
    losses = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    return min(losses, key=lambda step: losses[step]) if losses else None


def newest_intact(directory: pathlib.Path, checksums: bool, alone: bool = False) -> int | None:
    """The newest undamaged step, if there is one.

    Process 0 verifies; all take its word, for they must resume from the same step. If `alone`,
    this process asks nobody.
    """

    def search() -> int:
        for step in reversed(saved_steps(directory)):
            path = step_path(directory, step)
            reason = damage(path, checksums)
            if reason is None:
                return step
            _log.warning("%s is damaged (%s): using the checkpoint before it", path, reason)
        return -1

    step = search() if alone else _from_first_process(search)
    return None if step < 0 else step


def require_intact(
    directory: pathlib.Path, step: int, checksums: bool, alone: bool = False
) -> None:
    """Raises CheckpointError unless the checkpoint of `step` is there and undamaged.

    Process 0 verifies for all, or each for itself if `alone`.
    """
    steps = saved_steps(directory)
    others = f"only of {', '.join(map(str, steps))}" if steps else "nor of any other"
    _require(step in steps, f"{directory} holds no checkpoint of step {step}, {others}")
    path = step_path(directory, step)
    reasons: list[str | None] = [None]

    def verify() -> int:
        reasons[0] = damage(path, checksums)
        return int(reasons[0] is not None)

    damaged = verify() if alone else _from_first_process(verify)
    _require(not damaged, f"{path} is damaged ({reasons[0] or 'says process 0'}): choose another")


def _from_first_process(function: Callable[[], int]) -> int:
    if jax.process_count() == 1:
        return function()
    value = function() if jax.process_index() == 0 else 0
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def reason(error: Exception) -> str:
    """What went wrong and what to do about it, in one line, whichever library raised it."""
    text = " ".join(str(error).split())[:300]
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.ENOSPC or "No space left" in text:
        return (
            "no space left on the disk; free some, lower config.checkpoint.keep or choose another "
            "--workdir"
        )
    if code == errno.EDQUOT or "quota exceeded" in text.lower():
        return "the disk quota is used up; free some space or choose another --workdir"
    if code is not None or any(sign in text for sign in ("Permission denied", "Read-only file")):
        return f"{text}; choose a --workdir you may write to"
    return f"{type(error).__name__}: {text}"
