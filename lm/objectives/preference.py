"""Losses of preferences, of log-probabilities summed over whole replies.

Pairs have shape [P, 2]: the reply that was chosen, and the one that was rejected. Each function
gives the loss of every pair or reply, and what it rewards: β·log of the policy's probability over
the reference's, which is what a reward model would give up to a constant (Rafailov et al. 2023).
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from lm.config import AboveZero, Bounds, NotNegative, check

# What each loss reads of the config besides `loss` and `beta`: of objective dpo by its name.
READS = {
    "sigmoid": ("label_smoothing", "per_token"),
    "robust": ("label_smoothing", "per_token"),
    "hinge": ("per_token",),
    "ipo": (),
    "simpo": ("label_smoothing", "margin"),
    "orpo": (),
    "kto": ("desirable", "undesirable"),
}


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """The `objective.preference` section: of objectives dpo, orpo and kto."""

    # Of dpo: sigmoid (Rafailov et al. 2023), robust to flipped labels (Chowdhury et al. 2024),
    # hinge (Zhao et al. 2023), ipo (Azar et al. 2023), simpo, without reference (Meng et al. 2024)
    loss: Literal["sigmoid", "robust", "hinge", "ipo", "simpo"] = "sigmoid"
    # How much a log-ratio counts: the KL penalty's coefficient of the problem that is solved (ipo:
    # its τ; orpo: the weight λ of the odds ratio).
    beta: AboveZero = 0.1
    # The share of pairs whose labels are taken to be flipped (sigmoid, simpo: Mitchell 2023)
    label_smoothing: Annotated[float, Bounds(0, 0.5, "[)")] = 0.0
    per_token: bool = False  # compare means over a reply's tokens, not sums; ipo and simpo do
    margin: NotNegative = 0.0  # simpo's γ: by how much the chosen reply's reward should be higher
    desirable: NotNegative = 1.0  # kto's weight of replies that are desirable, ...
    undesirable: NotNegative = 1.0  # ... and of those that are not

    def check_reads(self, objective: str, prefix: str) -> None:
        """Raises ConfigError where a field is set that the objective's loss does not read."""
        loss = self.loss if objective == "dpo" else objective
        read = ("beta", *READS.get(loss, ()), *(("loss",) if objective == "dpo" else ()))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            readers = [name for name, reads in READS.items() if field.name in reads]
            check(
                value == field.default or (field.name in read and loss in READS),
                f"{prefix}.{field.name}={value!r} does nothing for {loss!r}; it is read by "
                f"{', '.join(readers) or 'objectives of preferences'}: leave it out",
            )


def dpo(
    config: PreferenceConfig,
    policy_P2: jax.Array,
    reference_P2: jax.Array | None,
    count_P2: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7) and its variants.

    Args:
      policy_P2, reference_P2: summed log-probabilities; simpo needs no reference.
      count_P2: how many tokens were summed.

    Returns:
      (loss_P, reward_P2), of the sums or means that the loss compares.
    """
    ratio_P2 = policy_P2 if config.loss == "simpo" else policy_P2 - reference_P2
    if config.per_token or config.loss in ("ipo", "simpo"):
        ratio_P2 = ratio_P2 / jnp.maximum(count_P2, 1)
    reward_P2 = config.beta * ratio_P2
    gap_P = reward_P2[:, 0] - reward_P2[:, 1]
    flipped = config.label_smoothing
    if config.loss == "ipo":
        loss_P = (ratio_P2[:, 0] - ratio_P2[:, 1] - 0.5 / config.beta) ** 2
    elif config.loss == "hinge":
        loss_P = jax.nn.relu(1 - gap_P)
    else:
        # γ is 0 but for simpo, whose rewards are to differ by more than that.
        right_P, wrong_P = _nats(gap_P - config.margin), _nats(config.margin - gap_P)
        if config.loss == "robust":  # unbiased: what flipped labels add is taken off
            loss_P = ((1 - flipped) * right_P - flipped * wrong_P) / (1 - 2 * flipped)
        else:
            loss_P = (1 - flipped) * right_P + flipped * wrong_P
    return loss_P, reward_P2


def orpo(
    config: PreferenceConfig, policy_P2: jax.Array, count_P2: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Odds-ratio preference optimisation (Hong et al. 2024, eq. 6 and 7): without a reference.

    The chosen reply's mean nats per token, and λ = β times the nats of its odds being the higher.
    Every pair counts alike, however long its replies.

    Returns:
      (loss_P, reward_P2); the reward is β·mean log-probability.
    """
    mean_P2 = policy_P2 / jnp.maximum(count_P2, 1)
    # A probability that rounds to 1 has odds that are not finite.
    below_P2 = jnp.where(count_P2 > 0, jnp.minimum(mean_P2, -1e-7), -1.0)
    log_odds_P2 = below_P2 - jnp.log(-jnp.expm1(below_P2))
    loss_P = -mean_P2[:, 0] + config.beta * _nats(log_odds_P2[:, 0] - log_odds_P2[:, 1])
    return loss_P, config.beta * mean_P2


def kto(
    config: PreferenceConfig,
    policy_B: jax.Array,
    reference_B: jax.Array,
    desirable_B: jax.Array,
    divergence: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Kahneman–Tversky optimisation (Ethayarajh et al. 2024, eq. 8): replies, each good or not.

    Args:
      policy_B, reference_B: summed log-probabilities.
      desirable_B: whether the reply is.
      divergence: the KL divergence that rewards are compared with, a scalar without gradient: see
        `kto_divergence`.

    Returns:
      (loss_B, gap_B): β times by how much the log-ratio lies on the right side of the divergence.
    """
    ratio_B = policy_B - reference_B
    gap_B = config.beta * jnp.where(desirable_B, ratio_B - divergence, divergence - ratio_B)
    weight_B = jnp.where(desirable_B, config.desirable, config.undesirable)
    return weight_B * jax.nn.sigmoid(-gap_B), gap_B


def kto_divergence(total: jax.Array, replies: jax.Array) -> jax.Array:
    """KL(policy‖reference) of summed log-ratios of so many mismatched replies; not below 0.

    A prompt with another prompt's reply stands for a sample of neither (Ethayarajh et al. 2024,
    §4.1). It is one number for the whole batch, so sums of all its parts come first.
    """
    return jax.lax.stop_gradient(jnp.maximum(total / jnp.maximum(replies, 1), 0))


def _nats(gap: jax.Array) -> jax.Array:
    """-log σ(gap)."""
    return jax.nn.softplus(-gap)
