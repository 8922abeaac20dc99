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

On a mesh, the rows of a batch are split over `expert` as over `data`, and tokens travel to their
experts and back by all-to-all (`lm.models.moe.dispatch`). Where the rows do not divide, as in
decoding, every device applies the experts it holds to all of its tokens and the parts are added;
where the experts do not, every device holds all of them. The part of each expert's hidden layer
that `tensor` leaves a device is a part of a sum, too.
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
from jax.sharding import PartitionSpec

from lm.models import quantized
from lm.models.config import ModelConfig
from lm.models.hooks import Tap, within
from lm.models.layers import MLP, activate, weight_initializer
from lm.models.matmul import cheap, contract
from lm.models.moe.dispatch import (
    by_turns,
    from_rows,
    plan_all,
    plan_capacity,
    swap,
    to_rows,
    weights_of_rows,
)
from lm.models.params import declare
from lm.parallel.platform import platform
from lm.parallel.reduce import axes_of
from lm.parallel.sharding import (
    ACTIVATION_RULES,
    PARAMETER_RULES,
    automatic_axes,
    constrain,
    partition,
)

BLOCK_ROWS = {"cpu": 128, "gpu": 512}  # of one expert multiplied at once, at most


class RouterStats(NamedTuple):
    """What routers did: float32 sums over tokens, so that those of a batch's parts add up to its.

    Of one router, or of several along leading axes.
    """

    tokens: jax.Array  # tokens that are not padding
    chosen_E: jax.Array  # how often each expert was chosen
    probability_E: jax.Array  # Σ of its scores, each token's adding up to one
    z: jax.Array  # Σ logsumexp(logits)² (Zoph et al. 2022, eq. 5)
    dropped: jax.Array  # the share of a token's choices that found no room, summed

    @property
    def balance(self) -> jax.Array:
        """tokens · E·Σ_e f_e·P_e (Fedus et al. 2021, eq. 4), f over all k choices."""
        probability_E = self.probability_E / jnp.maximum(self.tokens, 1)[..., None]
        experts = probability_E.shape[-1]
        return self.tokens * experts * jnp.sum(self._frequency_E * probability_E, -1)

    @property
    def max_load(self) -> jax.Array:
        """tokens · (the busiest expert's choices / an even share)."""
        return self.tokens * self.chosen_E.shape[-1] * jnp.max(self._frequency_E, -1)

    @property
    def _frequency_E(self) -> jax.Array:
        return self.chosen_E / jnp.maximum(jnp.sum(self.chosen_E, -1, keepdims=True), 1)


