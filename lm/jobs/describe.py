"""What a known model is made of and costs, without allocating a parameter of it."""

from __future__ import annotations

import dataclasses

import jax
import ml_collections
from rich.console import Console
from rich.table import Table

from lm.config import Count, check, view
from lm.models import ModelConfig, costs, param_specs, skeleton
from lm.models.presets import PRESETS, Overrides, preset
from lm.parallel.sharding import ParamSpec
from lm.training.config import OPTIMIZERS, OptimizerConfig
from lm.training.optimizer import make_optimizer
from lm.training.report import binary, facts_table, model_line, parameters_table, si

PIPED_WIDTH = 120  # columns where standard output is no terminal


@dataclasses.dataclass(frozen=True)
class DescribeJob:
    """Which model, with what changed, and how much text it reads."""

    job: str = "describe"
    preset: str = "gpt2_small"  # a name of `lm.models.presets`; "" lists them
    list: bool = False  # list the presets instead
    model: Overrides = dataclasses.field(default_factory=Overrides)  # what is not as it says
    context: Count = 0  # tokens that FLOPs and cache are counted at; 0: model.max_length
    source_length: Count = 0  # of an encoder-decoder's source; 0: as long as the context


def run(config: ml_collections.ConfigDict, workdir: str = "") -> costs.Parameters | None:
    """Prints what a `DescribeJob` asks for; nothing is written to `workdir`.

    The first line is `parameters: ` and their number.

    Returns:
      The numbers of parameters; None where the presets were listed.

    Raises:
      ConfigError: no such preset or field, or fields that no model can have together.
    """
    del workdir
    job = view(DescribeJob, config)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPED_WIDTH)
    if job.list or not job.preset:
        console.print(_list())
        return None
    fields = {name: value for name, value in vars(job.model).items() if value is not None}
    model = preset(job.preset, **fields)
    _check_lengths(job, model)
    specs = param_specs(skeleton(model))
    parameters = costs.parameters(model, specs)
    print(f"parameters: {parameters.total:,}", flush=True)

    facts = facts_table()
    facts.add_row("preset", f"{job.preset}: {PRESETS[job.preset].source}")
    if fields:
        changed = ", ".join(f"{name}={value!r}" for name, value in fields.items())
        facts.add_row("changed", changed)
    facts.add_row("model", model_line(model))
    facts.add_row("text", f"vocabulary of {model.vocab_size:,}, context of {model.max_length:,}")
    console.print(facts)
    console.print(parameters_table(specs, console.width))
    console.print(_facts(job, model, specs, parameters))
    return parameters


def _check_lengths(job: DescribeJob, model: ModelConfig) -> None:
    for name in ("vocab_size", "max_length"):
        value = getattr(model, name)
        check(value > 0, f"config.model.{name}={value} must be positive: there is no text to ask")
    for name in ("context", "source_length"):
        value = getattr(job, name)
        check(
            value <= model.max_length,
            f"config.{name}={value} is longer than config.model.max_length={model.max_length}",
        )


def _list() -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold cyan", show_edge=False)
    table.add_column("preset", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("source", style="dim")
    for name, known in PRESETS.items():
        table.add_row(name, f"{costs.parameters(preset(name)).total:,}", known.source)
    return table


def _facts(
    job: DescribeJob,
    model: ModelConfig,
    specs: dict[str, ParamSpec],
    parameters: costs.Parameters,
) -> Table:
    """Sizes, FLOPs and memory."""
    facts = facts_table()
    facts.add_row("total", f"{parameters.total:,} parameters")
    facts.add_row(
        "embedding",
        f"{parameters.embedding:,} in tables of tokens, positions and types"
        + ("" if model.tie_embeddings else " and the untied head"),
    )
    facts.add_row("non-embedding", f"{parameters.non_embedding:,}")
    if model.num_experts:
        facts.add_row("active", f"{parameters.active:,} of the total for each token")
    sizes = {"float32": 32, "bfloat16": 16, "int8": 8}
    facts.add_row(
        "checkpoint",
        ", ".join(f"{binary(costs.checkpoint_bytes(specs, b))} in {n}" for n, b in sizes.items()),
    )
    _flops(facts, job, model)
    _cache(facts, job, model)
    abstract = {n: jax.ShapeDtypeStruct(s.shape, "float32") for n, s in specs.items()}
    memory = []
    for name in OPTIMIZERS:
        optimizer = make_optimizer(OptimizerConfig(name=name), 1, specs)
        leaves = jax.tree.leaves(jax.eval_shape(optimizer.init, abstract))
        memory.append(f"{name} {binary(sum(x.size * x.dtype.itemsize for x in leaves))}")
    facts.add_row("optimizer", f"{', '.join(memory)}: its state, float32")
    return facts


def _lengths(job: DescribeJob, model: ModelConfig) -> tuple[int, int]:
    context = job.context or model.max_length
    both = model.architecture == "encoder_decoder"
    return context, (job.source_length or context) if both else 0


def _flops(facts: Table, job: DescribeJob, model: ModelConfig) -> None:
    """Of a token: training, and inference in the architecture's own stages."""
    context, source = _lengths(job, model)

    def row(name: str, value: float, meaning: str) -> None:
        facts.add_row(name, f"{si(value)}FLOPs a token{meaning}")

    training = costs.training_flops_per_token(model, context, source)
    here = f" at {context:,} tokens"
    if model.architecture == "encoder":
        row("training", training, here)
        row("inference", costs.prefill_flops_per_token(model, context), here)
        return
    share = f" of the target, {source:,} source tokens included" if source else ""
    row("training", training, f"{share}{here}")
    if source:
        row("encode", costs.prefill_flops_per_token(model, source), f" of {source:,} in the source")
    else:
        prefill = costs.prefill_flops_per_token(model, context)
        row("prefill", prefill, f" of {context:,}, with logits of the last alone")
    after = f", which sees {source:,} source tokens and" if source else ", which sees"
    decode = costs.decode_flops_per_token(model, context, source)
    row("decode", decode, f"{after} {context:,} tokens" if model.cell == "attention" else "")


def _cache(facts: Table, job: DescribeJob, model: ModelConfig) -> None:
    """Keys and values; nothing of an encoder."""
    context, source = _lengths(job, model)
    if model.architecture == "encoder":
        return

    def both(tokens: int, source: int = 0) -> str:
        full, half = (costs.cache_bytes(model, tokens, d, source) for d in ("float32", "bfloat16"))
        return f"{binary(full)} in float32, {binary(half)} in bfloat16"

    if model.cell != "attention":
        facts.add_row("state", both(context, source))
        return
    facts.add_row("KV cache", f"a token: {both(1)}")
    if model.window and context > model.window:
        later = costs.cache_bytes(model, model.window + 1) - costs.cache_bytes(model, model.window)
        facts.add_row("", f"a token after {model.window:,}: {binary(later)} in float32")
    of_source = f" and {source:,} of the source" if source else ""
    facts.add_row("", f"{context:,} tokens{of_source}: {both(context, source)}")
