"""What a policy drew, read again by the policy that learns from it, and by its critic.

Scoring and training read through the same function, so that before the first update every ratio of
the two is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax

from lm.models import Model
from lm.models.moe.experts import RouterStats
from lm.objectives.config import ObjectiveConfig
from lm.objectives.logprobs import stream_logprobs
from lm.objectives.policy import policy_loss, value_loss
from lm.objectives.tokens import text_of, with_router


class Reading(NamedTuple):
    """What a policy makes of a batch."""

    logprob_BT: jax.Array  # of the targets, among the tokens of the batch's `support`
    entropy_BT: jax.Array
    value_BT: jax.Array | None  # of a value head beside the output head
    router: RouterStats | None


def read(
    model: Model,
    batch: Mapping[str, jax.Array],
    config: ObjectiveConfig,
    rows_B: jax.Array | None = None,
) -> Reading:
    """Reads a batch of responses with a bound policy.

    Args:
      batch: see `lm.objectives.token_loss`; `support`, where there is one, is
        `linear_logprobs`'s.
      config: its `policy.temperature` divides the logits.
    """
    x_BTD, router = model.forward(text_of(batch, rows_B))
    asked = {"temperature": config.policy.temperature, "support_BTW": batch.get("support")}
    logprob_BT, entropy_BT = stream_logprobs(model, x_BTD, batch, config, entropy=True, **asked)
    value_BT = model.values(x_BTD) if model.config.classifier == "token" else None
    return Reading(logprob_BT, entropy_BT, value_BT, router)


def experience_loss(
    model: Model,
    batch: Mapping[str, jax.Array],
    config: ObjectiveConfig,
    rows_B: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`policy_loss` of a bound policy, with its routers' losses."""
    found = read(model, batch, config, rows_B)
    loss, metrics = policy_loss(
        found.logprob_BT, found.entropy_BT, batch, config.policy, found.value_BT
    )
    return with_router(loss, metrics, found.router, config)


def critic_loss(
    model: Model,
    batch: Mapping[str, jax.Array],
    config: ObjectiveConfig,
    rows_B: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`value_loss` of a bound critic, a model with a head of one label."""
    x_BTD, router = model.forward(text_of(batch, rows_B))
    loss, metrics = value_loss(model.values(x_BTD), batch, config.policy)
    return with_router(loss, metrics, router, config)
