"""A pipeline: each stage of devices holds some of the layers, and micro-batches pass through them.

GPipe (Huang et al. 2019): a batch is cut into M micro-batches; at every tick each of S stages works
on one and hands it to the next, so all have passed after M + S - 1 ticks, and a stage idles for a
share (S - 1) / (M + S - 1) of them. Circular, or interleaved (Narayanan et al. 2021, §2.2): each
stage holds V blocks of layers that are not neighbours, and a micro-batch passes V times round. The
S - 1 idle ticks are then V times shorter: (S - 1) / (V·M + S - 1). Micro-batches go round in groups
of S, so that one that leaves the last stage enters the first at the next tick and waits nowhere.

Nothing is gathered: the rows of a batch are split over the stages too, and move to the first as
they are needed. Each stage keeps M / S micro-batches in slots. At tick n the first stage takes the
one in its slot n mod M / S, that slot of every stage moves one stage down, and what the last stage
has finished takes the place that this frees. In the end the slots hold the outputs where the inputs
were, turned by S - 1. What moves between stages, forward and backward, goes to a neighbour only.

The backward pass is what differentiation makes of it: the same ticks in reverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lm.config import check
from lm.parallel.mesh import BATCH_AXES
from lm.parallel.sharding import automatic_axes

AXIS = "stage"
PER_STAGE = 4  # micro-batches a stage where the config leaves it open


def bubble_fraction(stages: int, microbatches: int, rounds: int = 1) -> float:
    """The share of its time that a stage idles: (S - 1) / (V·M + S - 1)."""
    return (stages - 1) / (rounds * microbatches + stages - 1)


def choose_microbatches(asked: int, stages: int, rows: int, ways: int = 1) -> int:
    """How many micro-batches a batch of `rows`, a multiple of the stages, is cut into.

    As many as `asked`, which is `config.mesh.microbatches`. If that is 0, four a stage, or as many
    below as the rows divide into such that the `ways` devices over which a stage splits the rows of
    a micro-batch get the same number.

    Raises:
      ConfigError: the rows do not divide into as many as were asked for.
    """
    per_stage = rows // stages
    if asked:
        check(
            asked % stages == 0 and per_stage % (asked // stages) == 0,
            f"config.mesh.microbatches={asked} must be a multiple of stage={stages}, and divide "
            f"the batch of {rows} rows",
        )
        return asked
    own = per_stage // ways if per_stage % ways == 0 else per_stage
    return stages * max(n for n in range(1, PER_STAGE + 1) if own % n == 0)


def check_layers(num_layers: int, stages: int, rounds: int) -> None:
    """Raises `ConfigError` unless the layers divide over the stages and rounds."""
    check(
        num_layers % (stages * rounds) == 0,
        f"config.mesh.stage={stages} × rounds={rounds} must divide the {num_layers} layers that "
        "config.model.num_layers leaves to the pipeline",
    )


def pipeline(
    stage_fn: Callable[..., tuple[Any, Any]],
    stacked: Any,
    state: Any,
    along: Any,
    shared: Any,
    *,
    microbatches: int,
    rounds: int = 1,
    whole_axes: Sequence[str] = (),
    policy: Callable[..., bool] | None = None,
) -> tuple[Any, Any]:
    """`state` after all layers, which the axis `stage` of the mesh set by `jax.set_mesh` shares.

    Only that axis and `whole_axes` are split by hand, here; XLA splits over the others as it does
    elsewhere, and `stage_fn` may split over them by hand, in a `shard_map` of its own. The idle
    ticks work on rows that are waiting. Nothing of what they make is kept, nor of its gradient,
    were it infinite or NaN.

    Args:
      stage_fn: (layers, first, state, along, shared) → (state, statistics): applies some layers to
        one micro-batch. `layers` is `stacked` with fewer layers, `first` the index of the first
        of them (traced). Statistics are arrays [layers, …], or None.
      stacked: pytree of arrays [L, …], in the model's order. With `rounds` > 1 a step begins by
        exchanging blocks of layers between stages, and ends so with their gradients; the arrays
        themselves, and checkpoints of them, know nothing of the schedule.
      state: pytree of floating arrays [B, …] that every layer changes.
      along: pytree of arrays [B, …] that layers read and do not change, of any dtype; they travel
        with the rows they belong to.
      shared: pytree of arrays that is the same for all rows and layers.
      microbatches: M, a multiple of the stages.
      rounds: V, how often a micro-batch passes through the stages.
      whole_axes: mesh axes that split rows and no array of `stacked`. The gradient of the layers is
        added up over these once, at the end; over the others, which are left to XLA, at each tick.
        Left to XLA are also these where the rows do not divide over them.
      policy: what the backward pass keeps of a stage's work on a micro-batch (see
        `jax.checkpoint`); None: everything that it needs, but no copies of parameters.

    Returns:
      The new state, and the statistics [L, …], summed over micro-batches.

    Raises:
      ConfigError: the layers or the rows do not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    L, B = (jax.tree.leaves(tree)[0].shape[0] for tree in (stacked, state))
    ticks = _Ticks(mesh.shape[AXIS], microbatches, rounds)
    S, slots, block = ticks.stages, microbatches // ticks.stages, L // (ticks.stages * rounds)
    check_layers(L, S, rounds)
    choose_microbatches(microbatches, S, B)
    by_hand = tuple(axis for axis in whole_axes if mesh.shape[axis] > 1)
    if B % (microbatches * math.prod(mesh.shape[axis] for axis in by_hand)):
        by_hand = ()

    def run(own, turn, stage, works, state, along, shared):
        if rounds > 1:
            take = lambda x: jax.lax.dynamic_slice_in_dim(x, turn * block, block)  # noqa: E731
            own = jax.tree.map(take, own)
        first = turn * (L // rounds) + stage * block
        return stage_fn(_if(works, own), first, state, along, _if(works, shared))

    if policy is not None or rounds > 1:
        run = jax.checkpoint(run, policy=policy or _all_but_slices, prevent_cse=False)

    def on_one_stage(stage_1, own, state, along, shared):
        stage = stage_1[0]
        own = _interleaved(own, stage, S, rounds)
        stream = _split(_cut((state, along), slots))
        waiting = jax.tree.map(lambda x: jax.lax.stop_gradient(x[0]), stream)

        def tick(carry, t):
            stream, received = carry
            clock, last = t - stage, t - (S - 1)  # a stage starts so much later than the first
            turn, works = ticks.turn(clock), ticks.works(clock)
            enters = ticks.turn(t) == 0  # whether the first stage takes a new one
            slot = ticks.microbatch(t) % slots
            entering = _at(stream, slot)
            taken = _where((stage == 0) & enters, entering, received)
            state, along = _split(_where(works, taken, waiting), 0)
            state, statistics = run(own, turn, stage, works, state, along, shared)

            down = _shifted(entering, [(s + 1, s) for s in range(S - 1)])
            stream = _put(stream, _where(enters, down, entering), slot)
            slot = (ticks.microbatch(last) + S - 1) % slots
            leaves = (stage == S - 1) & ticks.works(last) & (ticks.turn(last) == rounds - 1)
            leaving = _where(leaves, state, _at(stream[0], slot))
            stream = _split((_put(stream[0], leaving, slot), stream[1]))
            onward = [(s, (s + 1) % S) for s in range(S if rounds > 1 else S - 1)]
            return (stream, _shifted((state, along), onward)), (statistics, turn, works)

        carry = stream, jax.tree.map(jnp.zeros_like, waiting)
        carry, (statistics, turns, worked) = jax.lax.scan(tick, carry, jnp.arange(ticks.number))

        def summed(x):  # [ticks, layers of a block, …] → [1, rounds, 1, layers of a block, …]
            mine = (turns == jnp.arange(rounds)[:, None]) & worked
            mine = mine.reshape(*mine.shape, *(1,) * (x.ndim - 1))
            return jnp.sum(jnp.where(mine, x, 0), 1)[None, :, None]

        ended = jax.tree.map(lambda x: jnp.roll(x, 1 - S, 0), carry[0][0])
        return _joined(ended), jax.tree.map(summed, statistics)

    # Not `axis_index`: beside axes left to XLA it would need an instruction that XLA lacks.
    stages = jnp.arange(S, dtype=jnp.int32)
    layers, rows = PartitionSpec(AXIS), PartitionSpec((AXIS, *by_hand))
    state, statistics = jax.shard_map(
        on_one_stage,
        in_specs=(layers, layers, rows, rows, PartitionSpec()),
        out_specs=(rows, PartitionSpec(by_hand or None, None, AXIS)),
        axis_names={AXIS, *by_hand},
        check_vma=False,
    )(stages, stacked, state, along, shared)
    # Not by a `psum` inside, whose gradient would be one more sum.
    return state, jax.tree.map(lambda x: jnp.sum(x, 0).reshape(L, *x.shape[4:]), statistics)


class _Ticks(NamedTuple):
    """What a stage does when, by its clock: the ticks since it could first have had work."""

    stages: int
    microbatches: int
    rounds: int

    @property
    def number(self) -> int:
        """Of ticks in all."""
        return self.rounds * self.microbatches + self.stages - 1

    def works(self, clock):
        """Whether it has work."""
        return (clock >= 0) & (clock < self.rounds * self.microbatches)

    def turn(self, clock):
        """The round that its micro-batch is in."""
        return clock // self.stages % self.rounds

    def microbatch(self, clock):
        """The number of its micro-batch: groups of one for each stage go all rounds together."""
        return clock // (self.stages * self.rounds) * self.stages + clock % self.stages


def _all_but_slices(primitive, *_, **__) -> bool:
    return primitive is not jax.lax.dynamic_slice_p


def _cut(tree, slots: int):
    """[rows, …] → [slots, rows / slots, …], every n-th row to one, so that each stays split."""

    def cut(x):
        return jnp.moveaxis(x.reshape(-1, slots, *x.shape[1:]), 1, 0)

    return jax.tree.map(cut, tree)


def _joined(tree):
    """The inverse of `_cut`."""

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])

    return jax.tree.map(join, tree)


