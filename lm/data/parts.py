"""Parts of a corpus, tokenised apart, and how they become one entry of the token cache.

What one process would have written, reading the parts in order, follows from a record of each: its
counts say where its tokens go, and its tally what is wrong with a file that several parts share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm.config import ConfigError
from lm.data import corpora, files, storage
from lm.data.entry import SPLITS, write_splits
from lm.data.report import LISTED, CorpusReport, RefusedError, Skipped, Tally
from lm.data.shards import shard_lengths, shard_name
from lm.tokenizers import Tokenizer
from lm.tokenizers.files import from_files

COUNTS = ("num_tokens", "num_documents", "num_bytes")  # of a split
_BLOCK = 16 << 20  # bytes of a file that are in memory at a time


@dataclasses.dataclass(frozen=True)
class Part:
    """Consecutive documents of a corpus, and what it takes to tokenise them anywhere."""

    corpus: corpora.Source
    left: int | None  # characters of it and after it that are for training; see `corpora.splits`
    tokenizer: str  # a file
    folder: str  # for the arrays


@dataclasses.dataclass
class Record:
    """What became of a part."""

    characters: int = 0
    folder: str = ""  # where its arrays are
    splits: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    report: CorpusReport = dataclasses.field(default_factory=CorpusReport)
    broken_off: bool = False  # the file could not be read to its end
    error: ConfigError | None = None

    def closed(self) -> Record:
        """With a report that is short however much was skipped."""
        report = self.report
        self.broken_off = bool(report.skipped) and not report.skipped[-1].unit
        report.unlisted += len(report.skipped[LISTED:])
        del report.skipped[LISTED:]
        return self


def count(part: corpora.Source) -> Record:
    """Counts the characters of a part."""
    record = Record()
    try:
        record.characters = sum(map(len, part.documents(record.report)))
    except ConfigError as error:
        record.error = error
    return record.closed()


def tokenise(part: Part) -> Record:
    """Writes the arrays of a part."""
    # Two workers may be given the same task; the record says whose arrays count.
    record = Record(folder=storage.join(part.folder, uuid.uuid4().hex))
    try:
        tokenizer = _load_tokenizer(part.tokenizer)
        items = corpora.splits(part.corpus, record.report, part.left)
        with _writable(record.folder) as folder:
            record.splits = write_splits(folder, items, part.corpus, tokenizer, 1 << 62)
    except ConfigError as error:
        record.error = error
    return record.closed()


@contextlib.contextmanager
def _writable(folder: str) -> Iterator[Path]:
    """An ordinary directory whose files are in `folder` when the block ends well."""
    if not storage.is_url(folder):
        storage.make_folder(folder)
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)
        for path in sorted(Path(temporary).iterdir()):
            with open(path, "rb") as source, storage.create(storage.join(folder, path.name)) as to:
                shutil.copyfileobj(source, to, _BLOCK)


@functools.lru_cache(maxsize=4)
def _load_tokenizer(path: str) -> Tokenizer:
    files = json.loads(storage.read_bytes(path))
    return from_files({name: text.encode("latin-1") for name, text in files.items()})


def merge(
    parts: Sequence[corpora.Source], records: Sequence[Record]
) -> tuple[list[Record], CorpusReport]:
    """The records that count, and the report of one process that reads all parts in order.

    Raises:
      ConfigError: that process' error.
    """
    kept, report = [], CorpusReport()
    # Of the file that a part is a span of: what was read of it, how the report looked before it,
    # and whether a reader of the whole file would have gone on.
    before, listed, broken_off = Tally(), (0, 0), False

    def add(skipped: list[Skipped], unlisted: int = 0) -> None:
        report.skipped += skipped
        report.unlisted += unlisted + len(report.skipped[LISTED:])
        del report.skipped[LISTED:]

    def no_data() -> None:
        del report.skipped[listed[0] :]
        report.unlisted = listed[1]
        add([Skipped(last, before.doubt)])

    last = ""
    for part, record in [*zip(parts, records, strict=True), (None, Record())]:
        spans = getattr(part, "spans", ())
        inside = len(spans) == 1 and spans[0].start > 0
        if not inside:
            if last and before.doubt and not before.first_good and not broken_off:
                no_data()
            before, broken_off = Tally(), False
            listed = (len(report.skipped), report.unlisted)
            if part is None:
                break
        elif broken_off:
            record.characters = 0
            continue
        last = spans[0].path if len(spans) == 1 and spans[0].stop is not None else ""
        found = record.report
        if not before.first_good:
            before.doubt = before.doubt or found.tally.doubt
            before.first_good = found.tally.first_good and before.records + found.tally.first_good
            if before.doubt and before.first_good > files.FEW:
                broken_off, record.characters = True, 0
                no_data()
                continue
        if isinstance(record.error, RefusedError):
            raise RefusedError(
                Skipped(last, before.doubt)
                if inside and before.doubt and not before.first_good
                else _renumbered(record.error.skipped, before)
            )
        if record.error is not None:
            raise record.error
        add([_renumbered(skipped, before) for skipped in found.skipped], found.unlisted)
        report.num_documents += found.num_documents
        before.lines += found.tally.lines
        before.records += found.tally.records
        broken_off = record.broken_off
        kept.append(record)
    return kept, report


def _renumbered(skipped: Skipped, before: Tally) -> Skipped:
    """With the number in the whole file."""
    more = {"line": before.lines, "record": before.records}.get(skipped.unit, 0)
    return skipped._replace(number=skipped.number + more)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Items of a file that go into another."""

    path: str
    start: int  # first item
    count: int  # items
    add: int  # to each of them


