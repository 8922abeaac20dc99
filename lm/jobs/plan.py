"""Planning without hardware: does a run fit, and how fast will it be?

Compiles the training step that would run, prefill and a step of decoding, or an iteration of
learning from rewards, for devices that this machine has not got, and reads memory, FLOPs, traffic
and time off the result.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated, Any

import ml_collections
from rich.console import Console

from lm.alignment.advantages import AdvantageConfig
from lm.alignment.config import AlignJob, LearningConfig
from lm.alignment.rollouts import RolloutConfig
from lm.config import Bounds, Size, SizeOrZero, check, check_choice, to_dict, view
from lm.data import DataConfig
from lm.files import write_json
from lm.models import ModelConfig
from lm.models.adapters import AdapterConfig
from lm.models.presets import PRESETS, Overrides, preset
from lm.objectives import ObjectiveConfig, check_objective
from lm.parallel.layout import lay_out, resolve
from lm.parallel.mesh import MeshConfig
from lm.planning import report
from lm.planning.alignment import plan_iteration, show_iteration
from lm.planning.decoding import DecodePlan, decoding
from lm.planning.programs import train_program
from lm.planning.ranking import SearchConfig, ranked
from lm.planning.topology import Topology, open_topology
from lm.planning.weak_scaling import ScalingConfig, weak_scaling
from lm.training.config import TrainConfig
from lm.training.optimizer import OptimizerConfig
from lm.training.workload import Workload, check_layout

PIPED_WIDTH = 140  # columns where standard output is no terminal


@dataclasses.dataclass(frozen=True)
class PlannedData:
    """The shape of a batch; a plan needs no data."""

    block_size: SizeOrZero = 0  # tokens a sequence; 0: the model's context
    source_length: SizeOrZero = 0  # of an encoder-decoder's source; 0: as long as the block
    batch_size: SizeOrZero = 0  # sequences a step, over all devices; 0: rows_per_device on each
    rows_per_device: Size = 1  # where batch_size is 0: sequences for each device there is
    packed: bool = False  # rows hold several documents, with segments and positions


@dataclasses.dataclass(frozen=True)
class PlanJob:
    """What would run, and on what."""

    job: str = "plan"
    preset: str = ""  # a name of `lm.models.presets`; "": `model` says everything
    model: Overrides = dataclasses.field(default_factory=Overrides)  # what is not as it says
    topology: str = "v5p:4x4x4"  # v4, v5e, v5p, v6e or tpu7x and its shape; cpu:8: fake devices
    slices: Size = 1  # so many of them, connected by the data centre's network
    data: PlannedData = dataclasses.field(default_factory=PlannedData)
    # `policy`: an iteration of `lm.jobs.align`, which alone has the four fields after `adapter`
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    advantage: AdvantageConfig = dataclasses.field(default_factory=AdvantageConfig)
    learning: LearningConfig = dataclasses.field(default_factory=LearningConfig)
    reward_model: str = "policy"  # a preset, or as large as the policy; "": rewards are functions
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    strategy: str = ""  # as in training
    zero: Annotated[int, Bounds(-1, 3)] = -1  # as in training
    search: SearchConfig = dataclasses.field(default_factory=SearchConfig)
    decode: DecodePlan = dataclasses.field(default_factory=DecodePlan)
    scaling: ScalingConfig = dataclasses.field(default_factory=ScalingConfig)


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
    """Prints the plan, and writes it to `workdir`/plan.json.

    Returns:
      What the file holds.

    Raises:
      ConfigError: an unknown topology, model or field; sizes that do not divide; libtpu is missing.
    """
    job = view(PlanJob, config)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPED_WIDTH)
    if job.scaling.presets:
        result = weak_scaling(job.scaling, job.optimizer, job.train, console)
    else:
        result = _plan(job, console)
    path = pathlib.Path(workdir) / "plan.json"
    write_json(path, result)
    console.print(f"\nwritten to {path}", style="dim")
    return result


def _plan(job: PlanJob, console: Console) -> dict[str, Any]:
    topology = open_topology(job.topology, job.slices)
    workload = _workload(job, topology)
    if job.objective.name == "policy":
        return {"config": to_dict(job), "topology": topology.name} | _iteration(
            job, workload, topology, console
        )
    mesh, zero = resolve(job.strategy, job.mesh, job.zero)
    result: dict[str, Any] = {"config": to_dict(job), "topology": topology.name}
    if job.decode.only:
        report.header(console, topology, workload, job.preset)
    elif job.search.meshes:
        report.header(console, topology, workload, job.preset, f"searched for, zero {zero}")
        result["ranking"], workload, program = ranked(
            job.search, workload, mesh, zero, topology, console
        )
    else:
        layout = lay_out("", mesh, zero, topology.devices)
        workload = dataclasses.replace(workload, layout=layout)
        words = f"{report.layout_words(layout)}, zero {zero}"
        report.header(console, topology, workload, job.preset, words)
        program = train_program(workload, topology)
    if not job.decode.only:
        result["training"] = report.show_training(console, workload, topology, program)
    if job.decode.enabled or job.decode.only:
        result["decoding"] = decoding(
            job.decode, workload.model, workload.block_size, topology, console
        )
    return result


def _iteration(
    job: PlanJob, workload: Workload, topology: Topology, console: Console
) -> dict[str, Any]:
    """An iteration of `lm.jobs.align`, planned and printed."""
    check(
        not (job.search.meshes or job.decode.enabled or job.decode.only),
        "config.objective.name='policy' plans an iteration, decoding included, on one mesh: leave "
        "config.search and config.decode out",
    )
    names = ("rollout", "advantage", "objective", "adapter", "optimizer", "train")
    sizes = {"block_size": workload.block_size, "batch_size": workload.batch_size}
    fields = {"init_from": "a plan", "model": workload.model, "data": DataConfig(**sizes)}
    fields["learning"] = dataclasses.replace(job.learning, critic_from="")  # which is not there
    aligned = AlignJob(**fields, **{name: getattr(job, name) for name in names})
    aligned = view(AlignJob, aligned).with_value_head()
    layout = lay_out(job.strategy, job.mesh, job.zero, topology.devices)
    check_layout(aligned.workload(layout))
    check_choice("config.reward_model", job.reward_model, ("", "policy", *PRESETS))
    named = {"": None, "policy": workload.model}
    reward = named[job.reward_model] if job.reward_model in named else preset(job.reward_model)
    words = f"{report.layout_words(layout)}, zero {layout.zero}"
    report.header(console, topology, aligned.workload(layout), job.preset, words)
    found = plan_iteration(aligned, layout, reward, topology)
    show_iteration(console, found, aligned, topology)
    return {"iteration": found.figures()}


def _workload(job: PlanJob, topology: Topology) -> Workload:
    fields = {name: value for name, value in vars(job.model).items() if value is not None}
    if job.preset:
        model = preset(job.preset, **fields)
    else:
        model = view(ModelConfig, fields, "config.model")
    check(
        model.vocab_size > 0,
        "config.model.vocab_size=0 must be positive: a plan has no tokenizer to ask; or name a "
        "config.preset",
    )
    block = job.data.block_size or model.max_length
    check(block > 0, "config.data.block_size=0 must be positive where model.max_length is 0")
    both = model.architecture == "encoder_decoder"
    source = (job.data.source_length or block) if both else 0
    check(
        not model.max_length or model.positions != "learned" or block <= model.max_length,
        f"config.data.block_size={block} is longer than config.model.max_length={model.max_length}",
    )
    model = dataclasses.replace(model, max_length=max(model.max_length, block, source))
    check_objective(job.objective, model, "config")
    rows = job.data.batch_size or job.data.rows_per_device * len(topology.devices)
    sections = ("objective", "adapter", "optimizer", "train")
    sections = {name: getattr(job, name) for name in sections}
    return Workload(model, block, rows, source, job.data.packed, **sections)
