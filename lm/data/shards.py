"""A shard of the token cache: consecutive documents of a corpus as tokens, on disk.

For each split shard number n has `SPLIT.tokens-n.bin` (uint16 or uint32), the tokens of its
documents one after the other, each document ending with end-of-text if so configured, and
`SPLIT.offsets-n.bin` (int64), where each begins, and then the end. Nothing in a shard depends on
the others, so any process can write any of them; several are read as one long array.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lm.data import corpora, storage
from lm.data.files import CorpusReport
from lm.tokenizers import Tokenizer

SPLITS = ("train", "validation")
# Texts are encoded in groups of about this many characters, which bounds the memory in use, and a
# longer document is encoded in parts.
_CHUNK_CHARS = 4 << 20
_CONTEXTS = (256, 243, 127)  # characters before a cut that are asked whether it shows
# Mapped files hold a descriptor each, of which a process often has no more than 1,024.
_MOST_OPEN = 256


@dataclasses.dataclass(frozen=True)
class Shard:
    """What one shard is to hold."""

    number: int
    documents: corpora.Source  # a part of the corpus
    left: int | None  # characters of it and after it that are for training; see `corpora.splits`


def file_name(split: str, array: str, number: int) -> str:
    """The file of a shard with an array, "tokens" or "offsets", of a split."""
    return f"{split}.{array}-{number:05d}.bin"


def write_shard(shard: Shard, folder: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """Writes the files of a shard into `folder`.

    Returns:
      For JSON: `splits`, with what `read_shards` needs to know of each, and the `report`.
    """
    report = CorpusReport()
    with contextlib.ExitStack() as files:

        def create(split: str, array: str) -> BinaryIO:
            path = storage.join(folder, file_name(split, array, shard.number))
            return files.enter_context(storage.create(path))

        writers = {
            split: _SplitWriter(
                create(split, "tokens"),
                create(split, "offsets"),
                (tokenizer, tokenizer.target) if shard.documents.pairs else (tokenizer,),
                shard.documents.config.end_of_text,
            )
            for split in SPLITS
        }
        for split, texts in corpora.splits(shard.documents, report, shard.left):
            for text in texts:
                writers[split].add(text)
        described = {split: writer.finish() for split, writer in writers.items()}
    return {"splits": described, "report": dataclasses.asdict(report)}


class _SplitWriter:
    """Encodes texts in groups and appends them to the files of one split.

    `tokenizers` take turns: of pairs the second one is the target's.
    """

    def __init__(
        self,
        tokens: BinaryIO,
        offsets: BinaryIO,
        tokenizers: Sequence[Tokenizer],
        end_of_text: bool,
    ):
        self.tokens, self.offsets = tokens, offsets
        self.tokenizers, tokenizer = tokenizers, tokenizers[0]
        self.dtype = np.dtype("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32")
        self.ending = np.array([tokenizer.eos_id] if end_of_text else [], self.dtype)
        self.num_tokens = self.num_documents = self.num_bytes = 0
        self.pending: list[list[tuple[str, np.ndarray]]] = []
        self.pending_chars = 0
        offsets.write(np.zeros(1, np.int64).tobytes())

    def add(self, text: str) -> None:
        """Appends one document."""
        tokenizer = self.tokenizers[self.num_documents % len(self.tokenizers)]
        self.num_documents += 1
        self.num_bytes += len(text) if text.isascii() else len(text.encode())
        self.pending.append(_parts(text, tokenizer.encode_batch))
        self.pending_chars += len(text)
        if self.pending_chars >= _CHUNK_CHARS:
            self._flush()

    def _flush(self) -> None:
        first, turns = self.num_documents - len(self.pending), len(self.tokenizers)
        texts: list[list[str]] = [[] for _ in self.tokenizers]
        for number, parts in enumerate(self.pending, first):
            texts[number % turns] += [text for text, _ in parts]
        encoded = [iter(t.encode_batch(own)) for t, own in zip(self.tokenizers, texts, strict=True)]
        pieces, lengths = [], []
        for number, parts in enumerate(self.pending, first):
            ids = encoded[number % turns]
            document = [next(ids)[len(known) :].astype(self.dtype) for _, known in parts]
            document.append(self.ending)
            pieces += document
            lengths.append(sum(map(len, document)))
        if pieces:
            ends = self.num_tokens + np.cumsum(lengths, dtype=np.int64)
            self.tokens.write(np.concatenate(pieces).data)
            self.offsets.write(ends.data)
            self.num_tokens = int(ends[-1])
        self.pending, self.pending_chars = [], 0

    def finish(self) -> dict[str, Any]:
        """Writes what is left; returns what `read_shards` needs to know."""
        self._flush()
        return {
            "dtype": self.dtype.name,
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "num_bytes": self.num_bytes,
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


def read_shards(
    folder: Path, split: str, shards: Sequence[dict[str, Any]]
) -> tuple[np.ndarray | ShardedArray, np.ndarray]:
    """The tokens of a split, memory-mapped, and its offsets [documents + 1], in memory.

    `shards` is what `write_shard` said of the split in each shard, in order.

    Raises:
      OSError, ValueError: a file is missing or is not what was written.
    """
    offsets = np.zeros(sum(shard["num_documents"] for shard in shards) + 1, np.int64)
    paths, sizes, read, before = [], [], 1, 0
    for number, shard in enumerate(shards):
        path = folder / file_name(split, "tokens", number)
        dtype, size = np.dtype(shard["dtype"]), shard["num_tokens"]
        here = np.fromfile(folder / file_name(split, "offsets", number), np.int64)
        whole = len(here) == shard["num_documents"] + 1 and here[0] == 0 and here[-1] == size
        whole = whole and not (np.diff(here) < 0).any()
        if not whole or (size and path.stat().st_size != size * dtype.itemsize):
            raise ValueError(f"{path} is not what was written")
        offsets[read : read + len(here) - 1] = here[1:] + before
        read, before = read + len(here) - 1, before + size
        if size:  # an empty file cannot be mapped
            paths.append(path)
            sizes.append(size)
    if not paths:
        return np.zeros(0, dtype), offsets
    if len(paths) == 1:
        return np.memmap(paths[0], dtype, mode="r"), offsets
    return ShardedArray(paths, sizes, dtype), offsets


class ShardedArray:
    """An array in several files, read like a memory-mapped one: `x[i]`, `x[a:b]`, `x[indices]`.

    `sizes` says how many items each of the files `paths` has: not 0.
    """

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int], dtype: np.dtype):
        self.dtype = np.dtype(dtype)
        self.shape = (int(sum(sizes)),)
        self._starts = np.cumsum([0, *sizes])
        self._file = functools.lru_cache(_MOST_OPEN)(
            lambda number: np.asarray(np.memmap(paths[number], self.dtype, mode="r"))
        )

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._stretch(start, max(start, stop))
            index = np.arange(start, stop, step)
        index = np.asarray(index)
        flat = index.reshape(-1)
        if not len(flat):
            return np.empty(index.shape, self.dtype)
        if flat.min() < -len(self) or flat.max() >= len(self):
            raise IndexError(f"index out of range for {len(self)} items")
        if flat.min() < 0:
            flat = np.where(flat < 0, flat + len(self), flat)
        # Rows are read by stretches: only where one begins does the file change, or else inside it.
        begins = np.concatenate([[0], np.flatnonzero(flat[1:] - flat[:-1] != 1) + 1])
        ends = np.append(begins[1:], len(flat))
        which = self._files_of(flat[begins])
        if (flat[ends - 1] >= self._starts[which + 1]).any():
            begins, which = np.arange(len(flat)), self._files_of(flat)
        items = np.empty(flat.shape, self.dtype)
        changes = np.flatnonzero(np.diff(which, prepend=-1))
        lows = begins[changes].tolist()
        for number, low, high in zip(which[changes].tolist(), lows, [*lows[1:], len(flat)]):
            items[low:high] = self._file(number)[flat[low:high] - self._starts[number]]
        return items.reshape(index.shape)[()]

    def _files_of(self, index: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, index, side="right") - 1

    def _stretch(self, start: int, stop: int) -> np.ndarray:
        items = np.empty(stop - start, self.dtype)
        first, last = self._files_of(np.array([start, stop - 1]))
        for number in range(first, last + 1) if stop > start else ():
            begin, end = self._starts[number : number + 2]
            low, high = max(start, begin), min(stop, end)
            items[low - start : high - start] = self._file(number)[low - begin : high - begin]
        return items

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)
