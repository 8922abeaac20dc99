"""What a run measured: one JSON object a line in `metrics.jsonl`, and the same for TensorBoard.

Each record holds `step` and whatever was measured there; the names that other tools rely on are

    loss                  training loss, mean nats per target token
    eval_loss             the same on the validation split
    eval_bits_per_byte    the validation loss in bits per byte of text; where the tokenizer loses
                          some of it (case, unknown words), of the text as it would decode it
    learning_rate, grad_norm    those of the step itself
    tokens, tokens_per_second    tokens seen so far and their rate, without padding and, for an
                          encoder-decoder, without the source; rates leave out evaluations,
                          checkpoints, and the first dispatch of a process, which compiles
    data_wait             share of the time spent waiting for data, 0 to 1
    mfu                   model FLOPs utilisation, 0 to 1

A value that is not finite is `null` in the file, as JSON has no NaN, and NaN again when read.
"""

from __future__ import annotations

import json
import logging
import math
import os
import pathlib
import socket
import time
from collections.abc import Mapping
from typing import Any

from lm.config import ConfigError
from lm.files import replacing
from lm.parallel import hosts

FILE = "metrics.jsonl"
_log = logging.getLogger(__name__)


class MetricsWriter:
    """Appends records to `workdir/metrics.jsonl`, and TensorBoard events to `tensorboard/` there.

    Every record is handed to the operating system before `write` returns, so a killed run keeps all
    it logged. Records of steps after `start_step`, which an earlier run of this directory made and
    this one will repeat, are dropped first: the file tells one story. Only process 0 writes.

    Args:
      workdir: the run directory; created if needed.
      start_step: the step this run resumes from; 0 for a new one.

    Raises:
      ConfigError: the directory cannot be written to.
    """

    def __init__(self, workdir: str | os.PathLike[str], start_step: int = 0) -> None:
        self._file = self._events = None
        self._failed = False
        if hosts.index() == 0:
            self._open(pathlib.Path(workdir), start_step)

    def _open(self, workdir: pathlib.Path, start_step: int) -> None:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if (workdir / FILE).exists():
                _keep_until(workdir / FILE, start_step)
            self._file = (workdir / FILE).open("a", encoding="utf-8")
            self._events = _EventFile(workdir / "tensorboard", start_step)
        except OSError as error:
            raise ConfigError(
                f"{error.filename or workdir}: metrics cannot be written here: "
                f"{error.strerror or error}; choose another --workdir"
            ) from error

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records numbers measured at `step`; arrays of one element count as numbers.

        A disk that is full later on is reported once and does not end the training.
        """
        if self._file is None:
            return
        values = {name: _number(value) for name, value in metrics.items()}
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        record = {"step": int(step), **finite}
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
            self._events.write(int(step), values)
        except OSError as error:
            if not self._failed:
                _log.warning("%s: metrics are being lost: %s", self._file.name, error)
            self._failed = True

    def rewind(self, step: int) -> None:
        """Drops the records of steps after `step`: the run has gone back there."""
        if self._file is not None:
            workdir = pathlib.Path(self._file.name).parent
            self.close()
            self._open(workdir, step)

    def close(self) -> None:
        """Closes the files; further writes are ignored."""
        for file in (self._file, self._events):
            if file is not None:
                try:
                    file.close()
                except OSError as error:  # what a full disk would not take
                    _log.warning("metrics were lost: %s", error)
        self._file = self._events = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, or of the run directory that holds one, in order.

    `null` becomes NaN. A last line that a killed run left unfinished is left out; so is any other
    that is no record, with a warning.

    Raises:
      ConfigError: there is no such file.
    """
    path = pathlib.Path(path)
    path = path / FILE if path.is_dir() else path
    try:
        lines = _records(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    return [
        {name: math.nan if value is None else value for name, value in record.items()}
        for record, _ in lines
    ]


def _records(path: pathlib.Path) -> list[tuple[dict[str, Any], bytes]]:
    """The records of a file, each with its line."""
    *lines, last = path.read_bytes().split(b"\n")
    found = [(record, line) for line in lines if (record := _parse(line)) is not None]
    if len(found) < len(lines):
        missing = f"{len(lines) - len(found)} of {len(lines)} lines"
        _log.warning("%s: %s are damaged and left out", path, missing)
    record = _parse(last)
    return found if record is None else [*found, (record, last)]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    numbers = all(value is None or isinstance(value, int | float) for value in record.values())
    return record if numbers else None


def _keep_until(path: pathlib.Path, step: int) -> None:
    """Drops later records and unfinished lines; the file is replaced in one step or not at all."""
    kept = [line for record, line in _records(path) if record["step"] <= step]
    with replacing(path) as file:
        file.writelines(line + b"\n" for line in kept)


def _number(value: Any) -> int | float:
    if isinstance(value, int | float):
        return value
    return value.item() if hasattr(value, "item") else float(value)


class _EventFile:
    """A TensorBoard event file of scalars, written with the tensorboard package alone.

    Its own `EventFileWriter` imports TensorFlow where that is installed, and leaves writing to a
    thread that a killed process takes with it.
    """

    def __init__(self, directory: pathlib.Path, start_step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        # The same process may resume within a second: never two runs in one file.
        taken = sum(path.name.startswith(f"{name}.") for path in directory.iterdir())
        self._records = RecordWriter((directory / f"{name}.{taken}").open("wb"))
        self._write(self._event(wall_time=time.time(), file_version="brain.Event:2"))
        # Tells TensorBoard to forget what an earlier run logged for the steps this one repeats.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(self._event(wall_time=time.time(), step=start_step + 1, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [self._summary.Value(tag=n, simple_value=float(v)) for n, v in values.items()]
        summary = self._summary(value=scalars)
        self._write(self._event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._records.close()

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()
