"""The worked example of alignment: DPO, from the preferences themselves, without a reward model.

    python main.py --config=configs/align/story_dpo.py

See configs/align/story_base.py. Two CPU cores: two minutes. The true reward rises by 0.10 ± 0.06
over that of the SFT model, to 0.72, at 2.4 nats from it (five seeds).
"""

from lm.configs.align import dpo


def get_config():
    config = dpo.get_config()
    config.init_from = "runs/story_sft"
    config.data.block_size = 80
    config.optimizer.learning_rate = 2e-4
    return config
