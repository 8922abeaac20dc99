r"""Random walks in a graph, step 1: a model that walks as aimlessly as its examples.

    python main.py --config=configs/align/walks.py --workdir=runs/walks
    python main.py --config=configs/align/walks_ppo.py --config.init_from=runs/walks \
        --workdir=runs/walks_ppo

trlx's task, of 21 nodes and walks of at most ten (`lm/data/random_walks.py`): the model reads a
start and writes the rest of a walk, a letter a node. Then configs/align/walks_ppo.py pays it for
reaching the goal by a short way.
"""

from lm.config import defaults
from lm.jobs.train import TrainJob


def get_config():
    config = defaults(TrainJob)

    config.tokenizer.kind = "char"
    config.tokenizer.chat_template = "plain"  # a prompt is the start of a text

    config.objective.name = "sft"
    config.data.path = "random_walks"
    config.data.num_documents = 10_000
    config.data.validation_fraction = 0.02
    config.data.packing = "none"
    config.data.block_size = 16
    config.data.batch_size = 64

    config.model.num_layers = 2
    config.model.num_heads = 2
    config.model.width = 64
    config.model.compute_dtype = "float32"
    config.model.initializer = "lecun"

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 20
    config.optimizer.final_fraction = 0.0

    config.train.steps = 300
    config.train.log_every = 50
    config.train.eval_every = 100
    config.checkpoint.every = 100
    return config