class Experts(nnx.Module):
    """The mixture of experts that stands in a block where an MLP would."""

    def __init__(self, config: ModelConfig):
        D, E, F = config.width, config.num_experts, config.expert_feed_forward
        self.config = config
        self.router = declare((D, E), ("embed", None), weight_initializer(config, D, E))
        if config.router_bias:
            self.correction_bias = declare((E,), (None,), jax.nn.initializers.zeros)
        inward = weight_initializer(config, D, F)
        self.up = declare((E, D, F), ("expert", "embed", "mlp"), inward)
        self.gate = declare((E, D, F), ("expert", "embed", "mlp"), inward)
        outward = weight_initializer(config, F, D, residual=True)
        self.down = declare((E, F, D), ("expert", "mlp", "embed"), outward)
        if config.expert_bias:
            zeros = jax.nn.initializers.zeros
            self.router_logit_bias = declare((E,), (None,), zeros)
            self.up_bias = declare((E, F), ("expert", "mlp"), zeros)
            self.gate_bias = declare((E, F), ("expert", "mlp"), zeros)
            self.down_bias = declare((E, D), ("expert", "embed"), zeros)
        if config.shared_experts:
            unbiased = dataclasses.replace(config, bias=False)
            self.shared = MLP(unbiased, hidden=config.shared_experts * F)

    def __call__(
        self, x_BTD: jax.Array, tap: Tap, valid_BT: jax.Array | None = None
    ) -> tuple[jax.Array, RouterStats]:
        """What the experts add to the residual stream, and what the router did.

        Args:
          tap: sees `router` (logits [B, T, E]), `chosen` (experts [B, T, k], best first; E for
            padding), `weights` ([B, T, k]), `output`, and `shared.*`.
          valid_BT: false where a token is padding: it visits no expert but the shared ones, takes
            nobody's place and does not count.
        """
        config = self.config
        # The router is float32 throughout: rounding its logits changes which experts are chosen.
        # It is small: where ZeRO splits it, gathering it is cheaper than passing sums around.
        router_DE = constrain(self.router[...].astype(jnp.float32), None, None)
        logits_BTE = jnp.einsum(
            "btd,de->bte",
            x_BTD.astype(jnp.float32),
            router_DE,
            precision=jax.lax.Precision.HIGHEST,
        )
        if config.expert_bias:
            logits_BTE += self.router_logit_bias[...]
        logits_BTE = tap("router", checkpoint_name(logits_BTE, "product"))
        sigmoid = config.router_score == "sigmoid"
        scores_BTE = jax.nn.sigmoid(logits_BTE) if sigmoid else jax.nn.softmax(logits_BTE, -1)
        bias_E = self.correction_bias[...] if config.router_bias else None
        chosen_BTk = _best(*jax.lax.stop_gradient((scores_BTE, bias_E)), config)
        if valid_BT is not None:
            chosen_BTk = jnp.where(valid_BT[..., None], chosen_BTk, config.num_experts)
        chosen_BTk = tap("chosen", chosen_BTk)
        # Compared rather than looked up: the gradient of a look-up is a scatter.
        hits_BTkE = chosen_BTk[..., None] == jnp.arange(config.num_experts)
        weights_BTk = jnp.sum(jnp.where(hits_BTkE, scores_BTE[..., None, :], 0), -1)
        if config.router_normalize:
            weights_BTk /= jnp.sum(weights_BTk, -1, keepdims=True) + 1e-20  # padding: all are zero
        if config.router_scale != 1:
            weights_BTk *= config.router_scale
        weights_BTk = tap("weights", weights_BTk)

        out_BTD = self._dispatched(x_BTD, chosen_BTk, weights_BTk)
        if config.shared_experts:
            out_BTD += self.shared(x_BTD, within(tap, "shared"))
        out_BTD = constrain(out_BTD, "batch", "norm_length", "embed")
        return tap("output", out_BTD), _stats(logits_BTE, scores_BTE, hits_BTkE, valid_BT, config)

    def _dispatched(self, x_BTD, chosen_BTk, weights_BTk):
        """The chosen experts' weighted sum, each device doing the share of the experts it holds."""
        config = self.config
        room = capacity(config, x_BTD.shape[1])
        apply = functools.partial(_apply, config=config, room=room)
        experts_E = jnp.arange(config.num_experts)
        matrices = (self.up[...], self.gate[...], self.down[...])
        if config.expert_bias:
            matrices += (self.up_bias[...], self.gate_bias[...], self.down_bias[...])
        mesh, names = automatic_axes()
        if not names:
            return apply(experts_E, x_BTD, chosen_BTk, weights_BTk, matrices)[0]
        # Capacity counts a whole row, which therefore must not be cut.
        length = None if room < x_BTD.shape[1] else "length"
        tokens = partition(("batch", length, None), x_BTD.shape, mesh, ACTIVATION_RULES)
        inward = partition(("expert", None, "mlp"), matrices[0].shape, mesh, PARAMETER_RULES)
        outward = PartitionSpec(inward[0], inward[2], None)
        specs = (inward, inward, outward)
        if config.expert_bias:
            specs += (PartitionSpec(inward[0], inward[2]),) * 2 + (PartitionSpec(inward[0], None),)
        axis = inward[0] if inward[0] in axes_of(tokens[0]) else None
        # Where tokens do not travel, those who hold other experts have other parts of the sum.
        parts = tuple(name for name in (inward[0], inward[2]) if name and name != axis)
        out_PBTD = jax.shard_map(
            functools.partial(apply, axis=axis, shared_by=inward[2]),
            in_specs=(PartitionSpec(inward[0]), tokens, tokens, tokens, specs),
            out_specs=PartitionSpec(parts or None, *tokens),
            axis_names=names,
            check_vma=False,
        )(experts_E, x_BTD, chosen_BTk, weights_BTk, matrices)
        # Added here and not by a psum inside, whose gradient would be one more sum over devices,
        # and so that XLA scatters the sum where the residual stream's tokens are split. In the
        # compute dtype, as XLA adds the parts of a dense layer: half the bytes.
        return jax.lax.reduce_sum(out_PBTD, (0,))


