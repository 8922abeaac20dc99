"""A corpus too large for one machine → the token cache, on Apache Beam.

The entry is, byte for byte, the one that `cache.tokenize` makes alone: its shards are independent
of each other, so it does not matter who writes them. Files are recognised by their digests, counted
where the split is by position, and tokenised, all as maps over tasks on any runner. No worker holds
more than a block of text or tokens (of plain text, a file).

Tasks leave their results in files beside the entry, so a job that was stopped goes on with what is
missing. Everything is in one storage that all workers see under the same path: a shared directory,
or an object store.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pickle
import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

from absl import logging

from lm.config import Bounds, Bytes, ConfigError, check
from lm.data import cache, storage
from lm.data.config import DataConfig
from lm.data.corpora import Source, sources
from lm.tokenizers import Tokenizer

_SMALL = 1 << 30  # bytes that one process reads in less time than others start


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """The `beam` section of a config: who does the work."""

    runner: str = "DirectRunner"  # any of Apache Beam's; this one is this machine
    workers: Annotated[int, Bounds(0, 4096)] = 0  # DirectRunner: processes; 0: one per core
    options: str = ""  # further pipeline options, as on a command line: "--project=x --region=y"
    part_bytes: Bytes = 64 << 20  # input that a worker takes at a time; no less than a shard

    def validate(self, prefix: str = "config.beam") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        check(bool(self.runner), f"{prefix}.runner='' must name a runner, such as 'DirectRunner'")
        try:
            options = shlex.split(self.options)
        except ValueError as error:
            raise ConfigError(f"{prefix}.options={self.options!r}: {error}") from None
        for option in options:
            check(
                option.startswith("--"),
                f"{prefix}.options={self.options!r} has {option!r}: write --NAME=VALUE",
            )

    def arguments(self) -> list[str]:
        """Apache Beam's command line."""
        arguments = [f"--runner={self.runner}", *shlex.split(self.options)]
        if "sdk_harness_log_level" not in self.options:
            arguments.append("--default_sdk_harness_log_level=ERROR")
        if self.runner == "DirectRunner":
            workers = self.workers or os.cpu_count() or 1
            mode = "multi_processing" if workers > 1 else "in_memory"
            arguments += [f"--direct_running_mode={mode}", f"--direct_num_workers={workers}"]
        return arguments


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
    corpora, held_out = sources(config, seed)
    return [_make(corpus, tokenizer, beam, notify) for corpus in (*corpora, *held_out)]


def _make(
    corpus: Source, tokenizer: Tokenizer, beam: BeamConfig, notify: Callable[[str], None]
) -> Made:
    folder = cache.cache_name(corpus.config)
    on_store = storage.is_url(folder)
    if not on_store:
        folder = str(cache.cache_directory(corpus.config))
    sidecar = storage.join(folder, cache.HASHES)
    _hash(corpus.files, folder, sidecar, beam, notify)
    key = cache.entry_key(corpus, tokenizer, sidecar)
    entry = storage.join(folder, key)
    scratch = storage.join(folder, f".beam-{key}-{cache.SHARD_BYTES}")
    # An object store cannot rename a directory. Nobody takes an entry without meta.json.
    shards = entry if on_store else storage.join(scratch, "shards")

    def run_tasks(function: Callable[[Any], Any], tasks: Sequence[Any], name: str) -> list[Any]:
        notify(f"{len(tasks):,} shards ({name}), on {beam.runner}")
        results = each(function, tasks, storage.join(scratch, name), beam)
        for file in () if on_store else storage.names(shards):
            if not file.endswith(".bin"):  # of a worker that was killed
                os.remove(storage.join(shards, file))
        return results

    meta = storage.join(entry, cache.META)
    if not on_store:
        cache.tokenize(corpus, tokenizer, notify, run_tasks, scratch=shards)
    elif cache.META not in storage.names(entry) or not cache.read_meta(storage.read_bytes(meta)):
        cache.write_entry(entry, entry, corpus, tokenizer, notify, run_tasks)
    found = cache.read_meta(storage.read_bytes(meta))
    storage.remove_tree(scratch)
    return Made(corpus.path, entry, cache.totals(found))


