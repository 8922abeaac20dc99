r"""The best of n replies to each prompt, as lines to learn from: rejection sampling.

    python main.py --config=configs/align/best_of_n.py --config.init_from=runs/sft \
        --config.data.path=prompts.jsonl --config.rewards.functions=runs/reward \
        --config.output_file=best.jsonl

    # then: fine-tune on what was best, or compare best and worst (config.form=pairs)
    python main.py --config=configs/align/sft.py --config.init_from=runs/sft \
        --config.data.path=best.jsonl --workdir=runs/best
    python main.py --config=configs/align/reward.py --config.init_from=runs/sft \
        --config.data.path=pairs.jsonl --workdir=runs/reward2

A line of prompts.jsonl has `prompt`, a text or messages, and fields that reward functions read. A
reward is a run, `file.py:function`, or built in; several are weighted by config.rewards.weights.
With config.at_least only replies that are worth as much are kept; the same command goes on with a
file that is not complete.
"""

from lm.config import defaults
from lm.jobs.best_of_n import BestOfNJob


def get_config():
    config = defaults(BestOfNJob)

    config.init_from = "runs/sft"
    config.data.path = "prompts.jsonl"
    config.data.block_size = 256  # tokens of a prompt and its reply
    config.rewards.functions = "runs/reward"

    config.rollout.samples = 8  # n
    config.rollout.prompts = 8  # answered at once
    config.rollout.max_new_tokens = 64
    config.rollout.temperature = 1.0
    config.keep = 1
    config.output_file = "best.jsonl"
    return config
