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
    "sft": ("decoder",),  # what the assistant says in a conversation (Ouyang et al. 2022)
    "reward": ("decoder",),  # which of two replies is better, by a classifier of one label
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
    # reward: coefficient of (r_chosen + r_rejected)²; Eisenstein et al. 2023: 0.01
    centering: NotNegative = 0.0


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
    if objective.name == "reward":
        check(
            model.classifier == "sequence" and model.num_labels == 1,
            f"{prefix}.objective.name='reward' needs {prefix}.model.classifier='sequence' and "
            f"num_labels=1, not {model.classifier!r} and {model.num_labels}",
        )
    else:
        check(
            model.has_output_head,
            f"{prefix}.model.classifier={model.classifier!r} stands in place of the output head, "
            f"which {prefix}.objective.name={objective.name!r} needs: set it to 'none', or the "
            "objective to 'reward'",
        )
