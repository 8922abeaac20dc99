"""Files on this machine and on object stores (gs://, s3://, …) alike: found, read and recognised.

A path with "://" in it goes to fsspec, which needs the store's own package (gcsfs, s3fs, …); any
other is an ordinary file. What is written here appears under its name when it is whole.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, TypeVar

from lm.config import ConfigError, nearest
from lm.data import algorithmic, tasks
from lm.files import replacing

# Corpora by name that are made, not read (`lm.data.corpora`, `lm.data.lines`).
GENERATED = (
    "storyworld", "translation", "storyworld_instructions", "storyworld_preferences",
    "storyworld_prompts", "random_walks", "random_walks_prompts", "pronouns", "reversal",
    *tasks.NAMES, *algorithmic.PERIODS, *algorithmic.ADDITIONS,
)  # fmt: skip
COMPRESSION = (".gz", ".zst", ".bz2", ".xz")
RECORDS = (".json", ".jsonl", ".ndjson")
T = TypeVar("T")


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
    with replacing(path) as file:
        yield file


def read_bytes(path: str) -> bytes:
    """The whole of a file."""
    with open_file(path) as file:
        return file.read()


def write_bytes(path: str, data: bytes) -> None:
    """Writes a whole file; see `create`."""
    with create(path) as file:
        file.write(data)


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


def find(path: str, field: str) -> tuple[list[str], list[str]]:
    """The files `path` (a file, directory or glob) stands for, sorted, and those left out.

    A name that exists is taken as it is, and as a pattern only if there is none. Linked folders of
    a directory are read like any other, each folder once. Left out of it are hidden files, links to
    nothing, and what is no data (see `_is_data`).

    Raises:
      ConfigError: there is nothing there.
    """
    if is_url(path):
        return _find_on_store(path, field)
    expanded = os.path.expanduser(path)
    if not os.path.exists(expanded):
        # Of bytes that are no UTF-8 the command line makes Latin-1.
        other = os.fsdecode(expanded.encode("latin-1", "replace"))
        expanded = other if os.path.exists(other) else expanded
    if os.path.isdir(expanded):
        below = _below(expanded)
        found = _data([file for file in below if os.path.isfile(file)])
        if not found:
            raise ConfigError(f"{field}={path!r} is a directory without files")
        return found, sorted(set(below) - set(found))
    if os.path.isfile(expanded):
        return [expanded], []
    if os.path.exists(expanded):
        raise ConfigError(f"{field}={path!r} is not a file or a directory")
    found = []
    with contextlib.suppress(ValueError, OSError):  # names that no file can have
        found = [p for p in glob.glob(_pattern(expanded), recursive=True) if os.path.isfile(p)]
    if not found:
        parent = os.path.dirname(expanded) or "."
        close = nearest(
            path,
            [*GENERATED, "stdlib"]
            + [os.path.join(os.path.dirname(path), name) for name in _listing(parent)],
        )
        raise ConfigError(
            f"{field}={path!r} does not exist{close}; give a file, a directory, a glob, "
            "'storyworld', 'translation', 'stdlib' or 'hf:NAME'"
        )
    return sorted(found), []


def _find_on_store(url: str, field: str) -> tuple[list[str], list[str]]:
    store, name = _store(url)
    try:
        if store.isdir(name):
            root = len(name.rstrip("/"))
            found = [path for path in store.find(name) if "/." not in path[root:]]
            data = _data(found)
        elif store.exists(name):
            found = data = [name]
        else:
            found = data = [path for path in store.glob(name) if store.isfile(path)]
    except Exception as error:  # each store's package has its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{field}={url!r} cannot be read: {reason}") from None
    if not found:
        raise ConfigError(f"{field}={url!r} does not exist")
    left_out = set(found) - set(data)
    return (
        sorted(map(store.unstrip_protocol, data)),
        sorted(map(store.unstrip_protocol, left_out)),
    )


def _below(root: str) -> list[str]:
    """Everything below `root` that is no folder, sorted; hidden names are left out."""
    found, seen, waiting = [], set(), [root]
    while waiting:
        folder = waiting.pop()
        try:
            status, names = os.stat(folder), sorted(os.listdir(folder))
        except OSError:
            found.append(folder)
            continue
        if (status.st_dev, status.st_ino) in seen:  # links may lead round in a circle
            continue
        seen.add((status.st_dev, status.st_ino))
        for path in (os.path.join(folder, name) for name in names if not name.startswith(".")):
            (waiting if os.path.isdir(path) else found).append(path)
    return sorted(found)


# What data sets keep beside their data.
_METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
_ABOUT = ("readme", "license", "licence", "notice", "changelog", "citation", "contributing")


def _data(paths: list[str]) -> list[str]:
    """Those of a folder's files that are its data."""
    found = [path for path in paths if _is_data(path)]
    kinds = (".parquet", *RECORDS)
    records = {kind for kind in kinds if any(suffix(path).startswith(kind) for path in found)}
    return [path for path in found if _is_data(path, records)]


