"""The worked example of alignment: a model that writes stories, and answers nothing yet.

    python main.py --config=configs/align/story_base.py
    python main.py --config=configs/align/story_sft.py       # it answers questions about stories
    python main.py --config=configs/align/story_reward.py    # which answers are preferred
    python main.py --config=configs/align/story_ppo.py       # answers that are preferred

and story_grpo and story_dpo in place of the last. Each begins from the run of the one before, in
runs/ under its own name. The preferences follow a reward that is known (`gold`, of
lm/data/storyworld/instructions.py): right answers over invented ones, "I do not know." where the
story does not say, polite, short. So it shows where the learnt reward goes wrong.
`benchmarks/align_example.py` runs all of it for several seeds and compares.

This is the quickstart's model, whose tokenizer knows how conversations are written.
"""

import pathlib

from lm.configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.tokenizer.special_tokens = ("<|user|>", "<|assistant|>")
    config.tokenizer.chat_template = str(pathlib.Path(__file__).parent / "turns.jinja")
    return config
