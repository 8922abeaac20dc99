"""Checkpoints: the whole training state on disk, so that a killed run goes on where it was.

    checkpoints/
      00001000/            one directory a step; it exists under this name only once it is complete
        state/             the arrays, written by Orbax
        extra.json         whatever else the trainer needs: the position in the data, for example
        manifest.json      step, metrics, sizes and checksums, written last; see `manifests`
      00002000.saving/     a save in progress, or one that was killed: never read, swept up later
      lock                 held by the run that writes here

A save goes to `STEP.saving` and is renamed, in one step, after its manifest is on disk. So a
directory with a plain number for a name is complete, whenever the process was killed, and the
manifest tells a complete checkpoint from one that a disk or a copy damaged afterwards.

The directory must be one that every host of the run sees. One run at a time may write to it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from lm import files
from lm.config import Count, Positive
from lm.parallel import hosts
from lm.training.manifests import checksums, write_manifest
from lm.training.restore import (
    CheckpointError,
    best_step,
    exactly,
    load_tree,
    newest,
    orbax_context,
    plain,
    reason,
    saved_paths,
    saved_steps,
    step_path,
)

LOCK = "lock"
_EXTRA = "extra.json"
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: Count = 1000  # steps between saves; 0 saves only when the trainer asks (at its end)
    keep: Positive = 2  # how many of the latest checkpoints stay on disk
    keep_best: bool = True  # whether the one with the lowest eval_loss stays as well
    async_save: bool = True  # write while training goes on; False waits for every save
    # Record a checksum of every array, which the devices compute from what they hold (a pass over
    # their memory, nothing is read from disk), and of every small file; verify them on reading.
    # False records only the sizes of files.
    checksums: bool = True


def check_free(directory: pathlib.Path) -> None:
    """Raises CheckpointError if a run writes to `directory` now.

    It costs nothing and changes nothing; `Checkpointer` makes sure.
    """
    holder = hosts.from_first(lambda: files.holder(directory / LOCK))
    if holder:
        raise CheckpointError(_in_use(directory, holder))


def _in_use(directory: pathlib.Path, holder: str) -> str:
    return f"{directory} is in use by {holder}: let it end, or choose another --workdir"


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
      CheckpointError: `directory` cannot be created or written to, or another run writes to it.
    """

    def __init__(
        self, directory: str | os.PathLike[str], config: CheckpointConfig | None = None
    ) -> None:
        self._config = config or CheckpointConfig()
        self._directory = pathlib.Path(directory).absolute()
        self._primary = jax.process_index() == 0
        self._pending: concurrent.futures.Future[None] | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._held = contextlib.ExitStack()
        fault = hosts.from_first(self._claim)
        if fault:
            raise CheckpointError(fault)

    def _claim(self) -> str:
        """Takes the directory for this run; why that cannot be, or ''."""
        if not self._primary:
            return ""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            lock = self._held.enter_context(files.lock(self._directory / LOCK, wait=False))
            if lock.holder:
                self._held.close()
                return _in_use(self._directory, lock.holder)
            (self._directory / f"probe.{os.getpid()}.saving").write_bytes(b"")
            self._sweep()
        except OSError as error:
            self._held.close()
            return str(self._error("checkpoints cannot be written here", error))
        return ""

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
            sums = checksums(state) if self._config.checksums else None
            with orbax_context():
                writing = ocp.save_async(plain(self._directory) / scratch.name, state)
        except Exception as error:
            self._sweep()
            raise self._error(f"step {step} could not be saved", error) from error

        def finish() -> None:
            try:
                writing.result()
                if self._primary:
                    files.write_durably(scratch / _EXTRA, extra_json)
                    write_manifest(scratch, step, metrics, sums)
                    if path.exists():
                        self._delete(path, sweep=False)
                    scratch.rename(path)
                    files.sync_folder(self._directory)
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
          CheckpointError: the checkpoint holds other arrays or shapes than `abstract_state`; or all
            are damaged.
        """
        self.wait()
        read = functools.partial(self._read, abstract_state)
        found = newest(self._directory, read, self._config.checksums)
        return None if found is None else found[1]

    def restore(self, step: int, abstract_state: Any) -> Restored:
        """The checkpoint of exactly `step`; see `restore_latest`.

        Raises:
          CheckpointError: there is none, it is damaged, or it does not fit `abstract_state`.
        """
        self.wait()
        read = functools.partial(self._read, abstract_state)
        return exactly(self._directory, step, read, self._config.checksums)

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
        for path in saved_paths(self._directory) if self._primary else []:
            if int(path.name) > step:
                self._delete(path)

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
            self._held.close()

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

    def _read(self, abstract_state: Any, path: pathlib.Path) -> Restored:
        state = load_tree(path, abstract_state, partial=False)
        return Restored(
            int(path.name), state, json.loads((path / _EXTRA).read_text(encoding="utf-8"))
        )

    def _retire(self, newest: int) -> None:
        steps = self.steps()
        kept = {newest, *steps[-self._config.keep :]}
        if self._config.keep_best:
            kept.add(self.best())
        for step in steps:
            if step not in kept:
                self._delete(step_path(self._directory, step))

    def _delete(self, path: pathlib.Path, sweep: bool = True) -> None:
        # Renamed first: a deletion killed half-way must not leave half a checkpoint under its name.
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
