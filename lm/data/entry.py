"""What an entry of the token cache is: two arrays for each split, and `meta.json`.

`SPLIT.tokens` (uint16 or uint32) has the tokens of all documents one after the other, each document
ending with end-of-text if so configured; `SPLIT.offsets` (int64) says where each begins, and then
the end. Both lie in files of bounded size; see `shards`. `meta.json` is written last, so a folder
without it, or with files of other sizes than it says, is no entry.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lm.data import corpora
from lm.data.config import DataConfig
from lm.data.report import CorpusReport
from lm.data.shards import SHARD_ITEMS, ShardWriter, load_shards, right_sizes

VERSION = 2
SPLITS = ("train", "validation")
META = "meta.json"
# Texts are encoded in groups of about this many characters, which bounds the memory in use, and a
# longer document is encoded in parts.
_CHUNK_CHARS = 4 << 20
_CONTEXTS = (256, 243, 127)  # characters before a cut that are asked whether it shows


class Tokenizer(Protocol):
    """What this module needs of a tokenizer."""

    vocab_size: int
    eos_id: int
    bos_id: int
    fingerprint: str

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, without special tokens."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token contributes to the text."""


# Writes the arrays of an entry into a folder; returns what `meta.json` says of each split, and what
# was read.
Fill = Callable[[str, corpora.Source, Tokenizer], tuple[dict[str, dict[str, Any]], CorpusReport]]


def fill_alone(
    folder: str, corpus: corpora.Source, tokenizer: Tokenizer
) -> tuple[dict[str, Any], CorpusReport]:
    """Writes the arrays of an entry in this process; see `Fill`."""
    report = CorpusReport()
    left = corpora.num_training_characters(corpus, report)
    items = corpora.splits(corpus, report, left)
    described = write_splits(Path(folder), items, corpus, tokenizer)
    return described, report


