"""Text ⇄ ids.

`train(config, texts)` makes a tokenizer, `tokenizer.save(directory)` keeps it, `load(directory)`
opens it again, or one that others made. Every kind has the interface of `Tokenizer`.
"""

from lm.tokenizers.base import DecodeStream, Tokenizer
from lm.tokenizers.config import KINDS, TokenizerConfig
from lm.tokenizers.kinds import load, train
from lm.tokenizers.tiktoken_ranks import as_tiktoken

__all__ = ["KINDS", "DecodeStream", "Tokenizer", "TokenizerConfig", "as_tiktoken", "load", "train"]
