"""Tokenised corpora on disk: written once, memory-mapped ever after.

An entry is a directory named by a digest of everything its tokens depend on: the corpus, the
tokenizer, and the settings that choose and split documents; batch settings are not among them.
It holds, per split, `SPLIT.tokens.bin` (uint16 or uint32, documents one after the other, each
ending with end-of-text if so configured) and `SPLIT.offsets.bin` (int64, where each document
starts, then the end), and `meta.json`.

Writers work in a temporary directory beside the entry and rename it when everything is on disk, so
an entry is whole or absent, however a writer ends. A lock makes others wait instead of doing the
same work; where the file system has no locks the first to finish wins and the others discard.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from absl import logging

from lm.config import ConfigError, check
from lm.data import corpora
from lm.data.config import DataConfig
from lm.data.files import CorpusReport

try:
    import fcntl
except ImportError:  # not a POSIX system: writers race, and the first rename wins
    fcntl = None

_VERSION = 1
_SPLITS = ("train", "validation")
# Texts are encoded in groups of about this many characters, which bounds the memory in use, and a
# longer document is encoded in parts that end with a line.
_CHUNK_CHARS = 4 << 20


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


@dataclasses.dataclass(frozen=True)
class TokenizedCorpus:
    """One split of one corpus as tokens.

    Attributes:
      tokens: [num_tokens] memory-mapped uint16 or uint32; every document's tokens in order, each
        followed by end-of-text if `end_of_text`.
      offsets: [num_documents + 1] int64; document i is tokens[offsets[i]:offsets[i + 1]].
      num_bytes: UTF-8 bytes of the text the tokens were made from.
      first_token_bytes: how many of those the very first token stands for (a stream without
        separators cannot predict it).
      bos_id: what a model reads before the first token of a document.
      eos_id: end-of-text.
      end_of_text: whether documents end with `eos_id`.
      vocab_size: ids are below this.
      name: the corpus' path and split, for messages.
      key: digest of everything the tokens depend on.
      skipped: one line per file or record that was left out when the corpus was read.
      pairs: documents 2i and 2i + 1 are the source and the target of pair i.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    num_bytes: int
    first_token_bytes: int
    bos_id: int
    eos_id: int
    end_of_text: bool
    vocab_size: int
    name: str
    key: str
    skipped: tuple[str, ...] = ()
    pairs: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens, including end-of-text."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Documents in this split."""
        return len(self.offsets) - 1


def cache_directory(config: DataConfig) -> Path:
    """`config.cache_dir`, or $LM_CACHE_DIR, or ~/.cache/lm/tokens; created if need be.

    Raises:
      ConfigError: it cannot be created.
    """
    name = config.cache_dir or os.environ.get("LM_CACHE_DIR") or "~/.cache/lm/tokens"
    path = Path(name).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir={str(path)!r} cannot be created ({error.strerror}); "
            "set data.cache_dir or $LM_CACHE_DIR"
        ) from None
    return path


def tokenize(
    config: DataConfig,
    path: str,
    tokenizer: Tokenizer,
    seed: int,
    *,
    split: bool = True,
    field: str = "data.path",
    notify: Callable[[str], None] = logging.info,
) -> dict[str, TokenizedCorpus]:
    """The splits of the corpus at `path` as tokens, from the cache or made now.

    Args:
      config: how to read and split.
      path: one of `config.paths` or `config.validation_paths`.
      tokenizer: encodes; its fingerprint is part of the key.
      seed: for generated corpora.
      split: False to put every document in "train".
      field: the config field `path` comes from, for messages.
      notify: receives one line for each thing worth knowing (what is written, what was skipped).

    Returns:
      {"train": ..., "validation": ...}; a split may have no documents.

    Raises:
      ConfigError: the corpus does not exist, cannot be read or holds no documents; the cache
        directory cannot be written or its disk is full.
    """
    folder = cache_directory(config)
    if not split:
        config = dataclasses.replace(config, validation_fraction=0.0)
    corpus = corpora.source(path, config, seed, field)
    key = _key(config, corpus, tokenizer, folder / "hashes.json")
    entry = folder / key
    try:
        if (found := _open(entry, path, tokenizer, notify)) is not None:
            return found
        with _lock(folder, key) as locked:
            if locked:
                _clean_leftovers(folder, key)
            # Somebody else may have finished it while we waited for the lock.
            if (found := _open(entry, path, tokenizer, notify)) is not None:
                return found
            _write(entry, config, corpus, tokenizer, field, notify)
        found = _open(entry, path, tokenizer, notify)
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir={str(folder)!r}: {error.strerror or error}; "
            "free some space or choose another directory"
        ) from error
    check(found is not None, f"data.cache_dir={str(folder)!r} does not keep what is written to it")
    return found


