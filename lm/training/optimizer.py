"""Optimizers: gradients -> parameter updates, as one optax chain over flat dicts name -> array.

    clip by global norm -> direction of the named optimizer -> + weight decay -> * -learning rate

Weight decay is decoupled and, as in PyTorch, multiplied by the scheduled learning rate. Parameters
of all layers are stacked on a leading `layers` axis; what an optimizer does to "a matrix" it does
to each layer's matrix, and an attention projection [embed, heads, head_dim] is the matrix
[embed, heads * head_dim] that its einsum makes of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm.config import view
from lm.parallel.sharding import ParamSpec
from lm.training.config import OptimizerConfig
from lm.training.schedules import Schedule, make_schedule

# Rows looked up or scored one by one: embeddings, position biases and the head.
_TABLE_AXES = {"vocab", "length", "distance", "type"}

_HEAD_AXES = {"heads", "kv_heads", "head_dim"}  # together, one side of an attention projection


class Optimizer(NamedTuple):
    """An optax transformation, and the schedule of its learning rate.

    `update(gradients, state, parameters, learning_rate=rate)` leaves it to the caller what the rate
    is: that of the training step being taken, `schedule(step)`. The updates that the state counts
    are fewer where steps were skipped.
    """

    init: Callable[..., optax.OptState]
    update: Callable[..., tuple[optax.Updates, optax.OptState]]
    schedule: Schedule


def make_optimizer(
    config: OptimizerConfig, total_steps: int, specs: dict[str, ParamSpec]
) -> Optimizer:
    """The configured optimizer for the parameters declared by `specs`.

    `update` takes flat dicts with exactly the names of `specs`. The state of every optimizer but
    Adafactor holds, besides scalars, only arrays with the shapes and names of the parameters.

    References: AdamW, Loshchilov & Hutter 2019; Adafactor, Shazeer & Stern 2018; Lion, Chen et al.
    2023; Muon, Jordan et al. 2024 and Liu et al. 2025.

    Raises:
      ConfigError: a field is out of range, or the warm-up longer than `decay_steps`.
    """
    view(OptimizerConfig, config, "config.optimizer")
    decayed = decay_mask(config.decay, specs)
    steps = [_direction(config, specs)]
    if config.clip_norm:
        steps.insert(0, clip_by_global_norm(config.clip_norm))
    if config.weight_decay:
        steps.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    schedule = make_schedule(config, total_steps)
    steps.append(_scale_by_learning_rate(schedule))
    return Optimizer(*optax.chain(*steps), schedule)


def _scale_by_learning_rate(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """Updates times -rate: the one given, else that of as many updates as there were.

    The state is that of `optax.scale_by_learning_rate`, which checkpoints have.
    """

    def update(updates, state, params=None, *, learning_rate=None, **_):
        rate = schedule(state.count) if learning_rate is None else learning_rate
        updates = jax.tree.map(lambda g: (-rate).astype(g.dtype) * g, updates)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    init = optax.scale_by_schedule(schedule).init
    return optax.GradientTransformationExtraArgs(init, update)


def decay_mask(decay: str, specs: dict[str, ParamSpec]) -> dict[str, bool]:
    """Which parameters weight decay shrinks: name -> bool.

    `matrices` leaves out gains and biases, those of heads or experts too (nanoGPT's rule);
    `no_embeddings` leaves out token and position tables and the output head as well; `all` leaves
    out nothing but what is not trained, a router's bias.
    """
    return {
        name: (decay == "all" and not name.endswith("correction_bias"))
        or (matrix_axes(spec) is not None and not (decay == "no_embeddings" and _table(spec)))
        for name, spec in specs.items()
    }


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales the gradients by min(1, max_norm / (norm + 1e-6)), `norm` being that of all of them.

    The convention of `torch.nn.utils.clip_grad_norm_`. The norm is a float32 sum.
    """

    def clip(updates: optax.Updates, _) -> optax.Updates:
        scale = jnp.minimum(1.0, max_norm / (global_norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates)

    return optax.stateless(clip)


def global_norm(tree: optax.Updates) -> jax.Array:
    """The Euclidean norm of all numbers in `tree` together, a float32 scalar."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def _direction(
    config: OptimizerConfig, specs: dict[str, ParamSpec]
) -> optax.GradientTransformation:
    dtype = jnp.dtype(config.momentum_dtype)
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=dtype)
    if config.name == "adamw":
        return adam
    if config.name == "lion":
        return optax.scale_by_lion(config.b1, config.b2, mu_dtype=dtype)
    if config.name == "sgd":
        return optax.trace(config.b1, accumulator_dtype=dtype) if config.b1 else optax.identity()
    if config.name == "adafactor":
        return _per_matrix(_adafactor(), specs)
    matrices = {
        name: optax.contrib.MuonDimensionNumbers(axes.rows, axes.columns)
        for name, spec in specs.items()
        if (axes := matrix_axes(spec)) and not _table(spec)
    }
    muon = optax.chain(
        optax.contrib.scale_by_muon(
            ns_steps=config.muon_steps,
            beta=config.muon_momentum,
            mu_dtype=dtype,
            weight_dimension_numbers=matrices,
        ),
        _scale_by_shape(matrices, config.muon_rms),
    )
    labels = {name: "muon" if name in matrices else "adam" for name in specs}
    return _by_name(labels, muon=muon, adam=adam)


def _table(spec: ParamSpec) -> bool:
    return not _TABLE_AXES.isdisjoint(spec.axes)


class MatrixAxes(NamedTuple):
    """How an array is a stack of matrices: its axes, by position, in three groups."""

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]


def matrix_axes(spec: ParamSpec) -> MatrixAxes | None:
    """Which axes stack, which are the rows and which the columns; None when it is no matrix.

    Layers and experts stack, and so does an unnamed axis (query, key and value in one array) beside
    two named ones. One side of the matrix is `embed` where the array begins or ends with it, else
    its first axis; the other side is all that is left, heads and head_dim together. A bias or gain
    over [heads, head_dim] is a vector.
    """
    named = [i for i, axis in enumerate(spec.axes) if axis not in ("layers", "expert", None)]
    inner = [i for i, axis in enumerate(spec.axes) if axis not in ("layers", "expert")]
    sides = named if len(named) >= 2 else inner
    if len(sides) < 2 or {spec.axes[i] for i in sides} <= _HEAD_AXES:
        return None
    ends_in_embed = spec.axes[sides[-1]] == "embed" and spec.axes[sides[0]] != "embed"
    split = len(sides) - 1 if ends_in_embed else 1
    batch = tuple(i for i in range(len(spec.axes)) if i not in sides)
    return MatrixAxes(batch, tuple(sides[:split]), tuple(sides[split:]))


def _scale_by_shape(
    matrices: dict[str, optax.contrib.MuonDimensionNumbers], rms: float
) -> optax.GradientTransformation:
    """Scales orthogonal updates: to the given RMS (Liu et al. 2025), or, with 0, by
    sqrt(max(1, columns / rows)) (Jordan et al. 2024)."""

    def scaled(name: str, value: jax.Array) -> jax.Array:
        rows = math.prod(value.shape[axis] for axis in matrices[name].reduction_axis)
        columns = math.prod(value.shape[axis] for axis in matrices[name].output_axis)
        return value * (rms * max(rows, columns) ** 0.5 if rms else max(1.0, columns / rows) ** 0.5)

    return optax.stateless(lambda updates, _: {n: scaled(n, g) for n, g in updates.items()})


def _adafactor() -> optax.GradientTransformation:
    """Adafactor's direction: factored second moment, update clipped to RMS 1, then times the RMS of
    the parameter (at least 1e-3), so that the learning rate is a relative one."""
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )


def _per_matrix(
    transform: optax.GradientTransformation, specs: dict[str, ParamSpec]
) -> optax.GradientTransformation:
    """`transform` applied to each layer's matrix (or vector) alone; its state is kept per name."""
    views = {name: _view(spec) for name, spec in specs.items()}

    def init(params: optax.Params) -> optax.OptState:
        return {name: jax.vmap(transform.init)(views[name][0](p)) for name, p in params.items()}

    def update(updates: optax.Updates, state: optax.OptState, params: optax.Params):
        new_updates, new_state = {}, {}
        for name, value in updates.items():
            to_view, from_view = views[name]
            direction, new_state[name] = jax.vmap(transform.update)(
                to_view(value), state[name], to_view(params[name])
            )
            new_updates[name] = from_view(direction)
        return new_updates, new_state

    return optax.GradientTransformation(init, update)


def _view(spec: ParamSpec) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Functions from the parameter's shape to [stack, rows, columns] or [stack, size], and back."""
    axes = matrix_axes(spec)
    if axes is None:
        batch = [i for i, axis in enumerate(spec.axes) if axis == "layers"]
        rest = [i for i in range(len(spec.axes)) if i not in batch]
        axes = MatrixAxes(tuple(batch), tuple(rest), ())
    order = [*axes.batch, *axes.rows, *axes.columns]
    moved = [spec.shape[axis] for axis in order]
    stack, rows, columns = (math.prod(spec.shape[axis] for axis in group) for group in axes)
    shape = (stack, rows, columns) if axes.columns else (stack, rows)
    inverse = [order.index(axis) for axis in range(len(order))]
    return (
        lambda x: x.transpose(order).reshape(shape),
        lambda x: x.reshape(moved).transpose(inverse),
    )


def _by_name(
    labels: dict[str, str], **transforms: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Applies to each parameter the transform its label names; each sees only its own."""

    def part(label: str, tree: optax.Params) -> optax.Params:
        return {name: leaf for name, leaf in tree.items() if labels[name] == label}

    def init(params: optax.Params) -> optax.OptState:
        return {label: each.init(part(label, params)) for label, each in transforms.items()}

    def update(updates: optax.Updates, state: optax.OptState, params: optax.Params):
        merged, new_state = {}, {}
        for label, each in transforms.items():
            own, new_state[label] = each.update(
                part(label, updates), state[label], part(label, params)
            )
            merged |= own
        return {name: merged[name] for name in updates}, new_state

    return optax.GradientTransformation(init, update)
