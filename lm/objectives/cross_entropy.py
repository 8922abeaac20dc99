"""Cross-entropy of a linear head, without ever holding all its float32 logits.

The sequence is cut into chunks; each chunk's logits are made, used and dropped. Since the loss is a
sum, its gradient with respect to the logits is known as soon as they are, so the forward pass makes
the gradients of hidden states and head as well, and the backward pass only scales them: three
matrix products in all, as without chunks, where recomputing the logits would take four.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.config import ConfigError
from lm.models.numerics import contract
from lm.parallel.sharding import constrain

CHUNK_ELEMENTS = 2**25  # logits held at once: 128 MiB of float32


def chunk_length(batch: int, length: int, vocab: int, limit: int = CHUNK_ELEMENTS) -> int:
    """The largest divisor of `length` whose chunk of logits has at most `limit` elements."""
    most = max(1, limit // (batch * vocab))
    return max(n for n in range(1, length + 1) if length % n == 0 and (n <= most or n == 1))


class Shape(NamedTuple):
    """What bends the loss away from plain cross-entropy of the logits."""

    z_loss: float = 0.0  # coefficient of Σ w·log²Z (Chowdhery et al. 2022, §5)
    label_smoothing: float = 0.0  # share of the target spread over the vocabulary
    softcap: float = 0.0  # c in c·tanh(logits/c); 0: none


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
      chunk: positions a chunk; 0 chooses.

    Returns:
      (loss, nats): scalars, float32. `nats` is Σ w·(-log p(target)); `loss` has the regularisers
      too. Only `loss` has a gradient, and only with respect to hidden states, head and bias.

    Raises:
      ConfigError: `chunk` does not divide the sequence length.
    """
    batch, length, _ = x_BTD.shape
    chunk = chunk or chunk_length(batch, length, head_VD.shape[0])
    if length % chunk:
        divisors = [n for n in range(1, length + 1) if length % n == 0]
        closest = min(divisors, key=lambda n: abs(n - chunk))
        raise ConfigError(
            f"config.objective.chunk={chunk} does not divide the sequence length {length}: "
            f"use {closest}, or 0 to choose it"
        )
    shape = Shape(float(z_loss), float(label_smoothing), float(softcap))
    return _summed(shape, chunk, x_BTD, head_VD, bias_V, targets_BT, weights_BT)


def _chunk_loss(shape, x, head, bias, targets, weights):
    """(loss, nats, logits, log_z) of one chunk."""
    logits = contract("btd,vd->btv", x, head, jnp.float32)
    if bias is not None:
        logits += bias
    if shape.softcap:
        logits = shape.softcap * jnp.tanh(logits / shape.softcap)
    logits = constrain(logits, "batch", "length", "vocab")
    log_z = jax.nn.logsumexp(logits, -1)
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    nats = loss = jnp.sum(weights * (log_z - chosen))
    if shape.label_smoothing:
        loss += shape.label_smoothing * jnp.sum(weights * (chosen - logits.mean(-1)))
    if shape.z_loss:
        loss += shape.z_loss * jnp.sum(weights * log_z**2)
    return loss, nats, logits, log_z


def _logit_gradient(shape, logits, log_z, targets, weights):
    """The gradient of a chunk's loss with respect to x·headᵀ + bias."""
    softmax_scale = weights * (1 + 2 * shape.z_loss * log_z) if shape.z_loss else weights
    gradient = jnp.exp(logits - log_z[..., None]) * softmax_scale[..., None]
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    kept = weights * (1 - shape.label_smoothing) if shape.label_smoothing else weights
    gradient -= jnp.where(hit, kept[..., None], 0)
    if shape.label_smoothing:
        gradient -= (weights * (shape.label_smoothing / logits.shape[-1]))[..., None]
    if shape.softcap:
        gradient *= 1 - (logits / shape.softcap) ** 2
    return gradient


def _split(array, chunk):
    """[B, T, …] as [chunks, B, chunk, …]."""
    batch, length = array.shape[:2]
    shape = (batch, length // chunk, chunk, *array.shape[2:])
    return jnp.moveaxis(array.reshape(shape), 1, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(shape, chunk, x_BTD, head_VD, bias_V, targets_BT, weights_BT):
    def step(total, part):
        x, targets, weights = part
        loss, nats, *_ = _chunk_loss(shape, x, head_VD, bias_V, targets, weights)
        return (total[0] + loss, total[1] + nats), None

    if chunk == x_BTD.shape[1]:
        return step((0.0, 0.0), (x_BTD, targets_BT, weights_BT))[0]
    parts = tuple(_split(a, chunk) for a in (x_BTD, targets_BT, weights_BT))
    return jax.lax.scan(step, (jnp.float32(0), jnp.float32(0)), parts)[0]


def _summed_forward(shape, chunk, x_BTD, head_VD, bias_V, targets_BT, weights_BT):
    def step(carry, part):
        loss_sum, nats_sum, dhead, dbias = carry
        x, targets, weights = part
        loss, nats, logits, log_z = _chunk_loss(shape, x, head_VD, bias_V, targets, weights)
        dlogits = _logit_gradient(shape, logits, log_z, targets, weights)
        if bias_V is not None:
            dbias += dlogits.sum((0, 1))
        dlogits = jax.lax.optimization_barrier(dlogits.astype(x.dtype))
        dx = contract("btv,vd->btd", dlogits, head_VD)
        dhead += contract("btv,btd->vd", dlogits, x, jnp.float32)
        return (loss_sum + loss, nats_sum + nats, dhead, dbias), dx

    dbias = None if bias_V is None else jnp.zeros(bias_V.shape, jnp.float32)
    carry = (jnp.float32(0), jnp.float32(0), jnp.zeros(head_VD.shape, jnp.float32), dbias)
    if chunk == x_BTD.shape[1]:
        (loss, nats, dhead, dbias), dx = step(carry, (x_BTD, targets_BT, weights_BT))
    else:
        parts = tuple(_split(a, chunk) for a in (x_BTD, targets_BT, weights_BT))
        (loss, nats, dhead, dbias), dx = jax.lax.scan(step, carry, parts)
        dx = jnp.moveaxis(dx, 0, 1).reshape(x_BTD.shape)
    return (loss, nats), (dx, dhead.astype(head_VD.dtype), dbias)


def _summed_backward(shape, chunk, saved, gradient):
    scale, _ = gradient  # nats are reported, never differentiated; scale is float32
    dx, dhead, dbias = jax.tree.map(lambda array: (array * scale).astype(array.dtype), saved)
    return dx, dhead, dbias, None, None


_summed.defvjp(_summed_forward, _summed_backward)
