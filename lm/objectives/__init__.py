"""Model and batch to loss: always *summed* loss and *summed* weight.

Division happens once, over the global batch, so packing, accumulation, data parallelism and padding
cannot change the loss.
"""

from __future__ import annotations

import jax

from lm.models import Model
from lm.objectives.config import OBJECTIVES, ObjectiveConfig, check_objective
from lm.objectives.reward import reward_loss
from lm.objectives.tokens import Batch, token_loss

__all__ = ["OBJECTIVES", "ObjectiveConfig", "check_objective", "loss", "token_loss"]


def loss(
    model: Model,
    batch: Batch,
    config: ObjectiveConfig,
    dropout_key: jax.Array | None = None,
    max_targets: int = 0,
    rows_B: jax.Array | None = None,
    reference: Model | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Summed loss of a batch by `config.name`, and summed metrics: see `token_loss`.

    Args:
      model: bound.
      reference: the frozen model, bound, that some objectives compare with.
    """
    if config.name == "reward":
        return reward_loss(model, batch, config, dropout_key, rows_B)
    return token_loss(model, batch, config, dropout_key, max_targets, rows_B)
