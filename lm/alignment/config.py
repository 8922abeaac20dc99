"""The config of learning from rewards, as config.json in the run's directory holds it."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from lm.alignment.advantages import AdvantageConfig
from lm.alignment.rewards import RewardsConfig
from lm.alignment.rollouts import RolloutConfig
from lm.config import Bounds, Count, NotNegative, Path, Positive, Seed, check
from lm.data import DataConfig
from lm.models import ModelConfig
from lm.models.adapters import AdapterConfig
from lm.objectives import ObjectiveConfig, check_objective
from lm.parallel.cluster import HostsConfig
from lm.parallel.layout import Layout
from lm.parallel.mesh import MeshConfig
from lm.tokenizers import TokenizerConfig
from lm.training.checkpoints import CheckpointConfig
from lm.training.config import OptimizerConfig, TrainConfig
from lm.training.schedules import make_schedule
from lm.training.workload import Workload


@dataclasses.dataclass(frozen=True)
class LearningConfig:
    """How the policy, and its critic, learn from an iteration's responses."""

    epochs: Positive = 1  # passes over them, each in an order of its own
    kl_stop: NotNegative = 0.0  # nats a token from the policy that wrote: no more epochs; 0: never
    reference: bool = True  # keep the first policy, to tell how far this one has gone from it
    # Of GAE: a model with parameters of its own, or a head of the policy's.
    critic: Literal["separate", "shared"] = "separate"
    # The reward model that a separate critic starts from; "": the policy, with a new head.
    critic_from: Path = ""
    critic_rate: NotNegative = 0.0  # a separate critic's learning rate; 0: the policy's


@dataclasses.dataclass(frozen=True)
class AlignJob:
    """Everything about one run of learning from rewards."""

    job: str = "align"
    seed: Seed = 0  # of rollouts, shuffles and new heads
    init_from: Path = ""  # the policy at the start, and the reference: a run or Hugging Face's
    ignore: str | tuple[str, ...] = ()  # see `lm.runs.config.TrainJob`
    chat_template: Path = ""  # how prompts are written; a text's start is "plain"
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    # Prompts; `batch_size` responses make an update, `block_size` tokens hold a prompt and its own
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    rewards: RewardsConfig = dataclasses.field(default_factory=RewardsConfig)
    advantage: AdvantageConfig = dataclasses.field(default_factory=AdvantageConfig)
    objective: ObjectiveConfig = dataclasses.field(
        default_factory=lambda: ObjectiveConfig(name="policy")
    )
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)  # of the policy
    learning: LearningConfig = dataclasses.field(default_factory=LearningConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)  # its steps are iterations
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    hosts: HostsConfig = dataclasses.field(default_factory=HostsConfig)
    strategy: str = ""  # see `lm.runs.config.TrainJob` for this and the next
    zero: Annotated[int, Bounds(-1, 3)] = -1
    shown: Count = 8  # prompts whose responses before and after stand side by side in samples.html

    def validate(self, prefix: str = "config") -> None:
        """Raises ConfigError where sections contradict each other."""
        check(bool(self.init_from), f"{prefix}.init_from='' must name a model to start from")
        check_objective(self.objective, self.model, prefix)
        check(
            self.objective.name == "policy",
            f"{prefix}.objective.name={self.objective.name!r} must be 'policy' here; which policy "
            "gradient it is, objective.policy.loss says",
        )
        longest = self.model.max_length
        check(
            not longest or self.data.block_size <= longest,
            f"{prefix}.data.block_size={self.data.block_size} is longer than "
            f"{prefix}.model.max_length={longest}: set it to {longest}",
        )
        rollout, batch_size = self.rollout, self.data.batch_size
        check(
            rollout.responses % batch_size == 0,
            f"{prefix}.data.batch_size={batch_size} must divide the {rollout.responses} responses "
            f"of rollout.prompts={rollout.prompts} × rollout.samples={rollout.samples}",
        )
        check(
            rollout.max_new_tokens <= self.data.block_size,
            f"{prefix}.rollout.max_new_tokens={rollout.max_new_tokens} leaves no room for a prompt "
            f"in {prefix}.data.block_size={self.data.block_size}: lower it, or raise the other",
        )
        check(
            self.advantage.name == "gae" or rollout.samples > 1,
            f"{prefix}.rollout.samples=1: {prefix}.advantage.name={self.advantage.name!r} compares "
            "the responses to one prompt, and needs 2 at least",
        )
        penalised = self.advantage.kl_coefficient or self.objective.policy.kl_coefficient
        check(
            self.learning.reference or not (penalised or self.advantage.kl_target),
            f"{prefix}.learning.reference=False leaves nothing to measure KL from: set "
            "advantage.kl_coefficient and objective.policy.kl_coefficient to 0",
        )
        asked = self.objective.policy.temperature
        check(
            asked in (1.0, rollout.temperature),
            f"{prefix}.objective.policy.temperature={asked} is not that of the sampler here, "
            f"{prefix}.rollout.temperature={rollout.temperature}: leave it out",
        )
        check(
            self.train.on_spike != "rollback",
            f"{prefix}.train.on_spike='rollback' is not for rollouts: use 'skip' or 'stop'",
        )
        make_schedule(self.optimizer, self.updates * self.train.steps)  # for its errors

    def with_value_head(self) -> AlignJob:
        """With the policy's model as it is trained: with the head of a critic that shares it."""
        head = {"classifier": "token", "num_labels": 1} if self.critic == "shared" else {}
        return dataclasses.replace(self, model=dataclasses.replace(self.model, dropout=0.0, **head))

    @property
    def updates(self) -> int:
        """Optimizer steps of an iteration that runs all of its epochs."""
        return self.learning.epochs * (self.rollout.responses // self.data.batch_size)

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt that leave a response its room."""
        return self.data.block_size + 1 - self.rollout.max_new_tokens

    @property
    def converses(self) -> bool:
        """Whether what it learns is written by a template."""
        return True

    @property
    def critic(self) -> str:
        """Where values come from: "separate", "shared", or "" where none are needed."""
        return self.learning.critic if self.advantage.name == "gae" else ""

    def workload(self, layout: Layout, **fields) -> Workload:
        """What an update of the policy depends on; `fields` for another model's."""
        train = dataclasses.replace(self.train, steps=self.updates * self.train.steps)
        sampled = {
            "temperature": self.rollout.temperature,
            "max_response": self.objective.policy.max_response or self.rollout.max_new_tokens,
        }
        policy = dataclasses.replace(self.objective.policy, **sampled)
        objective = dataclasses.replace(self.objective, policy=policy)
        usual = {"model": self.model, "objective": objective, "adapter": self.adapter}
        usual["optimizer"] = self.optimizer
        return Workload(
            **{**usual, **fields},
            block_size=self.data.block_size,
            batch_size=self.data.batch_size,
            train=train,
            seed=self.seed,
            layout=layout,
        )
