"""The run directory: whose it is, claiming a new one, and what may change when a run goes on.

Everything here happens before any work, so that a mistake costs none.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

from lm import tokenizers
from lm.config import ConfigError, check
from lm.files import read_json
from lm.parallel import hosts
from lm.runs.sources import CHECKPOINTS, CONFIG
from lm.tokenizers import Tokenizer
from lm.training.metrics import FILE as METRICS
from lm.training.restore import saved_paths

# What a run that goes on may have otherwise than it began, by section or field of
# `lm.jobs.train.TrainJob`; a field's own line goes before its section's.
# These change nothing of what is computed, or only how fast, where and how often.
FREE = (
    "data.cache_dir", "data.prefetch", "data.num_threads", "data.even_batch", "data.epochs",
    "model.attention", "model.remat", "model.scan_layers", "model.initializer",
    "model.initializer_std", "objective.chunk", "train.offload_optimizer",
    "train.steps_per_dispatch", "train.log_every", "train.eval_every", "train.eval_batch_size",
    "train.on_spike", "train.spike_nats", "train.max_spikes", "train.profile_start",
    "train.profile_steps", "train.compiler", "train.compilation_cache", "checkpoint", "mesh",
    "ignore", "hosts", "strategy", "zero", "prompt", "sample", "exact_match",
)  # fmt: skip
# These may change, and it is said what that does.
_ROUNDED = "was {old}, is {new} from here on: no run without a break ends with the same numbers"
_MOVED = "was {old}, and {new} holds the same"  # or it is refused
NOTED = {
    "train.steps": "was {old}, is {new} from here on",
    "train.accumulation": _ROUNDED,
    "model.compute_dtype": _ROUNDED,
    "data.path": _MOVED,
    "data.validation_path": _MOVED,
    "init_from": "is not read: this run has begun, from {old}; to start from another model choose "
    "another --workdir",
}
# These make another run of it.
REFUSED = (
    "job", "seed", "tokenizer", "model", "optimizer", "data.weights", "data.text_field",
    "data.num_documents", "data.encoding", "data.on_bad_file", "data.split",
    "data.validation_fraction", "data.batch_size", "data.block_size", "data.source_length",
    "data.long_pairs", "data.corruption", "data.packing", "data.end_of_text", "data.shuffle",
    "data.random_offset", "data.document_separator", "objective.name", "objective.z_loss",
    "objective.label_smoothing", "objective.load_balancing", "objective.router_z",
)  # fmt: skip


def classified(field: str) -> str:
    """Which of the three a field is in: "free", "noted" or "refused"; "" for none."""
    while field:
        for name, fields in (("free", FREE), ("noted", NOTED), ("refused", REFUSED)):
            if field in fields:
                return name
        field = field.rpartition(".")[0]
    return ""


def saved_run(directory: pathlib.Path) -> dict[str, Any] | None:
    """The config.json of the run in `directory`; None where none has begun.

    A training run has begun when there is a checkpoint or a record of a loss. Until then its
    directory may be claimed by another.

    Raises:
      ConfigError: config.json, or the directory of checkpoints, cannot be read.
    """
    path = directory / CONFIG
    if not path.exists():
        return None
    saved = _read_config(path, f"--workdir={directory}")
    metrics = directory / METRICS
    begun = bool(saved_paths(directory / CHECKPOINTS))
    begun |= metrics.exists() and metrics.stat().st_size > 0
    return saved if begun or saved.get("job") != "train" else None


def check_directory(
    directory: pathlib.Path,
    wanted: dict[str, Any],
    usual: dict[str, Any],
    fingerprint: str | None = None,
    corpus: Callable[[], str] | None = None,
) -> list[str]:
    """Raises ConfigError if `directory` holds another run, or cannot be written.

    Another run is one of a config other than `wanted` in what may not change (`REFUSED`), or of
    another tokenizer or text.

    Args:
      directory: the run's.
      wanted: its config, as nested dicts; a field it lacks is not compared.
      usual: the same of a config that says nothing: what a run had in fields that its version did
        not know.
      fingerprint: of the tokenizer, where it is known.
      corpus: gives the text's (`lm.data.corpus_fingerprint`), if it must be known.

    Returns:
      What may change and does, one line each.
    """
    notes, saved = [], saved_run(directory)
    if saved is not None:
        trained = saved.get("tokenizer_fingerprint")
        check(
            fingerprint is None or trained in (None, fingerprint),
            f"--workdir={directory}: its tokenizer/ is not the one its run was trained with "
            f"(fingerprint {fingerprint}, not {trained}): put the original back, or choose "
            "another --workdir",
        )
        notes = _changes(directory, saved, wanted, usual, corpus)
    there = next(p for p in (directory, *directory.absolute().parents) if os.path.exists(p))
    check(
        there.is_dir() and os.access(there, os.W_OK),
        f"--workdir={directory} cannot be written: {there} is "
        + ("not writable" if there.is_dir() else "not a directory")
        + "; choose another --workdir",
    )
    return notes


def _changes(directory, saved, wanted, usual, corpus) -> list[str]:
    old, new, usual = (_flat(json.loads(json.dumps(config))) for config in (saved, wanted, usual))
    changed = {
        field: (old.get(field, usual.get(field)), value)
        for field, value in new.items()
        if old.get(field, usual.get(field)) != value
    }
    moved = [field for field in changed if field in ("data.path", "data.validation_path")]
    same = moved and corpus and "corpus_fingerprint" in saved
    same = same and saved["corpus_fingerprint"] == corpus()
    refused = [f for f in changed if classified(f) == "refused" or (f in moved and not same)]
    if refused:
        began = " and ".join(f"config.{field}={changed[field][0]!r}" for field in refused)
        says = " and ".join(repr(changed[field][1]) for field in refused)
        same_model = {"job", "model", "tokenizer"}.isdisjoint(f.split(".")[0] for f in refused)
        raise ConfigError(
            f"--workdir={directory} holds a run with {began}, and this config says {says}: choose "
            "another --workdir, or set back what has changed"
            + (f"; --config.init_from={directory} goes on from its parameters" * same_model)
        )
    return [
        f"config.{field} {NOTED[field].format(old=repr(was), new=repr(now))}"
        for field, (was, now) in changed.items()
        if field in NOTED
    ]


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name → value of every field that is no section."""
    fields = {}
    for name, value in config.items():
        if isinstance(value, dict):
            fields |= _flat(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields


def check_shared(directory: pathlib.Path) -> None:
    """Raises ConfigError unless all processes of the run see the same `directory`."""
    try:
        without = hosts.blind(directory)
    except OSError as error:
        raise _unwritable(directory, error) from error
    check(
        not without,
        f"--workdir={directory}: {', '.join(without)} cannot see what process 0 writes there, and "
        "checkpoints need it: choose a directory on a file system that all hosts share",
    )


def shared_tokenizer(directory: pathlib.Path, make: Callable[[], Tokenizer]) -> Tokenizer:
    """`make()`, called by process 0 alone; the others read what it made.

    Training one may depend on the machine, and two that differ would be two runs. It passes through
    `directory`, which all must share, and leaves nothing there.
    """
    if hosts.count() == 1:
        return make()
    scratch = directory / ".tokenizer.shared"
    if hosts.index() == 0:
        tokenizer = make()
        shutil.rmtree(scratch, ignore_errors=True)
        tokenizer.save(scratch)
    hosts.barrier()
    if hosts.index() != 0:
        tokenizer = tokenizers.load(scratch)
    hosts.barrier()
    if hosts.index() == 0:
        shutil.rmtree(scratch, ignore_errors=True)
    return tokenizer


def claim(
    directory: pathlib.Path, config: dict[str, Any], tokenizer: Tokenizer, **facts: Any
) -> None:
    """Writes config.json and, into a new run directory, the tokenizer; process 0 does, for all.

    Args:
      directory: the run's.
      config: of the job.
      tokenizer: its own.
      **facts: what config.json says beside the fields of the config.

    Raises:
      ConfigError: the directory cannot be written.
    """
    if hosts.index() == 0:
        wanted = {**config, "tokenizer_fingerprint": tokenizer.fingerprint, **facts}
        _write_claim(directory, wanted, tokenizer)
    hosts.barrier()


def _write_claim(directory: pathlib.Path, wanted: dict[str, Any], tokenizer: Tokenizer) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / CONFIG).exists() and saved_run(directory) is None:  # of a failed start
            shutil.rmtree(directory / "tokenizer", ignore_errors=True)
        if not (directory / "tokenizer").exists():
            scratch = directory / f".tokenizer.{os.getpid()}"
            tokenizer.save(scratch)
            try:
                scratch.rename(directory / "tokenizer")
            except OSError:  # another process was first
                shutil.rmtree(scratch)
        scratch = directory / f".config.{os.getpid()}"
        scratch.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        scratch.rename(directory / CONFIG)
    except OSError as error:
        raise _unwritable(directory, error) from error


def _unwritable(directory: pathlib.Path, error: OSError) -> ConfigError:
    return ConfigError(f"--workdir={directory} cannot be written: {error.strerror or error}")


def _read_config(path: pathlib.Path, field: str) -> dict[str, Any]:
    try:
        return read_json(path)
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}: restore it, or choose another directory") from None
