"""Cross-entropy of a linear head, without ever holding all its float32 logits.

The sequence is cut into chunks; each chunk's logits are made, used and dropped. Since the loss is a
sum, its gradient with respect to the logits is known as soon as they are, so the forward pass makes
the gradients of hidden states and head as well, and the backward pass only scales them: three
matrix products in all, as without chunks, where recomputing the logits would take four.

On a mesh every device does this for its own tokens and its own part of the vocabulary (`tensor`;
Shoeybi et al. 2019, §3): only maxima and sums of a chunk's logits travel while it is worked on, and
the head's gradient once, when all chunks are done. Left to itself, XLA adds that gradient up over
all devices in every chunk.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

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


class Shape(NamedTuple):
    """What bends the loss away from plain cross-entropy of the logits."""

    z_loss: float = 0.0  # coefficient of Σ w·log²Z (Chowdhery et al. 2022, §5)
    label_smoothing: float = 0.0  # share of the target spread over the vocabulary
    softcap: float = 0.0  # c in c·tanh(logits/c); 0: none


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


def linear_cross_entropy(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    bias_V: jax.Array | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    chunk: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy of logits x·headᵀ + bias, and its regularisers.

    Args:
      x_BTD: hidden states, in the compute dtype.
      head_VD: the output head.
      targets_BT: the right token at each position.
      weights_BT: how much each position counts.
      bias_V: the head's bias.
      z_loss: coefficient of Σ w·log²Z, which keeps the softmax's normaliser Z near one
        (Chowdhery et al. 2022, §5).
      label_smoothing: the share ε of the target that is spread evenly over the vocabulary
        (Szegedy et al. 2016, §7; 0.1 in Vaswani et al. 2017).
      softcap: logits are c·tanh(·/c); 0: as they are.
      chunk: positions a chunk, on one device; 0 chooses.

    Returns:
      (loss, nats): scalars, float32. `nats` is Σ w·(-log p(target)); `loss` has the regularisers
      too. Only `loss` has a gradient, and only with respect to hidden states, head and bias.

    Raises:
      ConfigError: `chunk` does not divide the sequence length.
    """
    split = Split.of(x_BTD.shape, head_VD.shape)
    batch, length, vocab = _local_sizes(split, x_BTD.shape, head_VD.shape[0])
    chunk = chunk or chunk_length(batch, length, vocab)
    if length % chunk:
        divisors = [n for n in range(1, length + 1) if length % n == 0]
        closest = min(divisors, key=lambda n: abs(n - chunk))
        where = "the sequence length" if length == x_BTD.shape[1] else "each device's share"
        raise ConfigError(
            f"config.objective.chunk={chunk} does not divide {where}, {length}: "
            f"use {closest}, or 0 to choose it"
        )
    shape = Shape(float(z_loss), float(label_smoothing), float(softcap))
    return _summed((shape, chunk, split), x_BTD, head_VD, bias_V, targets_BT, weights_BT)


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


# What follows runs on each device: `head` and `bias` are its part of the vocabulary, which starts
# at token `first`; `axis` is the mesh axis over which the other parts are, or None.


def _over(axis, reduce, x):
    return x if axis is None else reduce(x, axis)


def _chunk_loss(shape, axis, x, head, bias, first, targets, weights):
    """(loss, nats, logits, log_z) of one chunk."""
    logits = contract("btd,vd->btv", x, head, jnp.float32)
    if bias is not None:
        logits += bias
    if shape.softcap:
        logits = shape.softcap * jnp.tanh(logits / shape.softcap)
    if axis is None:
        log_z = jax.nn.logsumexp(logits, -1)
        chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    else:
        top = jax.lax.pmax(logits.max(-1), axis)
        log_z = top + jnp.log(jax.lax.psum(jnp.exp(logits - top[..., None]).sum(-1), axis))
        hit = jnp.arange(logits.shape[-1]) == (targets - first)[..., None]
        chosen = jax.lax.psum(jnp.sum(jnp.where(hit, logits, 0), -1), axis)
    nats = loss = jnp.sum(weights * (log_z - chosen))
    if shape.label_smoothing:
        mean = _over(axis, jax.lax.pmean, logits.mean(-1))
        loss += shape.label_smoothing * jnp.sum(weights * (chosen - mean))
    if shape.z_loss:
        loss += shape.z_loss * jnp.sum(weights * log_z**2)
    return loss, nats, logits, log_z


def _logit_gradient(shape, vocab, first, logits, log_z, targets, weights):
    """The gradient of a chunk's loss with respect to x·headᵀ + bias."""
    softmax_scale = weights * (1 + 2 * shape.z_loss * log_z) if shape.z_loss else weights
    gradient = jnp.exp(logits - log_z[..., None]) * softmax_scale[..., None]
    hit = jnp.arange(logits.shape[-1]) == (targets - first)[..., None]
    kept = weights * (1 - shape.label_smoothing) if shape.label_smoothing else weights
    gradient -= jnp.where(hit, kept[..., None], 0)
    if shape.label_smoothing:
        gradient -= (weights * (shape.label_smoothing / vocab))[..., None]
    if shape.softcap:
        gradient *= 1 - (logits / shape.softcap) ** 2
    return gradient