def _apply(
    experts_E, x_BTD, chosen_BTk, weights_BTk, matrices, *, config, room, axis=None, shared_by=None
):
    """The weighted sum [1, B, T, D] of the chosen experts.

    Of those that are among `experts_E`, which are consecutive and which the matrices are of; or of
    all, where a mesh `axis` splits both tokens and experts. An expert takes at most `room` tokens
    of a row. Where each expert is `shared_by` the devices of a mesh axis, theirs are parts of it.
    """
    if shared_by and config.expert_bias:  # the last is added once, by the first of them
        first = jax.lax.axis_index(shared_by) == 0
        matrices = (*matrices[:-1], jnp.where(first, matrices[-1], 0))
    B, T, D = x_BTD.shape
    E, k = experts_E.size, chosen_BTk.shape[-1]
    if not axis:
        chosen_BTk = chosen_BTk - experts_E[0]
        chosen_BTk = jnp.where((chosen_BTk >= 0) & (chosen_BTk < E), chosen_BTk, E)
    if room < T:
        out_ND = _visit_with_room(x_BTD, chosen_BTk, weights_BTk, matrices, config, room, axis)
    else:
        visit = functools.partial(_visit, config=config)
        tokens = (x_BTD.reshape(-1, D), chosen_BTk.reshape(-1, k), weights_BTk.reshape(-1, k))
        if axis:
            out_ND = by_turns(visit, *tokens, matrices, experts=E, axis=axis)
        else:
            out_ND = visit(*tokens, matrices)
    return out_ND.reshape(1, B, T, D).astype(x_BTD.dtype)


def _best(scores_BTE: jax.Array, bias_E: jax.Array | None, config: ModelConfig) -> jax.Array:
    """The experts of each token [B, T, k], best first, each device for its own tokens."""
    if bias_E is not None:
        scores_BTE += bias_E

    def best(scores_BTE):
        if config.router_group_limit < config.router_groups:
            scores_BTE = _of_best_groups(scores_BTE, config)
        return jax.lax.top_k(scores_BTE, config.experts_per_token)[1]

    mesh, names = automatic_axes()
    if not names:
        return best(scores_BTE)
    # Left to XLA, every device would choose for all tokens.
    tokens = partition(("batch", "length", None), scores_BTE.shape, mesh, ACTIVATION_RULES)
    return jax.shard_map(
        best, in_specs=tokens, out_specs=tokens, axis_names=names, check_vma=False
    )(scores_BTE)


def _of_best_groups(scores_BTE: jax.Array, config: ModelConfig) -> jax.Array:
    """The scores, -inf where an expert's group is not one of the token's best."""
    groups = config.router_groups
    scores_BTgx = scores_BTE.reshape(*scores_BTE.shape[:-1], groups, -1)
    sums_BTg = jax.lax.top_k(scores_BTgx, config.router_group_best)[0].sum(-1)
    chosen_BTl = jax.lax.top_k(sums_BTg, config.router_group_limit)[1]
    kept_BTg = (chosen_BTl[..., None] == jnp.arange(groups)).any(-2)
    return jnp.where(kept_BTg[..., None], scores_BTgx, -jnp.inf).reshape(scores_BTE.shape)


def capacity(config: ModelConfig, length: int) -> int:
    """How many tokens of a row of `length` an expert takes at most; `length` where all of them."""
    if not config.capacity_factor:
        return length
    room = config.capacity_factor * length * config.experts_per_token / config.num_experts
    return min(math.ceil(room), length)


