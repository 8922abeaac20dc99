"""Weights kept for reading alone: (out, in), in eight bits or not, for rows that stay apart.

What decoding multiplies is a few rows by weights that are read once, and a row's result should not
depend on its companions: summed in another order, it would be a rounding away, and the token drawn
with it. Libraries order a sum by the shape of the product. On the CPU `Weight` fixes the shape
that decides:

- The weights are the left operand, (out, in). As the right one they would be packed anew in every
  product, which takes longer than multiplying; barriers keep XLA from turning the product round.
- Rows are filled up to a multiple of `TILE`.

The float32 product of 2 to `TILE` rows is then bitwise the same for a row, however many there are
and wherever it stands among them. Of more rows another kernel may be chosen (with AVX-512, that of
32 rows adds up in another order than that of 16 and of 48), and one row alone is a product of a
matrix and a vector, at the speed of memory. What comes between products keeps a row's bits only
where the number of rows is the same: who needs them fills up to `TILE`.

Axes that are summed over are one, and so are those that are not: devices of a mesh share whole rows
or columns, and what a TPU tiles is the matrix that it multiplies.

Eight-bit weights are rounded to the nearest of 255 steps of each output's largest magnitude, as
`qwix` does, and activations stay as they are. Where they are multiplied they are widened: on the
CPU a block at a time that fits a core's cache, so that memory is read a quarter as much; on a TPU
within the product.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from lm.parallel.platform import platform
from lm.parallel.sharding import automatic_axes

BLOCK_BYTES = 3 * 2**17  # of widened weights at a time, within a second-level cache
SUBLANES = 8  # rows that a TPU's registers hold
TILE = 16  # rows; a multiple of what the CPU's kernels multiply at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """The other operand of `lm.models.matmul.contract`, as a matrix (out, in).

    Stacked layers come first where there are several.
    """

    values: jax.Array  # of the compute dtype, or int8
    scale: jax.Array | None = None  # of int8 `values`: float32, (out,)
    features: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})  # of `out`

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return self.values.shape

    def __getitem__(self, index) -> Weight:
        """All of it (`...`), as an `nnx.Param` asks for; or a layer of several."""
        return jax.tree.map(lambda x: x[index], self)

    def rows(self, index: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """`index`'s rows, of a weight that is a table as well, as embeddings are."""
        found = jnp.take(self.values, index, axis=0)
        if self.scale is None:
            return found
        return (found * jnp.take(self.scale, index, axis=0)[..., None]).astype(dtype)


def kept(w: jax.Array, inputs: tuple[int, ...], eight_bits: bool, stacked: bool = False) -> Weight:
    """`w`, whose axes `inputs` are summed over, as a `Weight`; rounded to int8 if asked.

    Where it is `stacked`, its first axis is that of layers.
    """
    w = jnp.moveaxis(w, inputs, range(-len(inputs), 0))
    layers, features = w.shape[:stacked], w.shape[stacked : -len(inputs)]
    w = w.reshape(*layers, math.prod(features), -1)
    if not eight_bits:
        return Weight(w, None, features)
    return Weight(*rounded(w), features)


def rounded(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x` in int8, and what its vectors, along the last axis, are multiples of, float32."""
    import qwix  # thirty milliseconds that others need not wait

    array = qwix.quantize(x.astype(jnp.float32), jnp.int8, channelwise_axes=range(x.ndim - 1))
    return array.qvalue, array.scale[..., 0]


def product(
    spec: str, x: jax.Array, w: Weight, dtype: jnp.dtype, sum_dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """`einsum(spec, x, w)` in `dtype`, as of `w` before it was kept.

    Every letter of x that w lacks comes before those it shares, and stays in the output, where
    they come first. On the CPU the product is summed in float32; elsewhere, and on a mesh, what the
    hardware leaves, and devices add up, is of `sum_dtype`.
    """
    first, second = spec.split("->")[0].split(",")
    leading = x.shape[: sum(letter not in second for letter in first)]
    values, scale = w.values, w.scale
    x = x.reshape(*leading, values.shape[1])
    if platform() == "cpu" and not automatic_axes()[1]:
        multiply = _by_rows if values.dtype == x.dtype else _by_blocks
        y = multiply(x.reshape(-1, values.shape[1]), values)
    else:
        if values.dtype != x.dtype and platform() != "tpu":
            # Tied to x: widened outside a loop that draws tokens, all of them would be kept. XLA
            # for TPUs has no need of it, and would not widen within the product.
            x, values = jax.lax.optimization_barrier((x, values))
        alone = platform() == "tpu" and math.prod(leading) == 1
        if alone:  # one row's product would be taken beside the matrix unit, several times as slow
            x = jax.lax.optimization_barrier(jnp.repeat(x, SUBLANES, len(leading) - 1))
        y = jnp.einsum("...k,fk->...f", x, values.astype(x.dtype), preferred_element_type=sum_dtype)
        y = y[..., :1, :] if alone else y
    y = (y if scale is None else y * scale).astype(dtype)
    if platform() == "tpu":
        # Or XLA takes heads apart in the weights: it copies them out of their stack first.
        y = jax.lax.optimization_barrier(y)
    return y.reshape(*leading, *w.features)


def _by_rows(x_NK: jax.Array, w_FK: jax.Array) -> jax.Array:
    """`x · wᵀ`, [N, F], float32; see the module."""
    N = x_NK.shape[0]

    def left(x_KN):
        dimensions = (((1,), (0,)), ((), ()))
        return jax.lax.dot_general(w_FK, x_KN, dimensions, preferred_element_type=jnp.float32)

    if N == 1:
        return left(x_NK.T).T
    filled = jnp.pad(x_NK, ((0, -N % TILE), (0, 0)))
    x_KN = jax.lax.optimization_barrier(filled.T)
    return jax.lax.optimization_barrier(left(x_KN)).T[:N]


def _by_blocks(x_NK: jax.Array, w_FK: jax.Array) -> jax.Array:
    """`_by_rows` of weights in a narrower type, widened block by block. The last overlaps."""
    N, (F, K) = x_NK.shape[0], w_FK.shape
    block = min(max(BLOCK_BYTES // (K * x_NK.dtype.itemsize), 1), F)

    def one_block(number, y_FN):
        start = jnp.minimum(number * block, F - block)
        part = jax.lax.dynamic_slice_in_dim(w_FK, start, block).astype(x_NK.dtype)
        y = _by_rows(x_NK, jax.lax.optimization_barrier(part))
        return jax.lax.dynamic_update_slice_in_dim(y_FN, y.T, start, 0)

    empty = jnp.zeros((F, N), jnp.float32)
    return jax.lax.fori_loop(0, -(-F // block), one_block, empty).T
