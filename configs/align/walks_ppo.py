r"""Random walks in a graph, step 2: PPO finds the short ways to the goal.

    python main.py --config=configs/align/walks_ppo.py --config.init_from=runs/walks \
        --workdir=runs/walks_ppo

Or GRPO:

    python main.py --config=configs/align/walks_ppo.py --config.init_from=runs/walks \
        --config.objective.policy.loss=grpo --config.advantage.name=group \
        --config.rollout.prompts=20 --config.rollout.samples=8 --workdir=runs/walks_grpo

`reward` is the optimality of walks drawn from the 20 starts: 1 for the shortest, 0 for one that
misses the goal or takes an edge that is not there. A shared trunk holds policy and critic.

Of five seeds both rise from 0.4 (0.2 to 0.6, as graphs differ) above 0.9 in the fifth iteration,
and have 0.99 ± 0.03 in the last ten of sixty (95 % of the mean); a run takes a quarter of a minute
on two CPU cores. `python benchmarks/align_example.py --task=walks` runs them all.
"""

from lm.config import defaults
from lm.jobs.align import AlignJob


def get_config():
    config = defaults(AlignJob)

    config.init_from = "runs/walks"
    config.data.path = "random_walks_prompts"
    config.data.num_documents = 20  # every start once
    config.data.validation_fraction = 0.0
    config.data.block_size = 16
    config.data.batch_size = 80  # responses of an update

    config.rollout.prompts = 160
    config.rollout.samples = 1
    config.rollout.max_new_tokens = 10
    config.rewards.functions = "lm.data.random_walks:reward"

    config.objective.policy.loss = "ppo"
    config.advantage.name = "gae"
    config.advantage.kl_coefficient = 0.0
    config.learning.critic = "shared"
    config.learning.epochs = 4

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.final_fraction = 0.0
    config.optimizer.weight_decay = 0.0

    config.train.steps = 60
    config.train.log_every = 1
    config.checkpoint.every = 50
    return config
