"""Matrices that are not trained, with what is trained beside them: leaves that products know.

`lm.models.matmul.contract` multiplies by an `Adapted` as by the matrix it stands for, and makes no
gradient of that matrix: neither is it an array of that size, nor is the product taken that it would
need. `lm.models.adapters` makes these leaves; this file says what they hold.

A frozen matrix may lie in memory `Rounded` (QLoRA, Dettmers et al. 2023) and is widened where it is
multiplied, forward and backward:

int8   to the nearest of 255 steps of each output's largest magnitude
nf4    to the nearest of the paper's 16 numbers, which are as dense as a normal distribution, times
       the largest magnitude of each output's next `BLOCK` inputs; two to a byte
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 64  # inputs that share a scale of nf4


def _static() -> Any:
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    """A matrix [inputs, outputs] in eight or four bits; stacked layers come first, if any."""

    values: jax.Array  # int8; of nf4 uint8, each two inputs' codes
    scale: jax.Array  # float32: [1, outputs], or [blocks, outputs]
    shape: tuple[int, ...] = _static()  # that the matrix had, of one layer

    @classmethod
    def of(cls, w: jax.Array, kind: str, inputs: int, stacked: bool) -> Rounded:
        """`w`, whose first `inputs` axes after that of layers are summed over, as `int8` or `nf4`.

        Of nf4 an even number of numbers is summed over.
        """
        layers, shape = w.shape[:stacked], w.shape[stacked:]
        w = w.astype(jnp.float32).reshape(*layers, math.prod(shape[:inputs]), -1)
        steps, block = (127, w.shape[-2]) if kind == "int8" else (1, block_of(w.shape[-2]))
        blocks = w.reshape(*layers, -1, block, w.shape[-1])
        scale = jnp.max(jnp.abs(blocks), -2) / steps
        unit = (blocks / jnp.where(scale == 0, 1, scale)[..., None, :]).reshape(w.shape)
        if kind == "int8":
            return cls(jnp.round(unit).astype(jnp.int8), scale, shape)
        numbers = _numbers()
        between = (numbers[1:] + numbers[:-1]) / 2
        codes = jnp.searchsorted(between, unit).astype(jnp.uint8)
        return cls(codes[..., ::2, :] | codes[..., 1::2, :] << 4, scale, shape)

    def widened(self, dtype: jnp.dtype) -> jax.Array:
        """The matrix in its own shape, in `dtype`; with its layers first where there are any."""
        values = self.values
        if values.dtype == jnp.int8:
            unit = values.astype(jnp.float32)
        else:
            codes = jnp.stack([values & 15, values >> 4], -2)
            unit = _numbers()[codes].reshape(*values.shape[:-2], -1, values.shape[-1])
        blocks = unit.reshape(*self.scale.shape[:-1], -1, values.shape[-1])
        whole = blocks * self.scale[..., None, :]
        return whole.reshape(*values.shape[:-2], *self.shape).astype(dtype)


def block_of(inputs: int) -> int:
    """How many of so many inputs share a scale of nf4: `BLOCK`, or what divides it and them."""
    return math.gcd(inputs, BLOCK)


def _numbers() -> jax.Array:
    """Dettmers et al. 2023, appendix E."""
    import qwix  # thirty milliseconds that others need not wait

    codes = jnp.arange(16, dtype=jnp.uint4)
    return qwix.dequantize(qwix.QArray(codes, jnp.ones(1), qtype="nf4"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A frozen matrix W, and what is trained beside it; nothing, where `a` is None.

    LoRA (Hu et al. 2021) is W + s·A·B. DoRA (Liu et al. 2024, eq. 5) divides each output's column
    of that by its length, which counts as a constant in the backward pass (§4.3), and multiplies it
    by a number that is trained, the column's `magnitude`.
    """

    weight: jax.Array | Rounded
    a: jax.Array | None = None  # [inputs, rank]
    b: jax.Array | None = None  # [rank, outputs]
    magnitude: jax.Array | None = None  # [outputs]
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})  # s
    turned: bool = dataclasses.field(default=False, metadata={"static": True})  # (outputs, inputs)

    def __getitem__(self, index) -> Adapted:
        """All of it (`...`), as an `nnx.Param` asks for; or a layer of several."""
        return jax.tree.map(lambda x: x[index], self)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix, of one layer where it is rounded."""
        return self.weight.shape

    def whole(self) -> jax.Array:
        """The matrix that all of it stands for, float32; with its layers first, if any."""
        w = widened(self.weight, jnp.float32)
        if self.a is None:
            return w
        with jax.default_matmul_precision("highest"):
            added = self.scale * (self.a.astype(jnp.float32) @ self.b)
            factor = None if self.magnitude is None else self.factor()[..., None, :]
        matrix = jnp.swapaxes(w, -1, -2) if self.turned else w.reshape(added.shape)
        matrix = matrix + added if factor is None else (matrix + added) * factor
        return jnp.swapaxes(matrix, -1, -2) if self.turned else matrix.reshape(w.shape)

    def factor(self) -> jax.Array:
        """What DoRA multiplies each output of W + s·A·B by, float32: magnitude / length."""
        lengths = jax.lax.stop_gradient(self.lengths())
        return self.magnitude / jnp.maximum(lengths, 1e-30)  # a column of zeros stays one

    def lengths(self) -> jax.Array:
        """The Euclidean length of each output's column of W + s·A·B, float32.

        Without making that matrix: |w + s·A·b|² = |w|² + 2s·(Aᵀw)·b + s²·b·(AᵀA)b.
        """
        a, b = self.a, self.b
        w = widened(self.weight, jnp.float32)
        if self.turned:
            w = jnp.swapaxes(w, -1, -2)
        w = w.reshape(*a.shape[:-1], b.shape[-1])
        a_turned = jnp.swapaxes(a, -1, -2)
        # One product alone, whose first operand is small: w is widened into it.
        crossed = self.scale * (2 * a_turned @ w + self.scale * (a_turned @ a) @ b)
        return jnp.sqrt(jnp.sum(w * w, -2) + jnp.sum(crossed * b, -2))


def widened(w: jax.Array | Rounded, dtype: jnp.dtype) -> jax.Array:
    """A frozen matrix in `dtype`."""
    return w.widened(dtype) if isinstance(w, Rounded) else w.astype(dtype)
