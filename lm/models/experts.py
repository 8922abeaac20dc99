"""Mixture of experts (Shazeer et al. 2017): each token visits a few of many MLPs.

A router scores the experts for every token; the token's output is the weighted sum of its best k.
There are two ways to share the work:

dropless (`capacity_factor` = 0; Gale et al. 2023). Tokens are sorted by expert, and every expert
takes all that chose it: a product whose rows fall into groups, each with a matrix of its own.

capacity (Lepikhin et al. 2021; Fedus et al. 2021). In each row of the batch an expert takes at most
⌈capacity_factor · T · k / E⌉ tokens; what finds no room passes by in the residual stream. Room goes
to earlier tokens first, and to a token's better choice first, so that no token changes what happens
to those before it; GShard's order, all first choices before any second, would. A row is a group of
its own, so that groups never wait for other devices. But a token may lose its place to another
document packed into its row, and the room depends on the row's length: cached decoding, whose rows
are one token long, drops nothing, and so may differ from the forward pass over the whole.

On a mesh, `batch` rows stay where they are, every device applies the experts (and the part of each
expert's hidden layer) it holds to its own tokens, and the parts are added: activations are not
split over the `expert` axis, so there is nothing to exchange but that sum.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

from lm.models.build import declare
from lm.models.config import ModelConfig
from lm.models.layers import MLP, activate, weight_initializer
from lm.models.numerics import cheap, contract
from lm.models.taps import Tap, within
from lm.parallel.sharding import ACTIVATION_RULES, PARAMETER_RULES, constrain, partition

BLOCK_ROWS = {"cpu": 128, "gpu": 512}  # of one expert multiplied at once, at most


class RouterStats(NamedTuple):
    """What routers did: float32 sums over tokens, which add up over layers and micro-batches.

    Divided by `tokens`, each is a mean over the tokens and layers that it was taken over. Balance
    and load are not sums over tokens by nature: they are taken per layer and micro-batch, then
    multiplied by the tokens there.
    """

    tokens: jax.Array  # tokens that are not padding
    balance: jax.Array  # tokens · E·Σ_e f_e·P_e (Fedus et al. 2021, eq. 4), f over all k choices
    z: jax.Array  # Σ logsumexp(logits)² (Zoph et al. 2022, eq. 5)
    dropped: jax.Array  # the share of a token's choices that found no room, summed
    max_load: jax.Array  # tokens · (the busiest expert's choices / an even share)


class Experts(nnx.Module):
    """The mixture of experts that stands in a block where an MLP would.

    Args:
      config: how many experts, how wide, how they are chosen.
    """

    def __init__(self, config: ModelConfig):
        D, E, F = config.width, config.num_experts, config.expert_feed_forward
        self.config = config
        self.router = declare((D, E), ("embed", None), weight_initializer(config, D, E))
        inward = weight_initializer(config, D, F)
        self.up = declare((E, D, F), ("expert", "embed", "mlp"), inward)
        self.gate = declare((E, D, F), ("expert", "embed", "mlp"), inward)
        outward = weight_initializer(config, F, D, residual=True)
        self.down = declare((E, F, D), ("expert", "mlp", "embed"), outward)
        if config.shared_experts:
            unbiased = dataclasses.replace(config, bias=False)
            self.shared = MLP(unbiased, hidden=config.shared_experts * F)

    def __call__(
        self, x_BTD: jax.Array, tap: Tap, valid_BT: jax.Array | None = None
    ) -> tuple[jax.Array, RouterStats]:
        """What the experts add to the residual stream, and what the router did.

        Args:
          x_BTD: the normalised residual stream, in the compute dtype.
          tap: sees `router` (logits [B, T, E]), `chosen` (experts [B, T, k], best first; E for
            padding), `weights` ([B, T, k]), `output`, and `shared.*`.
          valid_BT: false where a token is padding: it visits no expert but the shared ones, takes
            nobody's place and does not count.
        """
        config = self.config
        # The router is float32 throughout: rounding its logits changes which experts are chosen.
        logits_BTE = jnp.einsum(
            "btd,de->bte",
            x_BTD.astype(jnp.float32),
            self.router[...].astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        logits_BTE = tap("router", checkpoint_name(logits_BTE, "product"))
        scores_BTE = _scores(logits_BTE, config)
        chosen_BTk = _best(jax.lax.stop_gradient(scores_BTE), config.experts_per_token)
        if valid_BT is not None:
            chosen_BTk = jnp.where(valid_BT[..., None], chosen_BTk, config.num_experts)
        chosen_BTk = tap("chosen", chosen_BTk)
        # Compared rather than looked up: the gradient of a look-up is a scatter.
        hits_BTkE = chosen_BTk[..., None] == jnp.arange(config.num_experts)
        weights_BTk = jnp.sum(jnp.where(hits_BTkE, scores_BTE[..., None, :], 0), -1)
        if config.router_normalize:
            weights_BTk /= jnp.sum(weights_BTk, -1, keepdims=True) + 1e-20  # padding: all are zero
        weights_BTk = tap("weights", weights_BTk)

        out_BTD = self._dispatched(x_BTD, chosen_BTk, weights_BTk)
        if config.shared_experts:
            out_BTD += self.shared(x_BTD, within(tap, "shared"))
        out_BTD = constrain(out_BTD, "batch", "length", "embed")
        return tap("output", out_BTD), _stats(logits_BTE, scores_BTE, hits_BTkE, valid_BT, config)

    def _dispatched(self, x_BTD, chosen_BTk, weights_BTk):
        """The chosen experts' weighted sum, each device doing the share of the experts it holds."""
        config = self.config
        room = capacity(config, x_BTD.shape[1])
        apply = functools.partial(_apply, activation=config.activation, room=room)
        experts_E = jnp.arange(config.num_experts)
        matrices = (self.up[...], self.gate[...], self.down[...])
        mesh, names = _automatic_axes()
        if not names:
            out_1BTD = apply(experts_E, x_BTD, chosen_BTk, weights_BTk, *matrices)
            return out_1BTD[0].astype(x_BTD.dtype)
        # Capacity counts a whole row, which therefore must not be cut.
        length = None if room < x_BTD.shape[1] else "length"
        tokens = partition(("batch", length, None), x_BTD.shape, mesh, ACTIVATION_RULES)
        inward = partition(("expert", None, "mlp"), matrices[0].shape, mesh, PARAMETER_RULES)
        outward = PartitionSpec(inward[0], inward[2], None)
        parts = tuple(name for name in (inward[0], inward[2]) if name)
        out_PBTD = jax.shard_map(
            apply,
            in_specs=(PartitionSpec(inward[0]), tokens, tokens, tokens, inward, inward, outward),
            out_specs=PartitionSpec(parts or None, *tokens),
            axis_names=names,
            check_vma=False,
        )(experts_E, x_BTD, chosen_BTk, weights_BTk, *matrices)
        # Added here and not by a psum inside, whose gradient would be one more sum over devices.
        return jnp.sum(out_PBTD, 0).astype(x_BTD.dtype)