def _stats(logits_BTE, scores_BTE, hits_BTkE, valid_BT, config: ModelConfig) -> RouterStats:
    B, T, _ = logits_BTE.shape
    valid_BT = jnp.ones((B, T)) if valid_BT is None else valid_BT.astype(jnp.float32)
    counts_BE = jnp.sum(hits_BTkE, (1, 2), dtype=jnp.float32)
    if config.router_score == "sigmoid":
        scores_BTE /= jnp.sum(scores_BTE, -1, keepdims=True) + 1e-20
    overflow_BE = jnp.maximum(counts_BE - capacity(config, T), 0)
    return RouterStats(
        tokens=jnp.sum(valid_BT),
        chosen_E=jnp.sum(counts_BE, 0),
        probability_E=jnp.einsum("bte,bt->e", scores_BTE, valid_BT, precision="highest"),
        z=jnp.sum(valid_BT * jax.nn.logsumexp(logits_BTE, -1) ** 2),
        dropped=jnp.sum(overflow_BE) / config.experts_per_token,
    )


def _visit(x_ND, chosen_Nk, weights_Nk, matrices, *, config: ModelConfig) -> jax.Array:
    """The weighted sum [N, D], float32, of those of each token's experts that `matrices` are of.

    An expert takes all that chose it. The matrices, and biases after them if there are any, may be
    a slice of each along F.
    """
    E = matrices[0].shape[0]
    block = 0 if _has_ragged_dot() else _block_rows(chosen_Nk.size, E)
    plan, sizes_E = plan_all(chosen_Nk, E, block)
    rows_RD, weights_R = to_rows(x_ND, plan), weights_of_rows(weights_Nk, plan)
    product = functools.partial(
        grouped_contract, sizes_E=sizes_E, block=block, quantization=config.quantization
    )

    def bias(bias_EN, weights_R=None):
        """Of every row's expert, times a weight; as a product, whose gradient is one, too."""
        row_R1 = jnp.arange(rows_RD.shape[0])[:, None]
        ends_E = jnp.cumsum(sizes_E)
        ours_RE = (row_R1 < ends_E) & (row_R1 >= ends_E - sizes_E)
        weights_R1 = 1.0 if weights_R is None else weights_R[:, None]
        return contract("re,en->rn", (ours_RE * weights_R1).astype(rows_RD.dtype), bias_EN)

    return from_rows(_mlp(product, bias, config, rows_RD, weights_R, matrices), plan)


def _visit_with_room(x_BTD, chosen_BTk, weights_BTk, matrices, config, room: int, axis):
    """As `_visit`, but an expert takes at most `room` tokens of a row.

    With a mesh `axis` that splits both tokens and experts, of all experts: tokens travel over it.
    """
    D, k = x_BTD.shape[-1], chosen_BTk.shape[-1]
    E = matrices[0].shape[0] * (jax.lax.axis_size(axis) if axis else 1)
    plan = plan_capacity(chosen_BTk, E, room)
    rows_ERD = to_rows(x_BTD.reshape(-1, D), plan).reshape(E, -1, D)
    weights_ER = weights_of_rows(weights_BTk.reshape(-1, k), plan).reshape(E, -1)
    if axis:
        rows_ERD, weights_ER = swap(rows_ERD, axis, 0, 1), swap(weights_ER, axis, 0, 1)
    product = functools.partial(contract, "erd,edf->erf", quantization=config.quantization)

    def bias(bias_EN, weights_ER=None):
        bias_E1N = bias_EN[:, None]
        weighted = bias_E1N if weights_ER is None else bias_E1N * weights_ER[..., None]
        return weighted.astype(rows_ERD.dtype)

    out_ERD = _mlp(product, bias, config, rows_ERD, weights_ER, matrices)
    if axis:
        out_ERD = swap(out_ERD, axis, 1, 0)
    return from_rows(out_ERD.reshape(-1, D), plan)


