"""The small parts: initializers, norms, the MLP, projections, dropout, rows of a table."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.random import threefry2x32_p
from jax.sharding import PartitionSpec

from lm.models.config import GATED, ModelConfig
from lm.models.hooks import Tap, no_tap
from lm.models.matmul import add_bias, cheap, contract, contract_each, precise
from lm.models.params import declare
from lm.models.reading import Weight
from lm.parallel.layout import current_layout
from lm.parallel.reduce import axes_of, shared, summed_over
from lm.parallel.sharding import (
    ACTIVATION_RULES,
    WHOLE_RULES,
    automatic_axes,
    constrain,
    partition,
    zero_rules,
)

NONLINEARITIES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_quick": lambda x: x * jax.nn.sigmoid(1.702 * x),  # Hendrycks & Gimpel 2016, §2
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, §5
    "silu": jax.nn.silu,
}


def weight_initializer(config: ModelConfig, fan_in: int, fan_out: int, residual: bool = False):
    """How a projection starts, by `config.initializer`.

    gpt2: normal(0.02), and projections that write to the residual stream divided by √(2·layers)
    (Radford et al. 2019, §2.3). normal: normal(std) throughout. scaled_zero: as gpt2, but those
    projections start at zero, so every block starts as the identity. xavier: Glorot & Bengio 2010.
    lecun: normal(1/√fan_in). t5: the same (Raffel et al. 2020, published code); queries, which are
    not scaled there, and embeddings differ.
    """
    std = config.initializer_std
    if residual and config.initializer == "scaled_zero":
        return jax.nn.initializers.zeros
    if config.initializer == "xavier":
        limit = math.sqrt(6 / (fan_in + fan_out))
        return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -limit, limit)
    if config.initializer in ("lecun", "t5"):
        std = 1 / math.sqrt(fan_in)
    elif residual and config.initializer == "gpt2":
        std /= math.sqrt(2 * config.num_layers)
    return jax.nn.initializers.normal(std)


def embedding_initializer(config: ModelConfig):
    """How an embedding table starts: normal(std), and normal(1) by T5's rule."""
    return jax.nn.initializers.normal(1.0 if config.initializer == "t5" else config.initializer_std)


