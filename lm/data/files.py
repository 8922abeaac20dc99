"""Local files → documents: plain text, JSON and JSON Lines (.gz, .zst), Parquet.

A text file is one document. A record of a JSON or Parquet file is one document: its text field.
With two text fields it is a pair of them, and so is a line of a .tsv file. Documents are yielded as
they are read, so a file need not fit in memory unless it is plain text. Files of lines and Parquet
can be read in spans, by several machines. Paths may be URLs (gs://, s3://); see `storage`.
"""

from __future__ import annotations

import codecs
import contextlib
import glob
import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from lm.config import ConfigError, nearest
from lm.data import storage
from lm.data.config import DataConfig
from lm.data.report import BadFileError, CorpusReport, Tally, reject

_COMPRESSION = (".gz", ".zst")
_RECORDS = (".json", ".jsonl", ".ndjson")
_LINES = (".jsonl", ".ndjson", ".tsv")


class Span(NamedTuple):
    """A stretch of a file, in bytes of a file of lines or row groups of a Parquet file.

    A line belongs to the span in which it begins.
    """

    path: str
    start: int = 0
    stop: int | None = None  # None: the end of the file


def find(path: str, field: str) -> list[str]:
    """The files `path` (a file, directory or glob) stands for, sorted; hidden ones are left out.

    Raises:
      ConfigError: there is nothing there.
    """
    if storage.is_url(path):
        try:
            found = storage.matching(path)
        except OSError as error:
            raise ConfigError(f"{field}={path!r} cannot be read: {error}") from None
        if not found:
            raise ConfigError(f"{field}={path!r} does not exist")
        return found
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


