"""How tokens reach their experts: into rows sorted by expert, and to the devices that hold them.

A token's choice of an expert becomes a row; a plan says where every row comes from, and is its own
inverse: look-ups both ways, and no scatter. On a mesh that splits experts over an axis, the rows of
the batch are split over it too, so rows travel by all-to-all, are multiplied where their experts
are, and travel back (Lepikhin et al. 2021).

With capacity every expert has as much room for every row of the batch, so the buffers that travel
are full by design. Without (`by_turns`) any number of a device's choices, even all, may lie on one
other device, and buffers of fixed size for the worst case would be W times those of an even load
over W devices. Instead a buffer has room for a little more than an even share, and what is left
over travels in further, smaller turns, as many as the fullest queue needs: routing decides how long
it takes, never what comes out, nor how much memory it takes. The first turn's products are kept for
the backward pass as any layer's; later turns, rare when experts are balanced, are computed again.

Compiled for v5p:2x2x2 (a layer of Mixtral 8×7B and its gradient in bfloat16, an expert and 4,096
tokens a device): 2.3 GB of temporaries a device, 5.5 GB if one turn had room for the worst case,
1.4 GB with a capacity factor of 1.25. `jax.lax.ragged_all_to_all` would not send the spare room,
but XLA copies what it sends and what it receives into another layout, and its buffer must hold the
worst case all the same, or take turns.

A token that chose two experts of one device travels twice: sending it once would save bytes but
room for its rows would have to be kept for the worst case on the device that receives it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.parallel.platform import platform

SPARE = 1.25  # room in the first turn's buffers, of an even share of the choices
LEAST_ROOM = 64  # rows to another device that are not worth a second turn

# (tokens [N, D], their experts [N, k], weights [N, k], matrices) → sum over the experts [N, D].
Visit = Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]


class Plan(NamedTuple):
    """Where every choice of an expert goes: to one of R rows, sorted by expert, or to none.

    An index past the end stands for none, on either side.
    """

    choice_R: jax.Array  # the choice, n·k + j, that a row is for
    row_Nk: jax.Array  # the row of each token's j-th choice


class _Sorted(NamedTuple):
    """The choices of each of G groups, in order of where they go."""

    target_GS: jax.Array  # where each choice goes: one of E targets, or E for nowhere
    order_GS: jax.Array  # the choices in that order
    place_GS: jax.Array  # each choice's place in it
    sizes_GE: jax.Array  # how many go to each


def _sort(target_GS: jax.Array, targets: int) -> _Sorted:
    order_GS = jnp.argsort(target_GS, -1, stable=True)
    place_GS = jax.vmap(
        lambda order: (
            jnp.zeros_like(order)
            .at[order]
            .set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
        )
    )(order_GS)
    sizes_GE = jnp.sum(target_GS[..., None] == jnp.arange(targets), 1, dtype=jnp.int32)
    return _Sorted(target_GS, order_GS, place_GS, sizes_GE)


def plan_all(chosen_Nk: jax.Array, num_experts: int, spare_rows: int) -> tuple[Plan, jax.Array]:
    """One row for every choice, then rows to spare; and how many rows each expert has.

    Args:
      chosen_Nk: experts; `num_experts` for none.
      num_experts: E.
      spare_rows: how many rows, at least, stay empty at the end.
    """
    chosen_S = chosen_Nk.reshape(-1)
    _, (order_S,), (place_S,), (sizes_E,) = _sort(chosen_S[None], num_experts)
    filled = jnp.arange(chosen_S.size) < jnp.sum(sizes_E)
    choice_R = jnp.where(filled, order_S, chosen_S.size)
    choice_R = jnp.pad(choice_R, (0, spare_rows), constant_values=chosen_S.size)
    row_S = jnp.where(chosen_S < num_experts, place_S, choice_R.size)
    return Plan(choice_R, row_S.reshape(chosen_Nk.shape)), sizes_E


def plan_capacity(chosen_BTk: jax.Array, num_experts: int, room: int) -> Plan:
    """`room` rows for every expert and row of the batch, in that order."""
    B, T, k = chosen_BTk.shape
    return _plan_rooms(_sort(chosen_BTk.reshape(B, T * k), num_experts), k, room)


def _plan_rooms(choices: _Sorted, k: int, room: int, begin: jax.Array | int = 0) -> Plan:
    """`room` rows for every target and group: of its choices, from number `begin` on."""
    target_GS, order_GS, place_GS, sizes_GE = choices
    (G, S), E, C = target_GS.shape, sizes_GE.shape[1], room
    starts_GE = jnp.cumsum(sizes_GE, -1) - sizes_GE + begin
    index_G = jnp.arange(G)[:, None]
    rank_GS = place_GS - jnp.take_along_axis(starts_GE, jnp.minimum(target_GS, E - 1), -1)
    kept_GS = (target_GS < E) & (rank_GS >= 0) & (rank_GS < C)
    row_GS = jnp.where(kept_GS, (target_GS * G + index_G) * C + rank_GS, E * G * C)
    place_GEC = starts_GE[..., None] + jnp.arange(C)
    choice_GEC = jnp.take_along_axis(
        order_GS, jnp.minimum(place_GEC, S - 1).reshape(G, E * C), -1
    ).reshape(G, E, C)
    taken_GEC = begin + jnp.arange(C) < sizes_GE[..., None]
    choice_GEC = jnp.where(taken_GEC, choice_GEC + index_G[..., None] * S, G * S)
    return Plan(jnp.swapaxes(choice_GEC, 0, 1).reshape(-1), row_GS.reshape(-1, k))


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """`x[index]`, zeros where the index is past the end."""
    rows, *rest = x.shape
    if rest and rest[0] % 128 == 0 and platform() == "tpu":
        # A row in tiles of its own, not shared with its neighbours: by XLA's estimate this takes
        # half as long to look up and, with a matrix, a fifth as long to compile.
        x = x.reshape(rows, -1, 128)
    return x.at[index].get(mode="fill", fill_value=0).reshape(*index.shape, *rest)


# A choice has at most one row and a row at most one choice, so the gradient of each look-up below
# is another look-up. Autodiff would make it a scatter, row by row on the CPU.


@jax.custom_vjp
def to_rows(x_ND: jax.Array, plan: Plan) -> jax.Array:
    """The token of every row [R, D]."""
    return _take(x_ND, plan.choice_R // plan.row_Nk.shape[1])


@jax.custom_vjp
def from_rows(rows_RD: jax.Array, plan: Plan) -> jax.Array:
    """The sum of every token's rows [N, D], float32."""
    # As a sum of look-ups XLA fuses it; over an axis of one look-up the CPU took 10 times as long.
    parts = (_take(rows_RD, row_N).astype(jnp.float32) for row_N in plan.row_Nk.T)
    return functools.reduce(jnp.add, parts)