def _automatic_axes():
    """The mesh set by `jax.set_mesh`, and its axes that XLA splits arrays over, if any do."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types)
    names = {name for name, kind in kinds if kind is AxisType.Auto}
    return mesh, names if any(mesh.shape[name] > 1 for name in names) else set()


def _best(scores_BTE: jax.Array, k: int) -> jax.Array:
    """The experts with the k best scores [B, T, k], best first, each device for its own tokens."""

    def best(scores_BTE):
        return jax.lax.top_k(scores_BTE, k)[1]

    mesh, names = _automatic_axes()
    if not names:
        return best(scores_BTE)
    # Left to XLA, every device would choose for all tokens.
    tokens = partition(("batch", "length", None), scores_BTE.shape, mesh, ACTIVATION_RULES)
    return jax.shard_map(
        best, in_specs=tokens, out_specs=tokens, axis_names=names, check_vma=False
    )(scores_BTE)


def _scores(logits_BTE: jax.Array, config: ModelConfig) -> jax.Array:
    if config.router_score == "sigmoid":
        return jax.nn.sigmoid(logits_BTE)
    return jax.nn.softmax(logits_BTE, -1)


def capacity(config: ModelConfig, length: int) -> int:
    """How many tokens of a row of `length` an expert takes at most; `length` where all of them."""
    if not config.capacity_factor:
        return length
    room = config.capacity_factor * length * config.experts_per_token / config.num_experts
    return min(math.ceil(room), length)


def _stats(logits_BTE, scores_BTE, hits_BTkE, valid_BT, config: ModelConfig) -> RouterStats:
    B, T, E = logits_BTE.shape
    valid_BT = jnp.ones((B, T)) if valid_BT is None else valid_BT.astype(jnp.float32)
    tokens = jnp.sum(valid_BT)
    some = jnp.maximum(tokens, 1)
    counts_BE = jnp.sum(hits_BTkE, (1, 2), dtype=jnp.float32)
    frequency_E = jnp.sum(counts_BE, 0) / (some * config.experts_per_token)
    if config.router_score == "sigmoid":
        scores_BTE /= jnp.sum(scores_BTE, -1, keepdims=True) + 1e-20
    probability_E = jnp.einsum("bte,bt->e", scores_BTE, valid_BT, precision="highest") / some
    z = jnp.sum(valid_BT * jax.nn.logsumexp(logits_BTE, -1) ** 2)
    overflow_BE = jnp.maximum(counts_BE - capacity(config, T), 0)
    return RouterStats(
        tokens=tokens,
        balance=tokens * E * jnp.sum(frequency_E * probability_E),
        z=z,
        dropped=jnp.sum(overflow_BE) / config.experts_per_token,
        max_load=tokens * E * jnp.max(frequency_E),
    )


class _Plan(NamedTuple):
    """Where every choice of an expert goes: to one of R rows, sorted by expert, or to none.

    An index past the end stands for none, on either side.
    """

    choice_R: jax.Array  # the choice, t·k + j, that a row is for
    row_NK: jax.Array  # the row of each token's j-th choice
    sizes_E: jax.Array  # rows of each expert; with capacity, all have the same


def _apply(
    experts_E, x_BTD, chosen_BTk, weights_BTk, up_EDF, gate_EDF, down_EFD, *, activation, room
):
    """The weighted sum [1, B, T, D], float32, of those chosen experts that are among `experts_E`.

    `experts_E` are consecutive, and the matrices are theirs, or a slice of each along F. An expert
    takes at most `room` tokens of a row.
    """
    B, T, D = x_BTD.shape
    E, K = experts_E.size, chosen_BTk.shape[-1]
    chosen_BTk = chosen_BTk - experts_E[0]
    chosen_BTk = jnp.where((chosen_BTk >= 0) & (chosen_BTk < E), chosen_BTk, E)
    if room < T:
        plan = _plan_capacity(chosen_BTk, E, room)

        def product(rows_RD, w):
            out = contract("ecd,edf->ecf", rows_RD.reshape(E, -1, rows_RD.shape[-1]), w)
            return out.reshape(-1, w.shape[-1])
    else:
        block = 0 if _has_ragged_dot() else _block_rows(B * T * K, E)
        plan = _plan_dropless(chosen_BTk, E, block)

        def product(rows_RD, w):
            return grouped_contract(rows_RD, w, plan.sizes_E, block)

    # Named for remat policies, which would not keep a batched product.
    named = lambda rows, w: checkpoint_name(product(rows, w), "product")  # noqa: E731
    rows_RD = _to_rows(x_BTD.reshape(B * T, D), plan)
    hidden_RF = activate(activation, named(rows_RD, up_EDF), named(rows_RD, gate_EDF))
    weights_R = _weights_of_rows(weights_BTk.reshape(B * T, K), plan)
    out_RD = _weighted(named(hidden_RF, down_EFD), weights_R)
    return _from_rows(out_RD, plan).reshape(1, B, T, D)


def _sorted(chosen_GS, num_experts):
    """Of each group: its choices in order of expert, each choice's place there, experts' sizes."""
    order_GS = jnp.argsort(chosen_GS, -1, stable=True)
    place_GS = jax.vmap(
        lambda order: (
            jnp.zeros_like(order)
            .at[order]
            .set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
        )
    )(order_GS)
    sizes_GE = jnp.sum(chosen_GS[..., None] == jnp.arange(num_experts), 1, dtype=jnp.int32)
    return order_GS, place_GS, sizes_GE


def _plan_dropless(chosen_BTk, num_experts, spare_rows) -> _Plan:
    """One row for every choice, and some to spare; the whole batch is one group."""
    chosen_S = chosen_BTk.reshape(-1)
    (order_S,), (place_S,), (sizes_E,) = _sorted(chosen_S[None], num_experts)
    filled = jnp.arange(chosen_S.size) < jnp.sum(sizes_E)
    choice_R = jnp.where(filled, order_S, chosen_S.size)
    choice_R = jnp.pad(choice_R, (0, spare_rows), constant_values=chosen_S.size)
    row_S = jnp.where(chosen_S < num_experts, place_S, choice_R.size)
    return _Plan(choice_R, row_S.reshape(-1, chosen_BTk.shape[-1]), sizes_E)


def _plan_capacity(chosen_BTk, num_experts, capacity) -> _Plan:
    """`capacity` rows for every expert and row of the batch, in that order."""
    B, T, K = chosen_BTk.shape
    E, C = num_experts, capacity
    chosen_BS = chosen_BTk.reshape(B, T * K)
    order_BS, place_BS, sizes_BE = _sorted(chosen_BS, E)
    starts_BE = jnp.cumsum(sizes_BE, -1) - sizes_BE
    index_B = jnp.arange(B)[:, None]
    rank_BS = place_BS - jnp.take_along_axis(starts_BE, jnp.minimum(chosen_BS, E - 1), -1)
    kept_BS = (chosen_BS < E) & (rank_BS < C)
    row_BS = jnp.where(kept_BS, (chosen_BS * B + index_B) * C + rank_BS, E * B * C)
    place_BEC = starts_BE[..., None] + jnp.arange(C)
    choice_BEC = jnp.take_along_axis(
        order_BS, jnp.minimum(place_BEC, T * K - 1).reshape(B, E * C), -1
    ).reshape(B, E, C)
    taken_BEC = jnp.arange(C) < sizes_BE[..., None]
    choice_BEC = jnp.where(taken_BEC, choice_BEC + index_B[..., None] * T * K, B * T * K)
    choice_R = jnp.swapaxes(choice_BEC, 0, 1).reshape(-1)
    return _Plan(choice_R, row_BS.reshape(B * T, K), jnp.full((E,), B * C, jnp.int32))


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """`x[index]`, zeros where the index is past the end."""
    return x.at[index].get(mode="fill", fill_value=0)


# A choice has at most one row and a row at most one choice, so the gradient of each look-up below
# is another look-up. Autodiff would make it a scatter, row by row on the CPU.


@jax.custom_vjp
def _to_rows(x_ND: jax.Array, plan: _Plan) -> jax.Array:
    """The token of every row [R, D]."""
    return _take(x_ND, plan.choice_R // plan.row_NK.shape[1])


@jax.custom_vjp
def _from_rows(rows_RD: jax.Array, plan: _Plan) -> jax.Array:
    """The sum of every token's rows [N, D], float32."""
    # As a sum of look-ups XLA fuses it; over an axis of one look-up the CPU took 10 times as long.
    parts = (_take(rows_RD, row_N).astype(jnp.float32) for row_N in plan.row_NK.T)
    return functools.reduce(jnp.add, parts)


