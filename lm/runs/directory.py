"""The run directory: whose it is, claiming a new one, and what may change when a run goes on.

All of it comes before any work, so that a mistake costs none:

    saved = saved_run(directory)            # a run that goes on says what its config leaves open
    check_place(directory)
    claim = Claim(directory, config, …)
    claim.check()                           # as soon as the whole config is known
    ...                                     # data, model, compilation
    claim.write()                           # checks again; this process holds the run's lock
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

from lm.config import ConfigError, check
from lm.files import read_json, unwritable, write_json
from lm.parallel import hosts
from lm.tokenizers import Tokenizer
from lm.training.checkpoints import check_free, saved_paths
from lm.training.metrics import FILE as METRICS

CONFIG, TOKENIZER, CHECKPOINTS = "config.json", "tokenizer", "checkpoints"

# What a run that goes on may have otherwise than it began, by section or field of
# `lm.runs.config.TrainJob` or `lm.alignment.config.AlignJob`; a field's own line goes before its
# section's.
# These change nothing of what is computed, or only how fast, where and how often.
FREE = (
    "data.cache_dir", "data.prefetch", "data.num_threads", "data.even_batch", "data.epochs",
    "model.attention", "model.remat", "model.scan_layers", "model.initializer",
    "model.initializer_std", "objective.chunk", "train.offload_optimizer",
    "train.steps_per_dispatch", "train.log_every", "train.eval_every", "train.eval_batch_size",
    "train.on_spike", "train.spike_nats", "train.max_spikes", "train.profile_start",
    "train.profile_steps", "train.compiler", "train.compilation_cache", "checkpoint", "mesh",
    "ignore", "hosts", "strategy", "zero", "prompt", "sample", "exact_match", "rollout.slots",
    "shown",
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
    "job", "seed", "chat_template", "tokenizer", "model", "adapter", "optimizer", "data.weights",
    "data.text_field", "data.num_documents", "data.encoding", "data.on_bad_file", "data.split",
    "data.validation_fraction", "data.batch_size", "data.block_size", "data.source_length",
    "source_language", "target_language", "data.source_before", "data.source_after",
    "data.target_start", "data.long_pairs", "data.format", "data.long_conversations",
    "data.corruption", "data.packing", "data.end_of_text", "data.shuffle", "data.random_offset",
    "data.document_separator", "objective.name", "objective.z_loss", "objective.label_smoothing",
    "objective.load_balancing", "objective.router_z", "objective.centering", "objective.policy",
    "objective.preference", "objective.distillation", "rollout", "rewards", "advantage", "learning",
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
    try:
        saved = read_json(path)
    except ConfigError as error:
        raise ConfigError(
            f"--workdir={directory}: {error}: restore it, or choose another directory"
        ) from None
    metrics = directory / METRICS
    begun = bool(saved_paths(directory / CHECKPOINTS))
    begun |= metrics.exists() and metrics.stat().st_size > 0
    return saved if begun or saved.get("job") not in ("train", "align") else None


def check_place(directory: pathlib.Path) -> None:
    """Raises ConfigError if `directory` is not shared by all processes, in use, or not writable."""
    try:
        without = hosts.blind(directory)
    except OSError as error:
        raise unwritable(directory, error) from error
    check(
        not without,
        f"--workdir={directory}: {', '.join(without)} cannot see what process 0 writes there, and "
        "checkpoints need it: choose a directory on a file system that all hosts share",
    )
    check_free(directory / CHECKPOINTS)
    there = next(p for p in (directory, *directory.absolute().parents) if os.path.exists(p))
    check(
        there.is_dir() and os.access(there, os.W_OK),
        f"--workdir={directory} cannot be written: {there} is "
        + ("not writable" if there.is_dir() else "not a directory")
        + "; choose another --workdir",
    )


@dataclasses.dataclass(frozen=True)
class Claim:
    """A run that is to begin in a directory, or to go on there."""

    directory: pathlib.Path
    config: dict[str, Any]  # the job's; what a saved run has and this lacks is not compared
    usual: dict[str, Any]  # of a config that says nothing: what an older run had in newer fields
    tokenizer: Tokenizer
    corpus: Callable[[], str] | None = None  # the text's `lm.data.corpus_fingerprint`
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # config.json has them, too

    def check(self) -> list[str]:
        """What has changed since the run began and may, one line each.

        Raises:
          ConfigError: `directory` holds another run: one of a config that differs in what may not
            change (`REFUSED`), or of another tokenizer or text.
        """
        saved = saved_run(self.directory)
        if saved is None:
            return []
        trained, fingerprint = saved.get("tokenizer_fingerprint"), self.tokenizer.fingerprint
        check(
            trained in (None, fingerprint),
            f"--workdir={self.directory}: its tokenizer/ is not the one its run was trained with "
            f"(fingerprint {fingerprint}, not {trained}): put the original back, or choose "
            "another --workdir",
        )
        old, new, usual = map(_flat, (saved, self.config, self.usual))
        old = {**usual, **old}
        changed = {name: (old.get(name), new[name]) for name in new if old.get(name) != new[name]}
        moved = {"data.path", "data.validation_path"} & changed.keys()
        if moved and self.corpus and saved.get("corpus_fingerprint") == self.corpus():
            moved = set()
        refused = [f for f in changed if classified(f) == "refused" or f in moved]
        if refused:
            began = " and ".join(f"config.{field}={changed[field][0]!r}" for field in refused)
            says = " and ".join(repr(changed[field][1]) for field in refused)
            same_model = {"job", "model", "tokenizer"}.isdisjoint(f.split(".")[0] for f in refused)
            branch = f"; --config.init_from={self.directory} goes on from its parameters"
            raise ConfigError(
                f"--workdir={self.directory} holds a run with {began}, and this config says {says}:"
                f" choose another --workdir, or set back what has changed{branch * same_model}"
            )
        return [
            f"config.{field} {NOTED[field].format(old=repr(was), new=repr(now))}"
            for field, (was, now) in changed.items()
            if field in NOTED
        ]

    def write(self, more: dict[str, Any] | None = None) -> None:
        """Writes config.json and, into a new run directory, the tokenizer; process 0 does, for all.

        Args:
          more: facts that were not known before.

        Raises:
          ConfigError: as `check`, for another run may have begun here since; or the directory
            cannot be written.
        """
        self.check()
        if hosts.index() == 0:
            try:
                self._write(more or {})
            except OSError as error:
                raise unwritable(self.directory, error) from error
        hosts.barrier()

    def _write(self, more: dict[str, Any]) -> None:
        directory, own = self.directory, self.directory / TOKENIZER
        wanted = {**self.config, "tokenizer_fingerprint": self.tokenizer.fingerprint}
        if self.corpus:
            wanted["corpus_fingerprint"] = self.corpus()
        wanted |= {**self.facts, **more}
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / CONFIG).exists() and saved_run(directory) is None:  # of a failed start
            shutil.rmtree(own, ignore_errors=True)
        if not own.exists():
            scratch = directory / f".tokenizer.{os.getpid()}"
            self.tokenizer.save(scratch)
            try:
                scratch.rename(own)
            except OSError:  # another process was first
                shutil.rmtree(scratch)
        write_json(directory / CONFIG, wanted)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name → value, as JSON has it, of every field that is no section."""
    fields = {}
    for name, value in config.items():
        if isinstance(value, dict):
            fields |= _flat(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = json.loads(json.dumps(value))
    return fields
