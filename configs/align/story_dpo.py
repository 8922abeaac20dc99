"""The worked example of alignment: DPO, from the preferences themselves, without a reward model.

    python main.py --config=configs/align/story_dpo.py

See configs/align/story_base.py.
"""

from lm.configs.align import dpo


def get_config():
    config = dpo.get_config()
    config.init_from = "runs/story_sft"
    config.data.block_size = 80
    config.optimizer.learning_rate = 2e-4
    return config
