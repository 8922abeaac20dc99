"""What the loss is."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lm.config import Count, NotNegative, ShareBelowOne, check
from lm.models import ModelConfig
from lm.objectives.distill import DistillationConfig
from lm.objectives.policy import PolicyConfig
from lm.objectives.preference import PreferenceConfig

# What a batch asks of the model (`lm.data` makes it) → the architectures that can answer.
OBJECTIVES = {
    "causal": ("decoder",),  # the next token
    "prefix": ("decoder",),  # the next token, after a prefix that sees itself whole
    "masked": ("encoder",),  # the tokens that are hidden (Devlin et al. 2019)
    "span_corruption": ("encoder_decoder",),  # the spans that are hidden (Raffel et al. 2020)
    "seq2seq": ("encoder_decoder",),  # a text's counterpart, with teacher forcing
    "sft": ("decoder",),  # what the assistant says in a conversation (Ouyang et al. 2022)
    "reward": ("decoder",),  # which of two replies is better, by a classifier of one label
    "policy": ("decoder",),  # what a policy drew, by its advantage (`lm.objectives.policy`)
    "value": ("decoder",),  # a critic: what reward is still to come
    "dpo": ("decoder",),  # that one of two replies is preferred (Rafailov et al. 2023)
    "orpo": ("decoder",),  # the same, and that reply itself, without a reference
    "kto": ("decoder",),  # that a reply is desirable, or not (Ethayarajh et al. 2024)
    "distillation": ("decoder",),  # what a teacher predicts
}
# Those that compare whole replies; what they read is the section `preference`.
PREFERENCES = ("dpo", "orpo", "kto")


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
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    preference: PreferenceConfig = dataclasses.field(default_factory=PreferenceConfig)
    distillation: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)

    @property
    def has_reference(self) -> bool:
        """Whether a frozen model is compared with."""
        return self.name in ("dpo", "kto", "distillation") and self.preference.loss != "simpo"

    @property
    def texts_per_row(self) -> int:
        """Texts side by side in a row of a batch: of a pair of replies both."""
        return 2 if self.name in (*PREFERENCES, "reward") else 1

    @property
    def of_whole_batch(self) -> bool:
        """Whether the loss of a part of a batch depends on all of it; see `whole_batch`."""
        return self.name == "kto"

    def validate(self, prefix: str = "config.objective") -> None:
        """Raises ConfigError where a field is set that the objective does not read."""
        self.preference.check_reads(self.name, f"{prefix}.preference")
        check(
            self.name == "distillation" or self.distillation == DistillationConfig(),
            f"{prefix}.distillation is for {prefix}.name='distillation', not {self.name!r}",
        )
        for field in ("z_loss", "label_smoothing"):
            value = getattr(self, field)
            check(
                value == 0 or self.name not in (*PREFERENCES, "reward", "distillation"),
                f"{prefix}.{field}={value} does nothing for {prefix}.name={self.name!r}: leave it "
                "out",
            )


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
    elif objective.name != "value":
        check(
            model.has_output_head,
            f"{prefix}.objective.name={objective.name!r} needs an output head, and the model has "
            + (
                f"{prefix}.model.classifier={model.classifier!r} in its place: set it to 'none', "
                "or the objective to 'reward'"
                if model.output_head
                else f"{prefix}.model.output_head=False: only 'reward' learns from a body alone"
            ),
        )