def _is_data(path: str, records: Iterable[str] = ()) -> bool:
    """Whether a file of a folder is data.

    Beside `records` (the suffixes of files of records in the folder) a README is not; and beside
    JSON Lines or Parquet nothing is but records, .txt and compressed files.
    """
    name = os.path.basename(path).lower()
    if name in _METADATA or name.endswith((".lock", ".crc")) or name == "_success":
        return False
    if suffix(name).startswith((*RECORDS, ".tsv", ".parquet")) or not records:
        return True
    if name.split(".")[0] in _ABOUT:
        return False
    taken = name.endswith((".txt", *COMPRESSION))
    return taken or not {".jsonl", ".ndjson", ".parquet"} & set(records)


def _pattern(path: str) -> str:
    """`path` as a pattern in which the folders that exist under their own names are just names."""
    literal = path
    while literal and not os.path.isdir(literal):
        shorter = os.path.dirname(literal)
        literal = "" if shorter == literal else shorter
    return glob.escape(literal) + path[len(literal) :]


def _listing(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (OSError, ValueError):
        return []


def suffix(path: str) -> str:
    """What of a file's name decides how it is read, such as ".jsonl.gz"; "" for plain text."""
    stem = path.lower()
    packed = next((end for end in COMPRESSION if stem.endswith(end)), "")
    stem = stem.removesuffix(packed)
    return next((end for end in (*RECORDS, ".tsv", ".parquet") if stem.endswith(end)), "") + packed


def size_or_nothing(path: str) -> int:
    """Bytes in a file; 0 where it cannot be read."""
    try:
        return stamp(path)[0]
    except OSError:  # reading it says why
        return 0


def grouped(sizes: Iterable[tuple[T, float]], most: float) -> list[list[T]]:
    """Things of a size each in consecutive groups of at most `most` in all, or of one thing."""
    groups: list[list[T]] = []
    left = -1.0
    for thing, size in sizes:
        if left < size:
            groups.append([])
            left = most
        groups[-1].append(thing)
        left -= size
    return groups


def content_hashes(paths: Sequence[str], sidecar: str | None = None) -> list[str]:
    """BLAKE2 digests of the bytes of files.

    With `sidecar`, a JSON file, digests are remembered by path, size and modification time, so an
    unchanged corpus is not read again just to recognise it. Of a file that cannot be read it is "".
    """
    known = remembered(sidecar)
    made = hash_files(unhashed(paths, known))
    remember(made, sidecar)
    known |= made
    return [known.get(_full(path), [""])[-1] for path in paths]


def unhashed(paths: Sequence[str], known: dict[str, list[Any]]) -> dict[str, int]:
    """Bytes in each of the files whose digests are not `known`, where old ones are forgotten."""
    sizes = {}
    for name in map(_full, paths):
        try:
            mark = stamp(name)
        except OSError:  # reading it for its text says why
            known.pop(name, None)
            continue
        if known.get(name, [])[:-1] != mark:
            sizes[name] = mark[0]
    return sizes


def hash_files(paths: Iterable[str]) -> dict[str, list[Any]]:
    """{path: [*stamp(path), digest]} of those that can be read."""
    made = {}
    for path in paths:
        with contextlib.suppress(OSError):
            made[path] = [*stamp(path), digest(path)]
    return made


def _full(path: str) -> str:
    return path if is_url(path) else os.path.abspath(path)


def digest(path: str) -> str:
    """The BLAKE2 digest of a file's bytes."""
    result = hashlib.blake2b(digest_size=16)
    with open_file(path) as file:
        while block := file.read(1 << 20):
            result.update(block)
    return result.hexdigest()


def remembered(sidecar: str | None) -> dict[str, list[Any]]:
    """What `remember` wrote: {path: [size, modification, digest]}."""
    try:
        known = json.loads(read_bytes(sidecar)) if sidecar else {}
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        return {}


def remember(made: dict[str, list[Any]], sidecar: str | None) -> None:
    """Adds digests to the file `sidecar`."""
    if sidecar is None or not made:
        return
    # Read again: another process may have added entries meanwhile. Losing one only costs time.
    with contextlib.suppress(OSError):  # a cache that can only be read still serves
        write_bytes(sidecar, json.dumps(remembered(sidecar) | made).encode())
