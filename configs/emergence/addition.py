r"""Three-digit addition, learnt from nothing, with a checkpoint every ten steps to look at.

    python main.py --config=configs/emergence/addition.py --workdir=runs/addition
    python main.py --config=configs/emergence/addition.py --config.model.width=64 \
        --workdir=runs/addition_64
    python main.py --config=configs/emergence/curves.py --config.runs=runs/addition \
        --config.runs=runs/addition_64

The model reads "385+747=" and writes the sum, the lowest digit first: "2311". It is asked sums that
were never trained on (`lm/data/tasks.py`), and configs/emergence/curves.py draws what came of it.

About a minute on two CPU cores. Of 200 held-out sums none is right at step 40, 7 % at step 60, 93 %
at step 100 and 99 % at the end, at step 150. Of widths 64 and 32, 5 % and 6 % are right then. Other
tasks are other names, such as --config.data.path=sorting_5 with --config.data.block_size=20.
"""

from lm.config import defaults
from lm.jobs.train import TrainJob


def get_config():
    config = defaults(TrainJob)

    config.tokenizer.kind = "char"
    config.tokenizer.chat_template = "plain"  # a question is the start of a text

    config.objective.name = "sft"  # the answer alone is learnt
    config.data.path = "addition_3_reversed"
    config.data.num_documents = 16_000
    config.data.validation_fraction = 0.02
    config.data.packing = "none"
    config.data.block_size = 13
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

    config.train.steps = 150
    config.train.log_every = 10
    config.train.eval_every = 10
    config.checkpoint.every = 10
    config.checkpoint.keep = 100
    return config
