"""A map over tasks on Apache Beam whose results are files, so that it can be gone on with."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import io
import os
import pickle
import shlex
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from absl import logging

from lm.config import Bounds, Bytes, ConfigError, check
from lm.data import storage


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """The `beam` section of a config: who does the work."""

    runner: str = "DirectRunner"  # any of Apache Beam's; this one is this machine
    workers: Annotated[int, Bounds(0, 4096)] = 0  # DirectRunner: processes; 0: one per core
    options: str = ""  # further pipeline options, as on a command line: "--project=x --region=y"
    part_bytes: Bytes = 64 << 20  # input that a worker takes at a time, where a file can be cut

    def validate(self, prefix: str = "config.beam") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        check(bool(self.runner), f"{prefix}.runner='' must name a runner, such as 'DirectRunner'")
        try:
            options = shlex.split(self.options)
        except ValueError as error:
            raise ConfigError(f"{prefix}.options={self.options!r}: {error}") from None
        for option in options:
            check(
                option.startswith("--"),
                f"{prefix}.options={self.options!r} has {option!r}: write --NAME=VALUE",
            )

    def arguments(self) -> list[str]:
        """Apache Beam's command line."""
        arguments = [f"--runner={self.runner}", *shlex.split(self.options)]
        if "sdk_harness_log_level" not in self.options:
            arguments.append("--default_sdk_harness_log_level=ERROR")
        if self.runner == "DirectRunner":
            workers = self.workers or os.cpu_count() or 1
            mode = "multi_processing" if workers > 1 else "in_memory"
            arguments += [f"--direct_running_mode={mode}", f"--direct_num_workers={workers}"]
        return arguments


def each(
    function: Callable[[Any], Any],
    tasks: Sequence[Any],
    folder: str,
    beam: BeamConfig,
    *,
    small: bool = False,
) -> list[Any]:
    """[function(task) for task in tasks], on Beam's workers, but for what `folder` remembers.

    Args:
      function: of a module's top level. It may be called more than once for a task.
      tasks: what it is called with; in `folder`, the same as ever.
      folder: for the tasks and their results, where all workers see it. A result that has an
        `error` is not remembered.
      beam: who does it.
      small: there is too little to do to wait for workers; do it here.

    Raises:
      ConfigError: the pipeline failed.
    """
    if small:
        return [function(task) for task in tasks]
    storage.make_folder(folder)
    storage.write_bytes(storage.join(folder, "tasks"), pickle.dumps((function, list(tasks))))
    names = set(storage.names(folder))
    missing = [number for number in range(len(tasks)) if f"{number}.done" not in names]
    if missing:
        _run(missing, folder, beam)
    with concurrent.futures.ThreadPoolExecutor(32) as pool:  # object stores answer slowly
        try:
            return list(pool.map(functools.partial(_result, folder), range(len(tasks))))
        except FileNotFoundError as error:
            raise ConfigError(
                f"config.beam.runner={beam.runner!r} left no {error.filename}: "
                "config.data.cache_dir must be storage that all workers see under this path"
            ) from None


def _do(number: int, folder: str) -> None:
    function, tasks = _tasks(folder)
    result = function(tasks[number])
    suffix = "failed" if getattr(result, "error", None) else "done"
    storage.write_bytes(storage.join(folder, f"{number}.{suffix}"), pickle.dumps(result))


@functools.lru_cache(maxsize=2)
def _tasks(folder: str) -> tuple[Callable[[Any], Any], list[Any]]:
    return pickle.loads(storage.read_bytes(storage.join(folder, "tasks")))


def _result(folder: str, number: int) -> Any:
    path = storage.join(folder, f"{number}.done")
    if not storage.exists(path):
        path = storage.join(folder, f"{number}.failed")
    try:
        return _Data(io.BytesIO(storage.read_bytes(path))).load()
    except (pickle.UnpicklingError, EOFError, ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path} is no result of this job ({error}): remove {folder}") from None


class _Data(pickle.Unpickler):
    """Reads data alone: results lie in the cache between runs, where others may have put them."""

    def find_class(self, module: str, name: str) -> Any:
        """A dataclass, a named tuple or an exception of this package."""
        found = super().find_class(module, name) if module.split(".")[0] == "lm" else None
        data = isinstance(found, type) and (
            dataclasses.is_dataclass(found) or issubclass(found, tuple | Exception)
        )
        if not data:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return found


def _run(numbers: Sequence[int], folder: str, beam: BeamConfig) -> None:
    apache_beam = _apache_beam()
    from apache_beam.options.pipeline_options import PipelineOptions

    try:
        # Numbers only: the tasks themselves may be more than a job's description may hold.
        with apache_beam.Pipeline(options=PipelineOptions(beam.arguments())) as pipeline:
            _ = (
                pipeline
                | apache_beam.Create(list(numbers))
                | apache_beam.Reshuffle()
                | apache_beam.Map(_do, folder=folder)
            )
    except Exception as error:  # of any kind: it depends on the runner
        logging.exception("the pipeline failed")
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "Error" in line), repr(error))
        raise ConfigError(
            f"config.beam.runner={beam.runner!r} failed: {reason}; run the command again to go on "
            f"with what is in {folder}"
        ) from error


def check_runner(beam: BeamConfig) -> None:
    """Raises ConfigError if Apache Beam is not installed or has no such runner."""
    _apache_beam()
    from apache_beam.runners import create_runner

    try:
        create_runner(beam.runner)
    except (ValueError, ImportError, AttributeError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise ConfigError(f"config.beam.runner={beam.runner!r} cannot be used: {reason}") from None


def _apache_beam() -> Any:
    try:
        import apache_beam
    except ImportError:
        raise ConfigError(
            "config.job='corpus' needs the package 'apache-beam': pip install 'lm[beam]'"
        ) from None
    return apache_beam
