"""Characters and bytes: vocabularies that need no merging."""

from __future__ import annotations

import collections
import functools
import json
from typing import Any

import numpy as np

from lm.config import check
from lm.tokenizers.base import Specials, Tokenizer, roles
from lm.tokenizers.config import TokenizerConfig

_UNKNOWN = "<|unknown|>"


class ByteTokenizer(Tokenizer):
    """One id per UTF-8 byte: ids 0 … 255 are the bytes, specials follow."""

    def __init__(self, specials: Specials):
        super().__init__("byte", 256 + len(specials.ids), specials)

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def _table(self) -> list[bytes]:
        return [bytes([b]) for b in range(256)] + [b""] * len(self.special_ids)

    def model_files(self) -> dict[str, bytes]:
        """No file: the vocabulary is the 256 bytes."""
        return {}

    @classmethod
    def _opened(cls, files: dict[str, bytes], specials: Specials, info: dict[str, Any]):
        return cls(specials)

    @classmethod
    def train(cls, config: TokenizerConfig, texts: list[str], prefix: str) -> ByteTokenizer:
        """With the config's specials; no text is needed."""
        ids = {name: 256 + i for i, name in enumerate(config.specials)}
        return cls(roles(ids, config.specials[0], config.bos_token))


class CharTokenizer(Tokenizer):
    """One id per character of the training text, in code-point order; then unknown and specials.

    Characters outside the vocabulary become the unknown id, which decodes to nothing.
    """

    def __init__(self, characters: list[str], specials: Specials):
        self.characters = characters
        super().__init__(
            "char",
            len(characters) + len(specials.ids),
            specials,
            f"characters other than the {len(characters)} of the training text become unknown",
        )

    @functools.cached_property
    def _ids(self) -> np.ndarray:
        """Code point → id, one entry past the last known character for all beyond it."""
        points = np.array([ord(c) for c in self.characters], np.int64)
        table = np.full(points.max() + 2, self.unk_id, np.int32)
        table[points] = np.arange(len(points), dtype=np.int32)
        return table

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        last = len(self._ids) - 1
        points = [np.frombuffer(text.encode("utf-32-le"), np.uint32) for text in texts]
        return [self._ids[np.minimum(p, last)] for p in points]

    def _table(self) -> list[bytes]:
        return [c.encode() for c in self.characters] + [b""] * len(self.special_ids)

    def model_files(self) -> dict[str, bytes]:
        """`characters.json`: the characters, in the order of their ids."""
        return {"characters.json": json.dumps("".join(self.characters)).encode() + b"\n"}

    @classmethod
    def _opened(cls, files: dict[str, bytes], specials: Specials, info: dict[str, Any]):
        characters = list(json.loads(files["characters.json"]))
        check(bool(characters), "characters.json is empty")
        return cls(characters, specials)

    @classmethod
    def train(cls, config: TokenizerConfig, texts: list[str], prefix: str) -> CharTokenizer:
        """The most frequent characters of `texts`, as many as the vocabulary has room for."""
        counts: collections.Counter[str] = collections.Counter()
        for text in texts:
            counts.update(text)
        room = config.vocab_size - 1 - len(config.specials)
        check(
            room >= 1,
            f"{prefix}.vocab_size={config.vocab_size!r} must be at least "
            f"{2 + len(config.specials)} for kind 'char'",
        )
        # Ties are decided by code point, so the order of the texts does not matter.
        kept = sorted(sorted(counts), key=lambda c: -counts[c])[:room]
        ids = {name: len(kept) + i for i, name in enumerate([_UNKNOWN, *config.specials])}
        specials = roles(ids, config.specials[0], config.bos_token, _UNKNOWN)
        return cls(sorted(kept), specials)
