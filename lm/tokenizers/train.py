"""From text to a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lm.config import check, view
from lm.tokenizers.base import Tokenizer, well_formed
from lm.tokenizers.config import TokenizerConfig
from lm.tokenizers.files import CLASSES, open_path


def train(
    config: TokenizerConfig, texts: Iterable[str], prefix: str = "config.tokenizer"
) -> Tokenizer:
    """The tokenizer that `config` describes, trained on the first `train_bytes` of `texts`.

    The same text gives the same tokenizer, with the same fingerprint, on any number of threads.
    With `config.path` the tokenizer is read from there, and `texts` is not touched.

    Raises:
      ConfigError: a field that makes no sense, no text, or a vocabulary that does not fit the text.
    """
    view(TokenizerConfig, config, prefix)
    if config.path:
        return open_path(config.path, config, prefix)
    sample = [] if config.kind == "byte" else list(_sample(texts, config.train_bytes))
    check(config.kind == "byte" or bool(sample), f"{prefix}: the corpus has no text to train on")
    return CLASSES[config.kind].train(config, sample, prefix)


def _sample(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The first `limit` bytes of `texts`; the text that crosses the limit is cut."""
    for text in texts:
        text = well_formed(text)
        size = len(text) if text.isascii() else len(text.encode())
        if size > limit:
            text = text.encode()[:limit].decode("utf-8", "ignore")
        if text:
            yield text
        limit -= size
        if limit <= 0:
            return
