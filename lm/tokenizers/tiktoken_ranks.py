"""tiktoken: byte-pair encoding from a file of ranks.

Each line of a `.tiktoken` file is a token's bytes in base64 and its rank, which is its id. Of all
neighbours whose concatenation is a token, the pair of lowest rank merges first.
"""

from __future__ import annotations

import base64
import binascii
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tiktoken

from lm.config import ConfigError, check
from lm.tokenizers.base import Specials, Tokenizer, check_named, roles
from lm.tokenizers.config import END_OF_TEXT, TokenizerConfig, pattern
from lm.tokenizers.huggingface import HuggingFaceTokenizer

# Published rank files do not say how text is cut, nor what their special ids are.
_PUBLISHED: dict[str, tuple[str, dict[str, int]]] = {
    "r50k_base": ("gpt2", {END_OF_TEXT: 50256}),
    "p50k_base": ("gpt2", {END_OF_TEXT: 50256}),
    "cl100k_base": (
        "cl100k",
        {
            END_OF_TEXT: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": ("o200k", {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
}

_THREADS = 4


class TiktokenTokenizer(Tokenizer):
    """Ranks and the expression that cuts text into words."""

    def __init__(self, ranks: dict[bytes, int], pattern: str, specials: Specials):
        self.ranks = ranks
        self.pattern = pattern
        self._core = tiktoken.Encoding(
            "lm", pat_str=pattern, mergeable_ranks=ranks, special_tokens=dict(specials.ids)
        )
        size = max(*ranks.values(), *specials.ids.values()) + 1
        super().__init__("tiktoken", size, specials)

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        if len(texts) == 1:
            return [self._encode_one(texts[0])]
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(self._encode_one, texts))

    def _encode_one(self, text: str) -> np.ndarray:
        """The ids of `text`; one that exhausts the expression's stack is halved until none does.

        Only runs of some 100,000 white-space characters or capitals are known to need it.
        """
        try:
            # Of the library's ways to encode, the one that raises here instead of panicking.
            ids = self._core.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
        except ValueError:
            if len(text) < 2:
                raise
            middle = len(text) // 2
            halves = [self._encode_one(text[:middle]), self._encode_one(text[middle:])]
            return np.concatenate(halves)
        return ids.astype(np.int32)

    def _table(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        for token, id in self.ranks.items():
            table[id] = token
        return table

    def model_files(self) -> dict[str, bytes]:
        """`ranks.tiktoken`."""
        return {"ranks.tiktoken": _dump(self.ranks)}

    def options(self) -> dict[str, Any]:
        """The expression that cuts text into words."""
        return {"pattern": self.pattern}

    @classmethod
    def _opened(cls, files: dict[str, bytes], specials: Specials, info: dict[str, Any]):
        return cls(_parse(files["ranks.tiktoken"]), info["options"]["pattern"], specials)

    @classmethod
    def from_ranks(cls, data: bytes, name: str, config: TokenizerConfig):
        """A tokenizer from the bytes of a rank file called `name`.tiktoken.

        The pattern and special ids of files OpenAI published are known by name. Any other file is
        cut by `config.pattern`, and the config's specials follow its last rank.
        """
        ranks = _parse(data)
        if name in _PUBLISHED:
            named, ids = _PUBLISHED[name]
            clash = set(ids.values()) & set(ranks.values())
            check(not clash, f"{name}.tiktoken is not the published file of that name")
        else:
            named, start = config.pattern, max(ranks.values()) + 1
            ids = {token: start + i for i, token in enumerate(config.specials)}
        check_named(ids, config)
        specials = roles(ids, config.eos_token or END_OF_TEXT, config.bos_token)
        return cls(ranks, pattern(named, "tokenizer.pattern"), specials)


def as_tiktoken(tokenizer: HuggingFaceTokenizer, pattern: str) -> TiktokenTokenizer:
    """A byte-level BPE tokenizer with the same ids, run by tiktoken.

    Ids are ranks, so both prefer the same merges. tiktoken also merges two tokens into a third that
    was learnt from two others; on text where that happens the ids differ, never the decoded text.

    Args:
      tokenizer: a byte-level BPE whose ids are in the order of its merges, as training makes them.
      pattern: the expression that cuts text into words.

    Raises:
      ConfigError: another kind of tokenizer.
    """
    check(
        isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.is_byte_level,
        f"kind {tokenizer.kind!r} cannot be written as tiktoken ranks: only byte-level bpe can",
    )
    ranks = {tokenizer.token_bytes(id): id for id in range(tokenizer.vocab_size)}
    ranks.pop(b"", None)  # of specials
    return TiktokenTokenizer(ranks, pattern, tokenizer.specials)


def _dump(ranks: dict[bytes, int]) -> bytes:
    lines = [
        base64.b64encode(token) + b" %d\n" % rank
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    ]
    return b"".join(lines)


def _parse(data: bytes) -> dict[bytes, int]:
    """Rank file → token bytes → rank.

    Raises:
      ConfigError: a line that is not a token and a rank, a rank twice, or a byte without a token.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ConfigError(
                f"line {number} of the rank file is not a base64 token and a rank: {line[:40]!r}"
            ) from None
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    check(
        not missing,
        f"the rank file has no token for {len(missing)} of the 256 bytes: it is truncated, or not "
        "a byte-level vocabulary",
    )
    check(len(set(ranks.values())) == len(ranks), "the rank file gives one rank to two tokens")
    return ranks
