"""The files that `data.path` stands for: of a path, a folder with its links, a pattern, a URL."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterable

from lm.config import ConfigError, nearest
from lm.data import storage

COMPRESSION = (".gz", ".zst", ".bz2", ".xz")
RECORDS = (".json", ".jsonl", ".ndjson")


def find(path: str, field: str) -> tuple[list[str], list[str]]:
    """The files `path` (a file, directory or glob) stands for, sorted, and those left out.

    A name that exists is taken as it is, and as a pattern only if there is none. Linked folders of
    a directory are read like any other, each folder once. Left out of it are hidden files, links to
    nothing, and what is no data (see `_is_data`).

    Raises:
      ConfigError: there is nothing there.
    """
    if storage.is_url(path):
        try:
            found = storage.matching(path)
            data = _data(found) if storage.is_folder(path) else found
        except ConfigError:
            raise
        except Exception as error:  # each store's package has its own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"{field}={path!r} cannot be read: {reason}") from None
        if not found:
            raise ConfigError(f"{field}={path!r} does not exist")
        return data, sorted(set(found) - set(data))
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
            ["storyworld", "translation", "stdlib"]
            + [os.path.join(os.path.dirname(path), name) for name in _listing(parent)],
        )
        raise ConfigError(
            f"{field}={path!r} does not exist{close}; give a file, a directory, a glob, "
            "'storyworld', 'translation', 'stdlib' or 'hf:NAME'"
        )
    return sorted(found), []


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
        return storage.size(path)
    except OSError:  # reading it says why
        return 0
