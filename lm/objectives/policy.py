"""Policy gradients: PPO's clipped losses, and those of GRPO and its heirs.

Functions of arrays [B, T] whose row is a response and whose place is that of a target. `weights`
is above 0 where the policy chose the target; what stands elsewhere, NaN even, changes no bit.

Each loss is a *sum* over tokens that are weighted so that division by the summed `weight` gives the
published mean: over tokens, or over responses of each one's own mean. Cutting a batch into
micro-batches, or padding it, then changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lm.config import AboveZero, Bounds, NotNegative, SizeOrZero, check


class _Form(NamedTuple):
    """What sets a loss apart."""

    ratio: Literal["token", "mean", "sum"]  # of a token, or of the response: e to the mean, the sum
    mean: Literal["tokens", "responses", "constant"]  # what the loss is the mean over
    surrogate: Literal["clip", "weight"] = "clip"


LOSSES = {
    "ppo": _Form("token", "tokens"),  # Schulman et al. 2017, eq. 7
    "grpo": _Form("token", "responses"),  # Shao et al. 2024, eq. 3
    "dapo": _Form("token", "tokens"),  # Yu et al. 2025, eq. 8; with clip_high 0.28
    "dr_grpo": _Form("token", "constant"),  # Liu et al. 2025: no length normalisation
    "gspo": _Form("mean", "responses"),  # Zheng et al. 2025, eq. 5; clips 3e-4 and 4e-4
    "cispo": _Form("token", "tokens", "weight"),  # MiniMax-M1, 2025; with clip_high 4 or so
    "rloo": _Form("sum", "responses"),  # Ahmadian et al. 2024, with PPO's clip
}


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """The loss of a policy on what it drew."""

    loss: Literal[tuple(LOSSES)] = "ppo"  # see LOSSES
    # the ratio π/π_old earns nothing below 1 − clip_low and above 1 + clip_high; CISPO has no lower
    clip_low: Annotated[float, Bounds(0, 1, "(]")] = 0.2
    clip_high: Annotated[float, Bounds(0, ends="(]")] = 0.2
    kl_coefficient: NotNegative = 0.0  # of KL(π‖π_ref) in the loss (GRPO); PPO has it in the reward
    # unbiased: k3 times the ratio, whose gradient is the KL's. k3: as GRPO published it
    kl_estimator: Literal["unbiased", "k3"] = "unbiased"
    entropy_coefficient: NotNegative = 0.0  # of the entropy bonus
    value_coefficient: NotNegative = 0.1  # of the critic's loss, where it shares the policy's trunk
    value_clip: NotNegative = 0.2  # how far a value may leave the old one; 0: as far as it likes
    # largest weight of a token in rollouts of an older policy, π_old/π_rollout; 0: no weights
    importance_cap: NotNegative = 0.0
    temperature: AboveZero = 1.0  # divides the logits; a rollout's own in a job that makes them
    # tokens; what Dr. GRPO divides every response's sum by; a rollout's own most, likewise
    max_response: SizeOrZero = 0


def policy_loss(
    logprob_BT: jax.Array,
    entropy_BT: jax.Array | None,
    batch: Mapping[str, jax.Array],
    config: PolicyConfig,
    value_BT: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Summed loss of a batch of responses.

    The gradient of the KL term: k1 in the loss would have none, E[∇log π] = 0. k3's own is, on
    policy, that of KL(π_ref‖π), not of KL(π‖π_ref). Times the ratio π/π_old, through which the
    gradient goes as well, it is that of KL(π‖π_ref) at each token's place, on and off policy
    (DeepSeek-V3.2, 2025, §3.1). None of them is the KL's effect on the contexts of later tokens:
    k1 in the reward has that too (`lm.alignment.advantages`).

    Args:
      logprob_BT: of the targets, under the policy that learns.
      entropy_BT: of its distribution at each place, where it is wanted; the bonus needs it.
      batch: `weights`, `advantage` and, where there are any, `old_logprob` (under the policy when
        the iteration began; else the ratio is 1), `rollout_logprob` (under the sampler's policy,
        for `importance_cap`), `ref_logprob` (under the reference; needed for `kl_coefficient`),
        and for `value_loss` what it needs: all [B, T].
      value_BT: the critic's, where it shares the policy's trunk.

    Returns:
      The summed loss to differentiate, and summed metrics: `nats` (that loss), `weight`, `tokens`,
      and, which are means once divided by `weight`, `policy_loss`, `ratio`, `clip_fraction`,
      `approx_kl` (k3 of KL(π_old‖π)); and where there is what they are made from, `entropy`, `kl`
      (k3 of KL(π‖π_ref)), `importance` and `value_loss`'s.

    Raises:
      ConfigError: Dr. GRPO without `max_response`.
    """
    form, norm = LOSSES[config.loss], _Norm.of(config, batch["weights"])
    logprob_BT, advantage_BT = norm.kept(logprob_BT), norm.kept(batch["advantage"])
    old_BT = norm.kept(batch["old_logprob"]) if "old_logprob" in batch else logprob_BT
    old_BT = jax.lax.stop_gradient(old_BT)
    token_BT = logprob_BT - old_BT
    log_BT = norm.over_response(token_BT, form.ratio)
    low, high = jnp.log1p(-config.clip_low), jnp.log1p(config.clip_high)
    # min(r·A, clip(r)·A), by the sign of A; in logs, where what is cut off cannot overflow.
    if form.surrogate == "clip":
        clipped_BT = jnp.where(
            advantage_BT >= 0, jnp.minimum(log_BT, high), jnp.maximum(log_BT, low)
        )
        loss_BT = -jnp.exp(clipped_BT) * advantage_BT
    else:
        clipped_BT = jnp.minimum(log_BT, high)
        loss_BT = -jax.lax.stop_gradient(jnp.exp(clipped_BT)) * advantage_BT * logprob_BT
    metrics = {
        "ratio": norm.metric(jnp.exp(log_BT)),
        "clip_fraction": norm.metric((clipped_BT != log_BT) & (advantage_BT != 0)),
        "approx_kl": norm.metric(jnp.expm1(token_BT) - token_BT),
    }
    if entropy_BT is not None:
        entropy_BT = norm.kept(entropy_BT)
        metrics["entropy"] = norm.metric(entropy_BT)
    importance_BT = jnp.ones_like(loss_BT)
    if config.importance_cap:
        stale_BT = norm.over_response(old_BT - norm.kept(batch["rollout_logprob"]), form.ratio)
        importance_BT = jnp.minimum(jnp.exp(stale_BT), config.importance_cap)
        metrics["importance"] = norm.metric(importance_BT)
        loss_BT *= importance_BT
    metrics["policy_loss"] = norm.metric(loss_BT)
    if "ref_logprob" in batch:
        away_BT = norm.kept(batch["ref_logprob"]) - logprob_BT
        kl_BT = jnp.expm1(away_BT) - away_BT
        metrics["kl"] = norm.metric(kl_BT)
        if config.kl_estimator == "unbiased":
            kl_BT *= jnp.exp(token_BT) * importance_BT
    if config.kl_coefficient:
        loss_BT += config.kl_coefficient * kl_BT
    if config.entropy_coefficient:
        loss_BT -= config.entropy_coefficient * entropy_BT
    loss = norm.sum(loss_BT)
    if value_BT is not None:
        critic, of_critic = value_loss(value_BT, batch, config)
        loss += config.value_coefficient * critic
        metrics |= {name: of_critic[name] for name in ("value_loss", "value_clip_fraction")}
    return loss, norm.totals(loss, metrics)