_to_rows.defvjp(
    lambda x_ND, plan: (_to_rows(x_ND, plan), plan),
    lambda plan, gradient: (_from_rows(gradient, plan).astype(gradient.dtype), None),
)
_from_rows.defvjp(
    lambda rows_RD, plan: (_from_rows(rows_RD, plan), (plan, rows_RD[:0])),
    lambda saved, gradient: (_to_rows(gradient, saved[0]).astype(saved[1].dtype), None),
)


@jax.custom_vjp
def _weights_of_rows(weights_NK: jax.Array, plan: _Plan) -> jax.Array:
    """The weight of the choice that each row is for [R]."""
    return _take(weights_NK.reshape(-1), plan.choice_R)


_weights_of_rows.defvjp(
    lambda weights_NK, plan: (_weights_of_rows(weights_NK, plan), plan),
    lambda plan, gradient_R: (_take(gradient_R, plan.row_NK), None),
)


@cheap
def _weighted(rows_RD: jax.Array, weights_R: jax.Array) -> jax.Array:
    return (rows_RD.astype(jnp.float32) * weights_R[:, None]).astype(rows_RD.dtype)


def _has_ragged_dot() -> bool:
    # Elsewhere XLA computes every row with every expert, in as many times the memory.
    return jax.default_backend() == "tpu"


