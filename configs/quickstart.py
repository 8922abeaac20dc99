"""Raw text to a model that writes little stories, in one command.

    python main.py

Makes 50,000 stories of a small world, trains a byte-pair tokenizer and a one-million-parameter
Transformer on them, evaluates it on stories it has never seen and lets it write.

Two CPU cores, no accelerator: 2.5 minutes, after half a minute for the corpus and the compiler.
Expect a validation loss of about 0.41 nats a token, and whole stories in which nearly every
sentence is right; who did what still gets mixed up. Greedy, "The cat sat on the" goes on " mat".
"""

from lm.config import defaults
from lm.jobs.train import TrainJob


def get_config():
    config = defaults(TrainJob)

    config.tokenizer.kind = "bpe"
    config.tokenizer.vocab_size = 1024

    config.data.path = "storyworld"
    config.data.num_documents = 50_000
    config.data.validation_fraction = 0.01
    config.data.packing = "best_fit"  # whole stories, about two to a row
    config.data.block_size = 256
    config.data.batch_size = 4
    config.data.even_batch = True  # more where more devices share it

    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.width = 128
    config.model.activation = "swiglu"
    config.model.initializer = "lecun"

    config.optimizer.name = "muon"  # for the matrices; AdamW for the rest
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 100
    config.optimizer.final_fraction = 0.0

    config.train.steps = 1800
    config.train.log_every = 100
    config.train.eval_every = 600
    config.checkpoint.every = 600

    config.prompt = ("The cat sat on the", "One day, Mia", "The dog")
    config.sample.max_new_tokens = 120
    config.sample.temperature = 0.5
    config.sample.top_p = 0.95
    return config
