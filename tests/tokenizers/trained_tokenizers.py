"""One small corpus and the tokenizers trained on it, shared by the tests of this room."""

import functools
import random

from lm.tokenizers import TokenizerConfig, as_tiktoken, train
from lm.tokenizers.config import PATTERNS

LOSSLESS = ["byte", "bpe", "tiktoken", "sentencepiece_unigram", "sentencepiece_bpe"]
ALL = [*LOSSLESS, "char", "wordpiece"]


@functools.cache
def corpus() -> tuple[str, ...]:
    """Some 2,700 sentences, always the same, with line breaks, tabs and accents."""
    draw = random.Random(0)
    syllables = ["ta", "mi", "or", "the", "ca", "lun", "der", "po", "shi", "gra", "nel", "fi", "é"]
    words = ["together", "the", "cat", "didn't", "OK!", "room", "12"]
    words += ["".join(draw.choices(syllables, k=draw.randrange(1, 4))) for _ in range(300)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]

    def sentence() -> str:
        drawn = " ".join(draw.choices(words, weights, k=draw.randrange(3, 12)))
        return drawn[0].upper() + drawn[1:] + draw.choice([".", "?  ", ".\t"])

    return tuple("\n".join(sentence() for _ in range(draw.randrange(1, 9))) for _ in range(600))


@functools.cache
def trained(kind: str, vocab_size: int = 420):
    if kind == "tiktoken":
        return as_tiktoken(trained("bpe", vocab_size), PATTERNS["gpt2"])
    return train(TokenizerConfig(kind=kind, vocab_size=vocab_size), corpus())
