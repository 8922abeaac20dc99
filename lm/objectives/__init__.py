"""Model and batch to loss: always *summed* loss and *summed* weight.

Division happens once, over the global batch, so packing, accumulation, data parallelism and padding
cannot change the loss.
"""

from __future__ import annotations

import jax

from lm.models import Model
from lm.objectives.config import OBJECTIVES, ObjectiveConfig, check_objective
from lm.objectives.distill import DistillationConfig
from lm.objectives.experience import critic_loss, experience_loss
from lm.objectives.preference import PreferenceConfig
from lm.objectives.replies import distillation_loss, kto_loss, kto_sums, preference_loss
from lm.objectives.reward import reward_loss
from lm.objectives.tokens import Batch, token_loss

__all__ = [
    "OBJECTIVES",
    "DistillationConfig",
    "ObjectiveConfig",
    "PreferenceConfig",
    "check_objective",
    "loss",
    "token_loss",
    "whole_batch",
]

_OF_REPLIES = {
    "dpo": preference_loss,
    "orpo": preference_loss,
    "kto": kto_loss,
    "distillation": distillation_loss,
}


def loss(
    model: Model,
    batch: Batch,
    config: ObjectiveConfig,
    dropout_key: jax.Array | None = None,
    max_targets: int = 0,
    rows_B: jax.Array | None = None,
    reference: Model | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Summed loss of a batch by `config.name`, and summed metrics.

    See `token_loss` and, where whole replies are compared, `lm.objectives.replies`.

    Args:
      model: bound.
      reference: the frozen model, bound, that some objectives compare with.
    """
    if config.name == "reward":
        return reward_loss(model, batch, config, dropout_key, rows_B)
    if config.name == "policy":
        return experience_loss(model, batch, config, rows_B)
    if config.name == "value":
        return critic_loss(model, batch, config, rows_B)
    if config.name in _OF_REPLIES:
        return _OF_REPLIES[config.name](model, batch, config, dropout_key, rows_B, reference)
    return token_loss(model, batch, config, dropout_key, max_targets, rows_B)


def whole_batch(
    model: Model, batch: Batch, config: ObjectiveConfig, reference: Model | None = None
) -> dict[str, jax.Array]:
    """Sums that a part of a batch must know of all of it, without gradient; mostly none.

    Those of all parts, added up, are fields [B] of the batch, the same in every row.
    """
    return kto_sums(model, batch, config, reference) if config.name == "kto" else {}
