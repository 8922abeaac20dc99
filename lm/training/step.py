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
from jax.sharding import NamedSharding

from lm.models import Model, bind, skeleton
from lm.models.adapters import applied
from lm.objectives import loss, whole_batch
from lm.training.optimizer import Optimizer, global_norm
from lm.training.workload import Workload

State = dict[str, Any]
Batch = Mapping[str, jax.Array]
# Parameters that a step reads and does not change, by what they are for: `base`, what adapters
# stand beside (`lm.models.adapters.freeze`); `reference`, of the model that the objective compares
# with: all of them, or adapters of the same base.
Frozen = Mapping[str, Mapping[str, Any]]
Shardings = dict[str, NamedSharding]  # by parameter
# (summed gradients, what divides them, the norm of that mean, the optimizer's state, parameters,
# whether to skip this step, learning rate) → the next parameters and state: as they were where the
# step is skipped.
Update = Callable[[Any, jax.Array, jax.Array, Any, Any, jax.Array, jax.Array], tuple[Any, Any]]
OF_A_STEP = ("grad_norm", "skipped", "learning_rate")  # metrics that are no sums
LOSS_MEMORY = 0.98  # the running mean of the loss forgets 2 % a step


def initial_state(params: Mapping[str, jax.Array], optimizer: Optimizer) -> State:
    """The state before the first step."""
    return {
        "params": dict(params),
        "optimizer": optimizer.init(dict(params)),
        "step": jnp.int32(0),
        "loss_mean": jnp.float32(jnp.nan),
    }


def gradients(
    loss_fn: Callable, params, batch: Batch, accumulation: int, shardings: Shardings
) -> tuple[Any, Any]:
    """Gradient of the summed loss over `batch`, and its summed metrics.

    With accumulation the batch is cut into that many micro-batches of every n-th row, so that each
    keeps the batch's sharding, and sums are taken; a sum does not know how it was cut.

    Args:
      loss_fn: (params, batch, rows [B]) → (summed loss, summed metrics); `rows` are the numbers of
        the batch's rows in the whole.
      shardings: of the gradients.
    """
    grad_fn = jax.grad(loss_fn, has_aux=True)

    def summed(batch, rows_B):
        grads, metrics = grad_fn(params, batch, rows_B)
        return jax.lax.with_sharding_constraint(grads, shardings), metrics

    return sum_of_parts(summed, batch, accumulation)


def sum_of_parts(function: Callable, batch: Batch, accumulation: int) -> Any:
    """The sum of `function(micro-batch, rows_B)` over as many micro-batches as `gradients` cuts."""
    rows_B = jnp.arange(jax.tree.leaves(batch)[0].shape[0], dtype=jnp.int32)
    if accumulation == 1:
        return function(batch, rows_B)

    def cut(x):
        x = x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:])
        return jnp.moveaxis(x, 1, 0)

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(*part)), None

    parts = jax.tree.map(cut, (dict(batch), rows_B))
    shapes = jax.eval_shape(lambda p: function(*p), jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, parts)[0]


def whole_update(optimizer: Optimizer) -> Update:
    """The update that has all of the optimizer's state at hand."""

    def update(summed, weight, norm, state, params, skip, rate):
        mean = jax.tree.map(lambda g: g / weight, summed)
        updates, new_state = optimizer.update(mean, state, params, learning_rate=rate)
        new = (optax.apply_updates(params, updates), new_state)
        return jax.tree.map(lambda old, new: jnp.where(skip, old, new), (params, state), new)

    return update


def make_train_step(
    workload: Workload, model: Model, optimizer: Optimizer, update: Update, shardings: Shardings
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """A function (state, batches [N, B, T], frozen = {}) → (state after N steps, metrics [N]).

    Each step's loss is the sum over its batch divided once by its summed weight. A step whose loss
    or gradient is not finite, or whose loss is a spike, changes nothing but the step count; its
    `skipped` metric is 1. The learning rate is that of the step count, so that its decay ends with
    the run however many steps were skipped. Jit it, donating the state.

    Metrics: those of `lm.objectives.loss` (sums), `grad_norm`, `skipped`, `learning_rate`.

    Args:
      update: from gradients to the next state.
      shardings: of the gradients.
    """
    objective, config, most = workload.objective, workload.train, workload.max_targets
    teacher = workload.teacher and skeleton(workload.teacher)

    def one_step(state: State, batch: Batch, frozen: Frozen):
        key = None
        if model.config.dropout:  # made here, since a plan's devices cannot make one
            key = jax.random.fold_in(jax.random.key(workload.seed), state["step"])

        def loss_fn(params, batch, rows_B):
            bound, reference = models(model, params, frozen, teacher)
            return loss(bound, batch, objective, key, most, rows_B, reference)

        if objective.of_whole_batch and config.accumulation > 1:

            def of_part(part, rows_B):
                bound, reference = models(model, state["params"], frozen, teacher)
                return whole_batch(bound, part, objective, reference)

            totals = sum_of_parts(of_part, batch, config.accumulation)
            rows = jax.tree.leaves(batch)[0].shape[:1]
            batch = {**batch, **{name: jnp.full(rows, x) for name, x in totals.items()}}

        summed, metrics = gradients(loss_fn, state["params"], batch, config.accumulation, shardings)
        weight = jnp.maximum(metrics["weight"], 1.0)
        nats, norm = metrics["nats"] / weight, global_norm(summed) / weight
        bad = ~(jnp.isfinite(nats) & jnp.isfinite(norm))
        if config.spike_nats:
            bad |= nats > state["loss_mean"] + config.spike_nats
        rate = optimizer.schedule(state["step"])
        params, kept = update(summed, weight, norm, state["optimizer"], state["params"], bad, rate)
        settled = jnp.where(jnp.isnan(state["loss_mean"]), nats, state["loss_mean"])
        loss_mean = LOSS_MEMORY * settled + (1 - LOSS_MEMORY) * nats
        new_state = {
            "params": params,
            "optimizer": kept,
            "step": state["step"] + 1,
            "loss_mean": jnp.where(bad, state["loss_mean"], loss_mean),
        }
        measured = {"grad_norm": norm, "skipped": bad.astype(jnp.int32), "learning_rate": rate}
        return new_state, metrics | measured

    def steps(state: State, batches: Batch, frozen: Frozen | None = None):
        frozen = frozen or {}
        if jax.tree.leaves(batches)[0].shape[0] == 1:
            state, metrics = one_step(state, jax.tree.map(lambda x: x[0], batches), frozen)
            return state, jax.tree.map(lambda x: x[None], metrics)
        return jax.lax.scan(lambda state, batch: one_step(state, batch, frozen), state, batches)

    return steps


def models(
    model: Model, params: Mapping[str, jax.Array], frozen: Frozen, teacher: Model | None = None
) -> tuple[Model, Model | None]:
    """The model that is trained, bound, and the one it is compared with, if there is one.

    Args:
      teacher: what the parameters of the latter are of; None: of the same model.
    """

    def bound(params):
        return bind(model, applied(params, frozen["base"]) if "base" in frozen else params)

    if "reference" not in frozen:
        return bound(params), None
    reference = frozen["reference"]
    return bound(params), bound(reference) if teacher is None else bind(teacher, reference)
