"""Local files → documents: plain text, JSON and JSON Lines (.gz, .zst, .bz2, .xz), Parquet.

A text file is one document, or what lies between `data.document_separator`. A record of a JSON or
Parquet file is one document: its text field. With two text fields it is a pair of them, and so is a
line of a .tsv file. Lines end at a line feed and nowhere else. Documents are yielded as they are
read, so a file need not fit in memory unless it is plain text. Files of lines and Parquet can be
read in spans, by several machines. Paths may be URLs (gs://, s3://); see `storage`.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import dataclasses
import gzip
import io
import json
import lzma
import os
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from lm.config import ConfigError, nearest, printable
from lm.data import storage
from lm.data.config import DataConfig
from lm.data.storage import COMPRESSION, RECORDS, suffix

_LINES = (".jsonl", ".ndjson", ".tsv")
FEW = 1000  # a file, or span, without its text field in as many records is not read on
LISTED = 20  # skipped items that are named; the others are counted


class Span(NamedTuple):
    """A stretch of a file, in bytes of a file of lines or row groups of a Parquet file.

    A line belongs to the span in which it begins.
    """

    path: str
    start: int = 0
    stop: int | None = None  # None: the end of the file


@dataclasses.dataclass
class CorpusReport:
    """What was read and what was left out, and why.

    Attributes:
      num_documents: documents read, before any split.
      num_skipped: files, lines and records left out.
      skipped: the first `LISTED` of them, each as `FILE line 7: reason`.
      notes: decisions that the config leaves to the corpus, each the rest of a line after its path.
    """

    num_documents: int = 0
    num_skipped: int = 0
    skipped: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def skip(self, name: str, reason: str) -> None:
        """Notes what is left out."""
        self.num_skipped += 1
        self.skipped = [*self.skipped, f"{name}: {reason}"][:LISTED]

    def add(self, other: CorpusReport) -> None:
        """Adds what comes after in the same corpus."""
        self.num_documents += other.num_documents
        self.num_skipped += other.num_skipped
        self.skipped = [*self.skipped, *other.skipped][:LISTED]
        self.notes += other.notes

    def lines(self) -> list[str]:
        """One line per skipped item that is listed, then one line for the rest."""
        lines = [f"skipped {skipped}" for skipped in self.skipped]
        if more := self.num_skipped - len(lines):
            lines.append(f"skipped {more} more, {self.num_skipped} in all")
        return lines


class BadFileError(Exception):
    """A file or record that cannot be used; the message is the reason."""


def reject(
    span: Span, reason: str, config: DataConfig, report: CorpusReport, unit: str = "", number=0
) -> None:
    """Notes in `report` that a span, or its "line" or "record" of that number from 1, is left out.

    Raises:
      ConfigError: bad files are to be refused.
    """
    name = printable(span.path) + (f" {unit} {number}" if unit else "")
    if span.start:
        counted = "row group" if suffix(span.path) == ".parquet" else "byte"
        name += f" from {counted} {span.start:,} on"
    if config.on_bad_file == "refuse":
        raise ConfigError(
            f"data.on_bad_file='refuse' and {name} is bad: {reason}; "
            "remove it or set data.on_bad_file='skip'"
        )
    report.skip(name, reason)


def spans(path: str, total: int, size: int, config: DataConfig) -> list[Span]:
    """A file of `total` bytes cut into spans of about `size`, as far as its format allows."""
    kind = suffix(path)
    lines = _LINES if len(config.text_fields) == 2 else _LINES[:2]  # one text is the whole .tsv
    if total > size and kind in lines and _has_byte_lines(config.encoding):
        starts = range(0, total, size)
        return [Span(path, start, min(start + size, total)) for start in starts]
    if total > size and kind == ".parquet":
        with contextlib.suppress(Exception), _parquet(path) as file:  # reading it says what is bad
            number = file.metadata.num_row_groups
            each = max(1, number * size // total)
            starts = range(0, number, each)
            return [Span(path, start, min(start + each, number)) for start in starts]
    return [Span(path)]


def read(span: Span, config: DataConfig, report: CorpusReport) -> Iterator[tuple[str, ...]]:
    """The documents of one file or span, each as a tuple of one, or its pairs.

    What cannot be used (binary, mis-encoded, empty, without the text field) is noted in `report`,
    or refused where `config.on_bad_file` is "refuse".

    Raises:
      ConfigError: a missing optional package, or a bad file to be refused.
    """
    path, kind = span.path, suffix(span.path)
    try:
        if storage.stamp(path)[0] == 0:
            raise BadFileError("empty")
        if kind == ".parquet":
            yield from items(_parquet_records(span, config), span, config, report)
        elif kind.startswith(RECORDS):
            records = _json_records(span, kind, config, report)
            yield from items(records, span, config, report)
        elif len(config.text_fields) == 1:
            for text in _plain_texts(path, config):
                yield (text,)
        elif kind.startswith(".tsv"):
            yield from items(_tsv_records(span, config, report), span, config, report)
        else:
            raise BadFileError("pairs are read from .jsonl, .json, .parquet and .tsv files")
    except BadFileError as error:
        reject(span, str(error), config, report)
    except OSError as error:
        reject(span, f"unreadable, {error.strerror or error}", config, report)


def records(span: Span, config: DataConfig, report: CorpusReport) -> Iterator[tuple[str, Any]]:
    """What the records of a whole file hold, each after the place where it stands.

    That is `FILE line 7` of a file of lines. What is no JSON is noted in `report`, or refused.

    Raises:
      ConfigError: a missing optional package, or a bad file to be refused.
    """
    path, kind, name = span.path, suffix(span.path), printable(span.path)
    try:
        if storage.stamp(path)[0] == 0:
            raise BadFileError("empty")
        if kind.startswith((".jsonl", ".ndjson")):
            lines = _json_lines(span, config, report)
            numbered = ((f"{name} line {n}", value) for n, value in lines)
        elif kind.startswith(".json"):
            with _decompressed(path) as file:
                values = _json_array(decode(file.read(), config.encoding))
            numbered = ((f"{name} record {n}", value) for n, value in enumerate(values, 1))
        elif kind == ".parquet":
            values = _parquet_rows(path)
            numbered = ((f"{name} record {n}", value) for n, value in enumerate(values, 1))
        else:
            raise BadFileError("conversations are read from .jsonl, .json and .parquet files")
        for place, value in numbered:
            report.num_documents += 1
            yield place, value
    except BadFileError as error:
        reject(span, str(error), config, report)
    except OSError as error:
        reject(span, f"unreadable, {error.strerror or error}", config, report)


def items(
    records: Iterable[Any], span: Span, config: DataConfig, report: CorpusReport
) -> Iterator[tuple[str, ...]]:
    """The text field of each record as a tuple of one, or its two text fields.

    A record that is itself a string is its own text.

    Raises:
      BadFileError: none of the first records has such a field, or in none it is text.
    """
    fields = config.text_fields
    skipped, num_skipped = report.skipped, report.num_skipped
    good, mistake = False, ""
    for number, record in enumerate(records, 1):
        found = {field: record for field in fields if len(fields) == 1}
        if isinstance(record, dict):
            found = {field: record[field] for field in fields if field in record}
        missing = [field for field in fields if field not in found]
        values = tuple(found.values())
        if not missing and all(isinstance(text, str) and text for text in values):
            good = True
            if all(map(_is_unicode, values)):
                yield values
            else:  # JSON can spell half a surrogate pair, which no encoding can write
                reject(span, "half a surrogate pair", config, report, "record", number)
            continue
        textless = missing or any(text is None or text == "" for text in values)
        if not good:
            mistake = mistake or _mistake(record, missing, values, textless, fields)
            if mistake and config.on_bad_file == "refuse":
                raise BadFileError(mistake)
            if mistake and number >= FEW:
                break
        reject(span, "no text" if textless else "not text", config, report, "record", number)
    if mistake and not good:
        report.skipped, report.num_skipped = skipped, num_skipped  # the file as a whole is
        raise BadFileError(mistake)


def _mistake(record: Any, missing: list, values: tuple, textless: bool, fields: tuple) -> str:
    """What is wrong with a record as if all were like it; "" where it merely has no text."""
    if isinstance(record, dict) and missing:
        known = sorted(map(str, record))
        return (
            f"data.text_field={missing[0]!r} is not one of its fields, which are "
            f"{', '.join(map(repr, known[:20]))}{nearest(missing[0], known)}"
        )
    if textless:
        return ""
    bad = next(text for text in values if not isinstance(text, str))
    return f"data.text_field={' and '.join(map(repr, fields))} holds {type(bad).__name__}, not text"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@contextlib.contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed."""
    packed = os.path.splitext(path.lower())[1]
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(storage.open_file(path))
        if packed in _OPENERS:
            file = stack.enter_context(_OPENERS[packed](file, "rb"))
        elif packed == ".zst":
            zstandard = _optional("zstandard", path, "data")
            file = io.BufferedReader(_Frames(file, zstandard.ZstdDecompressor()), 1 << 20)
        yield file


