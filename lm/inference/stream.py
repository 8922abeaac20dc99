"""A continuation as exact text, while its tokens come: characters whole, stop strings found."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from lm.tokenizers import Tokenizer


class StopStrings:
    """Passes text on up to the first stop string, holding back what may become one.

    The first is the one that ends first, and of those that end together the longest. So what
    passes does not depend on where the text was cut into pieces, and holds no stop string.

    Attributes:
      found: the stop string that ended the text; None while there is none.
    """

    def __init__(self, strings: Sequence[str]):
        self._strings = sorted({s for s in strings if s}, key=len, reverse=True)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text that has become certain; "" for all that follows a stop string."""
        if self.found is not None or not self._strings:
            return piece if self.found is None else ""
        text = self._held + piece
        ends = [(at + len(s), -len(s), s) for s in self._strings if (at := text.find(s)) >= 0]
        if ends:
            end, _, self.found = min(ends)
            self._held = ""
            return text[: end - len(self.found)]
        held = max(self._begun(text, s) for s in self._strings)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _begun(text: str, string: str) -> int:
        """How many characters at the end of `text` begin `string`."""
        longest = min(len(text), len(string) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)


class TextStream:
    """Turns the tokens drawn after a prompt into text, one at a time.

    The joined pieces are what the tokens add to the text of the prompt, whatever the pieces: where
    it ends in the middle of a character, the character comes whole once tokens complete it, and
    nothing of it comes otherwise. U+FFFD stands for bytes drawn that are no UTF-8, and for a
    character drawn in part when the text is over.

    Args:
      tokenizer: of the tokens.
      prompt: the tokens before.
      stop: strings that end the text, as `StopStrings` finds them.
      unstopped: how many of the tokens pushed first are not searched for them: an echoed prompt.

    Attributes:
      length: characters that the tokens so far stand for, those held back and cut off included.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Iterable[int] = (),
        stop: Sequence[str] = (),
        unstopped: int = 0,
    ):
        self._tokenizer, self._stops = tokenizer, StopStrings(stop)
        self._unstopped = unstopped
        self._drop_space = tokenizer.drops_first_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.length = 0
        for id in prompt:
            self._utf8.decode(self._data(id))
        self._open = self._utf8.getstate()[0]  # bytes of the prompt's last, unfinished character

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text; None while there is none."""
        return self._stops.found

    def push(self, id: int) -> str:
        """The text that became certain with this token; "" while it is not."""
        data = self._data(id)
        if data and self._open:
            if not _continues(self._open, data[0]):
                self._utf8.reset()
            self._open = b""
        piece = self._utf8.decode(data)
        if self._unstopped > 0:
            self._unstopped -= 1
            self.length += len(piece)
            return piece
        return self._pass(piece)

    def flush(self) -> str:
        """The rest, when no more tokens come; "" after a stop string."""
        rest = "" if self._open else self._utf8.decode(b"", final=True)
        return self._pass(rest) + self._stops.flush()

    def _pass(self, piece: str) -> str:
        self.length += len(piece)
        return self._stops.push(piece)

    def _data(self, id: int) -> bytes:
        data = self._tokenizer.token_bytes(id)
        if data and self._drop_space:
            data, self._drop_space = data.removeprefix(b" "), False
        return data


def _continues(begun: bytes, byte: int) -> bool:
    """Whether the bytes of an unfinished character may be followed by `byte`."""
    try:
        (begun + bytes([byte])).decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True
