"""What a run takes over from the model it starts from (`init_from`): all of it.

The model is the source's: architecture, positions, norms, constants, tokenizer, framing. A field of
the config's sections `model` and `tokenizer` counts where somebody set it, and it may be set to the
source's own value, or where it changes nothing of the function that the parameters compute.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import ml_collections

from lm import tokenizers
from lm.config import ConfigError, check, fields_set, to_dict
from lm.models import ModelConfig
from lm.models.huggingface.config_roundtrip import essence
from lm.parallel import hosts
from lm.runs.directory import CONFIG, TOKENIZER
from lm.runs.sources import Source, open_source
from lm.tokenizers import Tokenizer, TokenizerConfig

# Sections of a run's config.json that say how texts are framed and where the model is from.
CARRIED = ("framing", "huggingface")
_CHOSEN = ("vocab_size", "max_length")  # 0 chooses
# Choices of training and of how to compute.
MAY_CHANGE = (
    "dropout", "compute_dtype", "quantization", "attention", "remat", "scan_layers",
    "capacity_factor", "initializer", "initializer_std",
)  # fmt: skip


def inherit(
    config: ml_collections.ConfigDict, saved: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`config` with the sections `model` and `tokenizer` of its source, and what else is carried.

    Args:
      config: of a training job.
      saved: the config.json of the run that goes on: it has the model already, and its source may
        be gone. None for a new run.

    Returns:
      The config as nested dicts, and the sections `CARRIED` of the source's config.json.

    Raises:
      ConfigError: `init_from` is no model to start from; or fields that are set and may not be, all
        of them named at once.
    """
    fields = config.to_dict()
    init_from = fields.get("init_from")
    if not init_from:
        return fields, {}
    model, tokenizer = (
        fields_set(section, config, name)
        for name, section in (("model", ModelConfig), ("tokenizer", TokenizerConfig))
    )
    if saved is not None:
        fields["model"] = {**saved["model"], **model}
        fields["tokenizer"] = {**saved["tokenizer"], **tokenizer}
        return fields, {name: saved[name] for name in CARRIED if name in saved}

    field = f"config.init_from={init_from!r}"
    source = open_model(init_from, fields.get("ignore", ()))
    check(source.tokenizer is not None, f"{field} is a Hugging Face model without a tokenizer")
    theirs = source.model
    where = init_from if source.checkpoint else os.path.join(init_from, TOKENIZER)
    trained = {**to_dict(TokenizerConfig()), **source.config.get("tokenizer", {})}
    trained["special_tokens"] = tuple(trained["special_tokens"])
    found = {"kind": source.tokenizer.kind, "vocab_size": source.tokenizer.vocab_size}
    found = {**trained, **found, "path": where}
    wrong = [
        (f"model.{name}", getattr(theirs, name), value)
        for name, value in model.items()
        if not _may_have(theirs, name, value)
    ] + [
        (f"tokenizer.{name}", found[name], value)
        for name, value in tokenizer.items()
        if value not in (trained[name], found[name])
    ]
    if wrong:
        has = ", ".join(f"{name}={own!r}" for name, own, _ in wrong)
        says = ", ".join(repr(value) for *_, value in wrong)
        raise ConfigError(
            f"{field} has {has}, and this config says {says}: model and tokenizer are those of the "
            "source, so leave these fields out (as configs/finetune.py does) or set them to what "
            f"it has; of a model only {', '.join(MAY_CHANGE)} may differ, and max_length where "
            "positions are not learned"
        )
    kept = {name: value for name, value in model.items() if value or name not in _CHOSEN}
    fields["model"] = to_dict(dataclasses.replace(theirs, **kept))
    fields["tokenizer"] = {**tokenizer, "kind": source.tokenizer.kind, "path": where}
    return fields, _carried(source, fields.get("data", {}).get("end_of_text", True))


def _may_have(theirs: ModelConfig, name: str, value: Any) -> bool:
    """Whether a field may have `value` though the model is `theirs`."""
    if name in MAY_CHANGE or value in (getattr(theirs, name), essence(theirs).get(name)):
        return True
    if name == "max_length":
        table = theirs.positions == "learned" and theirs.cell == "attention"
        return value <= theirs.max_length or not table
    return name in _CHOSEN and value == 0


def _carried(source: Source, separated: bool) -> dict[str, Any]:
    """Its sections `CARRIED`; what ends this run's documents is an end there, too."""
    carried = {name: source.config[name] for name in CARRIED if name in source.config}
    ends = carried.get("framing", {}).get("end_of_text")
    if ends and separated and source.tokenizer.eos_id not in ends:
        ends.append(source.tokenizer.eos_id)
        if "huggingface" in carried:
            carried["huggingface"].setdefault("generation", {})["eos_token_id"] = ends
    return carried


def open_model(init_from: str, ignore: str | Sequence[str] = ()) -> Source:
    """The model that `init_from` names, found to have parameters; `ignore`: see `open_source`.

    Raises:
      ConfigError: there is none.
    """
    try:
        source = open_source(init_from, ignore)
        source.check_parameters()
        return source
    except ConfigError as error:
        raise ConfigError(f"config.init_from={init_from!r}: {error}") from None


def initial_parameters(
    source: Source, abstract: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """The parameters of `source` where `abstract` says.

    Of a table of learned positions the first rows, where the run needs no more.
    """
    shardings = {name: leaf.sharding for name, leaf in abstract.items()}
    params = source.parameters(shardings=shardings)[1]
    tables = [name for name in params if name.endswith("embedding.positions")]
    return {**params, **{name: params[name][: abstract[name].shape[0]] for name in tables}}


def run_tokenizer(
    directory: pathlib.Path,
    saved: dict[str, Any] | None,
    config: TokenizerConfig,
    texts: Callable[[], Iterable[str]],
    init_from: str = "",
    ignore: str | Sequence[str] = (),
) -> Tokenizer:
    """The tokenizer of the run in `directory`: its own, else `init_from`'s, else a new one.

    Args:
      saved: the run's config.json, if it has begun; one that failed to start has left nothing.
      config: what to train; process 0 does, as two that differ in a bit would be two runs, and the
        others get it through `directory`, which all must share.
      texts: gives what it is trained on.
    """
    own = directory / TOKENIZER
    if own.exists() and (saved is not None or not (directory / CONFIG).exists()):
        return tokenizers.load(own)
    if init_from:
        tokenizer = open_source(init_from, ignore).tokenizer
        check(tokenizer is not None, f"config.init_from={init_from!r} has no tokenizer")
        return tokenizer
    if hosts.count() == 1:
        return tokenizers.train(config, texts())
    scratch = directory / ".tokenizer.shared"
    if hosts.index() == 0:
        tokenizer = tokenizers.train(config, texts())
        shutil.rmtree(scratch, ignore_errors=True)
        tokenizer.save(scratch)
    hosts.barrier()
    if hosts.index() != 0:
        tokenizer = tokenizers.load(scratch)
    hosts.barrier()
    if hosts.index() == 0:
        shutil.rmtree(scratch, ignore_errors=True)
    return tokenizer
