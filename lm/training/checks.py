"""Whether a model and its batches can be laid out as asked, said before any work is lost."""

from __future__ import annotations

import os

import jax

from lm.config import check
from lm.models import ModelConfig, count, param_specs, skeleton
from lm.parallel.layout import Layout
from lm.parallel.mesh import batch_ways
from lm.parallel.pipeline import check_layers


def check_layout(
    model: ModelConfig,
    layout: Layout,
    *,
    batch_size: int,
    block_size: int,
    accumulation: int = 1,
    eval_batch_size: int = 0,
    source_length: int = 0,
) -> None:
    """Raises ConfigError where the mesh cannot share the work evenly.

    Args:
      model: the model.
      layout: of the devices.
      batch_size: sequences a step.
      block_size: tokens a sequence.
      accumulation: micro-batches a step.
      eval_batch_size: sequences a validation batch; 0: as `batch_size`.
      source_length: tokens of an encoder-decoder's source; 0: none.
    """
    ways, sizes = batch_ways(layout.mesh), layout.mesh.shape
    shares = accumulation * ways
    check(
        batch_size % shares == 0,
        f"config.data.batch_size={batch_size} must be a multiple of {shares}: {ways} device(s) "
        f"that share it × train.accumulation={accumulation}",
    )
    check(
        eval_batch_size % ways == 0,
        f"config.train.eval_batch_size={eval_batch_size} must be a multiple of the {ways} devices "
        "that share it",
    )
    for axis in ("context", "stage"):
        check(
            model.cell == "attention" or sizes[axis] == 1,
            f"config.mesh.{axis}={sizes[axis]} needs config.model.cell='attention', not "
            f"{model.cell!r}: a recurrent network reads a sequence from one end to the other",
        )
    for name, length in (("block_size", block_size), ("source_length", source_length)):
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
        layout.pipeline(batch_size // accumulation)  # for its errors
        check_layers(model.num_layers - model.dense_layers, sizes["stage"], layout.rounds)
        if model.architecture == "encoder_decoder":
            check_layers(model.encoder_layers, sizes["stage"], layout.rounds)
    experts = model.num_experts or 1
    check(
        sizes["expert"] == 1 or experts % sizes["expert"] == 0,
        f"config.mesh.expert={sizes['expert']} must divide config.model.num_experts="
        f"{model.num_experts}: use mesh.fsdp or mesh.data for the rest",
    )


def check_memory(model: ModelConfig, batch_size: int, length: int) -> None:
    """Raises ConfigError where not even all devices together hold one copy of what must be there.

    That is the parameters and their gradients in float32, and a batch's inputs and targets. What
    passes may still not fit: see the report at the start.

    Args:
      model: the model.
      batch_size: sequences a step.
      length: tokens a sequence, of source and target together.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        here = (
            (device.memory_stats() or {}).get("bytes_limit") or 2**40
        ) * jax.local_device_count()
    memory = here * jax.process_count()
    parameters = count(param_specs(skeleton(model)))
    for needed, what in (
        (8 * parameters, f"config.model: {parameters:,} parameters and their gradients take"),
        (8 * batch_size * length, f"config.data.batch_size={batch_size}: a batch takes"),
    ):
        check(
            needed < memory,
            f"{what} {needed / 2**30:,.0f} GiB, and all devices together have "
            f"{memory / 2**30:,.0f} GiB: make it smaller",
        )