def _hash(
    paths: Sequence[str],
    folder: str,
    sidecar: str,
    beam: BeamConfig,
    notify: Callable[[str], None],
) -> None:
    """Makes `sidecar` know the digests of files, if there is much to read."""
    sizes = storage.unhashed(paths, storage.remembered(sidecar))
    if sum(sizes.values()) < _SMALL:
        return  # whoever asks for them reads the files
    notify(f"reading {len(sizes):,} files to recognise them, on {beam.runner}")
    identity = hashlib.blake2b(repr(sizes).encode(), digest_size=16).hexdigest()
    scratch = storage.join(folder, f".hashes-{identity}")
    groups = storage.grouped(sizes.items(), cache.SHARD_BYTES)
    made = each(storage.hash_files, groups, scratch, beam)
    storage.remember({name: mark for some in made for name, mark in some.items()}, sidecar)
    storage.remove_tree(scratch)


def each(
    function: Callable[[Any], Any], tasks: Sequence[Any], folder: str, beam: BeamConfig
) -> list[Any]:
    """[function(task) for task in tasks], on Beam's workers, but for what `folder` remembers.

    Args:
      function: can be pickled and returns what JSON can say. It may be called twice for a task.
      tasks: what it is called with; in `folder`, the same as ever.
      folder: for the tasks and their results, where all workers see it.
      beam: who does it.

    Raises:
      ConfigError: the pipeline failed; or the first that `function` raised, which is tried anew
        the next time.
    """
    storage.make_folder(folder)
    results = _results(range(len(tasks)), folder)
    missing = [number for number in range(len(tasks)) if "result" not in results[number]]
    if missing:
        storage.write_bytes(storage.join(folder, "tasks"), pickle.dumps((function, list(tasks))))
        _run(missing, folder, beam)
        results |= _results(missing, folder)
    for number, result in sorted(results.items()):
        if "error" in result:
            raise ConfigError(result["error"])
        check(
            "result" in result,
            f"config.beam.runner={beam.runner!r} left no {storage.join(folder, f'{number}.json')}: "
            "config.data.cache_dir must be storage that all workers see under this path",
        )
    return [results[number]["result"] for number in range(len(tasks))]


def _do(numbers: Iterable[int], folder: str) -> None:
    function, tasks = _tasks(folder)
    for number in numbers:
        try:
            found = {"result": function(tasks[number])}
        except ConfigError as error:
            found = {"error": str(error)}
        storage.write_bytes(storage.join(folder, f"{number}.json"), json.dumps(found).encode())


@functools.lru_cache(maxsize=2)
def _tasks(folder: str) -> tuple[Callable[[Any], Any], list[Any]]:
    return pickle.loads(storage.read_bytes(storage.join(folder, "tasks")))


def _results(numbers: Iterable[int], folder: str) -> dict[int, dict[str, Any]]:
    """What `_do` left of each number; {} where that is nothing, or nothing that can be read."""

    def result(number: int) -> tuple[int, dict[str, Any]]:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(storage.read_bytes(storage.join(folder, f"{number}.json")))
            if isinstance(found, dict):
                return number, found
        return number, {}

    with concurrent.futures.ThreadPoolExecutor(32) as pool:  # object stores answer slowly
        return dict(pool.map(result, numbers))


def _run(numbers: Sequence[int], folder: str, beam: BeamConfig) -> None:
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions

    size = max(1, beam.part_bytes // cache.SHARD_BYTES)
    groups = [list(numbers[start : start + size]) for start in range(0, len(numbers), size)]
    try:
        # Numbers only: the tasks themselves may be more than a job's description may hold.
        with apache_beam.Pipeline(options=PipelineOptions(beam.arguments())) as pipeline:
            _ = (
                pipeline
                | apache_beam.Create(groups)
                | apache_beam.Reshuffle()
                | apache_beam.Map(_do, folder=folder)
            )
    except Exception as error:  # of any kind: it depends on the runner
        logging.exception("the pipeline failed")
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "Error" in line), repr(error))
        raise ConfigError(
            f"config.beam.runner={beam.runner!r} failed: {reason}; run the command again to go on "
            f"with what is in {folder}"
        ) from error


def check_runner(beam: BeamConfig) -> None:
    """Raises ConfigError if Apache Beam is not installed or has no such runner."""
    try:
        import apache_beam
    except ImportError:
        raise ConfigError(
            "config.job='corpus' needs the package 'apache-beam': pip install 'lm[beam]'"
        ) from None
    try:
        apache_beam.runners.create_runner(beam.runner)
    except (ValueError, ImportError, AttributeError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise ConfigError(f"config.beam.runner={beam.runner!r} cannot be used: {reason}") from None
