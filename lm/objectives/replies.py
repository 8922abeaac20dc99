"""Objectives that compare a model's replies with one another, or with a frozen model's.

Replies are the targets of their rows. A pair is two rows side by side, [P, 2, T], in every field of
its batch: the loss reads them as 2P rows, which keeps the mesh's split of P.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lm.models import Model
from lm.models.moe.experts import RouterStats
from lm.objectives.config import ObjectiveConfig
from lm.objectives.distill import linear_divergence
from lm.objectives.logprobs import token_logprobs
from lm.objectives.preference import dpo, kto, kto_divergence, orpo
from lm.objectives.tokens import Batch, num_tokens, reply_rows, text_of, with_router

Metrics = dict[str, jax.Array]


def preference_loss(
    model: Model,
    batch: Batch,
    config: ObjectiveConfig,
    dropout_key: jax.Array | None = None,
    rows_B: jax.Array | None = None,
    reference: Model | None = None,
) -> tuple[jax.Array, Metrics]:
    """Summed loss of pairs, by objective dpo or orpo; see `lm.objectives.preference`.

    Args:
      batch: of arrays [P, 2, T]: chosen and rejected. A pair counts where both have targets.
      reference: for dpo, but for its loss simpo.

    Returns:
      The summed loss, and summed metrics: `nats`, `weight` (pairs), `tokens`, `accuracy` (whether
      the chosen reply's reward is the higher), `margin` (by how much), `chosen_reward`,
      `rejected_reward`; the router's, where there are experts.
    """
    policy_P2, count_P2, router = reply_logprobs(model, batch, config, dropout_key, rows_B)
    if config.name == "orpo":
        loss_P, reward_P2 = orpo(config.preference, policy_P2, count_P2)
    else:
        reference_P2 = None
        if reference is not None:
            reference_P2 = reply_logprobs(reference, batch, config)[0]
        loss_P, reward_P2 = dpo(config.preference, policy_P2, reference_P2, count_P2)
    real_P = jnp.all(count_P2 > 0, 1)
    chosen_P, rejected_P = reward_P2[:, 0], reward_P2[:, 1]
    measured = {
        "accuracy": chosen_P > rejected_P,
        "margin": chosen_P - rejected_P,
        "chosen_reward": chosen_P,
        "rejected_reward": rejected_P,
    }
    return _summed(loss_P, measured, real_P, batch, config, router)


def kto_loss(
    model: Model,
    batch: Batch,
    config: ObjectiveConfig,
    dropout_key: jax.Array | None = None,
    rows_B: jax.Array | None = None,
    reference: Model | None = None,
) -> tuple[jax.Array, Metrics]:
    """Summed loss of replies that are desirable or not; see `lm.objectives.preference.kto`.

    Args:
      batch: of arrays [B, 2, T], of which the first is the reply and the second, with the same
        prompt, another's; `label` [B], 1 where the reply is desirable; and, where the rows are a
        part of a batch, the whole batch's `mismatched` and `mismatches` [B], each the same in all
        rows: see `kto_sums`.

    Returns:
      The summed loss, and summed metrics: `nats`, `weight` (replies), `tokens`, `accuracy` (whether
      a reply's log-ratio lies on the right side of the divergence), `margin` (β times by how much),
      `divergence`; the router's, where there are experts.
    """
    sums = batch if "mismatched" in batch else kto_sums(model, batch, config, reference)
    divergence = kto_divergence(jnp.max(sums["mismatched"]), jnp.max(sums["mismatches"]))
    replies = _of(batch, slice(0, 1))
    policy_B1, count_B1, router = reply_logprobs(model, replies, config, dropout_key, rows_B)
    reference_B1 = reply_logprobs(reference, replies, config)[0]
    loss_B, gap_B = kto(
        config.preference, policy_B1[:, 0], reference_B1[:, 0], batch["label"] > 0, divergence
    )
    measured = {
        "accuracy": gap_B > 0,
        "margin": gap_B,
        "divergence": jnp.broadcast_to(divergence, gap_B.shape),
    }
    return _summed(loss_B, measured, count_B1[:, 0] > 0, replies, config, router)


def kto_sums(
    model: Model, batch: Batch, config: ObjectiveConfig, reference: Model | None
) -> Metrics:
    """Of mismatched replies, what their divergence is made of: their summed log-ratio and number.

    A whole batch's are the sums of its parts', and are taken before any part has a loss.
    """
    others = _of(batch, slice(1, 2))
    policy_B1, count_B1, _ = reply_logprobs(model, others, config)
    reference_B1 = reply_logprobs(reference, others, config)[0]
    sums = {
        "mismatched": jnp.sum(policy_B1 - reference_B1),
        "mismatches": jnp.sum(count_B1 > 0, dtype=jnp.float32),
    }
    return jax.lax.stop_gradient(sums)


def distillation_loss(
    model: Model,
    batch: Batch,
    config: ObjectiveConfig,
    dropout_key: jax.Array | None = None,
    rows_B: jax.Array | None = None,
    reference: Model | None = None,
) -> tuple[jax.Array, Metrics]:
    """Summed divergence from a teacher, the `reference`, over a batch's targets [B, T].

    Returns:
      The summed loss, and summed metrics: `nats` (the divergence), `weight` (targets), `tokens`;
      the router's, where there are experts.
    """
    text = text_of(batch, rows_B)
    x_BTD, router = model.forward(text, None, dropout_key)
    teacher_BTD, _ = reference.forward(text)
    loss = linear_divergence(
        model.readout(x_BTD),
        model.output_weights(),
        jax.lax.stop_gradient(reference.readout(teacher_BTD)),
        reference.output_weights(),
        batch["weights"],
        config.distillation,
        bias_V=model.output_bias(),
        teacher_bias_V=reference.output_bias(),
        softcap=model.config.logits_softcap,
        teacher_softcap=reference.config.logits_softcap,
        chunk=config.chunk,
    )
    weight = jnp.sum(batch["weights"])
    metrics = {"nats": loss, "weight": weight, "tokens": num_tokens(text)}
    return with_router(loss, metrics, router, config)


def reply_logprobs(
    model: Model,
    batch: Batch,
    config: ObjectiveConfig,
    dropout_key: jax.Array | None = None,
    rows_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, RouterStats | None]:
    """Log-probabilities of replies [B, N, T], each summed over its targets.

    Returns:
      (logprob_BN, float32; count_BN, the targets of each; what the routers did).
    """
    B, N = batch["inputs"].shape[:2]
    rows, rows_R = reply_rows(batch, rows_B)
    logprob_RT, _, router = token_logprobs(
        model, rows, config, dropout_key=dropout_key, rows_B=rows_R
    )
    count_BN = jnp.sum(batch["weights"] > 0, -1, dtype=jnp.float32)
    return jnp.sum(logprob_RT, -1).reshape(B, N), count_BN, router


def _of(batch: Batch, which: slice) -> Batch:
    """Some of the replies of each row."""
    return {name: x[:, which] for name, x in batch.items() if x.ndim == 3}


def _summed(loss_P, measured: Metrics, real_P, batch: Batch, config: ObjectiveConfig, router):
    """Sums over what is real."""

    def total(x_P: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(real_P, x_P, 0), dtype=jnp.float32)

    loss = total(loss_P)
    metrics = {
        "nats": loss,
        "weight": total(jnp.ones_like(loss_P)),
        "tokens": num_tokens(text_of(reply_rows(batch)[0])),
        **{name: total(value) for name, value in measured.items()},
    }
    return with_router(loss, metrics, router, config)
