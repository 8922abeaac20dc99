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
import json
import logging
import os
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from lm.config import check
from lm.training.manifests import sync_directory, write_durably, write_manifest
from lm.training.saved import (
    CheckpointError,
    best_step,
    load_tree,
    newest_intact,
    orbax_context,
    reason,
    require_intact,
    saved_steps,
    step_path,
)

_EXTRA = "extra.json"
_log = logging.getLogger(__name__)


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
        path = step_path(self._directory, step)
        scratch = path.with_suffix(".saving")
        extra_json = json.dumps(extra or {})
        metrics = {key: float(value) for key, value in (metrics or {}).items()}
        try:
            self._sweep()
            with orbax_context():
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
        step = newest_intact(self._directory, self._config.checksums)
        return None if step is None else self._read(step, abstract_state)

    def restore(self, step: int, abstract_state: Any) -> Restored:
        """The checkpoint of exactly `step`; see `restore_latest`.

        Raises:
          CheckpointError: there is none, it is damaged, or it does not fit `abstract_state`.
        """
        self.wait()
        require_intact(self._directory, step, self._config.checksums)
        return self._read(step, abstract_state)

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending; one still being written is not."""
        return saved_steps(self._directory)

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The complete step with the lowest `eval_loss`, or None when none recorded any."""
        return best_step(self._directory)

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
        path = step_path(self._directory, step)
        state = load_tree(path, abstract_state, partial=False)
        return Restored(step, state, json.loads((path / _EXTRA).read_text(encoding="utf-8")))

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
        path = step_path(self._directory, step)
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
        steps = saved_steps(self._directory)
        intact = f"; the checkpoint of step {steps[-1]} is untouched" if steps else ""
        return CheckpointError(f"{self._directory}: {what}: {reason(error)}{intact}")
