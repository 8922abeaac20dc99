"""How numbers are multiplied: the one place that knows what each platform is good at.

Parameters are float32. `contract` multiplies in the compute dtype and accumulates in float32,
forward and backward: both gradients multiply operands of the compute dtype too, which plain
autodiff of a bfloat16 product with a float32 result would not (it widens the gradient first).
Between devices that each hold a part of such a sum, activations and their gradients travel in the
compute dtype, gradients of parameters in float32 or as `lm.parallel.reduce` says. A product may
be of eight-bit numbers instead: `lm.models.quantized`.

On the CPU, XLA fuses the cheap operations that produce an operand into the copy that feeds the
product and then recomputes them with strided access. A barrier around the operands that the
backward pass reads keeps each product alone with finished arrays.

What the backward pass needs of the cheap operations it recomputes (`cheap`) rather than reads back:
under a scan over layers every saved array is copied into a stack of them and out again.
"""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm.models import quantized, reading
from lm.models.adapted import Adapted, Rounded, widened
from lm.parallel.layout import current_layout
from lm.parallel.platform import platform

JOINED_ROWS = 256  # products of fewer rows than this are not joined


@functools.cache
def fast_bfloat16(platform: str) -> bool:
    """Whether bfloat16 products beat float32 ones: TPU, GPU, AMX or AVX512-BF16."""
    if platform == "gpu":
        capability = str(getattr(jax.devices("gpu")[0], "compute_capability", ""))
        return not capability.replace(".", "").isdigit() or float(capability) >= 8  # Ampere, or AMD
    if platform != "cpu":
        return True
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    return "amx_bf16" in flags or "avx512_bf16" in flags


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype that `model.compute_dtype` names; `auto` is bfloat16 where that is faster."""
    if name == "auto":
        name = "bfloat16" if fast_bfloat16(platform()) else "float32"
    return jnp.dtype(name)


def precise(x: jax.Array) -> jax.Array:
    """`x` in float32, or in float64 where it is: what norms, softmax and logits are computed in.

    Models of float64 activations, under `jax.enable_x64`, are for identities to hold to rounding.
    """
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def contract(
    spec: str,
    x: jax.Array,
    w: jax.Array | reading.Weight | Adapted,
    dtype: jnp.dtype | None = None,
    *,
    quantization: str = "none",
) -> jax.Array:
    """`einsum(spec, x, w)` of two arrays in x's dtype, accumulated in float32.

    Every letter of one operand that the other lacks must be in the output (no broadcasting sums),
    so that both gradients are contractions as well.

    Args:
      spec: with an explicit output, e.g. `btd,df->btf`.
      x: the activations; their dtype is the compute dtype.
      w: the other operand: a float32 parameter, activations, a weight kept for reading, which has
        no gradient, or one that is frozen but for an adapter.
      dtype: of the result; x's own unless given.
      quantization: none, or the name of a recipe of `lm.models.quantized`, by which this product
        and both of its gradients are taken.

    To remat policies the product's name is `product`, or `batched_product` where the operands share
    a dimension with the output, as attention's do.
    """
    if isinstance(w, reading.Weight):
        dtype = jnp.dtype(dtype or x.dtype)
        return reading.product(spec, x, w, dtype, _sum_dtype(dtype))
    operands, out = spec.split("->")
    first, second = operands.split(",")
    batched = set(first) & set(second) & set(out)
    dtype = jnp.dtype(dtype or x.dtype)
    if isinstance(w, Adapted):
        product = _plus_adapter(spec, x, w, _frozen(spec, dtype, quantization, x, (w.weight,)))
    else:
        product = _contract(spec, dtype, quantization, x, w)
    # A policy cannot see the dot inside a custom derivative, but it sees the name of its result.
    return checkpoint_name(product, "batched_product" if batched else "product")


def contract_each(
    spec: str,
    x: jax.Array,
    weights: Sequence[jax.Array | reading.Weight | Adapted],
    *,
    quantization: str = "none",
) -> list[jax.Array]:
    """`contract(spec, x, w)` for every w of `weights`, as one larger product where that pays.

    The weights differ only in the size of their first dimension that x lacks, along which they are
    joined on the CPU: a copy, so not when decoding, where reading the weights is all the work; and
    not where the mesh splits weights over `tensor`, as joining would move them between devices.
    Elsewhere each product is large enough, and joining costs memory: at Llama-2-70B's size, 5 GB.
    """
    if isinstance(weights[0], reading.Weight):
        return [contract(spec, x, w) for w in weights]
    first, second, out = spec.replace("->", ",").split(",")
    letter = next(letter for letter in second if letter not in first)
    axis, out_axis = second.index(letter), out.index(letter)
    contracted = math.prod(size for name, size in zip(first, x.shape) if name in second)
    split = jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1
    if platform() != "cpu" or split or x.size // contracted < JOINED_ROWS:
        return [contract(spec, x, w, quantization=quantization) for w in weights]
    sizes = [w.shape[axis] for w in weights]
    if isinstance(weights[0], Adapted):  # so are all
        frozen = tuple(w.weight for w in weights)
        product = checkpoint_name(_frozen(spec, x.dtype, quantization, x, frozen), "product")
        parts = jax.lax.split(product, sizes, out_axis)
        return [_plus_adapter(spec, x, w, part) for w, part in zip(weights, parts)]
    joined = jnp.concatenate([w.astype(x.dtype) for w in weights], axis)
    product = contract(spec, x, joined, quantization=quantization)
    return list(jax.lax.split(product, sizes, out_axis))


def _einsum(spec: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype, kinds=None) -> jax.Array:
    """`einsum` in a's dtype, or of the two operands as eight-bit numbers of `kinds`."""
    if kinds:
        product = quantized.einsum(spec, a, b, kinds, _sum_dtype(dtype))
    else:
        b = b.astype(a.dtype)
        product = jnp.einsum(spec, a, b, preferred_element_type=_sum_dtype(dtype))
    return product.astype(dtype)


