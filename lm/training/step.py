"""One optimizer step, and one evaluation step, as functions of arrays.

The training state is a flat dictionary: `params` (name → array), `optimizer` (optax state over the
same names), `step` (optimizer steps done) and `loss_mean` (a running mean, to know a spike by).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm.models import Model, bind
from lm.objectives import ObjectiveConfig, token_loss
from lm.training.config import TrainConfig
from lm.training.optimizer import global_norm

State = dict[str, Any]
Batch = Mapping[str, jax.Array]
LOSS_MEMORY = 0.98  # the running mean of the loss forgets 2 % a step


def initial_state(
    params: Mapping[str, jax.Array], optimizer: optax.GradientTransformation
) -> State:
    """The state before the first step."""
    return {
        "params": dict(params),
        "optimizer": optimizer.init(dict(params)),
        "step": jnp.int32(0),
        "loss_mean": jnp.float32(jnp.nan),
    }


def gradients(loss_fn: Callable, params, batch: Batch, accumulation: int, key) -> tuple[Any, Any]:
    """Gradient of the summed loss over `batch`, and its summed metrics.

    With accumulation the batch is cut into that many micro-batches of every n-th row, so that each
    keeps the batch's sharding, and sums are taken; a sum does not know how it was cut.
    """
    grad_fn = jax.grad(loss_fn, has_aux=True)
    if accumulation == 1:
        return grad_fn(params, batch, key)

    def cut(x):
        x = x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:])
        return jnp.moveaxis(x, 1, 0)

    def add(total, part):
        micro_batch, index = part
        micro_key = None if key is None else jax.random.fold_in(key, index)
        return jax.tree.map(jnp.add, total, grad_fn(params, micro_batch, micro_key)), None

    parts = (jax.tree.map(cut, dict(batch)), jnp.arange(accumulation))
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(lambda p: grad_fn(params, p[0], key), first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, parts)[0]


def make_train_step(
    skeleton: Model,
    objective: ObjectiveConfig,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    seed: int,
    max_targets: int = 0,
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    """A function (state, batches [N, B, T]) → (state after N steps, metrics [N]).

    Each step's loss is the sum over its batch divided once by its summed weight. A step whose loss
    or gradient is not finite, or whose loss is a spike, changes nothing but the step count; its
    `skipped` metric is 1. Jit it, donating the state.

    Metrics: those of `lm.objectives.token_loss` (sums), `grad_norm`, `skipped`.

    Args:
      skeleton: the model.
      objective: the loss.
      optimizer: gradients to updates.
      config: accumulation, and what counts as a spike.
      seed: of dropout.
      max_targets: at most so many targets in a row; 0: any number.
    """
    dropout_root = jax.random.key(seed) if skeleton.config.dropout else None

    def loss_fn(params, batch, key):
        return token_loss(bind(skeleton, params), batch, objective, key, max_targets)

    def one_step(state: State, batch: Batch):
        key = None if dropout_root is None else jax.random.fold_in(dropout_root, state["step"])
        summed, metrics = gradients(loss_fn, state["params"], batch, config.accumulation, key)
        weight = jnp.maximum(metrics["weight"], 1.0)
        mean = jax.tree.map(lambda g: g / weight, summed)
        loss, norm = metrics["nats"] / weight, global_norm(mean)
        bad = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
        if config.spike_nats:
            bad |= loss > state["loss_mean"] + config.spike_nats
        updates, new_optimizer = optimizer.update(mean, state["optimizer"], state["params"])
        new_params = optax.apply_updates(state["params"], updates)
        settled = jnp.where(jnp.isnan(state["loss_mean"]), loss, state["loss_mean"])
        changed = {
            "params": new_params,
            "optimizer": new_optimizer,
            "loss_mean": LOSS_MEMORY * settled + (1 - LOSS_MEMORY) * loss,
        }
        kept = {name: state[name] for name in changed}
        new_state = jax.tree.map(lambda old, new: jnp.where(bad, old, new), kept, changed)
        new_state["step"] = state["step"] + 1
        return new_state, {**metrics, "grad_norm": norm, "skipped": bad.astype(jnp.int32)}

    def steps(state: State, batches: Batch):
        if jax.tree.leaves(batches)[0].shape[0] == 1:
            state, metrics = one_step(state, jax.tree.map(lambda x: x[0], batches))
            return state, jax.tree.map(lambda x: x[None], metrics)
        return jax.lax.scan(one_step, state, batches)

    return steps


def make_eval_step(
    skeleton: Model, max_targets: int = 0
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """A function (params, batch [B, T]) → summed metrics, `nats` and `weight` among them.

    Without dropout and regularisers; the arguments are as of `make_train_step`.
    """

    def step(params, batch: Batch):
        return token_loss(
            bind(skeleton, params), batch, ObjectiveConfig(), max_targets=max_targets
        )[1]

    return step
