"""Examines a model, suite by suite, and writes what it found as a page and as JSON."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pathlib
from collections.abc import Callable

import jax
import ml_collections

import lm
from lm.config import ConfigError, Path, Seed, check, check_choice, view
from lm.evaluation.benchmarks import HarnessSettings
from lm.evaluation.card import NotApplicable, Section, timed
from lm.evaluation.emergence import TasksSettings
from lm.evaluation.in_context import InContextSettings
from lm.evaluation.language import LanguageSettings
from lm.evaluation.leaning import BiasSettings
from lm.evaluation.page import CARD, line, made_by, write_card
from lm.evaluation.position import PositionSettings
from lm.evaluation.reasoning import ReasoningSettings
from lm.evaluation.subject import Subject
from lm.evaluation.truth import TruthSettings
from lm.files import read_json
from lm.models import costs, param_specs
from lm.parallel.layout import lay_out
from lm.parallel.mesh import MeshConfig, batch_ways
from lm.parallel.platform import keep_programs
from lm.parallel.sharding import parameter_shardings
from lm.runs.run import Run
from lm.training.report import model_line

# Suite → its module, whose `measure(subject, settings, seed)` returns a Section, or raises
# NotApplicable; `settings` is the field of EvaluateJob of this name.
SUITES: dict[str, str] = {
    "language": "lm.evaluation.language",
    "in_context": "lm.evaluation.in_context",
    "harness": "lm.evaluation.benchmarks",
    "bias": "lm.evaluation.leaning",
    "truth": "lm.evaluation.truth",
    "position": "lm.evaluation.position",
    "tasks": "lm.evaluation.emergence",
    "reasoning": "lm.evaluation.reasoning",
}


ENCODERS = ("bias",)  # what an encoder can be asked


@dataclasses.dataclass(frozen=True)
class EvaluateJob:
    """Which model to examine, and in what."""

    job: str = "evaluate"
    seed: Seed = 0  # of what is generated and drawn
    init_from: Path = ""  # the directory of a run, or a Hugging Face directory
    step: int | None = None  # of the checkpoint; None: the last one
    # Of a Hugging Face directory: regular expressions of fields of config.json and of tensors that
    # may be left out though they are not known.
    ignore: str | tuple[str, ...] = ()
    # The name of a chat template, or a file with Jinja text; "": the model's own, if it has one.
    chat_template: Path = ""
    suites: tuple[str, ...] = ()  # in this order; (): all that the model can be asked
    language: LanguageSettings = dataclasses.field(default_factory=LanguageSettings)
    in_context: InContextSettings = dataclasses.field(default_factory=InContextSettings)
    harness: HarnessSettings = dataclasses.field(default_factory=HarnessSettings)
    bias: BiasSettings = dataclasses.field(default_factory=BiasSettings)
    truth: TruthSettings = dataclasses.field(default_factory=TruthSettings)
    position: PositionSettings = dataclasses.field(default_factory=PositionSettings)
    tasks: TasksSettings = dataclasses.field(default_factory=TasksSettings)
    reasoning: ReasoningSettings = dataclasses.field(default_factory=ReasoningSettings)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def validate(self, prefix: str = "config") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        check(bool(self.init_from), f"{prefix}.init_from='' must name the directory of a run")
        for name in self.suites:
            check_choice(f"{prefix}.suites", name, SUITES)


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Section]:
    """Writes `workdir/card.html` and `workdir/card.json`, and prints every score.

    Returns:
      What each suite found, by name.

    Raises:
      ConfigError: no such run or suite, one of `suites` that the model cannot be asked, or a
        directory that holds another model's card.
    """
    job = view(EvaluateJob, config)
    keep_programs()
    subject = examined(job)
    directory = pathlib.Path(workdir).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    about, made = facts(subject.run), command(config)
    if (directory / CARD).exists():
        other = read_json(directory / CARD).get("facts", {}).get("directory", "")
        check(
            pathlib.Path(other).resolve() == subject.run.directory.resolve(),
            f"--workdir={workdir} holds the card of {other}, and this one would replace it: name "
            "another directory",
        )
    answers = job.harness.cache or str(directory / "harness.jsonl")
    settings = {**vars(job), "harness": dataclasses.replace(job.harness, cache=answers)}
    found: dict[str, Section] = {}
    left_out: dict[str, str] = {}
    for name in job.suites or SUITES:
        measure: Callable[..., Section] = importlib.import_module(SUITES[name]).measure
        try:
            if name not in ENCODERS:
                subject.needs_decoder()
            found[name] = timed(functools.partial(measure, subject, settings[name], job.seed))
        except NotApplicable as reason:
            if job.suites:
                raise ConfigError(f"config.suites={name!r}: {reason}") from None
            left_out[name] = str(reason)
        else:
            print(line(found[name]), flush=True)
        # What is found stays, whatever becomes of the rest.
        path = write_card(directory, about, made, [*found.values()], left_out)
    print(f"card: {path}")
    return found


def examined(job: EvaluateJob) -> Subject:
    """The model that `job` names, shared by the devices that there are."""
    try:
        loaded = lm.load(job.init_from, job.step, job.ignore)
    except ConfigError as error:
        raise ConfigError(f"config.init_from={job.init_from!r}: {error}") from None
    layout = lay_out("", job.mesh, 0)
    if layout.mesh.size > 1:
        shardings = parameter_shardings(param_specs(loaded.skeleton), layout.mesh)
        loaded = dataclasses.replace(loaded, params=jax.device_put(loaded.params, shardings))
    return Subject(loaded, batch_ways(layout.mesh), job.chat_template)


def command(config: ml_collections.ConfigDict) -> str:
    """What makes this card again: the fields that differ from the job's own."""
    return made_by("configs/evaluate.py", view(EvaluateJob, config))


def facts(loaded: Run) -> dict[str, str]:
    """What is examined, in words."""
    config = loaded.skeleton.config
    total = costs.parameters(config, param_specs(loaded.skeleton)).total
    name = loaded.directory.resolve().name
    tokenizer = f"{loaded.tokenizer.kind}, {loaded.tokenizer.vocab_size:,} tokens"
    return {
        "model": name,
        "directory": str(loaded.directory),
        "step": f"{loaded.step:,}",
        "parameters": f"{total:,}",
        "made of": model_line(config),
        "tokenizer": tokenizer,
        "context": f"{config.max_length:,} tokens",
        "made with": f"lm {lm.__version__}, jax {jax.__version__}, {jax.device_count()} × "
        f"{jax.devices()[0].device_kind}",
    }
