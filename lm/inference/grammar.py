"""Output that keeps to a JSON schema, a regular expression or a Lark grammar.

`llguidance` (Microsoft) runs an Earley parser over derivatives of regular expressions and says for
every state which tokens may come next; a token that crosses the grammar's own borders is no matter.
The state of a text stands on the host: a mask goes to the device for each token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from lm.config import ConfigError, check
from lm.tokenizers import Tokenizer

MOST_BYTES = 2**16  # of a schema, an expression or a grammar
WHITESPACE = r"[ \n]{1,16}"  # between the parts of JSON: a model must not go on with it for ever
_LIMITS = {
    "max_items_in_row": 2_000,  # ways to go on that are open at once
    "initial_lexer_fuel": 1_000_000,  # about 20 ms
    "step_lexer_fuel": 200_000,  # a token: about 15 ms
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,  # about 2 KiB each
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
FIELDS = {"json": "json_schema", "regex": "regex", "lark": "grammar"}


class Grammar:
    """What one text may still become. Many texts may share one: each follows its own `start()`."""

    def __init__(self, matcher: Any, ends: Sequence[int], end: int, vocab_size: int):
        self._matcher, self._ends = matcher, tuple(ends)
        self._end, self._vocab_size = end, vocab_size  # `end`: the parser's, where there is none

    def start(self) -> Grammar:
        """The same state, to be advanced on its own."""
        return Grammar(self._matcher.deep_copy(), self._ends, self._end, self._vocab_size)

    def mask(self) -> np.ndarray:
        """Which tokens may come next, uint32 [W], as `lm.inference.warpers.allowed` reads it.

        End-of-text is among them where the text may end. Where `ended`, there is nothing else.
        """
        mask_W = np.zeros(-(-self._vocab_size // 32), "<u4")
        if not self.ended:
            bits = self._matcher.compute_bitmask()[: mask_W.nbytes]  # has room for an id more
            mask_W.view(np.uint8)[: len(bits)] = np.frombuffer(bits, np.uint8)
            for id in () if self._ends else (self._end,):
                mask_W[id // 32] &= ~np.uint32(1 << id % 32)
        if self.ended or not mask_W.any():
            for id in self._ends:
                mask_W[id // 32] |= np.uint32(1 << id % 32)
        return mask_W

    def advance(self, id: int) -> None:
        """After the token `id`, one of the mask's."""
        self._matcher.consume_token(int(id))

    @property
    def ended(self) -> bool:
        """Whether nothing may follow but end-of-text."""
        return self._matcher.is_stopped()

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""
        return not self.error and self._matcher.is_accepting()

    @property
    def error(self) -> str:
        """Why the text cannot go on, in one line: it led to where the limits are met."""
        return _reason(self._matcher.get_error())


class Grammars:
    """Compiles grammars for the tokens of one vocabulary.

    Args:
      tokenizer: what the model writes.
      end_of_text: the ids that end a text; () where only the grammar does.

    Raises:
      ConfigError: `llguidance` is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, end_of_text: Sequence[int]):
        try:
            import llguidance
            from llguidance._lib import LLParserLimits
        except ImportError:
            raise ConfigError(
                "json_schema, regex and grammar need llguidance: pip install llguidance"
            ) from None
        self._make = llguidance.LLMatcher
        self._limits = LLParserLimits(**_LIMITS)
        self._ends, self._vocab_size = tuple(end_of_text), tokenizer.vocab_size
        self._end = tokenizer.eos_id
        words = llguidance.TokenizerWrapper(_Vocabulary(tokenizer))
        ends = list(self._ends) or [self._end]
        self._tokens = llguidance.LLTokenizer(words, eos_token=ends)

    def compile(self, kind: Literal["json", "regex", "lark"], source: str | dict) -> Grammar:
        """The grammar of a JSON schema (a dict, or its text), an expression or Lark's notation.

        JSON may have up to 16 spaces and line breaks between its parts.

        Raises:
          ConfigError: one line naming the field (`FIELDS`): what does not compile, is too large,
            or can never be met.
        """
        field = FIELDS[kind]
        if kind == "json" and isinstance(source, dict):
            try:
                source = json.dumps(source, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise ConfigError(f"{field} is no JSON: {error}") from None
        check(isinstance(source, str), f"{field}={str(source)[:99]!r} must be text")
        size = len(source.encode(errors="replace"))
        check(size <= MOST_BYTES, f"{field} has {size:,} bytes: it may have {MOST_BYTES:,}")
        many = re.search(r"\{[\d\s,]*?(\d{5,})\s*,?\s*\}", source)
        check(
            kind == "json" or many is None,
            f"{field} repeats something {many and many[0][:99]} times: 9,999 is the most",
        )
        try:
            if kind == "json":
                options = {"whitespace_pattern": WHITESPACE}
                text = self._make.grammar_from_json_schema(source, overrides=options)
            elif kind == "regex":
                text = self._make.grammar_from_regex(source)
            else:
                text = self._make.grammar_from_lark(source)
        except ValueError as error:
            raise ConfigError(f"{field} is no JSON: {_reason(str(error))}") from None
        matcher = self._make(self._tokens, text, log_level=0, limits=self._limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # what explodes does so at its first token
        check(not matcher.is_error(), f"{field} cannot be used: {_reason(matcher.get_error())}")
        return Grammar(matcher, self._ends, self._end, self._vocab_size)


class _Vocabulary:
    """A tokenizer as `llguidance` reads it."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.special_token_ids = sorted(tokenizer.special_names)
        self.tokens = [
            tokenizer.special_names.get(id, "").encode() or tokenizer.token_bytes(id)
            for id in range(tokenizer.vocab_size)
        ]

    def __call__(self, text: str | bytes) -> list[int]:
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self._tokenizer.encode(text)


def _reason(message: str) -> str:
    """What an error of `llguidance` says, in one line, without the place and the source."""
    if message.startswith("NoExtension"):
        return "no text meets it"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    found = next((line for line in lines if line.startswith("error: ")), lines[0] if lines else "")
    return found.removeprefix("error: ")[:300]