def _key(config: DataConfig, corpus: corpora.Source, tokenizer: Tokenizer, sidecar: Path) -> str:
    facts = {
        "version": _VERSION,
        "corpus": corpus.fingerprint(sidecar),
        "tokenizer": tokenizer.fingerprint,
        "split": config.split if config.validation_fraction else None,
        "validation_fraction": config.validation_fraction,
        "end_of_text": config.end_of_text,
        # A cached corpus in which files were skipped must not satisfy a run that refuses them.
        "on_bad_file": config.on_bad_file,
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _write(
    entry: Path,
    config: DataConfig,
    corpus: corpora.Source,
    tokenizer: Tokenizer,
    field: str,
    notify: Callable[[str], None],
) -> None:
    temporary = entry.parent / f".tmp-{entry.name}-{socket.gethostname()}-{uuid.uuid4().hex[:12]}"
    temporary.mkdir()
    report = CorpusReport()
    try:
        notify(f"tokenising {corpus.path} into {entry}")
        with contextlib.ExitStack() as stack:
            writers = {
                name: stack.enter_context(_SplitWriter(temporary, name, tokenizer, config))
                for name in _SPLITS
            }
            for split, texts in corpora.splits(corpus, report):
                for text in texts:
                    writers[split].add(text)
            described = {name: writer.finish() for name, writer in writers.items()}
        if not report.num_documents:
            raise corpora.no_documents(field, corpus.path, report)
        meta = {
            "version": _VERSION,
            "end_of_text": config.end_of_text,
            "pairs": corpus.pairs,
            "splits": described,
            "skipped": report.lines(),
        }
        with open(temporary / "meta.json", "w") as file:
            json.dump(meta, file, indent=1)
            _sync(file)
        _sync_directory(temporary)
        for line in report.lines():
            notify(line)
        _publish(temporary, entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, entry: Path) -> None:
    """Gives `temporary` its final name, unless a whole entry of that name is already there."""
    with contextlib.suppress(OSError):
        os.rename(temporary, entry)  # fails where a non-empty directory has the name
    if temporary.exists():
        if _read_meta(entry) is not None:
            return
        damaged = temporary.with_name(temporary.name + "-damaged")
        with contextlib.suppress(FileNotFoundError):
            os.rename(entry, damaged)
        shutil.rmtree(damaged, ignore_errors=True)
        os.rename(temporary, entry)
    _sync_directory(entry.parent)


class _SplitWriter:
    """Encodes texts in groups and appends them to the files of one split."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, config: DataConfig):
        self.tokenizer = tokenizer
        self.end_of_text = config.end_of_text
        self.dtype = np.dtype("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32")
        self.tokens = open(folder / f"{split}.tokens.bin", "wb")  # noqa: SIM115
        self.offsets = open(folder / f"{split}.offsets.bin", "wb")  # noqa: SIM115
        np.zeros(1, np.int64).tofile(self.offsets)
        self.num_tokens = self.num_documents = self.num_bytes = 0
        self.first_token_bytes: int | None = None
        self.pending: list[list[str]] = []
        self.pending_chars = 0

    def __enter__(self) -> _SplitWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self.tokens.close()
        self.offsets.close()

    def add(self, text: str) -> None:
        """Appends one document."""
        self.num_bytes += len(text) if text.isascii() else len(text.encode())
        self.pending.append(_parts(text))
        self.pending_chars += len(text)
        if self.pending_chars >= _CHUNK_CHARS:
            self._flush()

    def _flush(self) -> None:
        ids = iter(self.tokenizer.encode_batch(list(itertools.chain(*self.pending))))
        pieces, lengths = [], []
        eos = np.array([self.tokenizer.eos_id] if self.end_of_text else [], self.dtype)
        for parts in self.pending:
            document = [np.asarray(next(ids)).astype(self.dtype) for _ in parts] + [eos]
            pieces += document
            lengths.append(sum(map(len, document)))
        if pieces:
            chunk = np.concatenate(pieces)
            if self.first_token_bytes is None and len(chunk):
                self.first_token_bytes = len(self.tokenizer.token_bytes(int(chunk[0])))
            chunk.tofile(self.tokens)
            (self.num_tokens + np.cumsum(lengths, dtype=np.int64)).tofile(self.offsets)
            self.num_tokens += len(chunk)
            self.num_documents += len(lengths)
        self.pending, self.pending_chars = [], 0

    def finish(self) -> dict[str, Any]:
        """Writes what is left; returns what `meta.json` says of this split."""
        self._flush()
        _sync(self.tokens)
        _sync(self.offsets)
        return {
            "dtype": self.dtype.name,
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "num_bytes": self.num_bytes,
            "first_token_bytes": self.first_token_bytes or 0,
        }


def _parts(text: str, size: int = _CHUNK_CHARS) -> list[str]:
    """`text` cut after line ends into parts of at most about `size` characters."""
    parts, start = [], 0
    while len(text) - start > size:
        cut = text.rfind("\n", start, start + size) + 1 or start + size
        parts.append(text[start:cut])
        start = cut
    return [*parts, text[start:]]


def _open(
    entry: Path, path: str, tokenizer: Tokenizer, notify: Callable[[str], None]
) -> dict[str, TokenizedCorpus] | None:
    """The entry's splits, or None if there is no such entry or it is damaged."""
    if not entry.exists():
        return None
    meta = _read_meta(entry)
    if meta is None:
        notify(f"{entry} is damaged and is made again")
        return None
    return {
        split: TokenizedCorpus(
            tokens=_map(entry / f"{split}.tokens.bin", facts["dtype"], facts["num_tokens"]),
            offsets=np.fromfile(entry / f"{split}.offsets.bin", np.int64),
            num_bytes=facts["num_bytes"],
            first_token_bytes=facts["first_token_bytes"],
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            end_of_text=meta["end_of_text"],
            vocab_size=tokenizer.vocab_size,
            name=f"{path} ({split})",
            key=f"{entry.name}-{split}",
            skipped=tuple(meta["skipped"]),
            pairs=meta.get("pairs", False),
        )
        for split, facts in meta["splits"].items()
    }


def _map(path: Path, dtype: str, length: int) -> np.ndarray:
    if not length:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r", shape=(length,))


def _read_meta(entry: Path) -> dict[str, Any] | None:
    """`meta.json` if the entry is whole: files of the right size, offsets that add up."""
    try:
        meta = json.loads((entry / "meta.json").read_text())
        if meta["version"] != _VERSION or set(meta["splits"]) != set(_SPLITS):
            return None
        for split, facts in meta["splits"].items():
            size = np.dtype(facts["dtype"]).itemsize * facts["num_tokens"]
            if os.path.getsize(entry / f"{split}.tokens.bin") != size:
                return None
            offsets = np.fromfile(entry / f"{split}.offsets.bin", np.int64)
            if len(offsets) != facts["num_documents"] + 1:
                return None
            if (
                offsets[0] != 0
                or offsets[-1] != facts["num_tokens"]
                or (np.diff(offsets) < 0).any()
            ):
                return None
        return meta
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _lock(folder: Path, key: str, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of an entry; yields whether it is ours (False: busy, or no locks here).

    The kernel frees the lock of a process that dies. Lock files stay: removing one that another
    process is about to lock would let two in.
    """
    if fcntl is None:
        yield False
        return
    (folder / "locks").mkdir(exist_ok=True)
    with open(folder / "locks" / key, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield False
            return
        yield True


def _clean_leftovers(folder: Path, key: str) -> None:
    """Removes what killed writers on this machine left behind. The lock of `key` must be held."""
    for path in _temporaries(folder):
        owner = path.name.split("-")[1]
        if owner == key:
            shutil.rmtree(path, ignore_errors=True)
            continue
        with _lock(folder, owner, wait=False) as abandoned:
            if abandoned:
                shutil.rmtree(path, ignore_errors=True)


def _temporaries(folder: Path) -> Iterable[Path]:
    # Locks may not reach across machines, so another machine's work is never touched.
    return sorted(folder.glob(f".tmp-*-{socket.gethostname()}-*"))


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system lets a directory be synced
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
