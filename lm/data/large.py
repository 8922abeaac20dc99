"""A corpus too large for one machine → the token cache, on Apache Beam.

The entry is, byte for byte, the one that `cache.tokenize` makes alone. Three maps over independent
tasks make it, on any runner:

1. files → their digests, which name the entry;
2. consecutive parts of the corpus → arrays of tokens and offsets, each part for itself;
3. the files of the entry → copied together from the arrays of the parts.

Between the last two, one process adds up how much is in each part, which fixes the place of every
token. No machine holds more than a block of text or tokens (of plain text, a file). Tasks pass
their results through files beside the entry, each written when all else is: a job that was stopped
goes on with what is missing.

Everything is in one storage that all workers see under the same path: a shared directory, or an
object store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging

from lm.data import cache, corpora, hashes, storage
from lm.data.beam import BeamConfig, check_runner, each
from lm.data.config import DataConfig
from lm.data.entry import META, meta_bytes
from lm.data.parts import COUNTS, Part, assemble, count, merge, plan, tokenise
from lm.data.report import CorpusReport
from lm.data.shards import SHARD_ITEMS
from lm.tokenizers import Tokenizer

_SMALL = 1 << 30  # bytes that are read or copied by one process in less time than others start


@dataclasses.dataclass(frozen=True)
class Made:
    """What was made of one corpus.

    Attributes:
      path: the corpus.
      entry: the directory with its tokens.
      splits: for each split `num_tokens`, `num_documents`, `num_bytes`.
    """

    path: str
    entry: str
    splits: dict[str, dict[str, Any]]


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer,
    seed: int,
    beam: BeamConfig,
    notify: Callable[[str], None] = logging.info,
) -> list[Made]:
    """Makes what `lm.data.prepare` with the same arguments then finds in the cache.

    Raises:
      ConfigError: as `lm.data.prepare`; or Apache Beam or the runner cannot be used, or failed.
    """
    check_runner(beam)
    if config.validation_paths:
        config = dataclasses.replace(config, validation_fraction=0.0)
    asked = [("data.path", path) for path in config.paths]
    asked += [("data.validation_path", path) for path in config.validation_paths]
    return [_make(config, path, field, tokenizer, seed, beam, notify) for field, path in asked]


def _make(
    config: DataConfig,
    path: str,
    field: str,
    tokenizer: Tokenizer,
    seed: int,
    beam: BeamConfig,
    notify: Callable[[str], None],
) -> Made:
    corpus = corpora.source(path, config, seed, field)
    folder = cache.cache_name(config)
    on_store = storage.is_url(folder)
    if not on_store:
        folder = str(cache.cache_directory(config))
    sidecar = storage.join(folder, cache.HASHES)
    _hash(corpus, folder, sidecar, beam, notify)
    key = cache.entry_key(config, corpus, tokenizer, sidecar)
    scratch, entry = storage.join(folder, f".parts-{key}"), storage.join(folder, key)
    fill = functools.partial(_fill, scratch=scratch, beam=beam, notify=notify)
    if not on_store:
        found = cache.tokenize(config, path, tokenizer, seed, field=field, notify=notify, fill=fill)
        splits = {
            name: {what: getattr(split, what) for what in COUNTS} for name, split in found.items()
        }
    else:
        # An object store cannot rename a directory. Nobody takes an entry without meta.json.
        meta = storage.join(entry, META)
        if not storage.exists(meta):
            notify(f"tokenising {path} into {entry}")
            described, report = fill(entry, corpus, tokenizer)
            if not report.num_documents:
                raise corpora.no_documents(field, path, report)
            storage.write_bytes(meta, meta_bytes(corpus, described, report))
            for line in report.lines():
                notify(line)
            for note in corpus.notes + report.notes:
                notify(f"{path} {note}")
        splits = json.loads(storage.read_bytes(meta))["splits"]
    storage.remove_tree(scratch)
    return Made(path, entry, splits)


def _fill(
    folder: str,
    corpus: corpora.Source,
    tokenizer: Tokenizer,
    *,
    scratch: str,
    beam: BeamConfig,
    notify: Callable[[str], None],
) -> tuple[dict[str, Any], CorpusReport]:
    """Writes the arrays of an entry on Beam's workers; see `entry.Fill`."""
    parts = corpus.parts(beam.part_bytes)
    notify(f"{len(parts):,} parts, on {beam.runner}")
    scratch = storage.join(scratch, str(beam.part_bytes))
    storage.make_folder(scratch)
    lefts: list[int | None] = [None] * len(parts)
    chosen = CorpusReport()
    if corpora.by_position(corpus, chosen):
        counts = each(count, parts, storage.join(scratch, "lengths"), beam)
        merge(parts, counts)
        lengths = np.array([record.characters for record in counts], np.int64)
        training = corpora.training_share(int(lengths.sum()), corpus.config)
        lefts = (training - (np.cumsum(lengths) - lengths)).tolist()
    saved = storage.join(scratch, "tokenizer")
    files = {name: data.decode("latin-1") for name, data in tokenizer.files().items()}
    storage.write_bytes(saved, json.dumps(files).encode())
    arrays = storage.join(scratch, "arrays")
    tasks = [Part(part, left, saved, arrays) for part, left in zip(parts, lefts)]
    records = each(tokenise, tasks, storage.join(scratch, "tokens"), beam)
    records, report = merge(parts, records)
    report.notes = chosen.notes
    described, outputs = plan(folder, records, SHARD_ITEMS)
    copied = sum(output.num_bytes for output in outputs)
    assembly = storage.join(scratch, f"assembly-{uuid.uuid4().hex}")
    each(assemble, outputs, assembly, beam, small=copied < _SMALL)
    wanted = {os.path.basename(output.path) for output in outputs}
    if not storage.is_url(folder):
        for name in set(storage.names(folder)) - wanted:  # of workers that were killed
            os.remove(storage.join(folder, name))
    return described, report


def _hash(
    corpus: corpora.Source,
    folder: str,
    sidecar: str,
    beam: BeamConfig,
    notify: Callable[[str], None],
) -> None:
    """Makes `sidecar` know the digests of the corpus' files, if there is much to read."""
    known = hashes.remembered(sidecar)
    groups: list[list[str]] = []
    left, total = 0, 0
    identity = hashlib.blake2b(digest_size=16)
    for path in corpus.files:
        path = path if storage.is_url(path) else os.path.abspath(path)
        with contextlib.suppress(OSError):  # reading it says why
            stamp = storage.stamp(path)
            if known.get(path, [])[:-1] == stamp:
                continue
            identity.update(repr((path, stamp)).encode())
            if not groups or left < stamp[0]:
                groups.append([])
                left = beam.part_bytes
            groups[-1].append(path)
            left, total = left - stamp[0], total + stamp[0]
    small = total < _SMALL
    if not small:
        notify(f"reading {sum(map(len, groups)):,} files to recognise them, on {beam.runner}")
    scratch = storage.join(folder, f".hashes-{identity.hexdigest()}")
    found = each(_hash_files, groups, scratch, beam, small=small)
    hashes.remember({name: entry for group in found for name, entry in group.items()}, sidecar)
    storage.remove_tree(scratch)


def _hash_files(paths: list[str]) -> dict[str, list[Any]]:
    made = {}
    for path in paths:
        with contextlib.suppress(OSError):
            made[path] = [*storage.stamp(path), hashes.digest(path)]
    return made
