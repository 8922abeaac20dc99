"""Tokenised corpora on disk: written once, memory-mapped ever after.

An entry is a directory named by a digest of everything its tokens depend on: the corpus, the
tokenizer, and the settings that choose and split documents; batch settings are not among them.
What it holds is in `entry`. One process fills it, or many machines do with the same bytes (`beam`).

Writers work in a temporary directory beside the entry and rename it when everything is on disk, so
an entry is whole or absent, however a writer ends. A lock makes others wait instead of doing the
same work; where the file system has no locks the first to finish wins and the others discard.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from absl import logging

from lm.config import ConfigError, check, printable
from lm.data import corpora, storage
from lm.data.config import DataConfig
from lm.data.entry import (
    META,
    VERSION,
    Fill,
    Tokenizer,
    fill_alone,
    meta_bytes,
    offsets_of,
    read_meta,
    tokens_of,
)
from lm.data.shards import Sharded, load_shards, read_shards
from lm.files import lock, sync_folder

HASHES = "hashes.json"  # beside the entries: digests of files, see `hashes`


@dataclasses.dataclass(frozen=True)
class TokenizedCorpus:
    """One split of one corpus as tokens.

    Attributes:
      tokens: [num_tokens] uint16 or uint32, on disk: the tokens of every document in order, each
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

    tokens: np.ndarray | Sharded
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


def cache_name(config: DataConfig) -> str:
    """`config.cache_dir`, or $LM_CACHE_DIR, or ~/.cache/lm/tokens."""
    return config.cache_dir or os.environ.get("LM_CACHE_DIR") or "~/.cache/lm/tokens"


def cache_directory(config: DataConfig) -> Path:
    """The directory of that name, created if need be.

    Raises:
      ConfigError: it cannot be created, or is no directory.
    """
    name = cache_name(config)
    path = Path(os.path.expanduser(name))
    check(
        not storage.is_url(name),
        f"data.cache_dir={name!r} must be a directory: tokens are mapped into memory; mount the "
        "store, or copy what is there",
    )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.cache_dir={name!r} cannot be created ({getattr(error, 'strerror', error)}); "
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
    fill: Fill | None = None,
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
      fill: makes an entry that is not there; by default this process does it alone.

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
    key = entry_key(config, corpus, tokenizer, str(folder / HASHES))
    entry = folder / key
    try:
        if (found := _open(entry, corpus, tokenizer, notify)) is not None:
            return found
        with _lock(folder, key) as locked:
            if locked:
                _clean_leftovers(folder, key)
            # Somebody else may have finished it while we waited for the lock.
            if (found := _open(entry, corpus, tokenizer, notify)) is not None:
                return found
            _write(entry, fill or fill_alone, corpus, tokenizer, field, notify)
        found = _open(entry, corpus, tokenizer, notify)
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir={str(folder)!r}: {error.strerror or error}; "
            "free some space or choose another directory"
        ) from error
    check(found is not None, f"data.cache_dir={str(folder)!r} does not keep what is written to it")
    return found


def entry_key(
    config: DataConfig, corpus: corpora.Source, tokenizer: Tokenizer, sidecar: str
) -> str:
    """The name of an entry. `sidecar` remembers hashes of files."""
    # Generated documents so few that `corpora.by_position` may decide otherwise than it once did.
    few = config.split == "hash" and 0 < config.num_documents * config.validation_fraction < 20
    facts = {
        "version": VERSION,
        **({"few": True} if few else {}),
        "corpus": corpus.fingerprint(sidecar),
        "tokenizer": tokenizer.fingerprint,
        "split": config.split if config.validation_fraction else None,
        "validation_fraction": config.validation_fraction,
        "end_of_text": config.end_of_text,
        # A cached corpus in which files were skipped must not satisfy a run that refuses them.
        "on_bad_file": config.on_bad_file,
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def corpus_fingerprint(config: DataConfig, seed: int) -> str:
    """Digest of what the corpora of `config` hold, wherever they lie and whatever they are called.

    It covers the content of `path` and `validation_path`, in order, and how it is read (encoding,
    text_field, num_documents); for generated corpora the generator and `seed`. Neither paths nor
    cache_dir, batches, threads or the tokenizer change it. Two runs whose digests and other fields
    are equal read the same tokens. Files are read once and remembered in the cache directory.

    Raises:
      ConfigError: a corpus does not exist or cannot be read.
    """
    sidecar = str(cache_directory(config) / HASHES)
    facts = [
        [corpora.source(path, config, seed, field).fingerprint(sidecar) for path in paths]
        for field, paths in (
            ("data.path", config.paths),
            ("data.validation_path", config.validation_paths),
        )
    ]
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _write(
    entry: Path,
    fill: Fill,
    corpus: corpora.Source,
    tokenizer: Tokenizer,
    field: str,
    notify: Callable[[str], None],
) -> None:
    temporary = entry.parent / f".tmp-{entry.name}-{socket.gethostname()}-{uuid.uuid4().hex[:12]}"
    temporary.mkdir()
    try:
        notify(f"tokenising {printable(corpus.path)} into {printable(str(entry))}")
        described, report = fill(str(temporary), corpus, tokenizer)
        if not report.num_documents:
            raise corpora.no_documents(field, corpus.path, report)
        storage.write_bytes(str(temporary / META), meta_bytes(corpus, described, report))
        sync_folder(temporary)
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
        if read_meta(entry) is not None:
            return
        damaged = temporary.with_name(temporary.name + "-damaged")
        with contextlib.suppress(FileNotFoundError):
            os.rename(entry, damaged)
        shutil.rmtree(damaged, ignore_errors=True)
        os.rename(temporary, entry)
    sync_folder(entry.parent)


def _open(
    entry: Path, corpus: corpora.Source, tokenizer: Tokenizer, notify: Callable[[str], None]
) -> dict[str, TokenizedCorpus] | None:
    """The entry's splits, or None if there is no such entry or it is damaged."""
    if not entry.exists():
        return None
    meta = read_meta(entry)
    if meta is None:
        notify(f"{entry} is damaged and is made again")
        return None
    name = printable(corpus.path)
    for note in [*corpus.notes, *meta.get("notes", ())]:  # each run hears what is done to its data
        notify(f"{name} {note}")
    return {
        split: TokenizedCorpus(
            tokens=read_shards(entry, *tokens_of(split, meta)),
            offsets=load_shards(entry, *offsets_of(split, meta)),
            num_bytes=facts["num_bytes"],
            first_token_bytes=facts["first_token_bytes"],
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            end_of_text=meta["end_of_text"],
            vocab_size=tokenizer.vocab_size,
            name=f"{name} ({split})",
            key=f"{entry.name}-{split}",
            skipped=tuple(meta["skipped"]),
            pairs=meta.get("pairs", False),
        )
        for split, facts in meta["splits"].items()
    }


@contextlib.contextmanager
def _lock(folder: Path, key: str, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of an entry; yields whether it is ours (False: busy, or no locks here)."""
    (folder / "locks").mkdir(exist_ok=True)
    with lock(folder / "locks" / key, wait) as found:
        yield found.ours


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
