"""Checkpoints: the whole training state on disk, so that a killed run goes on where it was.

    checkpoints/
      00001000/            one directory a step; it exists under this name only once it is complete
        state/             the arrays, written by Orbax
        extra.json         whatever else the trainer needs: the position in the data, for example
        manifest.json      step, metrics, sizes and checksums, written last
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
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
from jax.experimental import multihost_utils

from lm import files
from lm.config import ConfigError, Count, Positive, check
from lm.parallel import hosts
from lm.training.checkpoint_files import (
    Damaged,
    checksums,
    damage,
    load_tree,
    own_devices_only,
    read_manifest,
    reason,
    save_tree,
    write_manifest,
)

BEST = "eval_loss"  # the metric, recorded with a save, whose lowest value makes it the best one
LOCK, EXTRA = "lock", "extra.json"
T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: Count = 1000  # steps between saves; 0 saves only when the trainer asks (at its end)
    keep: Positive = 2  # how many of the latest checkpoints stay on disk
    keep_best: bool = True  # whether the one with the lowest eval_loss stays as well
    async_save: bool = True  # write while training goes on; False waits for every save
    # Record a checksum of every array, which the devices compute from what they hold (a pass over
    # their memory, nothing is read from disk), and of every small file, for readers to verify.
    # False records only the sizes of files.
    checksums: bool = True


class Restored(NamedTuple):
    """The whole of a checkpoint."""

    step: int
    state: Any
    extra: dict[str, Any]


class Checkpointer:
    """Writes and reads the checkpoints of one run, in `directory`.

    At most one save is in flight. An error on the writing thread is raised by the next `save`,
    `wait` or `close`; the checkpoints that were complete before stay as they were. With several
    processes, all of them call every method, in the same order.

    Raises:
      ConfigError: `directory` cannot be created or written to, or another run writes to it.
    """

    def __init__(
        self, directory: str | os.PathLike[str], config: CheckpointConfig | None = None
    ) -> None:
        self._config = config or CheckpointConfig()
        self._directory = pathlib.Path(directory).absolute()
        self._pending: concurrent.futures.Future[None] | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._held = contextlib.ExitStack()
        fault = hosts.from_first(self._claim)
        if fault:
            raise ConfigError(fault)

    def _claim(self) -> str:
        """Takes the directory for this run; why that cannot be, or ''."""
        if jax.process_index() > 0:
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
          ConfigError: the disk is full or cannot be written to, now or at the save before.
        """
        self._settle()
        path = _path(self._directory, step)
        scratch = path.with_suffix(".saving")
        extra_json = json.dumps(extra or {})
        metrics = {key: float(value) for key, value in (metrics or {}).items()}
        with self._explained(step):
            self._sweep()
            sums = checksums(state) if self._config.checksums else None
            writing = save_tree(scratch, state)

        def finish() -> None:
            with self._explained(step):
                writing.result()  # of all processes
                if jax.process_index() == 0:
                    with files.replacing(scratch / EXTRA) as file:
                        file.write(extra_json.encode())
                    write_manifest(scratch, step, metrics, sums)
                    self._delete([path] if path.exists() else [])
                    scratch.rename(path)
                    files.sync_folder(self._directory)
                    self._retire(step)
                    self._sweep()

        self._pending = self._thread.submit(finish)
        if wait or not self._config.async_save:
            self.wait()

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._sweep()
            raise self._error(f"step {step} could not be saved", error) from error

    def restore_latest(self, abstract_state: Any) -> Restored | None:
        """The newest intact checkpoint, or None when there is none.

        A damaged one is named, with the reason, in a one-line warning, and the one before it is
        used.

        Args:
          abstract_state: pytree of `jax.ShapeDtypeStruct` with shardings, like the state saved;
            the shardings need not be those it was saved with.

        Raises:
          ConfigError: the checkpoint holds other arrays or shapes than `abstract_state`; or all
            are damaged.
        """
        self.wait()

        def read(path: pathlib.Path) -> tuple[Any, dict[str, Any]]:
            state = load_tree(path, abstract_state, partial=False)
            return state, json.loads((path / EXTRA).read_text(encoding="utf-8"))

        step, found = _find(self._directory, None, read)
        return None if found is None else Restored(step, *found)

    def discard_after(self, step: int) -> None:
        """Deletes the checkpoints newer than `step`: a run rolled back there has left them."""
        self.wait()
        if jax.process_index() == 0:
            self._delete([p for p in saved_paths(self._directory) if int(p.name) > step])
            self._sweep()

    def wait(self) -> None:
        """Returns when no save is in flight and every process sees the last one.

        Raises:
          ConfigError: that save failed.
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
        except ConfigError as error:
            if kind is None:
                raise
            _log.warning("%s", error)  # not in place of the exception on its way out

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _retire(self, newest: int) -> None:
        """Deletes all but the latest and the best."""
        steps = saved_steps(self._directory)
        kept = {newest, *steps[-self._config.keep :]}
        if self._config.keep_best:
            kept.add(best_step(self._directory))
        self._delete([_path(self._directory, step) for step in set(steps) - kept])

    def _delete(self, paths: list[pathlib.Path]) -> None:
        """Leaves them to `_sweep`: half a deleted checkpoint must not keep its name."""
        for path in paths:
            path.rename(path.with_suffix(".deleting"))

    def _sweep(self) -> None:
        """Deletes what killed saves and deletions left. No save may be in flight."""
        if jax.process_index() == 0:
            for path in [*self._directory.glob("*.saving*"), *self._directory.glob("*.deleting")]:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def _error(self, what: str, error: Exception) -> ConfigError:
        steps = saved_steps(self._directory)
        intact = f"; the checkpoint of step {steps[-1]} is untouched" if steps else ""
        return ConfigError(f"{self._directory}: {what}: {reason(error)}{intact}")


def check_free(directory: pathlib.Path) -> None:
    """Raises ConfigError if a run writes to `directory` now.

    It costs nothing and changes nothing; `Checkpointer` makes sure.
    """
    holder = hosts.from_first(lambda: files.holder(directory / LOCK))
    check(not holder, _in_use(directory, holder))


def _in_use(directory: pathlib.Path, holder: str) -> str:
    return f"{directory} is in use by {holder}: let it end, or choose another --workdir"


def restore_parameters(
    directory: str | os.PathLike[str],
    step: int | str | None,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    lazily: bool = False,
    part: str = "params",
) -> tuple[int, Mapping[str, jax.Array]]:
    """The step and the parameters (the state's `params`) of a checkpoint, and nothing else of it.

    Reads only; safe while a run is writing to `directory`. Parameters for devices of this process
    alone it reads alone; if they are for devices of several, all of these must call this.

    Args:
      directory: the run's `checkpoints` directory.
      step: a step, "best" (lowest `eval_loss`), or "latest" or None: the newest intact one.
      abstract: their shardings place the parameters and their dtypes convert them.
      lazily: whether each parameter is read when it is asked for and not kept. To find damage
        beforehand all are read once at first.
      part: of the state, to be read in place of the parameters; `abstract` is then like it.

    Raises:
      ConfigError: no such checkpoint, a damaged one, or other parameters than `abstract`.
    """

    def read(path: pathlib.Path) -> Mapping[str, jax.Array]:
        if not lazily:
            wanted = dict(abstract) if isinstance(abstract, Mapping) else abstract
            return load_tree(path, {part: wanted}, partial=True)[part]
        params = _Lazy(path, abstract)
        for name in params:
            params[name]
        return params

    directory = pathlib.Path(directory).absolute()
    step, params = _find(directory, step, read, alone=own_devices_only(abstract))
    check(params is not None, f"{directory} holds no checkpoint")
    return step, params


class _Lazy(Mapping[str, jax.Array]):
    def __init__(self, path: pathlib.Path, abstract: Mapping[str, jax.ShapeDtypeStruct]):
        self._path, self._abstract = path, abstract

    def __getitem__(self, name: str) -> jax.Array:
        wanted = {"params": {name: self._abstract[name]}}
        return load_tree(self._path, wanted, partial=True)["params"][name]

    def __iter__(self):
        return iter(self._abstract)

    def __len__(self) -> int:
        return len(self._abstract)


def _find(
    directory: pathlib.Path,
    step: int | str | None,
    read: Callable[[pathlib.Path], T],
    alone: bool = False,
) -> tuple[int, T | None]:
    """The step that `step` means, and what `read` makes of its checkpoint; None: there are none.

    Of the latest, one that is damaged, be it that `read` says so, is named in a one-line warning,
    and the one before it is taken. Process 0 says which there are and what the manifests say, as
    all must read the same; if `alone`, this process asks nobody.

    Raises:
      ConfigError: there is no such checkpoint, or it is damaged, or all are.
    """

    def ask(function: Callable[[], Any]) -> Any:
        if alone:
            return function()
        return json.loads(hosts.from_first(lambda: json.dumps(function())))

    latest = step is None or step == "latest"
    names = ask(lambda: [path.name for path in reversed(saved_paths(directory))])
    if latest and not names:
        return 0, None
    if step == "best":
        step = ask(lambda: best_step(directory))
        check(step is not None, f"{directory} holds no checkpoint with an {BEST}")
    if not latest:
        check(isinstance(step, int), f"step={step!r} must be a number, 'latest' or 'best'")
        steps = [n for n in sorted(map(int, names)) if _path(directory, n).name in names]
        others = f"only of {', '.join(map(str, steps))}" if steps else "nor of any other"
        check(step in steps, f"{directory} holds no checkpoint of step {step}, {others}")
        names = [_path(directory, step).name]
    faults = []
    for path in [directory / name for name in names]:
        fault = ask(functools.partial(damage, path))
        if fault is None:
            try:
                result = read(path)
            except Damaged as error:
                fault = str(error)
            else:
                for line in faults:
                    _log.warning("%s/%s: using the checkpoint before it", directory, line)
                return int(path.name), result
        check(latest, f"{path} is damaged ({fault}): choose another")
        faults.append(f"{path.name} is damaged ({fault})")
    raise ConfigError(
        f"{directory} holds no intact checkpoint: {', '.join(faults)}. Put one back from a copy; "
        "to begin anew, choose another --workdir or remove this directory"
    )


def _path(directory: pathlib.Path, step: int) -> pathlib.Path:
    return directory / f"{step:08d}"


def saved_paths(directory: pathlib.Path) -> list[pathlib.Path]:
    """All directories that are named as complete checkpoints are, the steps rising.

    Raises:
      ConfigError: `directory` cannot be read, which is not to be taken for an empty one.
    """
    try:
        paths = [path for path in directory.iterdir() if path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ConfigError(f"{directory} cannot be read: {reason(error)}") from error
    numbers = [path for path in paths if re.fullmatch("[0-9]{1,12}", path.name)]
    return sorted(numbers, key=lambda path: (int(path.name), path.name))


def saved_steps(directory: pathlib.Path) -> list[int]:
    """The steps of the complete checkpoints, rising; one still being written is not."""
    paths = saved_paths(directory)
    return [int(path.name) for path in paths if path == _path(directory, int(path.name))]


def some_steps(directory: pathlib.Path, every: int) -> list[int]:
    """One in `every` of `saved_steps`, and the last."""
    steps = saved_steps(directory)
    return sorted({*steps[::every], *steps[-1:]})


def best_step(directory: pathlib.Path) -> int | None:
    """The step with the lowest `eval_loss`, if there was an evaluation."""
    losses = {}
    for step in saved_steps(directory):
        # Else there was no evaluation at that step, or its manifest is damaged.
        with contextlib.suppress(
            OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError
        ):
            losses[step] = float(read_manifest(_path(directory, step))["metrics"][BEST])
    losses = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    return min(losses, key=losses.get) if losses else None