def _block_rows(rows: int, experts: int) -> int:
    """Rows to a block: about an expert's share, so that few are multiplied in vain."""
    share = -(-rows // experts)
    most = BLOCK_ROWS.get(jax.default_backend(), BLOCK_ROWS["gpu"])
    return min(most, 1 << (share - 1).bit_length())


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_contract(
    x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, block: int
) -> jax.Array:
    """Row r of `x_RD` times the matrix of the group it is in, as `contract` multiplies.

    Args:
      x_RD: rows in order of their group, the first `sizes_E[0]` in group 0 and so on. At least
        `block` rows must follow that are in none; what comes out for those means nothing.
      w_EDF: float32 parameters, one matrix a group.
      sizes_E: rows of each group.
      block: rows of a group multiplied at once, in a loop over the blocks that have any; the
        matrices of empty groups are not read. 0: one `jax.lax.ragged_dot`.

    Returns:
      [R, F] in x's dtype.
    """
    return _grouped("rd,df->rf", x_RD, w_EDF, sizes_E, block)


def _grouped_forward(x_RD, w_EDF, sizes_E, block):
    return grouped_contract(x_RD, w_EDF, sizes_E, block), (x_RD, w_EDF, sizes_E)


def _grouped_backward(block, saved, gradient_RF):
    x_RD, w_EDF, sizes_E = saved
    dx_RD = _grouped("rf,df->rd", gradient_RF, w_EDF, sizes_E, block)
    dw_EDF = _grouped_outer(x_RD, gradient_RF, sizes_E, block)
    return dx_RD, dw_EDF.astype(w_EDF.dtype), None


grouped_contract.defvjp(_grouped_forward, _grouped_backward)


def _grouped(spec, x, w, sizes_E, block):
    """`spec` of every group's rows of `x` and its matrix of `w`."""
    transposed = spec == "rf,df->rd"
    if not block:
        w = (jnp.swapaxes(w, 1, 2) if transposed else w).astype(x.dtype)
        product = jax.lax.ragged_dot(x, w, sizes_E, preferred_element_type=jnp.float32)
        return product.astype(x.dtype)

    # A block may reach into the next group, whose own blocks come later and write over it.
    def step(index, out):
        group, start, _ = at(index)
        rows = jax.lax.dynamic_slice_in_dim(x, start, block)
        matrix = jax.lax.dynamic_index_in_dim(w, group, 0, keepdims=False).astype(x.dtype)
        product = jnp.einsum(spec, rows, matrix, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(out, product.astype(x.dtype), start, 0)

    count, at = _blocks(sizes_E, block)
    out = jnp.zeros((x.shape[0], w.shape[1 if transposed else 2]), x.dtype)
    return jax.lax.fori_loop(0, count, step, out)


def _grouped_outer(x_RD, y_RF, sizes_E, block):
    """Of every group, the product [D, F] of its rows of `x` and `y`, in float32: [E, D, F]."""
    if not block:
        return jax.lax.ragged_dot_general(
            x_RD,
            y_RF,
            sizes_E,
            jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], []),
            preferred_element_type=jnp.float32,
        )

    def step(index, sums_EDF):
        group, start, end = at(index)
        x = jax.lax.dynamic_slice_in_dim(x_RD, start, block)
        y = jax.lax.dynamic_slice_in_dim(y_RF, start, block)
        y = jnp.where((start + jnp.arange(block) < end)[:, None], y, 0)
        product = jnp.einsum("rd,rf->df", x, y, preferred_element_type=jnp.float32)
        product += jax.lax.dynamic_index_in_dim(sums_EDF, group, 0, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(sums_EDF, product, group, 0)

    count, at = _blocks(sizes_E, block)
    shape = (sizes_E.size, x_RD.shape[1], y_RF.shape[1])
    return jax.lax.fori_loop(0, count, step, jnp.zeros(shape, jnp.float32))


def _blocks(sizes_E, block):
    """How many blocks cover all groups, and a function: index → (group, first row, group's end)."""
    blocks_E = -(-sizes_E // block)
    last_E = jnp.cumsum(blocks_E)
    end_E = jnp.cumsum(sizes_E)

    def at(index):
        group = jnp.sum(last_E <= index)
        nth = index - (last_E[group] - blocks_E[group])
        return group, end_E[group] - sizes_E[group] + nth * block, end_E[group]

    return last_E[-1], at