def _split(tree, axis: int = 1):
    """The arrays of `tree`, rows along `axis`, split as a batch is over what is left to XLA."""
    mesh, names = automatic_axes()
    axes = tuple(name for name in BATCH_AXES if name in names and mesh.shape[name] > 1)
    ways = math.prod(mesh.shape[name] for name in axes)

    def split(x):
        if not axes or x.shape[axis] % ways:
            return x
        free = (PartitionSpec.UNCONSTRAINED,) * x.ndim
        spec = PartitionSpec(*free[:axis], axes, *free[axis + 1 :])
        return jax.lax.with_sharding_constraint(x, spec)

    return jax.tree.map(split, tree)


def _at(tree, slot):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, slot, 0, keepdims=False), tree)


def _put(tree, values, slot):
    def put(x, value):
        return jax.lax.dynamic_update_index_in_dim(x, value, slot, 0)

    return jax.tree.map(put, tree, values)


def _where(condition, yes, no):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


@jax.custom_vjp
def _if_works(x, works):
    return x


def _if_works_backward(works, gradient):
    return jnp.where(works, gradient, 0), None


_if_works.defvjp(lambda x, works: (x, works), _if_works_backward)


def _if(works, tree):
    """`tree`, whose gradient counts only if the stage works on something."""
    return jax.tree.map(
        lambda x: _if_works(x, works) if jnp.issubdtype(x.dtype, jnp.inexact) else x, tree
    )


