"""A config and a reward of seconds: GRPO on the share of a reply that is letters."""

from lm.config import defaults
from lm.jobs.align import AlignJob


def share(prompts, responses, **fields):
    """The share of each reply that is letters."""
    return [sum(c.isascii() and c.isalpha() for c in r) / max(len(r), 1) for r in responses]


def get_config():
    config = defaults(AlignJob)
    config.chat_template = "plain"
    config.data.validation_fraction = 0.0
    config.data.batch_size = 16
    config.data.block_size = 32
    config.rollout.prompts = 4
    config.rollout.samples = 8
    config.rollout.max_new_tokens = 8
    config.rewards.functions = "tests/alignment/letters.py:share"
    config.objective.policy.loss = "grpo"
    config.advantage.name = "group"
    config.advantage.kl_coefficient = 0.0
    config.optimizer.learning_rate = 2e-2
    config.optimizer.schedule = "constant"
    config.train.steps = 4
    config.train.log_every = 1
    config.checkpoint.every = 2
    config.shown = 2
    return config