class _Frames(io.RawIOBase):
    """Zstandard frames, decompressed; the library's own reader takes one cut short for whole."""

    def __init__(self, file: BinaryIO, decompressor: Any):
        self._file, self._decompressor = file, decompressor
        self._frame: Any = None
        self._packed, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._file.read(1 << 14)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(self._packed))
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def _optional(package: str, path: str, extra: str) -> Any:
    try:
        return __import__(package)
    except ImportError:
        raise ConfigError(
            f"reading {path} needs the package {package!r}: pip install 'lm[{extra}]'"
        ) from None


def _plain_texts(path: str, config: DataConfig) -> list[str]:
    with _decompressed(path) as file:
        data = file.read()
    text = decode(data, config.encoding)
    if separator := config.separator:
        # Line breaks around a separator that stands on a line of its own belong to it.
        texts = [part.strip("\r\n") for part in text.split(separator)]
    else:
        texts = [text]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise BadFileError("empty")
    return texts


def decode(data: bytes, encoding: str) -> str:
    """`data` as text, without a byte-order mark. Raises `BadFileError` if it is not text."""
    name = codecs.lookup(encoding).name
    if b"\0" in data[:8192] and not name.startswith(("utf-16", "utf-32")):
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise BadFileError("UTF-16: set data.encoding='utf-16'" if wide else "binary")
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeError as error:
        raise BadFileError(f"not {name} at byte {getattr(error, 'start', 0)}") from None


