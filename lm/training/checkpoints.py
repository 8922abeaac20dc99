"""Checkpoints: the whole training state on disk, so that a killed run goes on where it was.

    checkpoints/
      00001000/            one directory a step; it exists under this name only once it is complete
        state/             the arrays, written by Orbax
        extra.json         whatever else the trainer needs: the position in the data, for example
        manifest.json      step, metrics, and the size and CRC-32 of every other file, written last
      00002000.saving/     a save in progress, or one that was killed: never read, swept up later

A save goes to `STEP.saving` and is renamed, in one step, after its manifest is on disk. So a
directory with a plain number for a name is complete, whenever the process was killed, and the
manifest tells a complete checkpoint from one that a disk or a copy damaged afterwards.

The directory must be one that every host of the run sees, and one run at a time may write to it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import errno
import json
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from lm.config import ConfigError, check
from lm.training.manifests import MANIFEST, damage, sync_directory, write_durably, write_manifest

_EXTRA = "extra.json"
_BEST = "eval_loss"  # the metric, recorded with a save, whose lowest value makes it the best one
_log = logging.getLogger(__name__)


class CheckpointError(ConfigError):
    """A checkpoint that cannot be written or read: one line naming the directory and the remedy."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: int = 1000  # steps between saves; 0 saves only when the trainer asks (at its end)
    keep: int = 2  # how many of the latest checkpoints stay on disk
    keep_best: bool = True  # whether the one with the lowest eval_loss stays as well
    async_save: bool = True  # write while training goes on; False waits for every save
    checksums: bool = True  # record and verify a CRC-32 of every file; False checks sizes only

    def validate(self, prefix: str = "config.checkpoint") -> None:
        """Raises `ConfigError` for a negative interval or when nothing would be kept."""
        check(self.every >= 0, f"{prefix}.every={self.every} must be 0 (only at the end) or more")
        check(self.keep >= 1, f"{prefix}.keep={self.keep} must be at least 1")

    def due(self, step: int, stride: int = 1) -> bool:
        """Whether to save after `step`, reached `stride` steps after the last time asked."""
        return self.every > 0 and step // self.every > (step - stride) // self.every


class Restored(NamedTuple):
    """What `Checkpointer.restore` gives back."""

    step: int
    state: Any
    extra: dict[str, Any]


