"""Cross-entropy of a linear head, without ever holding all its float32 logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lm.objectives.chunked import Part, summed


@dataclasses.dataclass(frozen=True)
class _CrossEntropy:
    """(loss, nats) of the `tokens`, which are the targets."""

    z_loss: float
    label_smoothing: float

    num_values = 2

    def values(self, part: Part, tokens, others):
        log_z, chosen = part.log_z(), part.at(tokens)
        nats = loss = log_z - chosen
        if self.label_smoothing:
            loss += self.label_smoothing * (chosen - part.sum(part.logits) / part.vocab)
        if self.z_loss:
            loss += self.z_loss * log_z**2
        return (loss, nats), (part, log_z)

    def gradient(self, saved, tokens, weights):
        part, log_z = saved
        scale = weights * (1 + 2 * self.z_loss * log_z) if self.z_loss else weights
        gradient = jnp.exp(part.logits - log_z[..., None]) * scale[..., None]
        kept = weights * (1 - self.label_smoothing) if self.label_smoothing else weights
        gradient -= jnp.where(part.is_token(tokens), kept[..., None], 0)
        if self.label_smoothing:
            gradient -= (weights * (self.label_smoothing / part.vocab))[..., None]
        return gradient


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
      weights_BT: how much each position counts; where 0, the target may be anything.
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
    measure = _CrossEntropy(float(z_loss), float(label_smoothing))
    targets_BT = jnp.where(weights_BT != 0, targets_BT, 0)  # what stands elsewhere may be no token
    arguments = x_BTD, head_VD, bias_V, targets_BT, weights_BT
    return summed(measure, *arguments, softcap=softcap, chunk=chunk)
