"""Addition modulo 59, learnt by heart first and understood long after.

    python main.py --config=configs/interpret/grokking.py --workdir=runs/grokking
    python main.py --config=configs/interpret/formation.py --config.runs=runs/grokking \
        --workdir=runs/formation

Of the 3,481 pairs of numbers a half is learnt and the other half asked (Power et al. 2022,
"Grokking"; Nanda et al. 2023). One layer of width 128, without norms, and a weight decay of 1,
which in the end makes a rule cheaper than a memory.

Two minutes of one CPU core. After 300 steps 97 % of the pairs learnt are known and 1 % of the
others; of these 35 % are right after 700 steps, 81 % after 1,100, 97 % after 1,300 and 99.9 % at
the end. By then three frequencies, 17, 22 and 23, have 59 % of the embedding's power. What lies
along them in the logits has, taken by itself, a loss of 0.35 nats on held-out pairs after 800
steps, when all the logits have one of 3.7: the rule is there before it wins (docs/grokking.png).
"""

from lm.config import defaults
from lm.jobs.train import TrainJob


def get_config():
    config = defaults(TrainJob)

    config.tokenizer.kind = "char"
    config.tokenizer.chat_template = "plain"

    config.objective.name = "sft"  # the answer alone is learnt
    config.data.path = "modular_addition_59"
    config.data.num_documents = 1741  # half of all 59² pairs
    config.data.validation_fraction = 1740 / 1741  # the other half
    config.data.packing = "none"
    config.data.block_size = 3  # begin-of-text, a, b; what follows the answer is cut off
    config.data.batch_size = 512

    config.model.num_layers = 1
    config.model.num_heads = 4
    config.model.width = 128
    config.model.mlp_width = 512
    config.model.positions = "learned"
    config.model.norm = "none"
    config.model.activation = "relu"
    config.model.tie_embeddings = False
    config.model.compute_dtype = "float32"
    config.model.initializer = "lecun"
    config.model.initializer_std = 128**-0.5  # of the embeddings

    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 10
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 1.0
    config.optimizer.decay = "all"
    config.optimizer.clip_norm = 0.0

    config.train.steps = 2000
    config.train.log_every = 100
    config.train.eval_every = 100
    config.checkpoint.every = 100
    config.checkpoint.keep = 100
    config.prompt = ""
    return config
