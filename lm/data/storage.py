"""Files on this machine and on object stores (gs://, s3://, …) alike.

A path with "://" in it goes to fsspec, which needs the store's own package (gcsfs, s3fs, …); any
other is an ordinary file. What is written here appears under its name when it is whole.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO

from lm.config import ConfigError


def is_url(path: str | os.PathLike) -> bool:
    """Whether `path` is on an object store, not in this machine's file system."""
    return "://" in os.fspath(path)


def join(folder: str | os.PathLike, *names: str) -> str:
    """`folder/name/…`."""
    return "/".join((os.fspath(folder).rstrip("/"), *names))


def open_file(path: str) -> BinaryIO:
    """Opens a file for reading bytes; it can seek."""
    if not is_url(path):
        return open(path, "rb")
    store, name = _store(path)
    return store.open(name, "rb")


@contextlib.contextmanager
def create(path: str) -> Iterator[BinaryIO]:
    """A new file to write bytes to; it gets its name, and is on disk, when the block ends well.

    Writers of the same path do not disturb each other: the last to finish wins.
    """
    if is_url(path):
        store, name = _store(path)
        with store.open(name, "wb") as file:  # a store shows an object once it is complete
            yield file
        return
    temporary = f"{path}.{uuid.uuid4().hex[:12]}"
    try:
        with open(temporary, "wb") as file:
            yield file
            sync(file)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def read_bytes(path: str) -> bytes:
    """The whole of a file."""
    with open_file(path) as file:
        return file.read()


def write_bytes(path: str, data: bytes) -> None:
    """Writes a whole file; see `create`."""
    with create(path) as file:
        file.write(data)


def exists(path: str) -> bool:
    """Whether there is a file or directory of that name."""
    if not is_url(path):
        return os.path.exists(path)
    store, name = _store(path)
    return store.exists(name)


def size(path: str) -> int:
    """Bytes in a file. Raises OSError if there is none."""
    if not is_url(path):
        return os.path.getsize(path)
    store, name = _store(path)
    return int(store.info(name)["size"])


def stamp(path: str) -> list[Any]:
    """[bytes, a value that changes when the file does]. Raises OSError if there is none."""
    if not is_url(path):
        stat = os.stat(path)
        return [stat.st_size, stat.st_mtime_ns]
    store, name = _store(path)
    return [int(store.info(name)["size"]), str(store.ukey(name))]


def make_folder(path: str) -> None:
    """Makes a directory and those above it, where the storage has such a thing."""
    if not is_url(path):
        os.makedirs(path, exist_ok=True)


def names(folder: str) -> list[str]:
    """Names of the files in a directory; none if it does not exist."""
    if not is_url(folder):
        return sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    store, name = _store(folder)
    store.invalidate_cache()  # other machines write here
    with contextlib.suppress(FileNotFoundError):
        return sorted(os.path.basename(found) for found in store.ls(name, detail=False))
    return []


def remove_tree(folder: str) -> None:
    """Removes a directory with all that is in it, if it exists."""
    if not is_url(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    store, name = _store(folder)
    with contextlib.suppress(FileNotFoundError):
        store.rm(name, recursive=True)


def is_folder(url: str) -> bool:
    """Whether the URL is that of a directory."""
    store, name = _store(url)
    return store.isdir(name)


def matching(url: str) -> list[str]:
    """The files that the URL of a file, a directory or a glob stands for, sorted.

    Hidden ones are left out of directories.
    """
    store, name = _store(url)
    if store.isdir(name):
        found = [path for path in store.find(name) if "/." not in path[len(name.rstrip("/")) :]]
    elif store.exists(name):
        found = [name]
    else:
        found = [path for path in store.glob(name) if store.isfile(path)]
    return sorted(store.unstrip_protocol(path) for path in found)


def sync(file: Any) -> None:
    """Waits until what was written to an ordinary file is on disk."""
    file.flush()
    os.fsync(file.fileno())


@functools.cache
def _file_system(protocol: str) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(protocol)
    except (ImportError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"paths that start with {protocol}:// cannot be used: {reason}") from None


def _store(path: str) -> tuple[Any, str]:
    store = _file_system(path.split("://")[0])
    return store, store._strip_protocol(path)