def _shifted(tree, pairs):
    """What the stage that `pairs` names the source holds; zeros where there is none."""
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, pairs), tree)


def _interleaved(own, stage, stages: int, rounds: int):
    """The stage's layers for a circular schedule, of those it holds in the model's order.

    Both are V blocks a stage: of all S·V, the stage holds blocks stage·V … stage·V + V - 1 and
    works on blocks stage, stage + S, … In V exchanges every stage sends one block and gets one.
    """
    if rounds == 1:
        return own
    S, V = stages, rounds
    exchanges, sent, placed = [[] for _ in range(V)], np.zeros((V, S), int), np.zeros((V, S), int)
    for index in range(S * V):
        # V blocks that lie together, and V that lie S apart, each differ in this.
        exchange = (index + index // math.lcm(S, V)) % V
        source, target = index // V, index % S
        exchanges[exchange].append((source, target))
        sent[exchange, source], placed[exchange, target] = index % V, index // S

    def interleave(x):
        blocks = x.reshape(V, -1, *x.shape[1:])
        result = jnp.zeros_like(blocks)
        for exchange, pairs in enumerate(exchanges):
            piece = _shifted(_at(blocks, jnp.array(sent)[exchange, stage]), pairs)
            result = _put(result, piece, jnp.array(placed)[exchange, stage])
        return result.reshape(x.shape)

    return jax.tree.map(interleave, own)
