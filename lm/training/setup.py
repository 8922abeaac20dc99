"""Training, set up from a config's sections: for a run, and for a plan of that run."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

from lm.models import Model, ModelConfig, param_specs, skeleton
from lm.objectives import ObjectiveConfig
from lm.parallel import compiler
from lm.parallel.layout import Layout
from lm.parallel.mesh import replicated
from lm.parallel.sharding import ParamSpec
from lm.training.config import TrainConfig
from lm.training.offload import HOST, streamed_update
from lm.training.optimizer import Optimizer, OptimizerConfig, make_optimizer
from lm.training.state import abstract_state, gradient_shardings
from lm.training.step import Batch, State, make_train_step


class Training(NamedTuple):
    """What trains a model on a layout. Nothing of it is allocated."""

    model: Model
    specs: dict[str, ParamSpec]
    optimizer: Optimizer
    abstract: State  # shapes and shardings of the state
    # (state, batches [N, B, T]) → (state after N steps, metrics [N]): jitted, donates the state;
    # to be called or lowered within `layout.active()`.
    step: Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]


def set_up(
    model: ModelConfig,
    objective: ObjectiveConfig,
    optimizer: OptimizerConfig,
    train: TrainConfig,
    layout: Layout,
    *,
    seed: int = 0,
    max_targets: int = 0,
) -> Training:
    """The training that these sections describe.

    Args:
      model: with its vocabulary's size and its length.
      objective: the loss.
      optimizer: its schedule ends after `train.steps`.
      train: `accumulation`, `spike_nats`, `offload_optimizer` and `compiler` of it.
      layout: what its arrays are split over.
      seed: of dropout.
      max_targets: at most so many targets in a row; 0: any number.

    Raises:
      ConfigError: the optimizer does not fit the steps, or the devices' compiler is too old for
        `train.compiler`.
    """
    built = skeleton(model)
    specs = param_specs(built)
    transformation = make_optimizer(optimizer, train.steps, specs)
    memory = update = None
    if train.offload_optimizer:
        memory, update = HOST, streamed_update(optimizer, train.steps, specs)
    abstract = abstract_state(specs, transformation, layout.mesh, layout.zero, memory)
    step = make_train_step(
        built,
        objective,
        transformation,
        train,
        seed,
        max_targets,
        gradient_shardings(specs, layout.mesh, layout.zero),
        update,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    options = None
    if train.compiler == "tuned":
        device = next(iter(layout.mesh.local_devices), layout.mesh.devices.flat[0])
        compiler.check_options(device)
        options = compiler.options(device.device_kind)
    jitted = jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings, replicated(layout.mesh)),
        compiler_options=options,
    )
    return Training(built, specs, transformation, abstract, jitted)
