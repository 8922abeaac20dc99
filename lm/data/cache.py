"""Tokenised corpora on disk: written once, memory-mapped ever after.

An entry is a directory named by a digest of everything its tokens depend on: the corpus, the
tokenizer, and the settings that choose and split documents; batch settings are not among them. It
holds the shards of the corpus (see `shards`), whose borders follow from its files alone, and
`meta.json`, written last, which says how much is in each. One process writes the shards one after
the other, or many machines do with the same bytes (`parallel_tokenize`).

Writers work in a directory of their own and rename it when everything is on disk, so an entry is
whole or absent, however a writer ends. A lock makes others wait instead of doing the same work;
where the file system has no locks the first to finish wins and the others discard.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from lm.config import ConfigError, check, printable
from lm.data import corpora, storage
from lm.data.config import DataConfig
from lm.data.files import CorpusReport
from lm.data.shards import SPLITS, Shard, ShardedArray, read_shards, write_shard
from lm.files import lock, sync_folder
from lm.tokenizers import Tokenizer

HASHES = "hashes.json"  # beside the entries: digests of files, see `storage.content_hashes`
META = "meta.json"
SHARD_BYTES = 64 << 20  # of input, as far as files can be cut; entries of other sizes serve, too
_KEY = 2  # raised when the same facts give other tokens
_FORMAT = 3  # of `meta.json`
# An older entry is one shard if no array has more items than this: its arrays are then one file.
_FORMAT_2_ITEMS = 1 << 28

# [function(task) for task in tasks], by whoever does the work; the name says what it is for.
RunTasks = Callable[[Callable[[Any], Any], Sequence[Any], str], list[Any]]


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
      name: the corpus' path and split, for messages.
      key: digest of everything the tokens depend on.
      pairs: documents 2i and 2i + 1 are the source and the target of pair i.
    """

    tokens: np.ndarray | ShardedArray
    offsets: np.ndarray
    num_bytes: int
    first_token_bytes: int
    bos_id: int
    eos_id: int
    end_of_text: bool
    name: str
    key: str
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
    corpus: corpora.Source,
    tokenizer: Tokenizer,
    notify: Callable[[str], None] = logging.info,
    run_tasks: RunTasks | None = None,
    scratch: str = "",
) -> dict[str, TokenizedCorpus]:
    """The splits of a corpus as tokens, from the cache or made now.

    Args:
      corpus: whose `config` says where the cache is.
      tokenizer: encodes; its fingerprint is part of the key.
      notify: receives one line for each thing worth knowing (what is written, what was skipped).
      run_tasks: makes the shards of an entry that is not there; by default, this process.
      scratch: a directory on the same disk for shards, which are gone on with there if writing
        was interrupted; by default they are in one of their own and begun anew.

    Returns:
      {"train": ..., "validation": ...}; a split may have no documents.

    Raises:
      ConfigError: the corpus cannot be read or holds no documents; the cache directory cannot be
        written or its disk is full.
    """
    folder = cache_directory(corpus.config)
    key = entry_key(corpus, tokenizer, str(folder / HASHES))
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
            temporary = Path(scratch) if scratch else _temporary(entry)
            temporary.mkdir(parents=bool(scratch), exist_ok=bool(scratch))
            try:
                write_entry(str(temporary), entry, corpus, tokenizer, notify, run_tasks)
                sync_folder(temporary)
                _publish(temporary, entry)
            finally:
                if not scratch:
                    shutil.rmtree(temporary, ignore_errors=True)
        found = _open(entry, corpus, tokenizer, notify)
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir={str(folder)!r}: {error.strerror or error}; "
            "free some space or choose another directory"
        ) from error
    check(found is not None, f"data.cache_dir={str(folder)!r} does not keep what is written to it")
    return found


def cached(corpus: corpora.Source, tokenizer: Tokenizer) -> dict[str, TokenizedCorpus] | None:
    """What `tokenize` returns, if it is in the cache; nothing is made.

    Raises:
      ConfigError: the corpus, which says what its tokens are called, cannot be read.
    """
    folder = cache_directory(corpus.config)
    entry = folder / entry_key(corpus, tokenizer, str(folder / HASHES))
    return _open(entry, corpus, tokenizer, lambda line: None)


def entry_key(corpus: corpora.Source, tokenizer: Tokenizer, sidecar: str) -> str:
    """The name of an entry. `sidecar` remembers hashes of files."""
    config = corpus.config
    # Generated documents so few that `corpora.by_position` may decide otherwise than it once did.
    few = config.split == "hash" and 0 < config.num_documents * config.validation_fraction < 20
    facts = {
        "version": _KEY,
        **({"few": True} if few else {}),
        "corpus": corpus.fingerprint(sidecar),
        "tokenizer": tokenizer.fingerprint,
        "split": config.split if config.validation_fraction else None,
        "validation_fraction": config.validation_fraction,
        "end_of_text": config.end_of_text,
        # A cached corpus in which files were skipped must not satisfy a run that refuses them.
        "on_bad_file": config.on_bad_file,
    }
    return _digest(facts)


def _digest(facts: Any) -> str:
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
    return _digest(
        [[c.fingerprint(sidecar) for c in some] for some in corpora.sources(config, seed)]
    )


