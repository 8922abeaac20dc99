r"""Transcoders of every MLP of a trained model: what it computes, as a few features a token.

    python main.py
    python main.py --config=configs/interpret/transcoder.py --config.init_from=runs/quickstart \
        --workdir=runs/transcoder

In Python `lm.interpretability.dictionaries.load("runs/transcoder")` encodes and decodes.
"""

from lm.config import defaults
from lm.jobs.dictionary import DictionaryJob


def get_config():
    config = defaults(DictionaryJob)

    config.init_from = "runs/quickstart"
    config.rows = 16
    config.tokens_per_row = 128

    config.dictionary.kind = "transcoder"
    config.dictionary.activation = "batch_topk"
    config.dictionary.features = 512  # of each layer, four times the width
    config.dictionary.k = 16
    config.dictionary.dead_after = 100_000  # tokens

    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule = "linear"
    config.optimizer.final_fraction = 0.0
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.0
    config.optimizer.b2 = 0.999

    config.train.steps = 400
    config.train.log_every = 20
    config.checkpoint.every = 100
    return config
