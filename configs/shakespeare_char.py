"""Characters of Shakespeare, with the settings that nanoGPT uses on a CPU.

    python main.py --config=configs/shakespeare_char.py --config.data.path=PATH/tinyshakespeare.txt

4 layers, 4 heads, width 128, blocks of 64 characters, batches of 12, 2,000 steps. Two CPU cores: 70
seconds. Expect 1.81 nats a character over the whole validation split; nanoGPT, which starts from
smaller weights, reaches 1.898. The block is GPT-2's, so that the model converts to Hugging Face.
"""

from lm.config import defaults
from lm.jobs.train import TrainJob


def get_config():
    config = defaults(TrainJob)

    config.tokenizer.kind = "char"
    config.data.path = "tinyshakespeare.txt"
    config.data.split = "position"
    config.data.validation_fraction = 0.1
    config.data.end_of_text = False
    config.data.random_offset = True
    config.data.block_size = 64
    config.data.batch_size = 12

    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.width = 128
    config.model.positions = "learned"
    config.model.norm = "layernorm"
    config.model.activation = "gelu_tanh"
    config.model.bias = True
    config.model.dropout = 0.0
    # Normal(1/√fan_in): at width 128 GPT-2's 0.02 starts too small (validation 1.91 against 1.81).
    config.model.initializer = "lecun"

    config.optimizer.learning_rate = 1e-3
    config.optimizer.final_fraction = 0.1
    config.optimizer.warmup_steps = 100
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0

    config.train.steps = 2000
    config.train.log_every = 100
    config.train.eval_every = 500
    config.train.eval_batch_size = 64
    config.checkpoint.every = 1000

    config.prompt = "ROMEO:"
    config.sample.max_new_tokens = 58  # prompt and text fill the context of 64
    config.sample.temperature = 0.8
    return config