to_rows.defvjp(
    lambda x_ND, plan: (to_rows(x_ND, plan), plan),
    lambda plan, gradient: (from_rows(gradient, plan).astype(gradient.dtype), None),
)
from_rows.defvjp(
    lambda rows_RD, plan: (from_rows(rows_RD, plan), (plan, rows_RD[:0])),
    lambda saved, gradient: (to_rows(gradient, saved[0]).astype(saved[1].dtype), None),
)


@jax.custom_vjp
def weights_of_rows(weights_Nk: jax.Array, plan: Plan) -> jax.Array:
    """The weight of the choice that each row is for [R]."""
    return _take(weights_Nk.reshape(-1), plan.choice_R)


weights_of_rows.defvjp(
    lambda weights_Nk, plan: (weights_of_rows(weights_Nk, plan), plan),
    lambda plan, gradient_R: (_take(gradient_R, plan.row_Nk), None),
)


def swap(x: jax.Array, axis: str, split: int = 0, join: int = 0) -> jax.Array:
    """Part i of `x` along `split` goes to device i of the mesh axis, which joins what it gets."""
    return jax.lax.all_to_all(x, axis, split, join, tiled=True)


class _Queues(NamedTuple):
    """Who sends how much to whom over an axis of W devices."""

    choices: _Sorted  # by device, and by expert there
    received_WE: jax.Array  # from each device, for each of the experts here