@dataclasses.dataclass(frozen=True)
class Output:
    """A file of an entry, and what it is made of."""

    path: str
    dtype: str
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return sum(piece.count for piece in self.pieces) * np.dtype(self.dtype).itemsize


def plan(
    folder: str, records: Sequence[Record], shard_items: int
) -> tuple[dict[str, Any], list[Output]]:
    """What `meta.json` says of each split, and what each of its files is made of."""
    described, outputs = {}, []
    for split in SPLITS:
        facts = [record.splits[split] for record in records]
        totals = {what: sum(fact[what] for fact in facts) for what in COUNTS}
        dtype = facts[0]["dtype"]
        first = [fact["first_token_bytes"] for fact in facts if fact["num_tokens"]]
        described[split] = {"dtype": dtype, **totals, "first_token_bytes": (first or [0])[0]}
        tokens, offsets, base = [], [], 0
        for number, (record, fact) in enumerate(zip(records, facts)):
            path = storage.join(record.folder, shard_name(f"{split}.tokens", 0))
            tokens.append(Piece(path, 0, fact["num_tokens"], 0))
            # The end of a part is where the next begins: one of the two is enough.
            again = int(number > 0)
            path = storage.join(record.folder, shard_name(f"{split}.offsets", 0))
            offsets.append(Piece(path, again, fact["num_documents"] + 1 - again, base))
            base += fact["num_tokens"]
        for name, kind, pieces in (("tokens", dtype, tokens), ("offsets", "int64", offsets)):
            for number, shard in enumerate(_cut(pieces, shard_items)):
                path = storage.join(folder, shard_name(f"{split}.{name}", number))
                outputs.append(Output(path, kind, shard))
    return described, outputs


def _cut(pieces: Sequence[Piece], size: int) -> Iterator[tuple[Piece, ...]]:
    """The pieces of each file of `size` items."""
    waiting = [piece for piece in reversed(pieces) if piece.count]
    for length in shard_lengths(sum(piece.count for piece in waiting), size):
        shard = []
        while length:
            piece = waiting.pop()
            taken = min(piece.count, length)
            shard.append(dataclasses.replace(piece, count=taken))
            length -= taken
            if rest := piece.count - taken:
                start = piece.start + taken
                waiting.append(dataclasses.replace(piece, start=start, count=rest))
        yield tuple(shard)


def assemble(output: Output) -> None:
    """Writes a file of an entry."""
    dtype = np.dtype(output.dtype)
    with storage.create(output.path) as to:
        for piece in output.pieces:
            with storage.open_file(piece.path) as file:
                file.seek(piece.start * dtype.itemsize)
                left = piece.count * dtype.itemsize
                while left:
                    block = file.read(min(left, _BLOCK))
                    if not block:
                        raise OSError(f"{piece.path} is cut short")
                    left -= len(block)
                    to.write((np.frombuffer(block, dtype) + piece.add).data if piece.add else block)
