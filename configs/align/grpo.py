r"""GRPO: a model learns from rewards of what it writes, by comparing its replies to one prompt.

    python main.py --config=configs/align/grpo.py --config.init_from=runs/sft --workdir=runs/grpo

init_from has been trained to reply (configs/align/sft.py). The prompts are of the embedded world;
with --config.data.path=prompts.jsonl they are your own: a line has `prompt`, a text or messages,
and whatever the reward asks for. The reward is a Python function of prompts, responses and these
fields (lm/alignment/rewards.py), the directory of a reward model, or a weighted sum of several:

    --config.rewards.functions=mine.py:correct --config.rewards.functions=runs/reward

An iteration (train.steps counts them) writes rollout.samples responses to each of rollout.prompts
prompts, scores them, and makes an update of every data.batch_size. objective.policy.loss has the
heirs: dapo, dr_grpo, gspo, cispo; with advantage.name=leave_one_out it is RLOO.

metrics.jsonl and TensorBoard have the reward and its parts, KL to the reference, entropy, lengths
and times; curves.png draws them; samples.html has responses before and after, side by side.
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
    config.data.batch_size = 64  # responses an update

    config.rollout.prompts = 16
    config.rollout.samples = 8
    config.rollout.max_new_tokens = 32
    config.rewards.functions = "lm.data.storyworld.instructions:gold_reward"

    config.advantage.name = "group"
    config.advantage.kl_coefficient = 0.0
    config.objective.policy.loss = "grpo"
    config.objective.policy.kl_coefficient = 0.02

    config.optimizer.learning_rate = 1e-5
    config.optimizer.schedule = "constant"
    config.optimizer.weight_decay = 0.0

    config.train.steps = 100
    config.train.log_every = 1
    config.train.eval_every = 25
    config.checkpoint.every = 25
    return config
