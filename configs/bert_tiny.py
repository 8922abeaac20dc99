"""A small BERT: fills in the words that are hidden from it.

    python main.py --config=configs/bert_tiny.py

Makes stories of a small world, trains a WordPiece tokenizer and an encoder that sees a whole story
at once, 15 % of its tokens hidden (Devlin et al. 2019: of these 80 % masked, 10 % replaced by any
other, 10 % left as they were).

Two CPU cores, no accelerator: two minutes. Expect a validation loss of about 0.96 nats a hidden
token, and "The cat sat on the [MASK]." filled in with "mat" before "hill".
"""

from lm.config import defaults
from lm.jobs.train import TrainJob


def get_config():
    config = defaults(TrainJob)

    config.tokenizer.kind = "wordpiece"
    config.tokenizer.vocab_size = 2048
    config.tokenizer.mask_token = True
    config.tokenizer.bos_token = "[CLS]"

    config.data.path = "storyworld"
    config.data.num_documents = 50_000
    config.data.validation_fraction = 0.01
    config.data.packing = "best_fit"
    config.data.block_size = 256
    config.data.batch_size = 4
    config.data.even_batch = True  # more where more devices share it

    config.objective.name = "masked"
    config.model.architecture = "encoder"
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.width = 128
    # With BERT's learned positions looking around starts much later; with these the model does not
    # convert to Hugging Face.
    config.model.positions = "rotary"
    config.model.norm = "layernorm"
    config.model.bias = True
    config.model.activation = "gelu"
    config.model.initializer = "lecun"
    config.model.head_transform = True
    config.model.head_bias = True

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 100
    config.optimizer.final_fraction = 0.0

    config.train.steps = 1200
    config.train.log_every = 100
    config.train.eval_every = 400
    config.checkpoint.every = 400

    config.prompt = ("The cat sat on the [MASK].", "One day, a [MASK] named Max found a red ball.")
    return config