def _split(array, chunk):
    """[B, T, …] as [chunks, B, chunk, …]."""
    batch, length = array.shape[:2]
    shape = (batch, length // chunk, chunk, *array.shape[2:])
    return jnp.moveaxis(array.reshape(shape), 1, 0)


def _losses(static, gradients, vocab, x, head, bias, first, targets, weights):
    """Loss and nats, and if asked for the loss's gradients with respect to x, head and bias."""
    shape, chunk, split = static

    def step(carry, part):
        loss_sum, nats_sum, *sums = carry
        x, targets, weights = part
        loss, nats, logits, log_z = _chunk_loss(
            shape, split.vocab, x, head, bias, first, targets, weights
        )
        totals = loss_sum + loss, nats_sum + nats
        if not gradients:
            return totals, None
        dhead, dbias = sums
        dlogits = _logit_gradient(shape, vocab, first, logits, log_z, targets, weights)
        if bias is not None:
            dbias += dlogits.sum((0, 1))
        dlogits = jax.lax.optimization_barrier(dlogits.astype(x.dtype))
        dx = contract("btv,vd->btd", dlogits, head)
        dhead += contract("btv,btd->vd", dlogits, x, jnp.float32)
        return (*totals, dhead, dbias), dx

    carry = jnp.float32(0), jnp.float32(0)
    if gradients:
        dbias = None if bias is None else jnp.zeros(bias.shape, jnp.float32)
        carry += jnp.zeros(head.shape, jnp.float32), dbias
    if chunk == x.shape[1]:
        (loss, nats, *sums), dx = step(carry, (x, targets, weights))
    else:
        parts = tuple(_split(a, chunk) for a in (x, targets, weights))
        (loss, nats, *sums), dx = jax.lax.scan(step, carry, parts)
        dx = jnp.moveaxis(dx, 0, 1).reshape(x.shape) if gradients else None
    return (loss, nats, dx, *sums) if gradients else (loss, nats)


def _on_mesh(split: Split, function, out_specs, x, head, bias, targets, weights):
    """`function` of each device's share of the arguments and the first token of its vocabulary."""
    tokens, vocab = PartitionSpec(*split.hidden[:2]), PartitionSpec(split.vocab)
    first_V = jnp.arange(head.shape[0], dtype=targets.dtype)
    return jax.shard_map(
        lambda x, head, bias, first_V, targets, weights: function(
            x, head, bias, first_V[0], targets, weights
        ),
        in_specs=(split.hidden, vocab, vocab, vocab, tokens, tokens),
        out_specs=out_specs,
        axis_names=set(split.names),
        check_vma=False,
    )(x, head.astype(x.dtype), bias, first_V, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(static, x_BTD, head_VD, bias_V, targets_BT, weights_BT):
    split = static[-1]
    function = functools.partial(_losses, static, False, head_VD.shape[0])
    if not split.names:
        return function(x_BTD, head_VD, bias_V, 0, targets_BT, weights_BT)

    def local(*arguments):
        return jax.lax.psum(function(*arguments), split.tokens)

    return _on_mesh(split, local, PartitionSpec(), x_BTD, head_VD, bias_V, targets_BT, weights_BT)


def _summed_forward(static, x_BTD, head_VD, bias_V, targets_BT, weights_BT):
    split = static[-1]
    function = functools.partial(_losses, static, True, head_VD.shape[0])
    arguments = x_BTD, head_VD, bias_V, targets_BT, weights_BT
    if not split.names:
        loss, nats, dx, dhead, dbias = function(*arguments[:3], 0, *arguments[3:])
        return (loss, nats), (dx, dhead.astype(head_VD.dtype), dbias)

    def local(*arguments):
        loss, nats, dx, dhead, dbias = function(*arguments)
        loss, nats, dbias = jax.lax.psum((loss, nats, dbias), split.tokens)
        if split.vocab and split.short != split.hidden:
            dx = jax.lax.psum_scatter(dx, split.vocab, scatter_dimension=1, tiled=True)
        elif split.vocab:
            dx = jax.lax.psum(dx, split.vocab)
        # Else each device would keep its whole `dhead` until the backward pass is over.
        dhead = summed_over(split.tokens, dhead, split.head)
        return loss, nats, after(dhead, dx), dhead, dbias

    out_specs = (
        PartitionSpec(),
        PartitionSpec(),
        split.short if split.vocab else split.hidden,
        PartitionSpec(split.vocab, shared(split.head, split.tokens)[1]),
        PartitionSpec(split.vocab),
    )
    loss, nats, dx, dhead, dbias = _on_mesh(split, local, out_specs, *arguments)
    return (loss, nats), (dx, dhead.astype(head_VD.dtype), dbias)


def _summed_backward(static, saved, gradient):
    scale, _ = gradient  # nats are reported, never differentiated; scale is float32
    dx, dhead, dbias = jax.tree.map(lambda array: (array * scale).astype(array.dtype), saved)
    return dx, dhead, dbias, None, None


_summed.defvjp(_summed_forward, _summed_backward)
