"""What a known model is made of and costs, without allocating a parameter of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import ml_collections
from rich.console import Console
from rich.table import Table

from lm.config import Count, check, view
from lm.models import ModelConfig, costs, param_specs, skeleton
from lm.models.presets import PRESETS, Overrides, preset
from lm.training.model_facts import model_facts
from lm.training.report import facts_table, model_line, parameters_table

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
    changed = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    text = f"vocabulary of {model.vocab_size:,}, context of {model.max_length:,}"
    of_model = [
        ("preset", f"{job.preset}: {PRESETS[job.preset].source}"),
        *([("changed", changed)] if fields else []),
        ("model", model_line(model)),
        ("text", text),
    ]
    context = job.context or model.max_length
    both = model.architecture == "encoder_decoder"
    source = (job.source_length or context) if both else 0
    console.print(_table(of_model))
    console.print(parameters_table(specs, console.width))
    console.print(_table(model_facts(model, specs, context, source)))
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


def _table(facts: Iterable[tuple[str, str]]) -> Table:
    table = facts_table()
    for fact in facts:
        table.add_row(*fact)
    return table