class Norm(nnx.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) of the last axes, in float32.

    That is the residual stream's unless the axes' `shape` and logical names are given.
    """

    def __init__(
        self, config: ModelConfig, shape: tuple[int, ...] = (), axes: tuple[str, ...] = ("embed",)
    ):
        self.kind, self.epsilon = config.norm, config.norm_epsilon
        self.unit_offset = config.norm_unit_offset
        start = jax.nn.initializers.zeros if self.unit_offset else jax.nn.initializers.ones
        shape = shape or (config.width,)
        self.over = tuple(range(-len(shape), 0))
        self.scale = declare(shape, axes, start)
        if config.has_bias("norm") and config.norm == "layernorm":
            self.bias = declare(shape, axes, jax.nn.initializers.zeros)

    def __call__(self, x: jax.Array, tap: Tap) -> jax.Array:
        """`x`, normalised, in its own dtype."""

        def normalize(x, scale, bias):
            dtype, x = x.dtype, precise(x)
            if self.kind == "layernorm":
                x = x - x.mean(self.over, keepdims=True)
            mean_square = jnp.mean(x * x, self.over, keepdims=True)
            inverse_scale = jax.lax.rsqrt(mean_square + self.epsilon)
            if len(self.over) > 1:  # one for each vector of the last axis, though they are the same
                inverse_scale = jnp.broadcast_to(inverse_scale, (*x.shape[:-1], 1))
            x = x * tap("inverse_scale", inverse_scale) * (scale + 1 if self.unit_offset else scale)
            return tap("output", (x if bias is None else x + bias).astype(dtype))

        if tap is no_tap:  # a tap would carry values out of what is recomputed
            normalize = cheap(normalize)
        return normalize(x, self.scale[...], self.bias[...] if hasattr(self, "bias") else None)


class MLP(nnx.Module):
    """Two projections around a nonlinearity; three when gated (Shazeer 2020).

    The hidden layer is `config.feed_forward` wide unless `hidden` says otherwise.
    """

    def __init__(self, config: ModelConfig, hidden: int | None = None):
        D, F = config.width, hidden or config.feed_forward
        self.activation, self.quantization = config.activation, config.quantization
        self.limit = config.activation_limit
        inward = weight_initializer(config, D, F)
        self.up = declare((D, F), ("embed", "mlp"), inward)
        if config.gated:
            self.gate = declare((D, F), ("embed", "mlp"), inward)
        self.down = declare((F, D), ("mlp", "embed"), weight_initializer(config, F, D, True))
        if config.bias:
            self.up_bias = declare((F,), ("mlp",), jax.nn.initializers.zeros)
            self.down_bias = declare((D,), ("embed",), jax.nn.initializers.zeros)
            if config.gated:
                self.gate_bias = declare((F,), ("mlp",), jax.nn.initializers.zeros)

    def __call__(self, x_BTD: jax.Array, tap: Tap) -> jax.Array:
        """What the MLP adds to the residual stream."""
        weights = [self.up[...], *([self.gate[...]] if hasattr(self, "gate") else [])]
        kind = self.quantization
        hidden_BTF, *gates = contract_each("btd,df->btf", x_BTD, weights, quantization=kind)
        if hasattr(self, "up_bias"):
            hidden_BTF = add_bias(hidden_BTF, self.up_bias[...])
        if hasattr(self, "gate_bias"):
            gates = [add_bias(gates[0], self.gate_bias[...])]
        hidden_BTF = tap("up", hidden_BTF)
        gate_BTF = tap("gate", gates[0]) if gates else None
        hidden_BTF = activate(self.activation, hidden_BTF, gate_BTF, self.limit)
        hidden_BTF = tap("hidden", constrain(hidden_BTF, "batch", "length", "mlp"))
        out_BTD = contract("btf,fd->btd", hidden_BTF, self.down[...], quantization=kind)
        out_BTD = constrain(out_BTD, "batch", "norm_length", "embed")
        if hasattr(self, "down_bias"):
            out_BTD = add_bias(out_BTD, self.down_bias[...])
        return tap("output", out_BTD)


def activate(
    name: str, hidden: jax.Array, gate: jax.Array | None = None, limit: float = 7.0
) -> jax.Array:
    """The nonlinearity `name` of `hidden`, or of `gate` times `hidden` where there is a gate.

    In float32: rounding between its terms costs accuracy and time. `limit` is swiglu_clipped's.
    """
    nonlinearity = NONLINEARITIES[GATED.get(name, name)]

    @cheap
    def activated(hidden, gate):
        hidden32 = precise(hidden)
        if gate is None:
            return nonlinearity(hidden32).astype(hidden.dtype)
        gate32 = precise(gate)
        if name == "swiglu_clipped":
            gate32, hidden32 = jnp.minimum(gate32, limit), jnp.clip(hidden32, -limit, limit) + 1
        return (nonlinearity(gate32) * hidden32).astype(hidden.dtype)

    return activated(hidden, gate)


class Projection(nnx.Module):
    """A dense layer of a residual stream: `x · projection + bias`, if there is one."""

    def __init__(self, config: ModelConfig, outputs: int, bias: bool = True):
        initializer = weight_initializer(config, config.width, outputs)
        self.projection = declare((config.width, outputs), ("embed", None), initializer)
        if bias:
            self.bias = declare((outputs,), (None,), jax.nn.initializers.zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[…, D] → […, outputs], in x's dtype."""
        rows = x.reshape(-1, x.shape[-1])
        out = contract("nd,de->ne", rows, self.projection[...])
        out = add_bias(out, self.bias[...]) if hasattr(self, "bias") else out
        return out.reshape(*x.shape[:-1], -1)