def value_loss(
    value_BT: jax.Array, batch: Mapping[str, jax.Array], config: PolicyConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Summed loss of a critic: half the squared error, of the worse of value and clipped value.

    ½·max((V − R)², (clip(V, V_old ± c) − R)²), as in OpenAI's code for Schulman et al. 2017; a
    mean over what `config.loss` is one over.

    Args:
      value_BT: of what is before each target.
      batch: `weights`, `value` (when the iteration began) and `return`: all [B, T].

    Returns:
      The summed loss, and metrics: `nats`, `weight`, `tokens`, `value_loss`, `value_clip_fraction`.
    """
    norm = _Norm.of(config, batch["weights"])
    value_BT, return_BT = norm.kept(value_BT), norm.kept(batch["return"])
    error_BT = worse_BT = jnp.square(value_BT - return_BT)
    if config.value_clip:
        old_BT = norm.kept(batch["value"])
        near_BT = jnp.clip(value_BT, old_BT - config.value_clip, old_BT + config.value_clip)
        worse_BT = jnp.maximum(error_BT, jnp.square(near_BT - return_BT))
    loss_BT = 0.5 * worse_BT
    metrics = {
        "value_loss": norm.metric(loss_BT),
        "value_clip_fraction": norm.metric(worse_BT > error_BT),
    }
    loss = norm.sum(loss_BT)
    return loss, norm.totals(loss, metrics)


class _Norm(NamedTuple):
    """What tokens count."""

    mask_BT: jax.Array
    loss_BT: jax.Array | float  # of a token in the loss
    metric_BT: jax.Array | float  # and in metrics, which are means
    weight: jax.Array

    @classmethod
    def of(cls, config: PolicyConfig, weights_BT: jax.Array) -> _Norm:
        mask_BT = weights_BT > 0
        length_B1 = jnp.sum(mask_BT, 1, keepdims=True, dtype=jnp.float32)
        mean = LOSSES[config.loss].mean
        check(
            mean != "constant" or config.max_response > 0,
            f"config.objective.policy.max_response={config.max_response} must be above 0 for "
            f"loss={config.loss!r}: the most tokens that a response can have",
        )
        if mean == "tokens":
            return cls(mask_BT, 1.0, 1.0, jnp.sum(length_B1))
        # Rows that pad a batch hold no response.
        weight, share_B1 = jnp.sum(length_B1 > 0, dtype=jnp.float32), 1 / jnp.maximum(length_B1, 1)
        of_loss = share_B1 if mean == "responses" else 1 / config.max_response
        return cls(mask_BT, of_loss, share_B1, weight)

    def kept(self, x_BT: jax.Array) -> jax.Array:
        """In float32 at least, 0 at masked places; so is its gradient."""
        x_BT = x_BT.astype(jnp.promote_types(x_BT.dtype, jnp.float32))
        return jnp.where(self.mask_BT, x_BT, 0)

    def over_response(self, log_BT: jax.Array, ratio: str) -> jax.Array:
        """A token's log-ratio, or its response's at each of its tokens."""
        if ratio == "token":
            return log_BT
        log_B1 = jnp.sum(log_BT, 1, keepdims=True)
        if ratio == "mean":
            log_B1 /= jnp.maximum(jnp.sum(self.mask_BT, 1, keepdims=True), 1)
        return jnp.where(self.mask_BT, log_B1, 0)

    def sum(self, x_BT: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(self.mask_BT, x_BT * self.loss_BT, 0))

    def metric(self, x_BT: jax.Array) -> jax.Array:
        x_BT = jax.lax.stop_gradient(x_BT)
        return jnp.sum(jnp.where(self.mask_BT, x_BT * self.metric_BT, 0))

    def totals(self, loss: jax.Array, metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
        tokens = jnp.sum(self.mask_BT, dtype=jnp.float32)
        loss = jax.lax.stop_gradient(loss)
        return {"nats": loss, "weight": self.weight, "tokens": tokens, **metrics}
