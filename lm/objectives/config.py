"""What the loss is."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lm.config import Count, NotNegative, ShareBelowOne, check
from lm.models import ModelConfig

# What a batch asks of the model (`lm.data` makes it) → the architectures that can answer.
OBJECTIVES = {
    "causal": ("decoder",),  # the next token
    "prefix": ("decoder",),  # the next token, after a prefix that sees itself whole
    "masked": ("encoder",),  # the tokens that are hidden (Devlin et al. 2019)
    "span_corruption": ("encoder_decoder",),  # the spans that are hidden (Raffel et al. 2020)
    "seq2seq": ("encoder_decoder",),  # a text's counterpart, with teacher forcing
}


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What the loss is."""

    name: Literal[tuple(OBJECTIVES)] = "causal"  # what it predicts; see OBJECTIVES
    z_loss: NotNegative = 0.0  # coefficient of log²Z (Chowdhery et al. 2022); 1e-4 where it is used
    # share of the target spread over the vocabulary; 2017: 0.1
    label_smoothing: ShareBelowOne = 0.0
    load_balancing: NotNegative = 0.01  # experts: coefficient of the load-balancing loss
    router_z: NotNegative = 0.001  # experts: coefficient of the router's z-loss
    chunk: Count = 0  # positions whose logits exist at once; 0 chooses


def check_objective(objective: ObjectiveConfig, model: ModelConfig, prefix: str) -> None:
    """Raises ConfigError unless `model` can be trained for `objective`."""
    allowed = OBJECTIVES[objective.name]
    fitting = [name for name, kinds in OBJECTIVES.items() if model.architecture in kinds]
    check(
        model.architecture in allowed,
        f"{prefix}.model.architecture={model.architecture!r} cannot be trained for "
        f"{prefix}.objective.name={objective.name!r}, which needs {' or '.join(allowed)}: set one "
        f"or the other (objectives of this architecture: {', '.join(fitting)})",
    )
    check(
        objective.name != "prefix" or model.cell == "attention",
        f"{prefix}.objective.name='prefix' needs {prefix}.model.cell='attention', not "
        f"{model.cell!r}: a recurrent network reads in order",
    )