class Resized(nnx.Module):
    """A dense layer without a bias, from vectors of one width to those of another."""

    def __init__(self, config: ModelConfig, inputs: int, outputs: int):
        initializer = weight_initializer(config, inputs, outputs)
        self.projection = declare((inputs, outputs), ("embed", None), initializer)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, inputs] → [B, T, outputs]."""
        resized_BTE = contract("btd,de->bte", x_BTD, self.projection[...])
        return constrain(resized_BTE, "batch", "norm_length", "embed")


class RewardHead(nnx.Module):
    """A decoder's classifier, without a bias: drawn from N(0, 1/√(D + 1)) (Stiennon et al. 2020).

    It is read in float32, as differences of rewards are smaller than bfloat16's steps.
    """

    def __init__(self, config: ModelConfig):
        initializer = jax.nn.initializers.normal(1 / math.sqrt(config.table_width + 1))
        shape = (config.table_width, config.num_labels)
        self.projection = declare(shape, ("embed", None), initializer)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] → [B, T, labels], float32."""
        return contract("btd,de->bte", x_BTD.astype(jnp.float32), self.projection[...])


def split_key(key: jax.Array | None, number: int):
    """So many keys of one; None is dropout's key where it is off, and so are all of its parts."""
    return (None,) * number if key is None else jax.random.split(key, number)


def dropout(
    x: jax.Array,
    rate: float,
    key: jax.Array | None,
    row: jax.Array,
    place: jax.Array,
    column: jax.Array | None = None,
) -> jax.Array:
    """Zeroes a share `rate` of `x`, scaling the rest up (Srivastava et al. 2014), given a key.

    Whether a number is kept depends on the key and on three coordinates alone, and so not on how
    the batch is cut into micro-batches, sequences into parts, or tokens reordered.

    Args:
      x, rate, key: no key, no dropout.
      row, place: integers that broadcast against all axes of `x` but the last: the row of the
        batch, and which of its vectors this is.
      column: integers that broadcast against the last axis; 0, 1, 2, … unless given.
    """
    if key is None or rate == 0:
        return x
    # Threefry (Salmon et al. 2011) itself, since jax.random counts an array's elements in order.
    first, second = jax.random.key_data(key)[-2:]
    row = row.astype(jnp.uint32)
    keys = threefry2x32_p.bind(*jnp.broadcast_arrays(first, second, jnp.uint32(0), row))
    column = jnp.arange(x.shape[-1]) if column is None else column
    counters = place[..., None].astype(jnp.uint32), column.astype(jnp.uint32)
    operands = (*(k[..., None] for k in keys), *counters)
    bits = threefry2x32_p.bind(*(jnp.broadcast_to(o, x.shape) for o in operands))[0]
    keep = bits < jnp.uint32(min(round((1 - rate) * 2**32), 2**32 - 1))
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


# ---- Rows of a table by number, where the mesh splits both ---------------------------------------


class _Split(NamedTuple):
    """How the mesh splits a look-up."""

    names: frozenset  # axes over which arrays are split by hand
    vocab: str | None  # that splits the rows of the table
    tokens: PartitionSpec  # of the row numbers
    found: PartitionSpec  # of what is found
    table: PartitionSpec  # of the table's gradient
    dtype: jnp.dtype  # in which the table travels
    size: int  # rows of the table

    @property
    def scatters(self) -> bool:
        """Whether devices that share the table's rows leave each other a part of the tokens."""
        return self.tokens[:2] != self.found[:2]


