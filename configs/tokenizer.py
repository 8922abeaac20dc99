"""Which tokenizer? Trains seven kinds on one corpus and compares them on held-out text.

    python main.py --config=configs/tokenizer.py

    # how each kind builds one word, and for BPE every merge on the way
    python main.py --config=configs/tokenizer.py --config.word=together

    # your own text and vocabulary size
    python main.py --config=configs/tokenizer.py --config.data.path=FILE \
        --config.tokenizer.vocab_size=8192

Two CPU cores, no accelerator: 16 seconds, most of it writing the stories and training `bpe`,
`wordpiece` and `sentencepiece_unigram` on 8.8 MB of them. Expect, at a vocabulary of 1,024,

    kind                   bytes/token  round trip
    char, byte                    1.00        100%
    bpe, tiktoken                 3.61        100%
    wordpiece                     3.81          5%   (it drops line breaks)
    sentencepiece_unigram         3.16        100%
    sentencepiece_bpe             3.52        100%

with training seconds and encoding speed beside them. Each tokenizer is saved in the run directory
under its kind, ready for `--config.tokenizer.path=DIR`; `tokenizers.json` there holds the table.
"""

from lm import config
from lm.jobs.tokenizer import TokenizerJob


def get_config():
    c = config.defaults(TokenizerJob)
    c.data.path = "storyworld"
    c.data.num_documents = 20_000
    c.tokenizer.vocab_size = 1024
    c.word = ""  # such as "together", or " together" as after a space
    return c
