"""Local files → documents: plain text, JSON and JSON Lines (.gz, .zst), Parquet.

A text file is one document. A record of a JSON or Parquet file is one document: its text field.
With two text fields it is a pair of them, and so is a line of a .tsv file. Documents are yielded as
they are read, so a file need not fit in memory unless it is plain text.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lm.config import ConfigError, nearest
from lm.data.config import DataConfig

_COMPRESSION = (".gz", ".zst")
_RECORDS = (".json", ".jsonl", ".ndjson")


@dataclasses.dataclass
class CorpusReport:
    """What was read and what was left out, and why.

    Attributes:
      num_documents: documents read, before any split.
      skipped: (file or record, reason) for everything left out.
    """

    num_documents: int = 0
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def lines(self, most: int = 20) -> list[str]:
        """One line per skipped item, at most `most` of them, then one line for the rest."""
        lines = [f"skipped {name}: {reason}" for name, reason in self.skipped[:most]]
        if len(self.skipped) > most:
            lines.append(f"skipped {len(self.skipped) - most} more, {len(self.skipped)} in all")
        return lines


class BadFileError(Exception):
    """A file or record that cannot be used; the message is the reason."""


def find(path: str, field: str) -> list[str]:
    """The files `path` (a file, directory or glob) stands for, sorted; hidden ones are left out.

    Raises:
      ConfigError: there is nothing there.
    """
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        found = []
        for folder, folders, names in os.walk(expanded):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            found += [os.path.join(folder, name) for name in names if not name.startswith(".")]
        if not found:
            raise ConfigError(f"{field}={path!r} is a directory without files")
        return sorted(found)
    if os.path.exists(expanded):
        return [expanded]
    found = [p for p in glob.glob(expanded, recursive=True) if os.path.isfile(p)]
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
    return sorted(found)


def _listing(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def read(path: str, config: DataConfig, report: CorpusReport) -> Iterator[tuple[str, ...]]:
    """The documents of one file, each as a tuple of one, or its pairs.

    What cannot be used (binary, mis-encoded, empty) is noted in `report`, or refused where
    `config.on_bad_file` is "refuse".

    Raises:
      ConfigError: a record format without `config.text_field`, a missing optional package, or a
        bad file to be refused.
    """
    stem = path.lower()
    for suffix in _COMPRESSION:
        stem = stem.removesuffix(suffix)
    try:
        if os.path.getsize(path) == 0:
            raise BadFileError("empty")
        if stem.endswith(".parquet"):
            yield from items(_parquet_records(path, config), path, config, report)
        elif stem.endswith(_RECORDS):
            yield from items(_json_records(path, stem, config, report), path, config, report)
        elif len(config.text_fields) == 1:
            yield (_plain_text(path, config),)
        elif stem.endswith(".tsv"):
            yield from items(_tsv_records(path, config, report), path, config, report)
        else:
            raise BadFileError("pairs are read from .jsonl, .json, .parquet and .tsv files")
    except BadFileError as error:
        reject(path, str(error), config, report)
    except OSError as error:
        reject(path, f"unreadable, {error.strerror or error}", config, report)


def reject(name: str, reason: str, config: DataConfig, report: CorpusReport) -> None:
    """Notes in `report` that `name` is left out, or raises if bad files are to be refused."""
    if config.on_bad_file == "refuse":
        raise ConfigError(
            f"data.on_bad_file='refuse' and {name} is bad: {reason}; "
            "remove it or set data.on_bad_file='skip'"
        )
    report.skipped.append((name, reason))


def items(
    records: Iterable[Any], name: str, config: DataConfig, report: CorpusReport
) -> Iterator[tuple[str, ...]]:
    """The text field of each record as a tuple of one, or its two text fields.

    A record that is itself a string is its own text.

    Raises:
      ConfigError: the first records have no such field, or it is not text.
    """
    fields = config.text_fields
    some_were_good = False
    for number, record in enumerate(records, 1):
        found = {field: record for field in fields if len(fields) == 1}
        if isinstance(record, dict):
            found = {field: record[field] for field in fields if field in record}
        missing = [field for field in fields if field not in found]
        values = tuple(found.values())
        if not missing and all(isinstance(text, str) and text for text in values):
            some_were_good = True
            if all(map(_is_unicode, values)):
                yield values
            else:  # JSON can spell half a surrogate pair, which no encoding can write
                reject(f"{name} record {number}", "half a surrogate pair", config, report)
        elif isinstance(record, dict) and missing and not some_were_good:
            known = sorted(map(str, record))
            raise ConfigError(
                f"data.text_field={missing[0]!r} is not a field of {name}, "
                f"which has {', '.join(map(repr, known))}{nearest(missing[0], known)}"
            )
        elif missing or any(text is None or text == "" for text in values):
            reject(f"{name} record {number}", "no text", config, report)
        elif not some_were_good:
            bad = next(text for text in values if not isinstance(text, str))
            raise ConfigError(
                f"data.text_field={config.text_field!r} of {name} holds "
                f"{type(bad).__name__}, not text"
            )
        else:
            reject(f"{name} record {number}", "not text", config, report)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


def _open(path: str) -> BinaryIO:
    if path.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    if path.lower().endswith(".zst"):
        zstandard = _optional("zstandard", path, "data")
        return zstandard.ZstdDecompressor().stream_reader(
            open(path, "rb"), read_across_frames=True, closefd=True
        )
    return open(path, "rb")


def _optional(package: str, path: str, extra: str) -> Any:
    try:
        return __import__(package)
    except ImportError:
        raise ConfigError(
            f"reading {path} needs the package {package!r}: pip install 'lm[{extra}]'"
        ) from None


def _plain_text(path: str, config: DataConfig) -> str:
    with _decompressing(path), _open(path) as file:
        data = file.read()
    text = decode(data, config.encoding)
    if not text.strip():
        raise BadFileError("empty")
    return text


def decode(data: bytes, encoding: str) -> str:
    """`data` as text, without a byte-order mark. Raises `BadFileError` if it is not text."""
    name = codecs.lookup(encoding).name
    if b"\0" in data[:8192] and not name.startswith(("utf-16", "utf-32")):
        raise BadFileError("binary")
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise BadFileError(f"not {name} at byte {error.start}") from None


class _decompressing:
    """Turns the several ways in which a damaged archive fails into `BadFileError`."""

    def __init__(self, path: str):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is None or not self.path.lower().endswith(_COMPRESSION):
            return
        damaged = isinstance(error, EOFError | gzip.BadGzipFile)
        if damaged or type(error).__name__ in ("ZstdError", "error"):
            raise BadFileError(f"damaged archive, {error}") from None


def _json_records(path: str, stem: str, config: DataConfig, report: CorpusReport) -> Iterator[Any]:
    with _decompressing(path), _open(path) as file:
        if stem.endswith(".json"):
            yield from _json_array(decode(file.read(), config.encoding))
            return
        for number, line in enumerate(io.BufferedReader(file), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(decode(line, config.encoding))
            except (ValueError, RecursionError):
                reject(f"{path} line {number}", "not JSON", config, report)
            except BadFileError as error:
                reject(f"{path} line {number}", str(error), config, report)
            else:
                yield record


def _tsv_records(path: str, config: DataConfig, report: CorpusReport) -> Iterator[dict[str, str]]:
    """The lines of a table: the columns that its header names, or else the first two."""
    columns = (0, 1)
    with _decompressing(path), _open(path) as file:
        for number, line in enumerate(io.BufferedReader(file), 1):
            try:
                cells = decode(line, config.encoding).rstrip("\r\n").split("\t")
            except BadFileError as error:
                reject(f"{path} line {number}", str(error), config, report)
                continue
            if number == 1 and set(config.text_fields) <= set(cells):
                columns = tuple(map(cells.index, config.text_fields))
            elif len(cells) <= max(columns):
                if any(cells):
                    reject(f"{path} line {number}", "not two columns", config, report)
            else:
                yield {name: cells[i] for name, i in zip(config.text_fields, columns)}


def _json_array(text: str) -> list[Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        # Many files called .json hold one object a line.
        try:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        except (ValueError, RecursionError):
            raise BadFileError("not JSON") from None
    return value if isinstance(value, list) else [value]


def _parquet_records(path: str, config: DataConfig) -> Iterator[Any]:
    _optional("pyarrow", path, "data")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if not set(config.text_fields) <= set(names):
                yield dict.fromkeys(names)
                return
            for batch in file.iter_batches(batch_size=1024, columns=list(config.text_fields)):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise BadFileError(f"not Parquet, {str(error).splitlines()[0]}") from None


def content_hash(path: str, sidecar: Path | None = None) -> str:
    """BLAKE2 digest of a file's bytes.

    With `sidecar`, a JSON file, digests are remembered by (path, size, modification time), so an
    unchanged corpus is not read again just to recognise it.
    """
    known = _remembered(sidecar)
    stat = os.stat(path)
    name = os.path.abspath(path)
    stamp = [stat.st_size, stat.st_mtime_ns]
    if name in known and known[name][:2] == stamp:
        return known[name][2]
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if sidecar is not None:
        # Read again: another process may have added entries meanwhile. Losing one only costs time.
        known = _remembered(sidecar) | {name: [*stamp, digest.hexdigest()]}
        temporary = sidecar.with_name(f".{sidecar.name}.{os.getpid()}.{next(_unique)}")
        with contextlib.suppress(OSError):  # a cache that can only be read still serves
            temporary.write_text(json.dumps(known))
            os.replace(temporary, sidecar)
    return digest.hexdigest()


_unique = itertools.count()


def _remembered(sidecar: Path | None) -> dict[str, list[Any]]:
    try:
        known = json.loads(sidecar.read_text()) if sidecar else {}
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        return {}
