r"""The reversal curse: who has learnt that A is B need not know who B is.

    python main.py --config=configs/evaluate/reversal.py --workdir=runs/reversal
    python main.py --config=configs/evaluate.py --config.init_from=runs/reversal \
        --config.suites=reasoning

400 pairs of names are learnt one way round, "kado>" and "mibe"; half of them the other way, too,
"mibe<" and "kado"; and the other half is asked that way (Berglund et al. 2023, "The reversal
curse"). 600 lines in all, over and over.

Three quarters of a minute on two CPU cores. After 100 steps every pair is known one way, all 200
are known the other way that were told so, and none of the 200 others is: the right name becomes
less likely while the rest is learnt, from -2.3 to -6.7 nats a character.
"""

from lm.config import defaults
from lm.jobs.train import TrainJob


def get_config():
    config = defaults(TrainJob)

    config.tokenizer.kind = "char"
    config.tokenizer.chat_template = "plain"  # a question is the start of a text

    config.objective.name = "sft"  # the answer alone is learnt
    config.data.path = "reversal"
    config.data.num_documents = 600
    config.data.validation_fraction = 1 / 3
    config.data.packing = "none"
    config.data.block_size = 10
    config.data.batch_size = 256

    config.model.num_layers = 2
    config.model.num_heads = 4
    config.model.width = 128
    config.model.positions = "learned"
    config.model.norm = "layernorm"
    config.model.activation = "gelu"
    config.model.compute_dtype = "float32"
    config.model.initializer = "lecun"

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 20
    config.optimizer.final_fraction = 0.1

    config.train.steps = 100
    config.train.log_every = 20
    config.train.eval_every = 20
    config.checkpoint.every = 10
    config.checkpoint.keep = 100
    return config