def embedding_lookup(
    table_VD: jax.Array | Weight, rows_BT: jax.Array, dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """`table_VD[rows_BT]`, [B, T, D].

    On a mesh each device looks up the rows of its own tokens; where `tensor` splits the table, in
    the part it holds, and the parts are added (Shoeybi et al. 2019, §3). Left to itself, XLA may
    gather the tokens of all devices instead.

    Devices send each other rows in `dtype`, the compute dtype: where there are several, what is
    found is rounded to it. Gradients are summed in float32 on each device, however.
    """
    mesh, names = automatic_axes()
    if not names:
        return _rows(table_VD, rows_BT, dtype)
    shape = (*rows_BT.shape, table_VD.shape[1])
    vocab = partition(("vocab", None), table_VD.shape, mesh, WHOLE_RULES)[0]
    short = partition(("batch", "norm_length", None), shape, mesh, ACTIVATION_RULES)
    whole = partition(("batch", "length", None), shape, mesh, ACTIVATION_RULES)
    rules = zero_rules(current_layout().zero, "gradients")
    split = _Split(
        frozenset(names),
        vocab,
        PartitionSpec(*(whole if vocab else short)[:2]),
        short,
        partition(("vocab", "embed"), table_VD.shape, mesh, rules),
        jnp.dtype(dtype),
        table_VD.shape[0],
    )
    return _found(split, table_VD, rows_BT)


def _rows(table_VD: jax.Array | Weight, rows_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    if isinstance(table_VD, Weight):
        return table_VD.rows(rows_BT, dtype)
    return jnp.take(table_VD, rows_BT, axis=0)


def _local(rows_BT, first_V, split: _Split):
    """Rows counted from this device's first, and which of them it holds."""
    if split.vocab is None:
        return rows_BT, None
    rows_BT = rows_BT - first_V[0]
    here_BT = (rows_BT >= 0) & (rows_BT < first_V.shape[0])
    return jnp.where(here_BT, rows_BT, 0), here_BT[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _found(split: _Split, table_VD, rows_BT):
    dtype = split.dtype if isinstance(table_VD, Weight) else table_VD.dtype
    if not isinstance(table_VD, Weight):
        table_VD = table_VD.astype(split.dtype)

    def local(first_V, table_VD, rows_BT):
        rows_BT, here_BT1 = _local(rows_BT, first_V, split)
        found = _rows(table_VD, rows_BT, split.dtype)
        if here_BT1 is None:
            return found
        found = jnp.where(here_BT1, found, 0)
        if split.scatters:
            return jax.lax.psum_scatter(found, split.vocab, scatter_dimension=1, tiled=True)
        return jax.lax.psum(found, split.vocab)

    whole = PartitionSpec(split.vocab)
    found = jax.shard_map(
        local,
        in_specs=(whole, whole, split.tokens),
        out_specs=split.found,
        axis_names=set(split.names),
        check_vma=False,
    )(jnp.arange(split.size, dtype=rows_BT.dtype), table_VD, rows_BT)
    return found.astype(dtype)


def _found_forward(split, table_VD, rows_BT):
    return _found(split, table_VD, rows_BT), rows_BT


def _found_backward(split: _Split, rows_BT, gradient_BTD):
    axes = axes_of(split.tokens[0]) + axes_of(split.tokens[1])

    def local(first_V, rows_BT, gradient_BTD):
        if split.scatters:
            gradient_BTD = jax.lax.all_gather(gradient_BTD, split.vocab, axis=1, tiled=True)
        rows_BT, here_BT1 = _local(rows_BT, first_V, split)
        gradient_BTD = gradient_BTD.astype(jnp.float32)
        if here_BT1 is not None:
            gradient_BTD = jnp.where(here_BT1, gradient_BTD, 0)
        empty_VD = jnp.zeros((first_V.shape[0], gradient_BTD.shape[2]), jnp.float32)
        return summed_over(axes, empty_VD.at[rows_BT].add(gradient_BTD), split.table)

    gradient_VD = jax.shard_map(
        local,
        in_specs=(PartitionSpec(split.vocab), split.tokens, split.found),
        out_specs=PartitionSpec(split.vocab, shared(split.table, axes)[1]),
        axis_names=set(split.names),
        check_vma=False,
    )(jnp.arange(split.size, dtype=rows_BT.dtype), rows_BT, gradient_BTD.astype(split.dtype))
    return gradient_VD.astype(gradient_BTD.dtype), None


_found.defvjp(_found_forward, _found_backward)
