"""The worked example of alignment: the model of story_sft learns which answers are preferred.

    python main.py --config=configs/align/story_reward.py

See configs/align/story_base.py.
"""

from lm.configs.align import reward


def get_config():
    config = reward.get_config()
    config.init_from = "runs/story_sft"
    config.data.block_size = 128
    config.optimizer.learning_rate = 1e-3
    return config
