r"""The worked example of alignment: DPO, straight from preferences, without a reward model.

    python main.py --config=configs/align/dpo.py --config.init_from=runs/sft --workdir=runs/dpo

A line of the data is as configs/align/reward.py says. The reference is the model of init_from as it
is. Other losses: --config.objective.preference.loss=ipo (hinge, robust, simpo), and
--config.objective.name=orpo or kto.
"""

from lm.config import defaults
from lm.jobs.train import TrainJob


def get_config():
    config = defaults(TrainJob)

    config.init_from = "runs/sft"
    config.data.path = "storyworld_preferences"
    config.data.num_documents = 6_000
    config.data.validation_fraction = 0.05
    config.data.packing = "none"  # a reply a row
    config.data.block_size = 160
    config.data.batch_size = 32  # pairs

    config.objective.name = "dpo"
    config.objective.preference.beta = 0.1

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 5e-5
    config.optimizer.warmup_steps = 10
    config.optimizer.final_fraction = 0.0
    config.optimizer.weight_decay = 0.0

    config.train.steps = 150
    config.train.log_every = 10
    config.train.eval_every = 50
    config.checkpoint.every = 50
    return config