class Checkpointer:
    """Writes and reads the checkpoints of one run, in `directory`.

    At most one save is in flight. An error on the writing thread is raised by the next `save`,
    `wait` or `close`; the checkpoints that were complete before stay as they were. With several
    processes, all of them call every method, in the same order.

    Raises:
      CheckpointError: `directory` cannot be created or written to.
    """

    def __init__(
        self, directory: str | os.PathLike[str], config: CheckpointConfig | None = None
    ) -> None:
        self._config = config or CheckpointConfig()
        self._directory = pathlib.Path(directory).absolute()
        self._primary = jax.process_index() == 0
        self._pending: concurrent.futures.Future[None] | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if self._primary:
                probe = self._directory / f"probe.{os.getpid()}.saving"
                probe.write_bytes(b"")
                self._sweep()
        except OSError as error:
            raise self._error("checkpoints cannot be written here", error) from error

    def save(
        self,
        step: int,
        state: Any,
        extra: dict[str, Any] | None = None,
        metrics: dict[str, float] | None = None,
        *,
        wait: bool = False,
    ) -> None:
        """Saves `state` as of `step`; the writing goes on after this returns, unless `wait`.

        Args:
          step: optimizer steps done; names the checkpoint. A step already there is replaced.
          state: pytree of jax arrays (random keys as `jax.random.key_data`). It is held or copied
            before this returns, so the caller may donate or delete the arrays.
          extra: JSON-able values stored beside the arrays. Process 0's are kept.
          metrics: numbers recorded with the checkpoint; `eval_loss` decides which one is best.
          wait: whether to return only when the checkpoint is complete.

        Raises:
          CheckpointError: the disk is full or cannot be written to, now or at the save before.
        """
        self._settle()
        path = _path(self._directory, step)
        scratch = path.with_suffix(".saving")
        extra_json = json.dumps(extra or {})
        metrics = {key: float(value) for key, value in (metrics or {}).items()}
        try:
            self._sweep()
            with _orbax():
                writing = ocp.save_async(scratch, state)
        except Exception as error:
            self._sweep()
            raise self._error(f"step {step} could not be saved", error) from error

        def finish() -> None:
            try:
                writing.result()
                if self._primary:
                    write_durably(scratch / _EXTRA, extra_json)
                    write_manifest(scratch, step, metrics, self._config.checksums)
                    if path.exists():
                        self._delete(step, sweep=False)
                    scratch.rename(path)
                    sync_directory(self._directory)
                    self._sweep()
                    self._retire(step)
            except Exception as error:
                self._sweep()
                raise self._error(f"step {step} could not be saved", error) from error

        self._pending = self._thread.submit(finish)
        if wait or not self._config.async_save:
            self.wait()

    def restore_latest(self, abstract_state: Any) -> Restored | None:
        """The newest intact checkpoint, or None when there is none.

        A damaged one is named, with the reason, in a one-line warning, and the one before it is
        used.

        Args:
          abstract_state: pytree of `jax.ShapeDtypeStruct` with shardings, like the state saved;
            the shardings need not be those it was saved with.

        Raises:
          CheckpointError: the checkpoint holds other arrays or shapes than `abstract_state`.
        """
        self.wait()
        step = _newest_intact(self._directory, self._config.checksums)
        return None if step is None else self._read(step, abstract_state)

    def restore(self, step: int, abstract_state: Any) -> Restored:
        """The checkpoint of exactly `step`; see `restore_latest`.

        Raises:
          CheckpointError: there is none, it is damaged, or it does not fit `abstract_state`.
        """
        self.wait()
        _require_intact(self._directory, step, self._config.checksums)
        return self._read(step, abstract_state)

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending; one still being written is not."""
        return _steps(self._directory)

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The complete step with the lowest `eval_loss`, or None when none recorded any."""
        return _best(self._directory)

    def discard_after(self, step: int) -> None:
        """Deletes the checkpoints newer than `step`: a run rolled back there has left them."""
        self.wait()
        for later in self.steps() if self._primary else []:
            if later > step:
                self._delete(later)

    def wait(self) -> None:
        """Returns when no save is in flight and every process sees the last one.

        Raises:
          CheckpointError: that save failed.
        """
        self._settle()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoint saved")

    def close(self) -> None:
        """Waits for the save in flight and ends the writing thread; raises what `wait` raises."""
        try:
            self._settle()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if kind is None:
                raise
            _log.warning("%s", error)  # not in place of the exception on its way out

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _read(self, step: int, abstract_state: Any) -> Restored:
        path = _path(self._directory, step)
        state = _load(path, abstract_state, partial=False)
        return Restored(step, state, json.loads((path / _EXTRA).read_text()))

    def _retire(self, newest: int) -> None:
        steps = self.steps()
        kept = {newest, *steps[-self._config.keep :]}
        if self._config.keep_best:
            kept.add(self.best())
        for step in steps:
            if step not in kept:
                self._delete(step)

    def _delete(self, step: int, sweep: bool = True) -> None:
        # Renamed first: a deletion killed half-way must not leave half a checkpoint under its name.
        path = _path(self._directory, step)
        path.rename(path.with_suffix(".deleting"))
        if sweep:
            self._sweep()

    def _sweep(self) -> None:
        """Deletes what killed saves and deletions left. No save may be in flight."""
        if self._primary:
            for path in [*self._directory.glob("*.saving*"), *self._directory.glob("*.deleting")]:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def _error(self, what: str, error: Exception) -> CheckpointError:
        steps = _steps(self._directory)
        intact = f"; the checkpoint of step {steps[-1]} is untouched" if steps else ""
        return CheckpointError(f"{self._directory}: {what}: {_reason(error)}{intact}")