def _mlp(product, bias, config: ModelConfig, rows, weights, matrices) -> jax.Array:
    """Every row through its expert, and times its weight.

    The weight multiplies the hidden layer, so that its gradient needs no output of the expert, and
    the last bias.

    Args:
      product: (rows, one matrix an expert) → every row times its expert's.
      bias: (one vector an expert, weights of the rows or none) → what it adds to every row.
      config, rows, weights: what experts are, and what goes through them.
      matrices: up, gate and down, then their biases if they have any.
    """
    up, gate, down, *biases = matrices

    def named(rows, w):  # for remat policies, which would not keep a batched product
        return checkpoint_name(product(rows, w), "product")

    @cheap
    def hidden(up, gate, weights):
        activated = activate(config.activation, up, gate, config.activation_limit)
        return (activated.astype(jnp.float32) * weights[..., None]).astype(activated.dtype)

    up, gate = named(rows, up), named(rows, gate)
    if biases:
        up, gate = up + bias(biases[0]), gate + bias(biases[1])
    out = named(hidden(up, gate, weights), down)
    return out + bias(biases[2], weights) if biases else out


def _has_ragged_dot() -> bool:
    # Elsewhere XLA computes every row with every expert, in as many times the memory.
    return platform() == "tpu"


def _block_rows(rows: int, experts: int) -> int:
    """Rows to a block: about an expert's share, so that few are multiplied in vain."""
    share = -(-rows // experts)
    most = BLOCK_ROWS.get(platform(), BLOCK_ROWS["gpu"])
    return min(most, 1 << (share - 1).bit_length())


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_contract(
    x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, block: int, quantization: str = "none"
) -> jax.Array:
    """Row r of `x_RD` times the matrix of the group it is in, as `contract` multiplies.

    Args:
      x_RD: rows in order of their group, the first `sizes_E[0]` in group 0 and so on. At least
        `block` rows must follow that are in none; what comes out for those means nothing.
      w_EDF: float32 parameters, one matrix a group.
      sizes_E: rows of each group.
      block: rows of a group multiplied at once, in a loop over the blocks that have any; the
        matrices of empty groups are not read. 0: one `jax.lax.ragged_dot`.
      quantization: as for `contract`; but of the weights' gradient, which is as without.

    Returns:
      [R, F] in x's dtype.
    """
    kinds = quantized.RECIPES[quantization].forward
    return _grouped("rd,df->rf", x_RD, w_EDF, sizes_E, block, kinds)


def _grouped_forward(x_RD, w_EDF, sizes_E, block, quantization):
    product_RF = grouped_contract(x_RD, w_EDF, sizes_E, block, quantization)
    return product_RF, (x_RD, w_EDF, sizes_E)


def _grouped_backward(block, quantization, saved, gradient_RF):
    x_RD, w_EDF, sizes_E = saved
    kinds = quantized.RECIPES[quantization].to_x
    dx_RD = _grouped("rf,df->rd", gradient_RF, w_EDF, sizes_E, block, kinds)
    dw_EDF = _grouped_outer(x_RD, gradient_RF, sizes_E, block)
    return dx_RD, dw_EDF.astype(w_EDF.dtype), None


grouped_contract.defvjp(_grouped_forward, _grouped_backward)


def _grouped(spec, x, w, sizes_E, block, kinds):
    """`spec` of every group's rows of `x` and its matrix of `w`, in eight bits if of `kinds`."""
    transposed = spec == "rf,df->rd"
    if not block:
        w = jnp.swapaxes(w, 1, 2) if transposed else w
        if kinds:
            return quantized.ragged_dot(x, w, sizes_E, kinds, x.dtype)
        w = w.astype(x.dtype)
        # Accumulated in float32 and rounded by the kernel: nothing would fuse with it.
        return jax.lax.ragged_dot(x, w, sizes_E, preferred_element_type=x.dtype)

    # A block may reach into the next group, whose own blocks come later and write over it.
    def step(index, out):
        group, start, _ = at(index)
        rows = jax.lax.dynamic_slice_in_dim(x, start, block)
        matrix = jax.lax.dynamic_index_in_dim(w, group, 0, keepdims=False).astype(x.dtype)
        if kinds:
            product = quantized.einsum(spec, rows, matrix, kinds, jnp.float32)
        else:
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
