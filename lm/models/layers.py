"""The small parts: norms, the MLP, positions, dropout, initializers."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lm.models.build import declare
from lm.models.config import ModelConfig
from lm.models.numerics import add_bias, cheap, contract, contract_each, finished
from lm.models.taps import Tap, no_tap
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
    lecun: normal(1/√fan_in).
    """
    std = config.initializer_std
    if residual and config.initializer == "scaled_zero":
        return jax.nn.initializers.zeros
    if config.initializer == "xavier":
        limit = math.sqrt(6 / (fan_in + fan_out))
        return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -limit, limit)
    if config.initializer == "lecun":
        std = 1 / math.sqrt(fan_in)
    elif residual and config.initializer == "gpt2":
        std /= math.sqrt(2 * config.num_layers)
    return jax.nn.initializers.normal(std)


class Norm(nnx.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over the width, in float32."""

    def __init__(self, config: ModelConfig):
        self.kind, self.epsilon = config.norm, config.norm_epsilon
        self.scale = declare((config.width,), ("embed",), jax.nn.initializers.ones)
        if config.bias and config.norm == "layernorm":
            self.bias = declare((config.width,), ("embed",), jax.nn.initializers.zeros)

    def __call__(self, x_BTD: jax.Array, tap: Tap) -> jax.Array:
        """The normalised residual stream, in its own dtype."""

        def normalize(x_BTD, scale, bias):
            x = x_BTD.astype(jnp.float32)
            if self.kind == "layernorm":
                x = x - x.mean(-1, keepdims=True)
            inverse_scale = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.epsilon)
            x = x * tap("inverse_scale", inverse_scale) * scale
            return (x if bias is None else x + bias).astype(x_BTD.dtype)

        if tap is no_tap:  # a tap would carry values out of what is recomputed
            normalize = cheap(normalize)
        return normalize(x_BTD, self.scale[...], self.bias[...] if hasattr(self, "bias") else None)


class MLP(nnx.Module):
    """Two projections around a nonlinearity; three when gated (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        D, F = config.width, config.feed_forward
        self.activation = config.activation
        inward = weight_initializer(config, D, F)
        self.up = declare((D, F), ("embed", "mlp"), inward)
        if config.gated:
            self.gate = declare((D, F), ("embed", "mlp"), inward)
        self.down = declare((F, D), ("mlp", "embed"), weight_initializer(config, F, D, True))
        if config.bias:
            self.up_bias = declare((F,), ("mlp",), jax.nn.initializers.zeros)
            self.down_bias = declare((D,), ("embed",), jax.nn.initializers.zeros)

    def __call__(self, x_BTD: jax.Array, tap: Tap) -> jax.Array:
        """What the MLP adds to the residual stream."""
        weights = [self.up[...], *([self.gate[...]] if hasattr(self, "gate") else [])]
        hidden_BTF, *gate_BTF = contract_each("btd,df->btf", x_BTD, weights)
        if hasattr(self, "up_bias"):
            hidden_BTF = add_bias(hidden_BTF, self.up_bias[...])
        hidden_BTF = tap("up", hidden_BTF)
        gate_BTF = tap("gate", gate_BTF[0]) if gate_BTF else None
        hidden_BTF = self._activate(hidden_BTF, gate_BTF)
        hidden_BTF = tap("hidden", constrain(hidden_BTF, "batch", "length", "mlp"))
        out_BTD = contract("btf,fd->btd", hidden_BTF, self.down[...])
        if hasattr(self, "down_bias"):
            out_BTD = add_bias(out_BTD, self.down_bias[...])
        return tap("output", out_BTD)

    def _activate(self, hidden_BTF: jax.Array, gate_BTF: jax.Array | None) -> jax.Array:
        """The nonlinearity, in float32: rounding between its terms costs accuracy and time."""
        nonlinearity = ACTIVATION_FUNCTIONS[self.activation]

        @cheap
        def activate(hidden, gate):
            hidden32 = hidden.astype(jnp.float32)
            if gate is None:
                return nonlinearity(hidden32).astype(hidden.dtype)
            return (nonlinearity(gate.astype(jnp.float32)) * hidden32).astype(hidden.dtype)

        return activate(hidden_BTF, gate_BTF)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share `rate` of `x`, scaling the rest up (Srivastava et al. 2014), given a key."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def sinusoids(positions_BT: jax.Array, width: int) -> jax.Array:
    """The sinusoidal position embedding of Vaswani et al. 2017, §3.5: sines, then cosines."""
    half = width // 2
    frequencies = jnp.exp(-math.log(10_000.0) * jnp.arange(half) / half)
    angles = positions_BT[..., None] * frequencies
    table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    return jnp.pad(table, [(0, 0)] * (table.ndim - 1) + [(0, width - 2 * half)])


def rotary_angles(positions_BT: jax.Array, head_dim: int, base: float) -> tuple[jax.Array, ...]:
    """Cosine and sine [B, T, 1, C/2] of RoPE (Su et al. 2021), for `rotate`."""
    frequencies = base ** (-jnp.arange(0, head_dim, 2) / head_dim)
    angles = positions_BT[..., None, None] * frequencies
    table = finished(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1))
    return tuple(jnp.split(table, 2, -1))


def rotate(x_BTHC: jax.Array, angles: tuple[jax.Array, ...]) -> jax.Array:
    """Rotates pairs (i, i + C/2) of each head by its position's angles, in float32."""
    cos, sin = angles
    first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, -1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated.astype(x_BTHC.dtype)