def write_splits(
    folder: Path,
    items: Iterable[tuple[corpora.Split, tuple[str, ...]]],
    corpus: corpora.Source,
    tokenizer: Tokenizer,
    shard_items: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Writes the arrays of both splits into `folder`; returns what `meta.json` says of each."""
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(
                _SplitWriter(folder, name, tokenizer, corpus.config, shard_items or SHARD_ITEMS)
            )
            for name in SPLITS
        }
        for split, texts in items:
            for text in texts:
                writers[split].add(text)
        return {name: writer.finish() for name, writer in writers.items()}


def meta_bytes(
    corpus: corpora.Source, described: dict[str, dict[str, Any]], report: CorpusReport
) -> bytes:
    """`meta.json`: what an entry holds. It is written last."""
    meta = {
        "version": VERSION,
        "shard_items": SHARD_ITEMS,
        "end_of_text": corpus.config.end_of_text,
        "pairs": corpus.pairs,
        "splits": described,
        "notes": report.notes,
        "skipped": report.lines(),
    }
    return json.dumps(meta, indent=1).encode()


class _SplitWriter:
    """Encodes texts in groups and appends them to the files of one split."""

    def __init__(
        self,
        folder: Path,
        split: str,
        tokenizer: Tokenizer,
        config: DataConfig,
        shard_items: int,
    ):
        self.tokenizer = tokenizer
        self.end_of_text = config.end_of_text
        self.dtype = np.dtype("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32")
        self.tokens = ShardWriter(folder, f"{split}.tokens", self.dtype, shard_items)
        self.offsets = ShardWriter(folder, f"{split}.offsets", np.int64, shard_items)
        self.offsets.append(np.zeros(1, np.int64))
        self.num_bytes = 0
        self.first_token_bytes: int | None = None
        self.pending: list[list[tuple[str, np.ndarray]]] = []
        self.pending_chars = 0

    def __enter__(self) -> _SplitWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self.tokens.close()
        self.offsets.close()

    def add(self, text: str) -> None:
        """Appends one document."""
        self.num_bytes += len(text) if text.isascii() else len(text.encode())
        self.pending.append(_parts(text, self.tokenizer.encode_batch))
        self.pending_chars += len(text)
        if self.pending_chars >= _CHUNK_CHARS:
            self._flush()

    def _flush(self) -> None:
        texts = [text for parts in self.pending for text, _ in parts]
        ids = iter(self.tokenizer.encode_batch(texts))
        pieces, lengths = [], []
        eos = np.array([self.tokenizer.eos_id] if self.end_of_text else [], self.dtype)
        for parts in self.pending:
            document = [next(ids)[len(known) :].astype(self.dtype) for _, known in parts] + [eos]
            pieces += document
            lengths.append(sum(map(len, document)))
        if pieces:
            chunk = np.concatenate(pieces)
            if self.first_token_bytes is None and len(chunk):
                self.first_token_bytes = len(self.tokenizer.token_bytes(int(chunk[0])))
            self.offsets.append(self.tokens.length + np.cumsum(lengths, dtype=np.int64))
            self.tokens.append(chunk)
        self.pending, self.pending_chars = [], 0

    def finish(self) -> dict[str, Any]:
        """Writes what is left; returns what `meta.json` says of this split."""
        self._flush()
        self.tokens.close()
        self.offsets.close()
        return {
            "dtype": self.dtype.name,
            "num_tokens": self.tokens.length,
            "num_documents": self.offsets.length - 1,
            "num_bytes": self.num_bytes,
            "first_token_bytes": self.first_token_bytes or 0,
        }


Encode = Callable[[list[str]], list[np.ndarray]]


def _parts(text: str, encode: Encode) -> list[tuple[str, np.ndarray]]:
    """Texts of about `_CHUNK_CHARS` characters that give the ids of `text`, one after the other.

    Each comes with its first ids, which are to be left out: it begins with some of the text before
    its cut, since many tokenizers treat the beginning of a text in a way of their own. What repeats
    itself for megabytes is not cut: where its tokens begin may depend on all of it.
    """
    parts, begin, known, end = [], 0, np.zeros(0, np.int32), _CHUNK_CHARS
    while end < len(text):
        cut = _cut(text, end, encode)
        if cut:
            parts.append((text[begin:cut], known))
            begin = cut - _CONTEXTS[0]
            (known,) = encode([text[begin:cut]])
        end = (cut or end) + _CHUNK_CHARS
    return [*parts, (text[begin:], known)]


def _cut(text: str, end: int, encode: Encode) -> int:
    """A place shortly before `end` where `text` may be cut; 0 if none is found."""
    start = max(end - _CHUNK_CHARS // 2, end - (1 << 14))
    for pattern in (r"\n(?=\S)", r"\s(?=\S)", r"(?=\s\S)", ""):
        places = [found.end() for found in re.compile(pattern).finditer(text, start, end)]
        for cut in reversed(places[-16:]):
            if _does_not_show(text, cut, encode):
                return cut
    return 0


def _does_not_show(text: str, cut: int, encode: Encode) -> bool:
    """Whether the ids on either side of `cut` are independent of the text on the other."""
    most = _CONTEXTS[0]
    if text.count(text[cut - 8 : cut + 8], cut - most, cut + most) > 1:  # it may repeat itself
        return False
    before = encode([text[cut - size : cut] for size in _CONTEXTS])
    both = encode([text[cut - size : cut + most] for size in _CONTEXTS])
    after = [ids[len(some) :] for some, ids in zip(before, both)]
    return all(
        np.array_equal(some, ids[: len(some)]) and np.array_equal(rest, after[0])
        for some, ids, rest in zip(before, both, after)
    )


def tokens_of(split: str, meta: dict[str, Any]) -> tuple[str, str, int, int]:
    """Name, dtype, length and items a file of the array of tokens."""
    facts = meta["splits"][split]
    return f"{split}.tokens", facts["dtype"], facts["num_tokens"], meta["shard_items"]


def offsets_of(split: str, meta: dict[str, Any]) -> tuple[str, str, int, int]:
    """The same of the array of offsets."""
    num_documents = meta["splits"][split]["num_documents"]
    return f"{split}.offsets", "int64", num_documents + 1, meta["shard_items"]


def read_meta(entry: Path) -> dict[str, Any] | None:
    """`meta.json` if the entry is whole: files of the right size, offsets that add up."""
    try:
        meta = json.loads((entry / META).read_text(encoding="utf-8"))
        if meta["version"] != VERSION or set(meta["splits"]) != set(SPLITS):
            return None
        for split, facts in meta["splits"].items():
            if not right_sizes(entry, *tokens_of(split, meta)):
                return None
            if not right_sizes(entry, *offsets_of(split, meta)):
                return None
            offsets = load_shards(entry, *offsets_of(split, meta))
            ends = offsets[0] == 0 and offsets[-1] == facts["num_tokens"]
            if not ends or (np.diff(offsets) < 0).any():
                return None
        return meta
    except (OSError, ValueError, KeyError, TypeError):
        return None
