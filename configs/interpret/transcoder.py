r"""Transcoders of every MLP of a trained model: what it computes, as a few features a token.

    python main.py
    python main.py --config=configs/interpret/transcoder.py --config.init_from=runs/quickstart \
        --workdir=runs/transcoder

dictionary.safetensors reads raw activations: in Python
`lm.interpretability.dictionaries.load("runs/transcoder")` encodes and decodes. features.html shows
features of each layer: examples, the tokens they promote, how often they fire. Other kinds:
--config.dictionary.kind=cross_layer, or sae with --config.dictionary.site=residual_after; other
architectures: --config.dictionary.activation=jumprelu --config.dictionary.sparsity=0.05, ….

About three CPU-minutes, no accelerator. On the quickstart's model (0.397 nats a token) expect after
614,400 tokens a fraction of variance unexplained of about 0.19 at 15 of 512 features a token, 2 %
dead, and of the loss between a zeroed and the true output of one layer 0.99, 0.81, 0.75 and 0.80
recovered; with all four layers' MLPs replaced at once 0.93 (0.86 nats; without MLPs 6.74). The loss
is still falling then.
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

    config.train.steps = 300
    config.train.log_every = 20
    config.checkpoint.every = 100
    return config
