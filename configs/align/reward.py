r"""A reward model: which of two replies is better, learned from pairs.

    # preferences among answers about stories; configs/align/story_reward.py is the worked example
    python main.py --config=configs/align/reward.py --config.init_from=runs/sft \
        --workdir=runs/reward

    # your own
    python main.py --config=configs/align/reward.py --config.init_from=DIR \
        --config.data.path=pairs.jsonl --workdir=runs/reward

A line of pairs.jsonl has `prompt`, `chosen` and `rejected`, or two whole conversations, and perhaps
`margin`: by how much the chosen reply should be better. The model is that of init_from with a new
head in place of its output head: one number, read from the end of a reply (Stiennon et al. 2020).

It ends with the share of held-out pairs that it ranks right, how far the probabilities are from
such shares (expected calibration error), and reward.json: the scale on which held-out replies have
mean 0 and spread 1.

    import lm
    lm.load("runs/reward").score("Where did the cat sit?", ["On the mat.", "I do not care."])

Other training takes the directory as a reward: --config.rewards.functions=runs/reward; and
configs/convert.py writes it for transformers' AutoModelForSequenceClassification.
"""

from lm.config import defaults
from lm.jobs.train import TrainJob


def get_config():
    config = defaults(TrainJob)

    config.init_from = "runs/sft"
    config.model.classifier = "sequence"
    config.model.num_labels = 1

    config.data.path = "storyworld_preferences"
    config.data.num_documents = 20_000  # of a generated corpus
    config.data.validation_fraction = 0.05
    config.data.packing = "none"  # a reply a row
    config.data.block_size = 160  # tokens of the longest conversation
    config.data.batch_size = 32  # pairs

    config.objective.name = "reward"
    config.objective.centering = 0.01

    # One pass: where pairs are known by heart, others are ranked worse.
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 20
    config.optimizer.final_fraction = 0.0
    config.optimizer.weight_decay = 0.01

    config.train.steps = 600
    config.train.log_every = 10
    config.train.eval_every = 100
    config.checkpoint.every = 100
    return config