@contextlib.contextmanager
def _decompressed(path: str) -> Iterator[BinaryIO]:
    """A file's bytes; raises `BadFileError` for the several ways in which an archive is damaged."""
    try:
        with _open(path) as file:
            yield file
    except Exception as error:
        damaged = isinstance(error, EOFError | gzip.BadGzipFile | lzma.LZMAError)
        damaged = damaged or type(error).__name__ in ("ZstdError", "error")
        if damaged and path.lower().endswith(COMPRESSION):
            raise BadFileError(f"damaged archive, {error}") from None
        raise


def _lines(span: Span, config: DataConfig, report: CorpusReport) -> Iterator[tuple[int, str]]:
    """The lines that begin within `span`, numbered from 1. Those that are no text are rejected."""
    with _decompressed(span.path) as opened:
        file = io.BufferedReader(opened)
        if not _has_byte_lines(config.encoding):
            try:
                wide = io.TextIOWrapper(file, config.encoding, newline="\n")
                for number, line in enumerate(wide, 1):
                    yield number, line.removeprefix("\ufeff")
            except UnicodeError:
                raise BadFileError(f"not {config.encoding}") from None
            return
        position = span.start
        if span.start:  # one byte back, lest a line that begins right here is taken for a rest
            file.seek(span.start - 1)
            position += len(file.readline()) - 1
        for number, line in enumerate(file, 1):
            if span.stop is not None and position >= span.stop:
                return
            position += len(line)
            try:
                text = decode(line, config.encoding)
            except BadFileError as error:
                reject(span, str(error), config, report, "line", number)
            else:
                yield number, text


def _has_byte_lines(encoding: str) -> bool:
    """Whether a line feed is one byte and that byte a line feed, unlike in UTF-16."""
    return "\n\n".encode(encoding).endswith(b"\n\n")


def _json_records(span: Span, kind: str, config: DataConfig, report: CorpusReport) -> Iterator[Any]:
    if kind.startswith(_LINES):
        for _, value in _json_lines(span, config, report):
            yield value
        return
    with _decompressed(span.path) as file:
        data = file.read()
    yield from _json_array(decode(data, config.encoding))


def _json_lines(span: Span, config: DataConfig, report: CorpusReport) -> Iterator[tuple[int, Any]]:
    """What each line holds, after its number from 1; those that are no JSON are rejected."""
    for number, line in _lines(span, config, report):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            reject(span, "not JSON", config, report, "line", number)
        else:
            yield number, value


def _tsv_records(span: Span, config: DataConfig, report: CorpusReport) -> Iterator[dict[str, str]]:
    """The lines of a table: the columns that its header names, or else the first two."""
    columns = (0, 1)
    if span.start:
        number, header = next(_lines(Span(span.path), config, CorpusReport()), (0, ""))
        columns = (number == 1 and _columns(_cells(header), config)) or columns
    for number, line in _lines(span, config, report):
        cells = _cells(line)
        if number == 1 and not span.start and (named := _columns(cells, config)):
            columns = named
        elif len(cells) <= max(columns):
            if any(cells):
                reject(span, "not two columns", config, report, "line", number)
        else:
            yield {name: cells[i] for name, i in zip(config.text_fields, columns)}


def _cells(line: str) -> list[str]:
    return line.rstrip("\r\n").split("\t")


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
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        except (ValueError, RecursionError):
            raise BadFileError("not JSON") from None
    return value if isinstance(value, list) else [value]


@contextlib.contextmanager
def _parquet(path: str) -> Iterator[Any]:
    """A file, open; what is wrong with it, or with its rows, is a `BadFileError`."""
    _optional("pyarrow", path, "data")
    import pyarrow.parquet

    try:
        with storage.open_file(path) as opened, pyarrow.parquet.ParquetFile(opened) as file:
            yield file
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise BadFileError(f"not Parquet, {' '.join(str(error).split())}") from None


def _parquet_records(span: Span, config: DataConfig) -> Iterator[Any]:
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


def _parquet_rows(path: str) -> Iterator[dict[str, Any]]:
    """All columns of a Parquet file."""
    with _parquet(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            yield from batch.to_pylist()
