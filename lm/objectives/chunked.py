"""Measures of a linear head's logits at every position, without ever holding all of the logits.

The sequence is cut into chunks; each chunk's float32 logits are made, used and dropped. Of a sum
with known weights (`summed`) the gradient with respect to the logits is known as soon as they are,
so the forward pass makes the gradients of hidden states and head as well, and the backward pass
only scales them: three matrix products in all, as without chunks. Where each position's value
matters (`each`), its weight is known to the backward pass alone, which makes the logits again: four
products.

On a mesh every device does this for its own tokens and its own part of the vocabulary (`tensor`;
Shoeybi et al. 2019, §3): only maxima and sums of a chunk's logits travel while it is worked on, and
the head's gradient once, when all chunks are done. Left to itself, XLA adds that gradient up over
all devices in every chunk.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm.config import ConfigError
from lm.models.matmul import contract
from lm.parallel.layout import current_layout
from lm.parallel.platform import platform
from lm.parallel.reduce import after, axes_of, shared, summed_over
from lm.parallel.sharding import ACTIVATION_RULES, automatic_axes, partition, zero_rules

# Logits held at once: 128 MiB of float32, and four times that where there is a faster product to
# feed, which otherwise waits for the head and its gradient to be read anew in every chunk.
CHUNK_ELEMENTS = {"cpu": 2**25, "gpu": 2**27, "tpu": 2**27}


def chunk_length(batch: int, length: int, vocab: int, limit: int = 0) -> int:
    """The largest divisor of `length` whose chunk of logits has at most `limit` elements.

    Sizes are those on one device; a `limit` of 0 is the platform's.
    """
    limit = limit or CHUNK_ELEMENTS[platform()]
    most = max(1, limit // (batch * vocab))
    return max(n for n in range(1, length + 1) if length % n == 0 and (n <= most or n == 1))


class Part(NamedTuple):
    """The logits of a chunk that one device works on: all, or its part of the vocabulary."""

    logits: jax.Array  # [B, t, V of this device], float32
    first: jax.Array | int  # the token of the first of them
    axis: str | None  # of the mesh, over which the other parts are; None: there are no others
    vocab: int  # tokens of all parts

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum [B, t] of x [B, t, V] over the whole vocabulary."""
        total = x.sum(-1)
        return total if self.axis is None else jax.lax.psum(total, self.axis)

    def log_z(self) -> jax.Array:
        """log Σ exp of the logits, [B, t]."""
        if self.axis is None:
            return jax.nn.logsumexp(self.logits, -1)
        top = jax.lax.pmax(self.logits.max(-1), self.axis)
        return top + jnp.log(self.sum(jnp.exp(self.logits - top[..., None])))

    def is_token(self, targets: jax.Array) -> jax.Array:
        """Which logits are those of the `targets` [B, t], bool [B, t, V]."""
        return jnp.arange(self.logits.shape[-1]) == (targets - self.first)[..., None]

    def at(self, targets: jax.Array) -> jax.Array:
        """The logits of the `targets`, [B, t]."""
        if self.axis is None:
            return jnp.take_along_axis(self.logits, targets[..., None], -1)[..., 0]
        return self.sum(jnp.where(self.is_token(targets), self.logits, 0))

    def bits(self, words: jax.Array) -> jax.Array:
        """Those of these tokens, bool [B, t, V]: bit i of `words` [B, t, w] is token 32 w + i's."""
        bits = (words[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        bits = bits.reshape(*words.shape[:2], -1)
        return jax.lax.dynamic_slice_in_dim(bits, self.first, self.logits.shape[-1], 2) > 0


class Measure(Protocol):
    """What is made of the logits of a position: one value or several. Hashable."""

    num_values: int

    def values(self, part: Part, tokens: Any, others: Any) -> tuple[tuple[jax.Array, ...], Any]:
        """The values, each [B, t] float32, and what `gradient` needs of this chunk.

        Args:
          tokens, others: what `each` was given of these positions, and for this part of the
            vocabulary.
        """

    def gradient(self, saved: Any, tokens: Any, *weights: jax.Array | None) -> jax.Array:
        """Of Σ weight·value, over the values that have `weights` [B, t], by the logits.

        The first has; others may be None or missing.
        """


class Split(NamedTuple):
    """How the mesh splits a loss; no names where it does not."""

    names: frozenset = frozenset()  # axes over which arrays are split by hand
    hidden: PartitionSpec = PartitionSpec()  # of x [B, T, D]
    short: PartitionSpec = PartitionSpec()  # and of its gradient, when tokens are split further
    head: PartitionSpec = PartitionSpec()  # of the head's gradient [V, D]

    @classmethod
    def of(cls, x_shape, head_shape) -> Split:
        """On the mesh set by `jax.set_mesh`."""
        mesh, names = automatic_axes()
        if not names:
            return cls()
        rules = zero_rules(current_layout().zero, "gradients")
        return cls(
            frozenset(names),
            partition(("batch", "length", None), x_shape, mesh, ACTIVATION_RULES),
            partition(("batch", "norm_length", None), x_shape, mesh, ACTIVATION_RULES),
            partition(("vocab", "embed"), head_shape, mesh, rules),
        )

    @property
    def vocab(self) -> str | None:
        """The axis that splits the vocabulary."""
        return self.head[0] if self.names else None

    @property
    def tokens(self) -> tuple[str, ...]:
        """The axes that split tokens."""
        return axes_of(self.hidden[0]) + axes_of(self.hidden[1]) if self.names else ()


class _Static(NamedTuple):
    """What a program depends on besides its arrays."""

    measure: Measure
    softcap: float  # c in c·tanh(logits/c); 0: none
    chunk: int
    split: Split
    vocab: int


def _static(measure: Measure, softcap: float, chunk: int, x_shape, head_shape) -> _Static:
    split = Split.of(x_shape, head_shape)
    batch, length, vocab = _local_sizes(split, x_shape, head_shape[0])
    chunk = chunk or chunk_length(batch, length, vocab)
    if length % chunk:
        divisors = [n for n in range(1, length + 1) if length % n == 0]
        closest = min(divisors, key=lambda n: abs(n - chunk))
        where = "the sequence length" if length == x_shape[1] else "each device's share"
        raise ConfigError(
            f"config.objective.chunk={chunk} does not divide {where}, {length}: "
            f"use {closest}, or 0 to choose it"
        )
    return _Static(measure, float(softcap), chunk, split, head_shape[0])


def _local_sizes(split: Split, x_shape, vocab: int) -> tuple[int, int, int]:
    """Rows, tokens of a row and vocabulary on one device."""
    if not split.names:
        return *x_shape[:2], vocab
    mesh, _ = automatic_axes()
    ways = [
        math.prod(mesh.shape[axis] for axis in axes_of(entry))
        for entry in (*split.hidden[:2], split.vocab)
    ]
    return x_shape[0] // ways[0], x_shape[1] // ways[1], vocab // ways[2]


def summed(
    measure: Measure,
    x_BTD: jax.Array,
    head_VD: jax.Array,
    bias_V: jax.Array | None,
    tokens: Any,
    weights_BT: jax.Array,
    others: Any = (),
    *,
    softcap: float = 0.0,
    chunk: int = 0,
) -> tuple[jax.Array, ...]:
    """Σ weight·value over all positions, of every value of the logits x·headᵀ + bias: scalars.

    Only the first has a gradient, and only with respect to hidden states, head and bias.

    Args:
      x_BTD: hidden states, in the compute dtype.
      head_VD: the output head.
      bias_V: its bias.
      tokens: a tree of arrays [B, T, …] that the measure reads.
      weights_BT: how much each position counts.
      others: a tree of arrays [V, …] that the measure reads, such as another head.
      softcap: logits are c·tanh(·/c); 0: as they are.
      chunk: positions a chunk, on one device; 0 chooses.

    Raises:
      ConfigError: `chunk` does not divide the sequence length.
    """
    static = _static(measure, softcap, chunk, x_BTD.shape, head_VD.shape)
    return _summed(static, x_BTD, head_VD, bias_V, others, tokens, (weights_BT,))


def each(
    measure: Measure,
    x_BTD: jax.Array,
    head_VD: jax.Array,
    bias_V: jax.Array | None,
    tokens: Any,
    others: Any = (),
    *,
    softcap: float = 0.0,
    chunk: int = 0,
) -> tuple[jax.Array, ...]:
    """Every value of the logits x·headᵀ + bias at every position, each [B, T] float32.

    All have gradients with respect to hidden states, head and bias. Arguments as for `summed`.
    """
    static = _static(measure, softcap, chunk, x_BTD.shape, head_VD.shape)
    return _each(static, x_BTD, head_VD, bias_V, others, tokens)


# What follows runs on each device: `head`, `bias` and `others` are its part of the vocabulary,
# which starts at token `first`.


def _cut(array, chunk):
    """[B, T, …] as [chunks, B, chunk, …]."""
    batch, length = array.shape[:2]
    shape = (batch, length // chunk, chunk, *array.shape[2:])
    return jnp.moveaxis(array.reshape(shape), 1, 0)


def _joined(array):
    """[chunks, B, chunk, …] as [B, T, …]."""
    array = jnp.moveaxis(array, 0, 1)
    return array.reshape(array.shape[0], -1, *array.shape[3:])


def _work(static: _Static, wanted, x, head, bias, others, first, tokens, weights):
    """What is `wanted`: all `values`; their weighted `sums`; or these, and gradients.

    That of `x` alone, or of `x and head` and bias.
    """
    measure, softcap, chunk, split, vocab = static
    trained = wanted == "x and head"

    def step(carry, here):
        x, tokens, weights = here
        logits = contract("btd,vd->btv", x, head, jnp.float32)
        if bias is not None:
            logits += bias
        if softcap:
            logits = softcap * jnp.tanh(logits / softcap)
        values, saved = measure.values(Part(logits, first, split.vocab, vocab), tokens, others)
        if wanted == "values":
            return carry, values
        sums, *head_gradients = carry
        sums = tuple(total + jnp.sum(weights[0] * value) for total, value in zip(sums, values))
        if wanted == "sums":
            return (sums,), None
        dhead, dbias = head_gradients
        dlogits = measure.gradient(saved, tokens, *weights)
        if softcap:
            dlogits *= 1 - (logits / softcap) ** 2
        if dbias is not None:
            dbias += dlogits.sum((0, 1))
        dlogits = jax.lax.optimization_barrier(dlogits.astype(x.dtype))
        dx = contract("btv,vd->btd", dlogits, head)
        if trained:
            dhead += contract("btv,btd->vd", dlogits, x, jnp.float32)
        return (sums, dhead, dbias), dx

    carry = () if wanted == "values" else ((jnp.float32(0),) * measure.num_values,)
    if wanted in ("x", "x and head"):
        carry += tuple(
            jnp.zeros(array.shape, jnp.float32) if trained and array is not None else None
            for array in (head, bias)
        )
    here = x, tokens, weights
    if chunk == x.shape[1]:
        carry, places = step(carry, here)
    else:
        carry, places = jax.lax.scan(step, carry, jax.tree.map(lambda a: _cut(a, chunk), here))
        places = jax.tree.map(_joined, places)
    if wanted == "values":
        return places
    return carry[0] if wanted == "sums" else (*carry, places)


def _on_mesh(split: Split, function, out_specs, x, head, bias, others, tokens, weights):
    """`function` of each device's share of the arguments and the first token of its vocabulary."""
    places, vocab = PartitionSpec(*split.hidden[:2]), PartitionSpec(split.vocab)
    first_V = jnp.arange(head.shape[0], dtype=jnp.int32)
    return jax.shard_map(
        lambda x, head, bias, others, first_V, tokens, weights: function(
            x, head, bias, others, first_V[0], tokens, weights
        ),
        in_specs=(split.hidden, vocab, vocab, vocab, vocab, places, places),
        out_specs=out_specs,
        axis_names=set(split.names),
        check_vma=False,
    )(x, head.astype(x.dtype), bias, others, first_V, tokens, weights)


def _gradients(static: _Static, trained: bool, x_BTD, head_VD, bias_V, others, tokens, weights):
    """The sums, and the gradients (dx, dhead, dbias) of Σ weight·value.

    A frozen head, as adapters have, gets none: it could be the largest array of all.
    """
    split = static.split
    function = functools.partial(_work, static, "x and head" if trained else "x")
    arguments = x_BTD, head_VD, bias_V, others, tokens, weights

    def local(*arguments):
        sums, dhead, dbias, dx = function(*arguments)
        sums, dbias = jax.lax.psum((sums, dbias), split.tokens)
        if split.vocab and split.short != split.hidden:
            dx = jax.lax.psum_scatter(dx, split.vocab, scatter_dimension=1, tiled=True)
        elif split.vocab:
            dx = jax.lax.psum(dx, split.vocab)
        if not trained:
            return sums, dhead, dbias, dx
        # Else each device would keep its whole `dhead` until the backward pass is over.
        dhead = summed_over(split.tokens, dhead, split.head)
        return sums, dhead, dbias, after(dhead, dx)

    if not split.names:
        sums, dhead, dbias, dx = function(*arguments[:4], 0, *arguments[4:])
    else:
        out_specs = (
            PartitionSpec(),
            PartitionSpec(split.vocab, shared(split.head, split.tokens)[1]),
            PartitionSpec(split.vocab),
            split.short if split.vocab else split.hidden,
        )
        sums, dhead, dbias, dx = _on_mesh(split, local, out_specs, *arguments)
    return sums, (dx, dhead.astype(head_VD.dtype) if trained else None, dbias)


def _primal(x) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


def _opened(primals):
    """The arrays, and whether the head or its bias, the second and third, are differentiated."""
    trained = any(primal.perturbed for primal in jax.tree.leaves(primals[1:3], is_leaf=_primal))
    return jax.tree.map(lambda primal: primal.value, primals, is_leaf=_primal), trained


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(static, x_BTD, head_VD, bias_V, others, tokens, weights):
    split = static.split
    function = functools.partial(_work, static, "sums")
    if not split.names:
        return function(x_BTD, head_VD, bias_V, others, 0, tokens, weights)

    def local(*arguments):
        return jax.lax.psum(function(*arguments), split.tokens)

    arguments = x_BTD, head_VD, bias_V, others, tokens, weights
    return _on_mesh(split, local, PartitionSpec(), *arguments)


def _summed_forward(static, *primals):
    arguments, trained = _opened(primals)
    return _gradients(static, trained, *arguments)


def _summed_backward(static, saved, gradients):
    scale = gradients[0]  # the others are reported, never differentiated; scale is float32
    dx, dhead, dbias = jax.tree.map(lambda array: (array * scale).astype(array.dtype), saved)
    return dx, dhead, dbias, None, None, None


_summed.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _each(static, x_BTD, head_VD, bias_V, others, tokens):
    split = static.split
    function = functools.partial(_work, static, "values")
    if not split.names:
        return function(x_BTD, head_VD, bias_V, others, 0, tokens, ())
    places = PartitionSpec(*split.hidden[:2])
    return _on_mesh(split, function, places, x_BTD, head_VD, bias_V, others, tokens, ())


def _each_forward(static, *primals):
    arguments, trained = _opened(primals)
    return _each(static, *arguments), (arguments, () if trained else None)


def _each_backward(static, saved, weights):
    arguments, trained = saved
    zero = jax.custom_derivatives.SymbolicZero
    first, *rest = (None if isinstance(weight, zero) else weight for weight in weights)
    if first is None:
        first = jnp.zeros(weights[0].shape, jnp.float32)
    return *_gradients(static, trained is not None, *arguments, (first, *rest))[1], None, None


_each.defvjp(_each_forward, _each_backward, symbolic_zeros=True)
