"""Log-probabilities of given tokens, as preferences and policies compare them.

Everything is indexed by the place of the target: `logprob_BT[b, t]` is log p(targets[b, t]) after
inputs[b, :t + 1], and `weights` say where a target is. Elsewhere all is exactly 0, whatever stands
there, and without gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.models import Model
from lm.models.moe.experts import RouterStats
from lm.objectives.chunked import Part, each
from lm.objectives.config import ObjectiveConfig
from lm.objectives.tokens import text_of


class _Tokens(NamedTuple):
    targets: jax.Array
    support: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _LogProb:
    """The log-probability of each target and, if asked, the entropy of its distribution."""

    temperature: float
    entropy: bool

    @property
    def num_values(self) -> int:
        return 1 + self.entropy

    def values(self, part: Part, tokens: _Tokens, others):
        if self.temperature != 1:
            part = part._replace(logits=part.logits / self.temperature)
        if tokens.support is not None:
            kept = part.bits(tokens.support) | part.is_token(tokens.targets)
            part = part._replace(logits=jnp.where(kept, part.logits, -jnp.inf))
        log_z = part.log_z()
        logprob = part.at(tokens.targets) - log_z
        if not self.entropy:
            return (logprob,), (part, log_z, None)
        log_p = part.logits - log_z[..., None]
        p = jnp.exp(log_p)
        entropy = -part.sum(jnp.where(p > 0, p * log_p, 0))
        return (logprob, entropy), (part, log_z, entropy)

    def gradient(self, saved, tokens: _Tokens, weights, entropy_weights=None):
        part, log_z, entropy = saved
        log_p = part.logits - log_z[..., None]
        p = jnp.exp(log_p)
        gradient = jnp.where(part.is_token(tokens.targets), weights[..., None], 0)
        gradient -= weights[..., None] * p
        if entropy_weights is not None:
            slope = jnp.where(p > 0, p * (log_p + entropy[..., None]), 0)
            gradient -= entropy_weights[..., None] * slope
        return gradient / self.temperature


def linear_logprobs(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    bias_V: jax.Array | None = None,
    softcap: float = 0.0,
    temperature: float = 1.0,
    support_BTW: jax.Array | None = None,
    entropy: bool = False,
    chunk: int = 0,
) -> tuple[jax.Array, jax.Array | None]:
    """Log-probabilities of the targets under the softmax of x·headᵀ + bias.

    Args:
      x_BTD: hidden states, in the compute dtype.
      head_VD: the output head.
      targets_BT: the tokens asked for.
      weights_BT: 0 where nothing is asked.
      bias_V: the head's bias.
      softcap: logits are c·tanh(·/c); 0: as they are.
      temperature: logits are then divided by it; above 0.
      support_BTW: of each place, the tokens among which probabilities are shared, as bits of
        uint32: bit i of word w is that of token 32 w + i. The target is always among them.
      entropy: whether entropies are asked for, too.
      chunk: positions whose logits exist at once, on one device; 0 chooses.

    Returns:
      (logprob_BT, entropy_BT or None), float32, with gradients with respect to hidden states, head
      and bias; 0 where weights are.

    Raises:
      ConfigError: `chunk` does not divide the sequence length.
    """
    asked_BT = weights_BT > 0
    x_BTD = jnp.where(asked_BT[..., None], x_BTD, 0)
    targets_BT = jnp.where(asked_BT, targets_BT, 0)
    if support_BTW is not None and support_BTW.shape[-1] * 32 < head_VD.shape[0]:
        raise ValueError(f"support {support_BTW.shape} is too short for {head_VD.shape[0]} tokens")
    measure = _LogProb(float(temperature), entropy)
    tokens = _Tokens(targets_BT, support_BTW)
    values = each(measure, x_BTD, head_VD, bias_V, tokens, softcap=softcap, chunk=chunk)
    logprob_BT, *entropies = (jnp.where(asked_BT, value, 0) for value in values)
    return logprob_BT, entropies[0] if entropies else None


def token_logprobs(
    model: Model,
    batch: Mapping[str, jax.Array],
    config: ObjectiveConfig,
    *,
    temperature: float = 1.0,
    support_BTW: jax.Array | None = None,
    entropy: bool = False,
    dropout_key: jax.Array | None = None,
    rows_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None, RouterStats | None]:
    """Log-probabilities of a batch's targets; see `linear_logprobs`.

    Args:
      model: bound; a decoder.
      batch: of arrays [B, T]; see `lm.objectives.token_loss`.
      config: its `chunk` counts.
      dropout_key: turns dropout on.
      rows_B: each row's number in the whole batch, for dropout.

    Returns:
      (logprob_BT, entropy_BT or None, what the routers did, where there are experts).
    """
    x_BTD, router = model.forward(text_of(batch, rows_B), None, dropout_key)
    asked = {"temperature": temperature, "support_BTW": support_BTW, "entropy": entropy}
    return *stream_logprobs(model, x_BTD, batch, config, **asked), router


def stream_logprobs(
    model: Model,
    x_BTD: jax.Array,
    batch: Mapping[str, jax.Array],
    config: ObjectiveConfig,
    **asked: Any,
) -> tuple[jax.Array, jax.Array | None]:
    """`linear_logprobs` of a batch's targets, of a model's last residual stream.

    Args:
      **asked: its `temperature`, `support_BTW` and `entropy`.
    """
    return linear_logprobs(
        model.readout(x_BTD),
        model.output_weights(),
        batch["targets"],
        batch["weights"],
        bias_V=model.output_bias(),
        softcap=model.config.logits_softcap,
        chunk=config.chunk,
        **asked,
    )
