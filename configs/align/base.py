"""The worked example of alignment, step 1: a model that writes stories, and answers nothing yet.

    python main.py --config=configs/align/base.py --workdir=runs/align/base

The quickstart's model, whose tokenizer knows how conversations are written. What follows, one
command each: `sft` teaches it to answer questions about stories, `reward` learns from preferences
which answers are better, and `ppo`, `grpo` and `dpo` make answers better by that. The preferences
follow a reward that is known (`lm/data/storyworld/instructions.py`), so it shows where the learnt
one goes wrong. `benchmarks/align_example.py` runs all of it for several seeds and measures it.
"""

import pathlib

from lm.configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.tokenizer.special_tokens = ("<|user|>", "<|assistant|>")
    config.tokenizer.chat_template = str(pathlib.Path(__file__).parent / "turns.jinja")
    config.train.steps = 1200
    return config
