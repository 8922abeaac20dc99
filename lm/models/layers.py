"""The small parts: norms, the MLP, projections, dropout, initializers."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.random import threefry2x32_p

from lm.models.config import ModelConfig
from lm.models.hooks import Tap, no_tap
from lm.models.matmul import add_bias, cheap, contract, contract_each
from lm.models.params import declare
from lm.parallel.sharding import constrain

ACTIVATION_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "geglu": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swiglu": jax.nn.silu,
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
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) of the last axis, in float32.

    Args:
      config: says which.
      width: of that axis; the residual stream's unless given.
      axis: its logical name.
    """

    def __init__(self, config: ModelConfig, width: int | None = None, axis: str = "embed"):
        self.kind, self.epsilon = config.norm, config.norm_epsilon
        self.unit_offset = config.norm_unit_offset
        start = jax.nn.initializers.zeros if self.unit_offset else jax.nn.initializers.ones
        self.scale = declare((width or config.width,), (axis,), start)
        if config.has_bias("norm") and config.norm == "layernorm":
            self.bias = declare((width or config.width,), (axis,), jax.nn.initializers.zeros)

    def __call__(self, x: jax.Array, tap: Tap) -> jax.Array:
        """`x`, normalised, in its own dtype."""

        def normalize(x, scale, bias):
            dtype, x = x.dtype, x.astype(jnp.float32)
            if self.kind == "layernorm":
                x = x - x.mean(-1, keepdims=True)
            inverse_scale = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.epsilon)
            x = x * tap("inverse_scale", inverse_scale) * (scale + 1 if self.unit_offset else scale)
            return (x if bias is None else x + bias).astype(dtype)

        if tap is no_tap:  # a tap would carry values out of what is recomputed
            normalize = cheap(normalize)
        return normalize(x, self.scale[...], self.bias[...] if hasattr(self, "bias") else None)


class MLP(nnx.Module):
    """Two projections around a nonlinearity; three when gated (Shazeer 2020).

    Args:
      config: says which nonlinearity, and whether there are biases.
      hidden: width of the hidden layer; `config.feed_forward` unless given.
    """

    def __init__(self, config: ModelConfig, hidden: int | None = None):
        D, F = config.width, hidden or config.feed_forward
        self.activation, self.quantization = config.activation, config.quantization
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
        hidden_BTF = activate(self.activation, hidden_BTF, gate_BTF)
        hidden_BTF = tap("hidden", constrain(hidden_BTF, "batch", "length", "mlp"))
        out_BTD = contract("btf,fd->btd", hidden_BTF, self.down[...], quantization=kind)
        out_BTD = constrain(out_BTD, "batch", "norm_length", "embed")
        if hasattr(self, "down_bias"):
            out_BTD = add_bias(out_BTD, self.down_bias[...])
        return tap("output", out_BTD)


def activate(name: str, hidden: jax.Array, gate: jax.Array | None = None) -> jax.Array:
    """The nonlinearity `name` of `hidden`, or of `gate` times `hidden` where there is a gate.

    In float32: rounding between its terms costs accuracy and time.
    """
    nonlinearity = ACTIVATION_FUNCTIONS[name]

    @cheap
    def activated(hidden, gate):
        hidden32 = hidden.astype(jnp.float32)
        if gate is None:
            return nonlinearity(hidden32).astype(hidden.dtype)
        return (nonlinearity(gate.astype(jnp.float32)) * hidden32).astype(hidden.dtype)

    return activated(hidden, gate)


class Projection(nnx.Module):
    """A dense layer with a bias: `x · projection + bias`.

    Args:
      config: says how it starts.
      outputs: how many numbers it makes of a residual stream.
    """

    def __init__(self, config: ModelConfig, outputs: int):
        initializer = weight_initializer(config, config.width, outputs)
        self.projection = declare((config.width, outputs), ("embed", None), initializer)
        self.bias = declare((outputs,), (None,), jax.nn.initializers.zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[…, D] → […, outputs], in x's dtype."""
        rows = x.reshape(-1, x.shape[-1])
        out = add_bias(contract("nd,de->ne", rows, self.projection[...]), self.bias[...])
        return out.reshape(*x.shape[:-1], -1)


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
      x: of any shape.
      rate: the share to drop.
      key: of this call; None turns dropout off.
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
