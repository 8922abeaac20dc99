"""The worked example of alignment: the model of story_sft learns which answers are preferred.

    python main.py --config=configs/align/story_reward.py

See configs/align/story_base.py. Two CPU cores: eleven minutes. It ranks 91.5 ± 0.7 % of held-out
pairs right, of those that differ in truth 83 %, and in manners alone 99 % (five seeds).
Truth is learnt slowly, for a pair tells one bit of it: 82 % of pairs after 200 steps, 88 after 800.
"""

from lm.configs.align import reward


def get_config():
    config = reward.get_config()
    config.init_from = "runs/story_sft"
    config.data.num_documents = 66_000
    config.data.validation_fraction = 0.02
    config.data.block_size = 80

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 50

    config.train.steps = 2000
    config.train.log_every = 50
    config.train.eval_every = 200
    config.checkpoint.every = 200
    return config
