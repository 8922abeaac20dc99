"""Products of eight-bit numbers, which the hardware that has them takes twice as fast as bfloat16.

Each operand is divided by a scale and rounded to the nearest eight-bit number; the product of those
is multiplied by both scales. There is a scale for every row: for every combination of the indices
that are not summed over, the largest magnitude among those that are, divided by the largest number
of the kind. So nothing overflows, each token has a scale of its own, and so has each channel of a
weight. Scales are taken anew in every product from the arrays in hand: no state is kept, and
parameters, what is kept for the backward pass and all that lies between products are as without.
A layer has three products:

                    int8                      fp8
    y  = x · w      int8 · int8               e4m3 · e4m3
    dx = dy · wᵀ    int8 · int8               e5m2 · e4m3
    dw = xᵀ · dy    in the compute dtype      e4m3 · e5m2

fp8 is the assignment of Micikevicius et al. 2022: e5m2 has a range for gradients that differ a
thousandfold, and rounds twice as coarsely. int8 has no such range, and dw sums over all tokens of
the batch, whose gradients differ so; it stays as it is, as in SwitchBack (Wortsman et al. 2023,
§2). So does that of experts without a capacity.

int8 is summed in int32, exactly, so that splitting such a sum over devices changes nothing; but
what then travels is twice the size of bfloat16: use the mesh axis `tensor` sparingly. Gathered
weights travel as eight bits.

TPU v5e, v5p and v6e are fast at int8; TPU v7 and NVIDIA GPUs since Ada at fp8. Elsewhere the
compiler widens the numbers again, for the same results more slowly. The arithmetic is that of
`qwix`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Kinds = tuple[jnp.dtype, jnp.dtype]  # of a product's two operands


class Recipe(NamedTuple):
    """What the operands of a layer's three products are rounded to; None: nothing, they stay."""

    forward: Kinds | None = None  # x and w
    to_x: Kinds | None = None  # dy and w
    to_w: Kinds | None = None  # x and dy


_E4M3, _E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2

RECIPES = {
    "none": Recipe(),
    "int8": Recipe(forward=(jnp.int8, jnp.int8), to_x=(jnp.int8, jnp.int8)),
    "fp8": Recipe(forward=(_E4M3, _E4M3), to_x=(_E5M2, _E4M3), to_w=(_E4M3, _E5M2)),
}


def einsum(spec: str, a: jax.Array, b: jax.Array, kinds: Kinds, sum_dtype: jnp.dtype) -> jax.Array:
    """`einsum(spec, a, b)`, its output explicit, of the operands rounded to eight bits of `kinds`.

    The result is of `sum_dtype`, and so are the parts of it that devices sum, but of int8 those are
    int32.
    """
    import qwix  # thirty milliseconds that others need not wait

    operands, out = spec.split("->")
    rounded = (
        _rounded(array, kind, [axis for axis, name in enumerate(names) if name in out])
        for names, array, kind in zip(operands.split(","), (a, b), kinds)
    )
    return qwix.einsum(spec, *rounded, preferred_element_type=sum_dtype)


def ragged_dot(
    x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, kinds: Kinds, dtype: jnp.dtype
) -> jax.Array:
    """`jax.lax.ragged_dot` [R, F] of the operands rounded to eight bits of `kinds`, in `dtype`.

    A column's scale is the same in all of the matrices.
    """
    import qwix

    rows, matrices = _rounded(x_RD, kinds[0], [0]), _rounded(w_EDF, kinds[1], [2])
    return qwix.ragged_dot(rows, matrices, sizes_E, preferred_element_type=dtype)


def _rounded(array: jax.Array, kind: jnp.dtype, scaled: list[int]):
    """A `qwix.QArray` with a scale for every combination of indices of the axes `scaled`."""
    import qwix

    return qwix.quantize(array.astype(jnp.float32), kind, channelwise_axes=scaled)
