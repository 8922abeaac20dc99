"""Next-token prediction."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lm.config import check
from lm.models import Transformer
from lm.objectives.cross_entropy import linear_cross_entropy


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What the loss is."""

    z_loss: float = 0.0  # coefficient of log²Z (Chowdhery et al. 2022); 1e-4 where it is used
    chunk: int = 0  # positions whose logits exist at once; 0 chooses

    def validate(self, prefix: str = "config.objective") -> None:
        """Raises ConfigError on a negative coefficient or chunk."""
        check(self.z_loss >= 0, f"{prefix}.z_loss={self.z_loss} must not be negative")
        check(self.chunk >= 0, f"{prefix}.chunk={self.chunk} must be positive, or 0 to choose it")


def causal(
    model: Transformer,
    batch: Mapping[str, jax.Array],
    config: ObjectiveConfig,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Summed next-token loss of a batch (see `lm.data` for its fields).

    A batch whose rows are one document each may leave out `positions` and `segment_ids`.

    Returns:
      The summed loss to differentiate, and summed metrics: `nats` (cross-entropy without
      regularisers) and `weight` (target tokens).
    """
    x_BTD = model.hidden(
        batch["inputs"],
        batch.get("positions"),
        batch.get("segment_ids"),
        dropout_key=dropout_key,
    )
    loss, nats = linear_cross_entropy(
        x_BTD,
        model.output_weights(),
        batch["targets"],
        batch["weights"],
        config.z_loss,
        config.chunk,
    )
    return loss, {"nats": nats, "weight": jnp.sum(batch["weights"])}
