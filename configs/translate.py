"""Translation into an invented language, from generated pairs: the 2017 architecture at work.

    python main.py --config=configs/translate.py

An encoder-decoder reads English sentences of a small world and writes them in Ilvani, a language
with its own words, word order, cases and vowel harmony (`lm/data/storyworld/language.py`). When
training ends, held-out sentences are translated greedily and compared word for word.

Two CPU cores, no accelerator: five and a half minutes, half a minute of it for the corpus. Expect
a validation loss of about 0.003 nats a token, and 995 of 1,000 held-out sentences right to the
letter.
"""

from lm.config import defaults
from lm.jobs.train import TrainJob


def get_config():
    config = defaults(TrainJob)

    config.tokenizer.kind = "bpe"  # one vocabulary for both languages
    config.tokenizer.vocab_size = 1024

    config.data.path = "translation"
    config.data.num_documents = 100_000
    config.data.validation_fraction = 0.01
    config.data.packing = "best_fit"
    config.data.block_size = 128
    config.data.source_length = 128
    config.data.batch_size = 16
    config.data.even_batch = True  # more where more devices share it

    config.objective.name = "seq2seq"
    config.model.architecture = "encoder_decoder"
    # With T5's block (positions="relative", activation="geglu", norm_epsilon=1e-6) the model would
    # convert to Hugging Face, but it learns slower (0.83 nats a token after 300 steps, not 0.06).
    config.model.num_layers = 3
    config.model.num_heads = 4
    config.model.width = 128
    config.model.activation = "swiglu"
    config.model.initializer = "lecun"

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 100
    config.optimizer.final_fraction = 0.0

    config.train.steps = 1000
    config.train.log_every = 100
    config.train.eval_every = 500
    config.checkpoint.every = 500

    config.exact_match = 1000
    config.prompt = (
        "The old dog that saw Tom will not give two red balls to the cats.",
        "When Mia sleeps, the white foxes dance near the river.",
    )
    return config
