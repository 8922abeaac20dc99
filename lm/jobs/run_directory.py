"""The run directory: whose it is, claiming a new one, and what another run may take from it.

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
from lm.config import ConfigError, check, nearest, to_dict, view
from lm.models import ModelConfig
from lm.models.huggingface.exact import essence
from lm.models.huggingface.read import is_checkpoint, read_config
from lm.parallel import hosts
from lm.tokenizers import Tokenizer
from lm.tokenizers.files import has_tokenizer

# What may differ between a run directory and the config that goes on with it.
FREE_SECTIONS = (
    "train", "checkpoint", "mesh", "strategy", "zero", "hosts", "prompt", "sample", "init_from",
)  # fmt: skip
# Fields of `model` that decide what its parameters mean, and so must be those of `init_from`.
_SHAPING = (
    "architecture", "cell", "cross_attention", "num_layers", "num_encoder_layers", "num_heads",
    "num_kv_heads", "width", "head_dim", "mlp_width", "vocab_size", "tie_embeddings",
    "embedding_scale", "embedding_norm", "token_types", "positions", "position_offset",
    "relative_buckets", "qk_norm", "norm", "norm_position", "norm_unit_offset", "final_norm",
    "parallel", "shared_norm", "activation", "bias", "qkv_bias", "attention_bias", "norm_bias",
    "num_experts", "expert_width", "shared_experts", "dense_layers", "head_transform", "head_bias",
    "output_scale", "pooler", "classifier", "num_labels",
)  # fmt: skip


def check_directory(
    directory: pathlib.Path, wanted: dict[str, Any], fingerprint: str | None = None
) -> None:
    """Raises ConfigError if `directory` holds another run, or cannot be written.

    Another run is one of a config other than `wanted`, or of a tokenizer other than that of
    `fingerprint`.
    """
    wanted = json.loads(json.dumps(wanted))
    path = directory / "config.json"
    if path.exists():
        saved = _read_config(path, f"--workdir={directory}")
        trained = saved.get("tokenizer_fingerprint")
        check(
            fingerprint is None or trained in (None, fingerprint),
            f"--workdir={directory}: its tokenizer/ is not the one its run was trained with "
            f"(fingerprint {fingerprint}, not {trained}): put the original back, or choose "
            "another --workdir",
        )
        difference = _difference(saved, wanted)
        if difference:
            field, old, new = difference
            raise ConfigError(
                f"--workdir={directory} holds a run with config.{field}={old!r}, and this config "
                f"says {new!r}: choose another --workdir, or set the field back"
            )
    there = next(p for p in (directory, *directory.absolute().parents) if os.path.exists(p))
    check(
        there.is_dir() and os.access(there, os.W_OK),
        f"--workdir={directory} cannot be written: {there} is "
        + ("not writable" if there.is_dir() else "not a directory")
        + "; choose another --workdir",
    )


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


def claim(directory: pathlib.Path, config: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Writes config.json and, into a new run directory, the tokenizer; process 0 does, for all.

    Raises:
      ConfigError: the directory cannot be written.
    """
    if hosts.index() == 0:
        _write_claim(directory, config, tokenizer)
    hosts.barrier()


def _write_claim(directory: pathlib.Path, config: dict[str, Any], tokenizer: Tokenizer) -> None:
    wanted = json.loads(json.dumps(config))
    wanted["tokenizer_fingerprint"] = tokenizer.fingerprint
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / "tokenizer").exists():
            scratch = directory / f".tokenizer.{os.getpid()}"
            tokenizer.save(scratch)
            try:
                scratch.rename(directory / "tokenizer")
            except OSError:  # another process was first
                shutil.rmtree(scratch)
        scratch = directory / f".config.{os.getpid()}"
        scratch.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        scratch.rename(directory / "config.json")
    except OSError as error:
        raise _unwritable(directory, error) from error


def _unwritable(directory: pathlib.Path, error: OSError) -> ConfigError:
    return ConfigError(f"--workdir={directory} cannot be written: {error.strerror or error}")


def check_init_from(init_from: str, model: dict[str, Any]) -> None:
    """Raises ConfigError unless `init_from` is empty or has a model whose parameters fit `model`.

    It is a run directory or a Hugging Face directory.
    `model` is the model section of the config, as a dict; a field it lacks is not compared.
    """
    if not init_from:
        return
    source, field = pathlib.Path(init_from).expanduser(), f"config.init_from={init_from!r}"
    if not source.exists():
        there = [str(p) for p in source.parent.glob("*") if (p / "config.json").exists()]
        raise ConfigError(f"{field} does not exist{nearest(str(source), there)}")
    if is_checkpoint(source):
        check(has_tokenizer(source), f"{field} is a Hugging Face model without a tokenizer")
        theirs = to_dict(read_config(source)[1])
    else:
        for name in ("config.json", "tokenizer", "checkpoints"):
            check(
                (source / name).exists(),
                f"{field} is not the directory of a training run: it has no {name}",
            )
        theirs = _read_config(source / "config.json", field).get("model")
        check(isinstance(theirs, dict), f"{field}: its config.json has no section 'model'")
    there, here = (_shaping(fields) for fields in (theirs, model))
    wrong = [
        name
        for name in there
        if name in theirs
        and name in model
        and there[name] != here.get(name)
        # What follows from another field, such as a head's width, is mended with that field.
        and theirs[name] != model[name]
    ]
    if wrong:
        given = " and ".join(f"model.{name}={theirs[name]!r}" for name in wrong)
        says = " and ".join(f"{model[name]!r}" for name in wrong)
        remedy = " ".join(f"config.model.{name}={theirs[name]!r}" for name in wrong)
        raise ConfigError(f"{field} has {given}, and this config says {says}: set {remedy}")


def _shaping(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a model section that decide what its parameters mean, defaults resolved."""
    config = view(ModelConfig, fields, "config.model")
    known = essence(config)
    learned = config.positions == "learned"
    return {
        name: known[name]
        for name in known
        if name in _SHAPING or (learned and name == "max_length")
    }


def _read_config(path: pathlib.Path, field: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{field}: {path} cannot be read ({error}): restore it, or choose another directory"
        ) from None
    check(isinstance(config, dict), f"{field}: {path} does not hold the config of a run")
    return config


def _difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first field in which two configs differ, outside the sections that may."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in new:
            if not path and name in FREE_SECTIONS:
                continue
            if name in old:
                found = _difference(old[name], new[name], f"{path}.{name}" if path else name)
                if found:
                    return found
        return None
    return None if old == new else (path, old, new)