def restore_parameters(
    directory: str | os.PathLike[str],
    step: int | str | None = None,
    abstract: Any = None,
) -> tuple[int, dict[str, jax.Array]]:
    """The step and the parameters (the state's `params`) of a checkpoint, and nothing else of it.

    Reads only; safe while a run is writing to `directory`.

    Args:
      directory: the run's `checkpoints` directory.
      step: a step, "best" (lowest `eval_loss`), or "latest" or None: the newest intact one.
      abstract: dict name -> `jax.ShapeDtypeStruct`; its shardings place the parameters and its
        dtypes convert them. None loads all as saved, onto the first device.

    Raises:
      CheckpointError: no such checkpoint, a damaged one, or other parameters than `abstract`.
    """
    directory = pathlib.Path(directory).absolute()
    if step is None or step == "latest":
        chosen = _newest_intact(directory, checksums=True)
        _require(chosen is not None, f"{directory} holds no intact checkpoint")
    else:
        if step == "best":
            chosen = _best(directory)
            _require(chosen is not None, f"{directory} holds no checkpoint with an {_BEST}")
        else:
            chosen = step
            _require(isinstance(step, int), f"step={step!r} must be a number, 'latest' or 'best'")
        _require_intact(directory, chosen, checksums=True)
    path = _path(directory, chosen)
    if abstract is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
            _describe(path)["params"],
            is_leaf=_is_array,
        )
    return chosen, _load(path, {"params": abstract}, partial=True)["params"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckpointError(message)


def _orbax() -> ocp.Context:
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


def _load(path: pathlib.Path, abstract: Any, partial: bool) -> Any:
    """The tree at `path` shaped like `abstract`; `partial` leaves out what it does not name."""
    _check_fits(path, abstract, partial)
    context = _orbax()
    context.pytree.loading.partial_load = partial
    try:
        with context:
            return ocp.load(path, abstract)
    except Exception as error:
        raise CheckpointError(f"{path} could not be read: {_reason(error)}") from error


def _describe(path: pathlib.Path) -> Any:
    """The tree at `path` with a shape and dtype for every array."""
    try:
        return ocp.metadata(path).metadata
    except Exception as error:
        raise CheckpointError(f"{path} could not be read: {_reason(error)}") from error


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


def _path(directory: pathlib.Path, step: int) -> pathlib.Path:
    return directory / f"{step:08d}"


def _steps(directory: pathlib.Path) -> list[int]:
    try:
        names = [path.name for path in directory.iterdir() if (path / MANIFEST).exists()]
    except OSError:
        return []
    return sorted(int(name) for name in names if name.isdigit())


def _best(directory: pathlib.Path) -> int | None:
    losses = {}
    for step in _steps(directory):
        try:
            manifest = json.loads((_path(directory, step) / MANIFEST).read_text())
            losses[step] = float(manifest["metrics"][_BEST])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no evaluation at that step, or a damaged manifest
    losses = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    return min(losses, key=lambda step: losses[step]) if losses else None


def _newest_intact(directory: pathlib.Path, checksums: bool) -> int | None:
    """Process 0 verifies; all hosts take its word, for they must resume from the same step."""

    def search() -> int:
        for step in reversed(_steps(directory)):
            path = _path(directory, step)
            reason = damage(path, checksums)
            if reason is None:
                return step
            _log.warning("%s is damaged (%s): using the checkpoint before it", path, reason)
        return -1

    step = _from_first_process(search)
    return None if step < 0 else step


def _require_intact(directory: pathlib.Path, step: int, checksums: bool) -> None:
    steps = _steps(directory)
    others = f"only of {', '.join(map(str, steps))}" if steps else "nor of any other"
    _require(step in steps, f"{directory} holds no checkpoint of step {step}, {others}")
    path = _path(directory, step)
    reasons: list[str | None] = [None]

    def verify() -> int:
        reasons[0] = damage(path, checksums)
        return int(reasons[0] is not None)

    damaged = _from_first_process(verify)
    _require(not damaged, f"{path} is damaged ({reasons[0] or 'says process 0'}): choose another")


def _from_first_process(function: Callable[[], int]) -> int:
    if jax.process_count() == 1:
        return function()
    value = function() if jax.process_index() == 0 else 0
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _reason(error: Exception) -> str:
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
