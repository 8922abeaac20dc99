"""What is trained, in one value: for a run, and for a plan of that run."""

from __future__ import annotations

import dataclasses
import os

import jax

from lm.config import check
from lm.models import ModelConfig, count, param_specs, skeleton
from lm.models.adapters import AdapterConfig, adapter_specs
from lm.models.costs import forward_flops_per_token, training_flops_per_token
from lm.objectives import ObjectiveConfig
from lm.parallel.layout import Layout
from lm.parallel.mesh import batch_ways
from lm.parallel.pipeline import check_layers
from lm.parallel.sharding import ParamSpec
from lm.training.config import OptimizerConfig, TrainConfig

HOST = "pinned_host"  # the kind of memory of `train.offload_optimizer`


@dataclasses.dataclass(frozen=True)
class Workload:
    """All that a training step depends on, but for the numbers in its arrays."""

    model: ModelConfig  # with vocab_size and max_length set
    block_size: int  # tokens a sequence; of an encoder-decoder, of its target
    batch_size: int  # sequences a step, or pairs of replies, over all devices
    source_length: int = 0  # tokens of an encoder-decoder's source; 0: no source
    packed: bool = False  # rows hold several documents, with segments and positions
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    max_targets: int = 0  # no row has more targets than this; 0: any number
    seed: int = 0  # of the initial parameters and dropout
    layout: Layout | None = None  # of the devices; None where a plan is still looking for it
    teacher: ModelConfig | None = None  # what is compared with, where it is another model

    @property
    def microbatch(self) -> int:
        """Sequences whose gradient is taken at once, over all devices."""
        return self.batch_size * self.objective.texts_per_row // self.train.accumulation

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.batch_size * self.objective.texts_per_row * self.block_size

    @property
    def trained(self) -> dict[str, ParamSpec]:
        """The parameters that are trained: the model's, or adapters.

        Raises:
          ConfigError: adapters of what the model has not.
        """
        specs = param_specs(skeleton(self.model))
        return specs if self.adapter.kind == "none" else adapter_specs(self.adapter, specs)

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of training, by `lm.models.costs`.

        Frozen matrices get no gradient: two thirds, and those of what stands beside them.
        """
        sizes = self.model, self.block_size, self.source_length or None, self.max_targets
        if self.adapter.kind == "none":
            return training_flops_per_token(*sizes)
        return 2 * forward_flops_per_token(*sizes) + 6 * count(self.trained)


def check_workload(workload: Workload) -> None:
    """Raises ConfigError where its devices cannot share it, or cannot hold what must be there."""
    check_layout(workload)
    check_memory(workload)
    check_offload(workload)


def check_layout(workload: Workload) -> None:
    """Raises ConfigError where the mesh cannot share the work evenly."""
    model, train, layout = workload.model, workload.train, workload.layout
    ways, sizes = batch_ways(layout.mesh), layout.mesh.shape
    shares = train.accumulation * ways
    check(
        workload.batch_size % shares == 0,
        f"config.data.batch_size={workload.batch_size} must be a multiple of {shares}: {ways} "
        f"device(s) that share it × train.accumulation={train.accumulation}",
    )
    check(
        train.eval_batch_size % ways == 0,
        f"config.train.eval_batch_size={train.eval_batch_size} must be a multiple of the {ways} "
        "devices that share it",
    )
    for axis in ("context", "stage"):
        check(
            model.cell == "attention" or sizes[axis] == 1,
            f"config.mesh.{axis}={sizes[axis]} needs config.model.cell='attention', not "
            f"{model.cell!r}: a recurrent network reads a sequence from one end to the other",
        )
    for name in ("block_size", "source_length"):
        length = getattr(workload, name)
        check(
            length % sizes["context"] == 0,
            f"config.data.{name}={length} must be a multiple of mesh.context={sizes['context']}, "
            "and better of twice that, so that all devices have as much to do",
        )
    check(
        sizes["stage"] == 1 or model.remat != "offload",
        f"config.model.remat='offload' needs config.mesh.stage=1, not {sizes['stage']}: XLA cannot "
        "move what a pipeline's stages keep; use 'full'",
    )
    if sizes["stage"] > 1:
        layout.pipeline(workload.microbatch)  # for its errors
        check_layers(model.num_layers - model.first_layers, sizes["stage"], layout.rounds)
        if model.architecture == "encoder_decoder":
            check_layers(model.encoder_layers, sizes["stage"], layout.rounds)
    experts = model.num_experts or 1
    check(
        sizes["expert"] == 1 or experts % sizes["expert"] == 0,
        f"config.mesh.expert={sizes['expert']} must divide config.model.num_experts="
        f"{model.num_experts}: use mesh.fsdp or mesh.data for the rest",
    )


def check_memory(workload: Workload) -> None:
    """Raises ConfigError where not even all devices together hold one copy of what must be there.

    That is the parameters and, where they are trained, their gradients in float32, and a batch's
    inputs and targets. What passes may still not fit: see the report at the start.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        here = (
            (device.memory_stats() or {}).get("bytes_limit") or 2**40
        ) * jax.local_device_count()
    memory = here * jax.process_count()
    parameters = count(param_specs(skeleton(workload.model)))
    each, said = 8, "parameters and their gradients take"
    if workload.adapter.kind != "none":
        each, said = 4, "frozen parameters, read in float32, take"
    rows, length = workload.batch_size, workload.block_size + workload.source_length
    for needed, what in (
        (each * parameters, f"config.model: {parameters:,} {said}"),
        (8 * rows * length, f"config.data.batch_size={rows}: a batch takes"),
    ):
        check(
            needed < memory,
            f"{what} {needed / 2**30:,.0f} GiB, and all devices together have "
            f"{memory / 2**30:,.0f} GiB: make it smaller",
        )


def check_offload(workload: Workload) -> None:
    """Raises ConfigError where the optimizer's state is to live beside these devices and cannot."""
    if not workload.train.offload_optimizer:
        return
    check(
        workload.optimizer.name != "adafactor",
        "config.train.offload_optimizer=True is no use to config.optimizer.name='adafactor', whose "
        "state is small: set it to False, or use adamw, lion, muon or sgd",
    )
    device = workload.layout.mesh.local_devices[0]
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    check(
        HOST in kinds,
        f"config.train.offload_optimizer=True needs devices that reach {HOST} memory, and "
        f"{device.device_kind} has only {', '.join(kinds)}",
    )