def spans(path: str, total: int, size: int, config: DataConfig) -> list[Span]:
    """A file of `total` bytes cut into spans of about `size`, as far as its format allows."""
    stem = path.lower()
    lines = _LINES if len(config.text_fields) == 2 else _LINES[:2]  # one text is the whole .tsv
    if total > size and stem.endswith(lines):
        starts = range(0, total, size)
        return [Span(path, start, min(start + size, total)) for start in starts]
    if total > size and stem.endswith(".parquet"):
        with contextlib.suppress(Exception), _parquet(path) as file:  # reading it says what is bad
            number = file.metadata.num_row_groups
            each = max(1, number * size // total)
            starts = range(0, number, each)
            return [Span(path, start, min(start + each, number)) for start in starts]
    return [Span(path)]


def suffix(path: str) -> str:
    """What of a file's name decides how it is read, such as ".jsonl.gz"; "" for plain text."""
    stem = path.lower()
    packed = next((end for end in _COMPRESSION if stem.endswith(end)), "")
    stem = stem.removesuffix(packed)
    return next((end for end in (*_RECORDS, ".tsv", ".parquet") if stem.endswith(end)), "") + packed


def size_or_nothing(path: str) -> int:
    """Bytes in a file; 0 where it cannot be read."""
    try:
        return storage.size(path)
    except OSError:  # reading it says why
        return 0


def read(path: str | Span, config: DataConfig, report: CorpusReport) -> Iterator[tuple[str, ...]]:
    """The documents of one file or span, each as a tuple of one, or its pairs.

    What cannot be used (binary, mis-encoded, empty) is noted in `report`, or refused where
    `config.on_bad_file` is "refuse".

    Raises:
      ConfigError: a record format without `config.text_field`, a missing optional package, or a
        bad file to be refused.
    """
    span = path if isinstance(path, Span) else Span(path)
    path, first = span.path, span.start == 0
    stem = path.lower()
    for suffix in _COMPRESSION:
        stem = stem.removesuffix(suffix)
    try:
        if storage.size(path) == 0:
            raise BadFileError("empty")
        if stem.endswith(".parquet"):
            yield from items(_parquet_records(span, config), path, config, report, first)
        elif stem.endswith(_RECORDS):
            records = _json_records(span, stem, config, report)
            yield from items(records, path, config, report, first)
        elif len(config.text_fields) == 1:
            yield (_plain_text(path, config),)
        elif stem.endswith(".tsv"):
            yield from items(_tsv_records(span, config, report), path, config, report, first)
        else:
            raise BadFileError("pairs are read from .jsonl, .json, .parquet and .tsv files")
    except BadFileError as error:
        reject(path, str(error), config, report)
    except OSError as error:
        reject(path, f"unreadable, {error.strerror or error}", config, report)


def items(
    records: Iterable[Any],
    name: str,
    config: DataConfig,
    report: CorpusReport,
    first: bool = True,
) -> Iterator[tuple[str, ...]]:
    """The text field of each record as a tuple of one, or its two text fields.

    A record that is itself a string is its own text. Where the records are not the `first` of their
    file, what would be an error is left to those before, as `report.tally.doubt`.

    Raises:
      ConfigError: the first records have no such field, or it is not text.
    """
    fields = config.text_fields
    tally = report.tally = Tally()
    for number, record in enumerate(records, 1):
        tally.records = number
        found = {field: record for field in fields if len(fields) == 1}
        if isinstance(record, dict):
            found = {field: record[field] for field in fields if field in record}
        missing = [field for field in fields if field not in found]
        values = tuple(found.values())
        if not missing and all(isinstance(text, str) and text for text in values):
            tally.good = True
            if all(map(_is_unicode, values)):
                yield values
            else:  # JSON can spell half a surrogate pair, which no encoding can write
                reject(name, "half a surrogate pair", config, report, "record", number)
            continue
        textless = missing or any(text is None or text == "" for text in values)
        mistake = ""
        if isinstance(record, dict) and missing:
            known = sorted(map(str, record))
            mistake = (
                f"data.text_field={missing[0]!r} is not a field of {name}, "
                f"which has {', '.join(map(repr, known))}{nearest(missing[0], known)}"
            )
        elif not textless:
            bad = next(text for text in values if not isinstance(text, str))
            mistake = (
                f"data.text_field={config.text_field!r} of {name} holds "
                f"{type(bad).__name__}, not text"
            )
        if mistake and not tally.good:
            if first:
                raise ConfigError(mistake)
            tally.doubt = tally.doubt or mistake
        reject(name, "no text" if textless else "not text", config, report, "record", number)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


@contextlib.contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(storage.open_file(path))
        if path.lower().endswith(".gz"):
            file = stack.enter_context(gzip.open(file, "rb"))
        elif path.lower().endswith(".zst"):
            zstandard = _optional("zstandard", path, "data")
            reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            file = stack.enter_context(reader)
        yield file


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


def _lines(span: Span, report: CorpusReport) -> Iterator[tuple[int, bytes]]:
    """The lines that begin within `span`, numbered from 1."""
    with _decompressing(span.path), _open(span.path) as opened:
        file = io.BufferedReader(opened)
        position = span.start
        if span.start:  # one byte back, lest a line that begins right here is taken for a rest
            file.seek(span.start - 1)
            position += len(file.readline()) - 1
        for number, line in enumerate(file, 1):
            if span.stop is not None and position >= span.stop:
                return
            position += len(line)
            report.tally.lines = number
            yield number, line


def _json_records(span: Span, stem: str, config: DataConfig, report: CorpusReport) -> Iterator[Any]:
    if stem.endswith(".json"):
        with _decompressing(span.path), _open(span.path) as file:
            data = file.read()
        yield from _json_array(decode(data, config.encoding))
        return
    for number, line in _lines(span, report):
        if not line.strip():
            continue
        try:
            record = json.loads(decode(line, config.encoding))
        except (ValueError, RecursionError):
            reject(span.path, "not JSON", config, report, "line", number)
        except BadFileError as error:
            reject(span.path, str(error), config, report, "line", number)
        else:
            yield record


def _tsv_records(span: Span, config: DataConfig, report: CorpusReport) -> Iterator[dict[str, str]]:
    """The lines of a table: the columns that its header names, or else the first two."""
    columns = (0, 1)
    if span.start:
        header = next(_lines(Span(span.path), CorpusReport()))[1]
        with contextlib.suppress(BadFileError):
            columns = _columns(_cells(header, config), config) or columns
    for number, line in _lines(span, report):
        try:
            cells = _cells(line, config)
        except BadFileError as error:
            reject(span.path, str(error), config, report, "line", number)
            continue
        if number == 1 and not span.start and (named := _columns(cells, config)):
            columns = named
        elif len(cells) <= max(columns):
            if any(cells):
                reject(span.path, "not two columns", config, report, "line", number)
        else:
            yield {name: cells[i] for name, i in zip(config.text_fields, columns)}


def _cells(line: bytes, config: DataConfig) -> list[str]:
    return decode(line, config.encoding).rstrip("\r\n").split("\t")


def _columns(cells: list[str], config: DataConfig) -> tuple[int, ...] | None:
    """Where a header has the text fields, if it is one."""
    if set(config.text_fields) <= set(cells):
        return tuple(map(cells.index, config.text_fields))
    return None


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


@contextlib.contextmanager
def _parquet(path: str) -> Iterator[Any]:
    _optional("pyarrow", path, "data")
    import pyarrow.parquet

    with storage.open_file(path) as opened, pyarrow.parquet.ParquetFile(opened) as file:
        yield file


def _parquet_records(span: Span, config: DataConfig) -> Iterator[Any]:
    pyarrow = _optional("pyarrow", span.path, "data")
    try:
        with _parquet(span.path) as file:
            names = file.schema_arrow.names
            if not set(config.text_fields) <= set(names):
                yield dict.fromkeys(names)
                return
            stop = file.metadata.num_row_groups if span.stop is None else span.stop
            for batch in file.iter_batches(
                batch_size=1024,
                row_groups=range(span.start, stop),
                columns=list(config.text_fields),
            ):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise BadFileError(f"not Parquet, {str(error).splitlines()[0]}") from None
