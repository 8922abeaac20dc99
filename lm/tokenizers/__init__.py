"""Text ⇄ ids.

`train(config, texts)` makes a tokenizer, `tokenizer.save(directory)` keeps it, `load(directory)`
opens it again, or one that others made. Every kind has the interface of `Tokenizer`.
"""

from lm.tokenizers.base import Tokenizer
from lm.tokenizers.chat import ChatTemplate, chat_template
from lm.tokenizers.config import KINDS, TokenizerConfig
from lm.tokenizers.kinds import load, train
from lm.tokenizers.tiktoken_ranks import as_tiktoken
from lm.tokenizers.turns import learned

__all__ = [
    "KINDS",
    "ChatTemplate",
    "Tokenizer",
    "TokenizerConfig",
    "as_tiktoken",
    "chat_template",
    "learned",
    "load",
    "train",
]