def rooms(tokens: int, k: int, experts: int, ways: int) -> tuple[int, int]:
    """The rows that one device sends another in the first turn, and in each later one.

    Of `ways` devices with so many tokens and experts each, where a token chooses k of all experts.
    """
    even = -(-tokens * k // ways)
    first = max(-(-int(SPARE * even) // 8) * 8, LEAST_ROOM)
    return min(first, tokens * min(k, experts)), -(-first // 32) * 8


def by_turns(
    visit: Visit, x_ND, chosen_Nk, weights_Nk, matrices, *, experts: int, axis: str
) -> jax.Array:
    """What `visit` returns for every token here and all of its experts [N, D], float32.

    Args:
      visit: applies the experts here, of which there are `experts`, numbered from 0, to tokens.
      x_ND, chosen_Nk, weights_Nk: the tokens here; `chosen_Nk` is one past the last for none.
      matrices: of the experts here, as `visit` takes them.
      experts: how many are here; in all as many times more as there are devices.
      axis: of the mesh, manual here, that splits both tokens and experts.
    """
    N, k = chosen_Nk.shape
    ways = jax.lax.axis_size(axis)
    by_expert = _sort(chosen_Nk.reshape(1, -1), ways * experts)
    sent_WE = by_expert.sizes_GE.reshape(ways, experts)
    queues = _Queues(
        by_expert._replace(
            target_GS=by_expert.target_GS // experts, sizes_GE=jnp.sum(sent_WE, 1)[None]
        ),
        swap(sent_WE, axis),
    )
    first, later = rooms(N, k, experts, ways)
    turn = functools.partial(_turn, visit, axis)
    values = (x_ND, weights_Nk, matrices)
    if first == N * min(k, experts):
        return turn((0, first), 0, queues, values)
    left = jax.lax.pmax(jnp.max(queues.choices.sizes_GE), axis) - first
    turns = jnp.maximum(-(-left // later), 0)
    out_ND, values = _later(functools.partial(turn, (first, later)), turns, queues, values)
    return out_ND + turn((0, first), 0, queues, values)


def _turn(visit, axis, window, index, queues: _Queues, values) -> jax.Array:
    """The part of `by_turns` for the choices of one turn.

    `window`: which of every queue's choices are turn 0's, and how many; the next turn's follow.
    """
    x_ND, weights_Nk, matrices = values
    start, room = window
    begin = start + index * room
    plan = _plan_rooms(queues.choices, weights_Nk.shape[1], room, begin)
    # What comes is in order of expert too, so that the sizes say which row is for which.
    ends_WE = jnp.cumsum(queues.received_WE, 1)
    expert_WC = jnp.sum(ends_WE[:, None] <= begin + jnp.arange(room)[:, None], -1)
    rows_RD = swap(to_rows(x_ND, plan), axis)
    weights_R = swap(weights_of_rows(weights_Nk, plan), axis)
    out_RD = visit(rows_RD, expert_WC.reshape(-1, 1), weights_R[:, None], matrices)
    return from_rows(swap(out_RD.astype(x_ND.dtype), axis), plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _later(turn, turns: jax.Array, queues: _Queues, values):
    """The sum of so many turns, and `values` as they are.

    Who goes on with those hands their gradients back through here, where every turn adds its own:
    there is no second set of gradients, which are as large as the matrices.
    """
    zeros_ND = jnp.zeros(values[0].shape, jnp.float32)
    out_ND = jax.lax.fori_loop(
        0, turns, lambda index, out_ND: out_ND + turn(index, queues, values), zeros_ND
    )
    return out_ND, values


def _later_forward(turn, turns, queues, values):
    out_ND, _ = _later(turn, turns, queues, values)
    # The very values, so that ZeRO's matrices are gathered again and not kept.
    return (out_ND, values), (turns, queues, values)


def _later_backward(turn, saved, gradients):
    turns, queues, values = saved
    gradient_ND, sums = gradients

    def step(index, sums):
        _, pull = jax.vjp(lambda values: turn(index, queues, values), values)
        return jax.tree.map(jnp.add, sums, *pull(gradient_ND))

    return None, None, jax.lax.fori_loop(0, turns, step, sums)


_later.defvjp(_later_forward, _later_backward)
