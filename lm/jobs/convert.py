"""A Hugging Face directory to a run directory, and back."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any, Literal

import jax
import ml_collections
from jax.experimental import multihost_utils
from rich import markup
from rich.console import Console

from lm.config import AboveZero, ConfigError, Count, Path, check, printable, view
from lm.inference import Framing
from lm.models import ModelConfig, count, param_specs, skeleton
from lm.models.huggingface import hub
from lm.models.huggingface.families import FAMILIES, family_for
from lm.models.huggingface.family import Family
from lm.models.huggingface.read import CONFIG, PARAMETER_DTYPES, is_checkpoint
from lm.models.huggingface.write import check_new, save_pretrained
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.parallel.sharding import parameter_shardings
from lm.runs.sources import GENERATION, open_source
from lm.tokenizers import Tokenizer
from lm.tokenizers.export import framed, huggingface_files
from lm.training.checkpoints import CheckpointConfig, Checkpointer
from lm.training.report import binary, facts_table, model_line

DIRECTIONS = ("run", "hf")


@dataclasses.dataclass(frozen=True)
class ConvertJob:
    """What to convert, to what."""

    job: str = "convert"
    init_from: Path = ""  # a Hugging Face directory or hub name (to run); a run directory (to hf)
    to: Literal[DIRECTIONS] = "run"  # run: a run directory | hf: a Hugging Face directory
    # of what is written: float32 | bfloat16 | float16
    dtype: Literal[tuple(PARAMETER_DTYPES)] = "float32"
    # Regular expressions of tensors, and of fields of config.json, that may be left out though the
    # family does not know them: "cls.seq_relationship". They are listed in what is printed.
    ignore: str | tuple[str, ...] = ()
    # to hf: of which checkpoint: its step, latest or best
    step: Count | Literal["latest", "best"] = "latest"
    # to hf: the most a file of weights may hold, in 10⁹ bytes
    shard_gigabytes: AboveZero = 5.0
    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(data=1, fsdp=-1))

    def validate(self, prefix: str = "config") -> None:
        """Raises ConfigError naming the first field that makes no sense."""
        check(
            bool(self.init_from),
            f"{prefix}.init_from='' must name a Hugging Face directory, or a run directory for "
            f"{prefix}.to='hf'",
        )


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
    """Converts what a `ConvertJob` names into the new directory `workdir`.

    Nothing appears under that name before it is complete.

    Returns:
      What was printed: `family`, `parameters`, `bytes` of the weights written, `ignored`.

    Raises:
      ConfigError: nothing that can be converted exactly; what stands in the way is named.
    """
    job = view(ConvertJob, config)
    target = pathlib.Path(workdir).expanduser().absolute()
    check_new(target)
    mesh = make_mesh(job.mesh)
    source = _source(job)
    convert = _to_run if job.to == "run" else _to_huggingface
    summary, facts = convert(job, source, target, mesh)
    if jax.process_index() == 0:
        table = facts_table()
        for name, value in {**facts, "written": str(target)}.items():
            table.add_row(name, value)
        Console(highlight=False, soft_wrap=True).print(table)
    return summary


def _source(job: ConvertJob) -> pathlib.Path:
    """The directory that `init_from` names; downloaded if it is a name on the hub."""
    source = pathlib.Path(job.init_from).expanduser()
    field = f"config.init_from={job.init_from!r}"
    if job.to == "run" and not source.exists() and hub.is_name(job.init_from):
        return hub.fetch(job.init_from)
    check(source.exists(), f"{field} does not exist")
    check(source.is_dir(), f"{field} is a file, not a directory")
    if job.to == "run" and not is_checkpoint(source):
        check(
            not (source / "checkpoints").exists(),
            f"{field} is a run directory already: config.to='hf' converts the other way",
        )
        check((source / CONFIG).is_file(), f"{field} has no {CONFIG}: not a Hugging Face model")
    if job.to == "hf":
        check(
            not is_checkpoint(source),
            f"{field} is a Hugging Face directory already: config.to='run' converts the other way",
        )
    return source


def _to_run(job: ConvertJob, source, target, mesh) -> tuple[dict[str, Any], dict[str, str]]:
    imported = open_source(source, job.ignore)
    checkpoint = imported.checkpoint
    specs = checkpoint.layout.specs
    params = checkpoint.parameters(parameter_shardings(specs, mesh), job.dtype)

    first = jax.process_index() == 0
    scratch = target.with_name(f".{target.name}.writing")
    try:
        if first:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            config = {**imported.config, "init_from": job.init_from}
            (scratch / "config.json").write_text(
                json.dumps(config, indent=2) + "\n", encoding="utf-8"
            )
            if imported.tokenizer is not None:
                imported.tokenizer.save(scratch / "tokenizer")
        _together()
        saving = CheckpointConfig(async_save=False)
        with Checkpointer(scratch / "checkpoints", saving) as checkpointer:
            checkpointer.save(0, {"params": params}, wait=True)
        if first:
            if target.exists():
                target.rmdir()
            scratch.rename(target)
        _together()
    except OSError as error:
        raise ConfigError(f"--workdir={target} cannot be written: {error.strerror}") from None
    finally:
        if first:
            shutil.rmtree(scratch, ignore_errors=True)

    model, tokenizer = checkpoint.config, imported.tokenizer
    kind = f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens" if tokenizer else "none: no text"
    return _summary(
        job, checkpoint.family, model, " and ".join(checkpoint.dtypes), kind, checkpoint.ignored
    )


def _to_huggingface(job: ConvertJob, source, target, mesh) -> tuple[dict[str, Any], dict[str, str]]:
    opened = open_source(source)
    model, tokenizer = opened.model, opened.tokenizer
    origin = opened.config.get("huggingface", {})
    family = _family(origin.get("model_type"), model)
    files, fields, kind = {}, dict(origin.get("fields", {})), "none"
    if origin.get("generation"):
        files[GENERATION] = (json.dumps(origin["generation"], indent=2) + "\n").encode()
    if tokenizer is not None:
        kind = f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens"
        if not origin:
            fields = _token_ids(tokenizer, family, model)
        try:
            files |= huggingface_files(tokenizer)
            if not origin:
                where = f"{source / CONFIG}: framing"
                framing = Framing.of_run(opened.config, model, tokenizer, where)
                data = files["tokenizer.json"]
                files["tokenizer.json"] = framed(data, framing.before, framing.after)
        except ConfigError as error:
            kind = f"not written: {error}"

    shardings = parameter_shardings(param_specs(skeleton(model)), mesh)
    step, params = opened.parameters(job.step, shardings, lazily=True)
    save_pretrained(
        target, family, model, params, job.dtype, files, fields, int(job.shard_gigabytes * 1e9)
    )
    _together()
    return _summary(job, family, model, f"step {step:,}", kind, ())


def _family(model_type: str | None, model: ModelConfig) -> Family:
    """The family it came from, if it still computes the same; else the first that does."""
    if model_type in FAMILIES:
        try:
            FAMILIES[model_type].write_config(model)
            return FAMILIES[model_type]
        except ConfigError:
            pass
    return family_for(model)


def _token_ids(tokenizer: Tokenizer, family: Family, model: ModelConfig) -> dict[str, int]:
    """The roles of ids, for config.json. Padding stays where positions are counted from it."""
    fields = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    if model.architecture == "encoder_decoder":
        fields["decoder_start_token_id"] = tokenizer.bos_id
    if tokenizer.pad_id is not None and "pad_token_id" not in family.write_config(model):
        fields["pad_token_id"] = tokenizer.pad_id
    return fields


def _summary(job, family: Family, model: ModelConfig, origin, kind, ignored):
    """What a conversion did, for the caller and for the reader."""
    specs = param_specs(skeleton(model))
    size = count(specs) * PARAMETER_DTYPES[job.dtype].itemsize
    architecture = family.write_config(model).get("architectures", family.architectures)[0]
    summary = {
        "family": family.model_type,
        "parameters": count(specs),
        "bytes": size,
        "ignored": list(ignored),
    }
    facts = {
        "from": f"{job.init_from} ({origin})",
        "family": f"{family.model_type}: {architecture}",
        "model": model_line(model),
        "parameters": f"{count(specs):,}",
        "weights": f"{job.dtype}, {binary(size)}",
        "tokenizer": kind,
    }
    if ignored:
        names = markup.escape(printable(", ".join(ignored)))  # of another's file
        facts["ignored"] = f"{len(ignored)} tensors: {names}"
    return summary, facts


def _together() -> None:
    """Waits until every process has come this far."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("convert")
