r"""Whom does "she" mean? A model of one head that learns nothing else, to look inside.

    python main.py --config=configs/interpret/pronouns.py --workdir=runs/pronouns
    python main.py --config=configs/interpret/heads.py --config.init_from=runs/pronouns \
        --workdir=runs/heads

The model reads "One day, Emma saw Leo in the garden. She" and says " Emma" (`lm/data/pronouns.py`).
With --config.model.num_layers=2 and --config.model.num_heads=4 several heads share the work.

Half a minute on two CPU cores. After 100 steps every name is right, of pairs of names that were
held out as well.
"""

from lm.config import defaults
from lm.jobs.train import TrainJob


def get_config():
    config = defaults(TrainJob)

    config.tokenizer.kind = "bpe"
    config.tokenizer.vocab_size = 512
    config.tokenizer.chat_template = "plain"  # a prompt is the start of a text

    config.objective.name = "sft"  # the name behind the pronoun alone is learnt
    config.data.path = "pronouns"
    config.data.num_documents = 12_800
    config.data.validation_fraction = 0.02
    config.data.packing = "none"
    config.data.block_size = 24
    config.data.batch_size = 64

    config.model.num_layers = 1
    config.model.num_heads = 1
    config.model.width = 64
    config.model.positions = "rotary"
    config.model.compute_dtype = "float32"
    config.model.initializer = "lecun"

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-2
    config.optimizer.warmup_steps = 20
    config.optimizer.final_fraction = 0.0

    config.train.steps = 200
    config.train.log_every = 20
    config.train.eval_every = 100
    config.checkpoint.every = 10
    config.checkpoint.keep = 100
    return config