def write_entry(
    folder: str,
    entry: Path | str,
    corpus: corpora.Source,
    tokenizer: Tokenizer,
    notify: Callable[[str], None],
    run_tasks: RunTasks | None = None,
) -> None:
    """Writes into `folder` what is to be `entry`: shards, then `meta.json`. See `tokenize`."""
    run_tasks = run_tasks or (lambda function, tasks, name: list(map(function, tasks)))
    notify(f"tokenising {printable(corpus.path)} into {printable(str(entry))}")
    parts = corpus.parts(SHARD_BYTES)
    report = CorpusReport()
    lefts: list[int | None] = [None] * len(parts)
    if corpora.by_position(corpus, report):
        lengths = run_tasks(corpora.num_characters, parts, "lengths")
        training = corpora.training_share(sum(lengths), corpus.config)
        lefts = [training - before for before in itertools.accumulate([0, *lengths[:-1]])]
    shards = [Shard(number, *both) for number, both in enumerate(zip(parts, lefts))]
    write = functools.partial(write_shard, folder=folder, tokenizer=tokenizer)
    written = run_tasks(write, shards, "tokens")
    for shard in written:
        report.add(CorpusReport(**shard["report"]))
    if not report.num_documents:
        raise corpora.no_documents(corpus, report)
    meta = {
        "version": _FORMAT,
        "end_of_text": corpus.config.end_of_text,
        "pairs": corpus.pairs,
        "notes": report.notes,
        "skipped": report.lines(),
        "shards": [shard["splits"] for shard in written],
    }
    storage.write_bytes(storage.join(folder, META), json.dumps(meta, indent=1).encode())
    for line in report.lines():
        notify(line)


def read_meta(data: bytes) -> dict[str, Any] | None:
    """`meta.json` of an entry, or None if it is damaged or of a format that is not read."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        meta = json.loads(data)
        if meta["version"] == 2:
            splits = meta["splits"]
            counts = [s[of] for s in splits.values() for of in ("num_tokens", "num_documents")]
            return {**meta, "shards": [splits]} if max(counts) < _FORMAT_2_ITEMS else None
        return meta if meta["version"] == _FORMAT else None
    return None


def totals(meta: dict[str, Any]) -> dict[str, dict[str, int]]:
    """For each split of an entry `num_tokens`, `num_documents`, `num_bytes`."""
    counts = ("num_tokens", "num_documents", "num_bytes")
    return {
        split: {count: sum(shard[split][count] for shard in meta["shards"]) for count in counts}
        for split in SPLITS
    }


def _publish(temporary: Path, entry: Path) -> None:
    """Gives `temporary` its final name, unless a whole entry of that name is already there."""
    with contextlib.suppress(OSError):
        os.rename(temporary, entry)  # fails where a non-empty directory has the name
    if temporary.exists():
        if _read(entry) is not None:
            return
        damaged = temporary.with_name(temporary.name + "-damaged")
        with contextlib.suppress(FileNotFoundError):
            os.rename(entry, damaged)
        shutil.rmtree(damaged, ignore_errors=True)
        os.rename(temporary, entry)
    sync_folder(entry.parent)


def _read(entry: Path) -> tuple[dict[str, Any], dict[str, tuple[Any, np.ndarray]]] | None:
    """An entry's `meta.json` and the arrays of its splits; None if it is damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if (meta := read_meta((entry / META).read_bytes())) is not None:
            return meta, {
                split: read_shards(entry, split, [shard[split] for shard in meta["shards"]])
                for split in SPLITS
            }
    return None


def _open(
    entry: Path, corpus: corpora.Source, tokenizer: Tokenizer, notify: Callable[[str], None]
) -> dict[str, TokenizedCorpus] | None:
    """The entry's splits, or None if there is no such entry or it is damaged."""
    if not entry.exists():
        return None
    if (found := _read(entry)) is None:
        notify(f"{entry} is damaged, or of an older format, and is made again")
        return None
    meta, arrays = found
    name = printable(corpus.path)
    for note in [*corpus.notes, *meta.get("notes", ())]:  # each run hears what is done to its data
        notify(f"{name} {note}")
    return {
        split: TokenizedCorpus(
            tokens=tokens,
            offsets=offsets,
            num_bytes=totals(meta)[split]["num_bytes"],
            first_token_bytes=len(tokenizer.token_bytes(int(tokens[0]))) if len(tokens) else 0,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            end_of_text=meta["end_of_text"],
            name=f"{name} ({split})",
            key=f"{entry.name}-{split}",
            pairs=meta.get("pairs", False),
        )
        for split, (tokens, offsets) in arrays.items()
    }


@contextlib.contextmanager
def _lock(folder: Path, key: str, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of an entry; yields whether it is ours (False: busy, or no locks here)."""
    (folder / "locks").mkdir(exist_ok=True)
    with lock(folder / "locks" / key, wait) as found:
        yield found.ours


def _temporary(entry: Path) -> Path:
    """A new directory beside `entry`, whose name says whose it is; see `_clean_leftovers`."""
    return entry.parent / f".tmp-{entry.name}-{socket.gethostname()}-{uuid.uuid4().hex[:12]}"


def _clean_leftovers(folder: Path, key: str) -> None:
    """Removes what killed writers on this machine left behind. The lock of `key` must be held."""
    # Locks may not reach across machines, so another machine's work is never touched.
    for path in sorted(folder.glob(f".tmp-*-{socket.gethostname()}-*")):
        owner = path.name.split("-")[1]
        if owner == key:
            shutil.rmtree(path, ignore_errors=True)
            continue
        with _lock(folder, owner, wait=False) as abandoned:
            if abandoned:
                shutil.rmtree(path, ignore_errors=True)