def _sum_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """What a product wanted in `dtype` leaves the hardware in, to be summed over devices so.

    Accelerators accumulate in float32 and round at the end; the CPU is faster with float32.
    """
    if dtype == jnp.bfloat16 and platform() != "cpu":
        return dtype
    return jnp.promote_types(dtype, jnp.float32)


def _settle(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """On the CPU, finishes `arrays` before anything reads them; elsewhere does nothing."""
    return jax.lax.optimization_barrier(arrays) if platform() == "cpu" else arrays


def finished(x: jax.Array) -> jax.Array:
    """On the CPU, float32 `x` behind a product with the identity; elsewhere `x`.

    XLA recomputes what is cheap by its count, sines and cosines among it, wherever it is read; it
    never recomputes a product.
    """
    if platform() != "cpu":
        return x
    return jnp.matmul(x, jnp.eye(x.shape[-1], dtype=x.dtype), precision="highest")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _contract(spec, dtype, quantization, x, w):
    return _einsum(spec, x, w, dtype, quantized.RECIPES[quantization].forward)


def _contract_forward(spec, dtype, quantization, x, w):
    (x,) = _settle(x)
    return _contract(spec, dtype, quantization, x, w), (x, w)


def _contract_backward(spec, dtype, quantization, saved, gradient):
    x, w = saved
    recipe = quantized.RECIPES[quantization]
    operands, out = spec.split("->")
    first, second = operands.split(",")
    (gradient,) = _settle(gradient.astype(x.dtype))
    dx = _einsum(f"{out},{second}->{first}", gradient, w, x.dtype, recipe.to_x)
    summed = jnp.dtype(current_layout().reduce_dtype) if w.dtype == jnp.float32 else w.dtype
    dw = _einsum(f"{first},{out}->{second}", x, gradient, summed, recipe.to_w)
    return dx, dw.astype(w.dtype)


_contract.defvjp(_contract_forward, _contract_backward)


# ---- Frozen matrices, and adapters beside them ---------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _frozen(spec, dtype, quantization, x, weights):
    """`_contract` of x alone, of matrices joined along the first dimension that x lacks."""
    w = _joined(spec, weights, x.dtype)
    return _einsum(spec, x, w, dtype, quantized.RECIPES[quantization].forward)


def _frozen_forward(spec, dtype, quantization, x, weights):
    (x,) = _settle(x)
    return _frozen(spec, dtype, quantization, x, weights), (weights, jnp.zeros((), x.dtype))


def _frozen_backward(spec, dtype, quantization, saved, gradient):
    weights, like_x = saved
    operands, out = spec.split("->")
    first, second = operands.split(",")
    gradient = gradient.astype(like_x.dtype)
    if any(isinstance(w, Rounded) for w in weights):
        # Or XLA keeps what it widened in the forward pass.
        gradient, weights = jax.lax.optimization_barrier((gradient, weights))
    else:
        (gradient,) = _settle(gradient)
    w = _joined(spec, weights, like_x.dtype)
    kinds = quantized.RECIPES[quantization].to_x
    return _einsum(f"{out},{second}->{first}", gradient, w, like_x.dtype, kinds), None


_frozen.defvjp(_frozen_forward, _frozen_backward)


def _joined(spec, weights, dtype):
    first, second, _ = spec.replace("->", ",").split(",")
    wide = [widened(w, dtype) for w in weights]
    axis = next(axis for axis, letter in enumerate(second) if letter not in first)
    return wide[0] if len(wide) == 1 else jnp.concatenate(wide, axis)


def _plus_adapter(spec, x, w: Adapted, product):
    """What an adapted matrix gives, from the product of x and the frozen part of it."""
    if w.a is None:
        return product
    first, second, out = spec.replace("->", ",").split(",")
    sizes = dict(zip(first, x.shape)) | dict(zip(out, product.shape))
    rows, inputs, outputs = (
        "".join(letter for letter in letters if (letter in other) == is_in)
        for letters, other, is_in in (
            (first, second, False), (second, first, True), (second, first, False),
        )
    )  # fmt: skip
    a = w.a.reshape(*(sizes[letter] for letter in inputs), -1)
    b = w.b.reshape(-1, *(sizes[letter] for letter in outputs))
    low = w.scale * _contract(f"{first},{inputs}z->{rows}z", x.dtype, "none", x, a)
    product += _contract(f"{rows}z,z{outputs}->{out}", product.dtype, "none", low, b)
    if w.magnitude is None:
        return product
    factor = w.factor().reshape(b.shape[1:])
    return (product.astype(jnp.float32) * factor).astype(product.dtype)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """`x + bias` in x's dtype; `bias` float32, shaped as the last axes of x.

    Its gradient, a sum over all rows, is taken as a product with ones: accumulated in float32, and
    on the CPU several times faster than XLA's reduction of leading axes.
    """
    return x + bias.astype(x.dtype)


def _add_bias_backward(bias, gradient):
    (gradient,) = _settle(gradient)
    rows = gradient.reshape(-1, bias.size)
    ones = jnp.ones(rows.shape[:1], rows.dtype)
    summed = _einsum("n,nd->d", ones, rows, jnp.dtype(jnp.float32))
    return gradient, summed.reshape(bias.shape).astype(bias.dtype)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), bias), _add_bias_backward)


