"""Files: small ones that others may have written, read whole, within bounds, and as plain JSON
alone; locks between processes; and what must be on disk before it counts.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import socket
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from lm.config import ConfigError, check

try:
    import fcntl
except ImportError:  # not a POSIX system: there are no locks
    fcntl = None

LARGEST = 256 * 2**20  # bytes of a file of JSON; the largest vocabularies take 40 MiB


def read_bytes(path: str | os.PathLike[str], largest: int = LARGEST) -> bytes:
    """The content of a regular file.

    Raises:
      ConfigError: a file that is missing, cannot be read, is larger than `largest` bytes, or is
        none, such as a pipe, that would never end.
    """
    path = pathlib.Path(path)
    try:
        check(not path.exists() or path.is_file(), f"{path} is not a file")
        size = path.stat().st_size
        check(size <= largest, f"{path} has {size:,} bytes, and at most {largest:,} are read")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read: {reason}") from None


def parse_json(data: bytes | str, name: str) -> Any:
    """The value of a JSON text.

    Raises:
      ConfigError: no UTF-8, no JSON, one nested too deeply, a number that is not finite, or an
        object that has a name twice, of which readers would take either; it begins with `name`.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        return json.loads(
            text, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_object
        )
    except RecursionError:
        raise ConfigError(f"{name} is damaged: nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{name} is damaged: {error}") from None


def parse_object(data: bytes | str, name: str) -> dict[str, Any]:
    """The object that is a JSON text; errors as of `parse_json`, and where it is something else."""
    value = parse_json(data, name)
    check(isinstance(value, dict), f"{name} is damaged: not a JSON object")
    return value


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a file of JSON; errors as of `read_bytes` and `parse_object`."""
    return parse_object(read_bytes(path), str(path))


def is_plain(name: str) -> bool:
    """Whether `name`, which a file gives, is that of a file beside it, and of none elsewhere."""
    return pathlib.PurePath(name).name == name and name not in ("", "..") and "\0" not in name


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice!r} twice")
    return result


class Lock(NamedTuple):
    """Whether a lock is `ours`; if not, its `holder`, '' where the file system has no locks."""

    ours: bool
    holder: str


@contextlib.contextmanager
def lock(path: str | os.PathLike[str], wait: bool = True) -> Iterator[Lock]:
    """Holds the lock file `path` for as long as the block runs, if it can be had.

    The kernel frees the lock of a process that dies. The file stays: removing one that another
    process is about to lock would let two in.

    Args:
      path: a file in a directory that exists; created if need be.
      wait: whether to wait for the process that holds it.

    Raises:
      OSError: the file cannot be created.
    """
    if fcntl is None:
        yield Lock(False, "")
        return
    with open(path, "a+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            yield Lock(False, file.readline(200).strip() or "another process")
            return
        except OSError:
            yield Lock(False, "")
            return
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield Lock(True, "")


def holder(path: str | os.PathLike[str]) -> str:
    """Who holds the lock file `path`, as `process 7 on host`; '' if nobody does."""
    if not os.path.exists(path):
        return ""
    try:
        with lock(path, wait=False) as found:
            return found.holder
    except OSError:  # not ours to open, so not ours to judge
        return ""


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write bytes to; it takes the place of `path`, on disk, when the block ends well.

    Writers of the same path do not disturb each other: the last to finish wins.
    """
    path = pathlib.Path(path)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with scratch.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a file of JSON, whole or not at all, into a directory that is made if need be.

    Raises:
      ConfigError: the directory cannot be written.
    """
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(
                json.dumps(value, indent=2, ensure_ascii=False, default=str).encode() + b"\n"
            )
    except OSError as error:
        raise unwritable(path.parent, error) from error


def unwritable(directory: str | os.PathLike[str], error: OSError) -> ConfigError:
    """What to tell whoever chose a directory that cannot be written."""
    return ConfigError(f"--workdir={directory} cannot be written: {error.strerror or error}")


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Waits until the names in a directory are on disk."""
    with contextlib.suppress(OSError):  # not every file system lets a directory be synced
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def take_off_torn_line(path: pathlib.Path, data: bytes) -> None:
    """Cuts off what stands behind the last line end of a file, whose content is `data`."""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
