"""A Hugging Face directory to a run directory, and back."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, Literal

import jax
import ml_collections
from rich import markup
from rich.console import Console

from lm.config import AboveZero, Count, Path, check, printable, view
from lm.models import count
from lm.models.adapters import adapter_specs
from lm.models.huggingface.family import NameMap
from lm.models.huggingface.peft import is_peft
from lm.models.huggingface.read import (
    CONFIG,
    PARAMETER_DTYPES,
    download,
    is_checkpoint,
    is_hub_name,
)
from lm.models.huggingface.write import check_new
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.runs.conversion import write_huggingface, write_peft, write_run
from lm.runs.sources import open_source
from lm.training.report import binary, facts_table, model_line

DIRECTIONS = ("run", "hf", "peft")


@dataclasses.dataclass(frozen=True)
class ConvertJob:
    """What to convert, to what."""

    job: str = "convert"
    init_from: Path = ""  # a Hugging Face directory or hub name (to run); a run directory (to hf)
    # run: a run directory | hf: a Hugging Face directory, with adapters added in | peft: adapters
    # alone, as PEFT writes them
    to: Literal[DIRECTIONS] = "run"
    # to peft: what it is to load as their base; "": the Hugging Face directory that it is, or was
    base: Path = ""
    # of what is written: float32 | bfloat16 | float16
    dtype: Literal[tuple(PARAMETER_DTYPES)] = "float32"
    # Regular expressions of tensors, and of fields of config.json, that may be left out though the
    # family does not know them: "cls.seq_relationship". They are listed in what is printed.
    ignore: str | tuple[str, ...] = ()
    # to hf and peft: of which checkpoint: its step, latest or best
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
    source = open_source(_directory(job), job.ignore)
    if job.to == "run":
        source.config["init_from"] = job.init_from
        done = write_run(source, target, mesh, job.dtype)
    elif job.to == "peft":
        done = write_peft(source, target, job.dtype, job.step, job.base)
    else:
        shard_bytes = int(job.shard_gigabytes * 1e9)
        done = write_huggingface(source, target, mesh, job.dtype, job.step, shard_bytes)

    family, specs = done.family, NameMap(done.family, source.model).specs
    parameters = count(adapter_specs(source.base.adapter, specs) if job.to == "peft" else specs)
    size = parameters * PARAMETER_DTYPES[job.dtype].itemsize
    ignored = list(source.checkpoint.ignored) if source.checkpoint else []
    written = family.write_config(source.model)
    architecture = written.get("architectures", family.architectures)[0]
    facts = {
        "from": f"{job.init_from} ({done.origin})",
        "family": f"{family.model_type}: {architecture}",
        "model": model_line(source.model),
        "parameters": f"{parameters:,}",
        "weights": f"{job.dtype}, {binary(size)}",
        "tokenizer": done.tokenizer,
    }
    if ignored:
        names = markup.escape(printable(", ".join(ignored)))  # of another's file
        facts["ignored"] = f"{len(ignored)} tensors: {names}"
    if jax.process_index() == 0:
        table = facts_table()
        for name, value in {**facts, "written": str(target)}.items():
            table.add_row(name, value)
        Console(highlight=False, soft_wrap=True).print(table)
    return {
        "family": family.model_type, "parameters": parameters, "bytes": size, "ignored": ignored
    }  # fmt: skip


def _directory(job: ConvertJob) -> pathlib.Path:
    """The directory that `init_from` names; downloaded if it is a name on the hub."""
    source = pathlib.Path(job.init_from).expanduser()
    field = f"config.init_from={job.init_from!r}"
    if job.to == "run" and not source.exists() and is_hub_name(job.init_from):
        return download(job.init_from)
    check(source.exists(), f"{field} does not exist")
    check(source.is_dir(), f"{field} is a file, not a directory")
    if job.to == "run" and not is_checkpoint(source) and not is_peft(source):
        check(
            not (source / "checkpoints").exists(),
            f"{field} is a run directory already: config.to='hf' converts the other way",
        )
        check((source / CONFIG).is_file(), f"{field} has no {CONFIG}: not a Hugging Face model")
    if job.to in ("hf", "peft"):
        check(
            not is_checkpoint(source),
            f"{field} is a Hugging Face directory already: config.to='run' converts the other way",
        )
    return source