def cheap(function):
    """`function`, whose backward pass starts from its inputs and recomputes what lies between."""
    return jax.checkpoint(function, prevent_cse=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def masked_softmax(scores: jax.Array, mask: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Softmax over the last axis of float32 `scores` where `mask` holds, rounded to `dtype`.

    The backward pass reads the rounded result alone, half the size of the scores or less. A row
    that may see nothing gives a uniform mean and not NaN.
    """
    return jax.nn.softmax(jnp.where(mask, scores, -1e30), -1).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def softmax_with_sinks(
    scores_BHTS: jax.Array, mask: jax.Array, sinks_H: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """As `masked_softmax`, but a head's sink is one more score of each row, which is left out."""
    return _softmax_with_sinks(scores_BHTS, mask, sinks_H, dtype)[0]


def _softmax_with_sinks(scores_BHTS, mask, sinks_H, dtype):
    scores_BHTS = jnp.where(mask, scores_BHTS, -1e30)
    sinks_BHT1 = jnp.broadcast_to(
        sinks_H.astype(scores_BHTS.dtype)[:, None, None], (*scores_BHTS.shape[:3], 1)
    )
    most_BHT1 = jnp.maximum(scores_BHTS.max(-1, keepdims=True), sinks_BHT1)
    shares_BHTS, sunk_BHT1 = jnp.exp(scores_BHTS - most_BHT1), jnp.exp(sinks_BHT1 - most_BHT1)
    total_BHT1 = shares_BHTS.sum(-1, keepdims=True) + sunk_BHT1
    return (shares_BHTS / total_BHT1).astype(dtype), sunk_BHT1 / total_BHT1


def _softmax_forward(scores, mask, dtype):
    pattern = masked_softmax(scores, mask, dtype)
    return pattern, pattern


def _softmax_backward(dtype, pattern, gradient):
    p, g = precise(pattern), precise(gradient)
    return p * (g - jnp.sum(p * g, -1, keepdims=True)), None


masked_softmax.defvjp(_softmax_forward, _softmax_backward)


def _sinks_forward(scores_BHTS, mask, sinks_H, dtype):
    pattern, sunk_BHT1 = _softmax_with_sinks(scores_BHTS, mask, sinks_H, dtype)
    return pattern, (pattern, sunk_BHT1, sinks_H)


def _sinks_backward(dtype, saved, gradient):
    pattern, sunk_BHT1, sinks_H = saved
    p, g = precise(pattern), precise(gradient)
    along_BHT1 = jnp.sum(p * g, -1, keepdims=True)
    d_sinks_H = -jnp.sum(sunk_BHT1 * along_BHT1, (0, 2, 3))
    return p * (g - along_BHT1), None, d_sinks_H.astype(sinks_H.dtype)


softmax_with_sinks.defvjp(_sinks_forward, _sinks_backward)
