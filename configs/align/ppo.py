r"""PPO: a model learns from a reward, near the model that it was (Ouyang et al. 2022).

    python main.py --config=configs/align/ppo.py --config.init_from=runs/sft \
        --config.rewards.functions=runs/reward --config.learning.critic_from=runs/reward \
        --workdir=runs/ppo

init_from has been trained to reply (configs/align/sft.py), and the reward model to tell which of
two replies is better (configs/align/reward.py); a Python function is a reward as well, and there
may be several: see configs/align/grpo.py for these, for prompts of your own, and for what an
iteration is and leaves behind.

The critic is a model of its own, begun from the reward model, or from the policy where critic_from
is left out; with learning.critic=shared it is a head of the policy's. advantage.kl_coefficient is
what a nat of distance from the first policy costs, at every token: 0 shows what happens without
it, and advantage.kl_target adapts it.
"""

from lm.config import defaults
from lm.jobs.align import AlignJob


def get_config():
    config = defaults(AlignJob)

    config.init_from = "runs/sft"
    config.data.path = "storyworld_prompts"
    config.data.num_documents = 10_000  # of a generated corpus
    config.data.validation_fraction = 0.01
    config.data.block_size = 256  # a prompt and its response; at most the model's context
    config.data.batch_size = 32  # responses an update

    config.rollout.prompts = 128
    config.rollout.samples = 1
    config.rollout.max_new_tokens = 32
    config.rewards.functions = "lm.data.storyworld.instructions:gold_reward"

    config.advantage.name = "gae"
    config.advantage.kl_coefficient = 0.05
    config.advantage.missing_end_penalty = 1.0
    config.objective.policy.loss = "ppo"
    config.learning.epochs = 4
    config.learning.kl_stop = 0.1

    config.optimizer.learning_rate = 1e-5
    config.optimizer.schedule = "constant"
    config.optimizer.weight_decay = 0.0

    config.train.steps = 100
    config.train.log_every = 1
    config.train.eval_every = 25
    config.checkpoint.every = 25
    return config
