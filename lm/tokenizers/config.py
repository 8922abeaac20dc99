"""What tokenizer a run trains, or where it finds one."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import tokenizers

from lm.config import (
    Bounds,
    Bytes,
    ConfigError,
    Path,
    Positive,
    SizeOrZero,
    check,
    nearest,
)
from lm.tokenizers.base import MASKS, SENTINEL
from lm.tokenizers.chat_built_in import BUILT_IN

TRAINED_KINDS = (
    "char",
    "byte",
    "bpe",
    "wordpiece",
    "sentencepiece_unigram",
    "sentencepiece_bpe",
)
LOADED_KINDS = ("tiktoken", "huggingface", "pieces")
KINDS = TRAINED_KINDS + LOADED_KINDS

END_OF_TEXT = "<|endoftext|>"

# How text is cut into words before byte pairs are merged; merges never cross a cut. `\s++\z` takes
# trailing white space in one step, where `\s+(?!\S)` would back up one character at a time.
PATTERNS = {
    "gpt2": (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s++\z|\s+(?!\S)|\s+"),
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s++\z|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s++\z|\s+(?!\S)|\s+"
    ),
}

# Every byte needs an id of its own, and so do the specials.
_SMALLEST = {"bpe": 256, "sentencepiece_unigram": 257, "sentencepiece_bpe": 257, "wordpiece": 64}


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The `tokenizer` section of a config.

    Kinds trained from the corpus: `char` (one id per character), `byte` (one id per UTF-8 byte),
    `bpe` (byte-level byte-pair encoding, as GPT-2), `wordpiece` (as BERT; drops some white space),
    `sentencepiece_unigram` and `sentencepiece_bpe` (SentencePiece with byte fallback). Kinds read
    from `path`: `tiktoken` (a file of ranks), `huggingface` (any `tokenizer.json`) and `pieces`
    (the SentencePiece models of Marian and mBART).
    """

    kind: Literal[KINDS] = "bpe"  # see above

    # Ids in all, specials included. `char` keeps the most frequent characters; `byte` ignores it.
    # A corpus with too few repetitions may give `bpe` and `wordpiece` fewer.
    vocab_size: Annotated[int, Bounds(1, 2**24)] = 1024

    # Read this tokenizer instead of training one: a directory (one that was saved, or a Hugging
    # Face model), a tokenizer.json, a SentencePiece .model or a .tiktoken file. The file decides
    # the kind; what only training needs has no effect. Special tokens that are asked for below and
    # are not there get ids after the last one.
    path: Path = ""

    train_bytes: Bytes = 10_000_000  # train on at most this much text, from the corpus's start
    min_frequency: Positive = 2  # `bpe`, `wordpiece`: a pair must occur this often to be merged
    pattern: str = "gpt2"  # `bpe`, `tiktoken`: "gpt2", "cl100k", "o200k", or a regular expression
    lowercase: bool = False  # `wordpiece`: fold case, as bert-base-uncased
    # SentencePiece: the share of characters not left to bytes
    character_coverage: Annotated[float, Bounds(0.9, 1)] = 0.9995

    # The end-of-text token. None: "<|endoftext|>", or what the files at `path` say.
    eos_token: str | None = None
    # The begin-of-text token, such as "<s>" or "[CLS]". None: the end-of-text token serves, or what
    # the files at `path` say.
    bos_token: str | None = None
    mask_token: bool = False  # have "[MASK]", for masked language modelling
    num_sentinels: SizeOrZero = 0  # have "<extra_id_0>", "<extra_id_1>", ..., for span corruption
    special_tokens: tuple[str, ...] = ()  # further specials, such as "<|user|>"
    # How conversations are written: "chatml", "llama3", "gemma", whose specials are then had,
    # "plain", which has none, or a file with Jinja text.
    chat_template: Path = ""

    @property
    def specials(self) -> tuple[str, ...]:
        """Every special token that training adds, end-of-text first."""
        names = [self.eos_token or END_OF_TEXT]
        if self.bos_token:
            names.append(self.bos_token)
        if self.mask_token:
            names.append(MASKS[0])
        names += [SENTINEL.format(i) for i in range(self.num_sentinels)]
        names += [name for name in self.chat_specials if name not in self.special_tokens]
        return (*dict.fromkeys(names), *self.special_tokens)

    @property
    def chat_specials(self) -> tuple[str, ...]:
        """The special tokens that the chosen chat template writes, where it is known."""
        return BUILT_IN[self.chat_template].specials if self.chat_template in BUILT_IN else ()

    def validate(self, prefix: str = "config.tokenizer") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        check(
            bool(self.path) or self.kind not in LOADED_KINDS,
            f"{prefix}.path='' must name a file: kind {self.kind!r} is read, not trained",
        )
        for name in self.special_tokens:
            check(
                bool(name) and self.specials.count(name) == 1,
                f"{prefix}.special_tokens={self.special_tokens!r} must be distinct, not empty and "
                "other than the end-of-text, begin-of-text, mask and sentinel tokens",
            )
        for name in self.specials if not self.path and self.kind in ("bpe", "wordpiece") else ():
            check(
                len(name.removeprefix("##")) > 1,
                f"{prefix}: the special token {name!r} must be longer than a character, which kind "
                f"{self.kind!r} needs for text: choose a name that no text has, such as '<|user|>'",
            )
        if not self.path and self.kind in _SMALLEST:
            least = _SMALLEST[self.kind] + len(self.specials)
            check(
                self.vocab_size >= least,
                f"{prefix}.vocab_size={self.vocab_size!r} must be at least {least} for kind "
                f"{self.kind!r}",
            )
        pattern(self.pattern, f"{prefix}.pattern")


def pattern(name: str, field: str) -> str:
    """The regular expression that a `pattern` field names or is."""
    if name in PATTERNS:
        return PATTERNS[name]
    plain = name.replace("_", "").isalnum() or not name  # a word, not an expression
    if not plain:
        try:
            tokenizers.Regex(name)
            return name
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{field}={name!r} is not a regular expression: {reason}") from None
    choices = ", ".join(map(repr, PATTERNS))
    raise ConfigError(
        f"{field}={name!r} is neither one of {choices}{nearest(name, PATTERNS)} nor a regular "
        "expression"
    )
