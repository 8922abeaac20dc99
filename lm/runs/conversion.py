"""A Hugging Face directory written as a run directory, and a run as a Hugging Face directory."""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from lm.config import ConfigError, check
from lm.inference import Framing
from lm.models import ModelConfig
from lm.models.huggingface.families import family_for
from lm.models.huggingface.family import Family, NameMap
from lm.models.huggingface.peft import is_peft, save_peft
from lm.models.huggingface.write import new_directory, save_pretrained, write_files
from lm.parallel.sharding import parameter_shardings
from lm.runs.directory import CHECKPOINTS, CONFIG, TOKENIZER
from lm.runs.sources import GENERATION, Source
from lm.runs.vectors import module_files
from lm.tokenizers import Tokenizer
from lm.tokenizers.export import framed, huggingface_files
from lm.training.checkpoints import CheckpointConfig, Checkpointer


class Converted(NamedTuple):
    """What was written: a model of this family, from where (a step, or dtypes), and a tokenizer."""

    family: Family
    origin: str
    tokenizer: str


def write_run(
    source: Source, directory: pathlib.Path, mesh: jax.sharding.Mesh, dtype: str
) -> Converted:
    """Writes the Hugging Face model `source` as a run directory with one checkpoint, of step 0.

    Adapters that PEFT wrote are added into their base.

    All processes call this, as `write_huggingface`. Nothing appears under the name of `directory`
    before it is complete.

    Raises:
      ConfigError: see `Checkpoint.parameters`; the directory cannot be written.
    """
    checkpoint, tokenizer, family = source.checkpoint, source.tokenizer, source.names.family
    shardings = parameter_shardings(source.names.specs, mesh)
    if checkpoint is not None:
        params, origin = checkpoint.parameters(shardings, dtype), " and ".join(checkpoint.dtypes)
    else:
        params, origin = source.parameters(shardings=shardings)[1], "with adapters added in"
        params = {name: x.astype(dtype) for name, x in params.items()}
    with new_directory(directory) as scratch:
        if jax.process_index() == 0:
            text = json.dumps(source.config, indent=2) + "\n"
            (scratch / CONFIG).write_text(text, encoding="utf-8")
            if tokenizer is not None:
                tokenizer.save(scratch / TOKENIZER)
            write_files(scratch, module_files(source.directory))
        _together()
        saving = CheckpointConfig(async_save=False)
        with Checkpointer(scratch / CHECKPOINTS, saving) as checkpointer:
            checkpointer.save(0, {"params": params}, wait=True)
    _together()
    words = _words(tokenizer) if tokenizer else "none: no text"
    return Converted(family, origin, words)


def write_huggingface(
    source: Source,
    directory: pathlib.Path,
    mesh: jax.sharding.Mesh,
    dtype: str,
    step: int | str,
    shard_bytes: int,
) -> Converted:
    """Writes checkpoint `step` of the run `source` as a Hugging Face directory.

    Raises:
      ConfigError: no family computes what the model does; see `save_pretrained`.
    """
    model, tokenizer = source.model, source.tokenizer
    origin = source.config.get("huggingface", {})
    family = family_for(model, origin.get("model_type"))
    files, fields = module_files(source.directory), dict(origin.get("fields", {}))
    words = "none"
    if origin.get("generation"):
        files[GENERATION] = (json.dumps(origin["generation"], indent=2) + "\n").encode()
    if tokenizer is not None:
        words = _words(tokenizer)
        if not origin:
            fields = _token_ids(tokenizer, family, model)
        try:
            files |= huggingface_files(tokenizer)
            if not origin:
                where = f"{source.directory / CONFIG}: framing"
                framing = Framing.of_run(source.config, model, tokenizer, where)
                if len(framing.end_of_text or ()) > 1:  # of a text, and of a turn
                    fields["eos_token_id"] = list(framing.end_of_text)
                data = files["tokenizer.json"]
                files["tokenizer.json"] = framed(data, framing.before, framing.after)
        except ConfigError as error:
            words = f"not written: {error}"
    shardings = parameter_shardings(NameMap(family, model).specs, mesh)
    step, params = source.parameters(step, shardings, lazily=True)
    save_pretrained(directory, family, model, params, dtype, files, fields, shard_bytes)
    _together()
    return Converted(family, f"step {step:,}", words)


def write_peft(
    source: Source, directory: pathlib.Path, dtype: str, step: int | str, base: str
) -> Converted:
    """Writes the adapters of checkpoint `step` of the run `source` as PEFT does.

    Args:
      base: what to say that their base is; "": the Hugging Face directory that it is, or was.

    Raises:
      ConfigError: the run has none, or its base is no Hugging Face directory; see `save_peft`.
    """
    check(
        source.base is not None,
        f"config.to='peft' needs a run with adapters, and {source.directory} has none: use 'hf'",
    )
    there = source.base.source
    if not base and there.checkpoint is not None:
        base = str(there.directory.absolute())
    elif not base and there.config.get("job") == "convert":
        base = there.config.get("init_from", "")
        base = "" if is_peft(base) else base  # whose base is another
    check(
        bool(base),
        f"config.base='' must say what PEFT is to load as the base: {there.directory}, which "
        "config.to='hf' converts into a directory",
    )
    files, words = {}, "none"
    if source.tokenizer is not None:
        words = _words(source.tokenizer)
        try:
            files = huggingface_files(source.tokenizer)
        except ConfigError as error:
            words = f"not written: {error}"
    step, adapters = source.adapters(step)
    save_peft(directory, source.names, source.base.adapter, adapters, base, dtype, files)
    _together()
    return Converted(source.names.family, f"step {step:,}", words)


def _token_ids(tokenizer: Tokenizer, family: Family, model: ModelConfig) -> dict[str, Any]:
    """The roles of ids, for config.json. Padding stays where positions are counted from it."""
    fields = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    if model.architecture == "encoder_decoder":
        fields["decoder_start_token_id"] = tokenizer.bos_id
    counted = model.positions == "learned" and "pad_token_id" in family.write_config(model)
    if tokenizer.pad_id is not None and not counted:
        fields["pad_token_id"] = tokenizer.pad_id
    return fields


def _words(tokenizer: Tokenizer) -> str:
    return f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens"


def _together() -> None:
    """Waits until every process has come this far."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("convert")
