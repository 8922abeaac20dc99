"""What an engine draws, as the choices of a reply: text that is certain, and its tokens."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from lm.inference.grammar import Grammar
from lm.inference.requests import Event, Step
from lm.inference.sampling import json_logprob
from lm.inference.stream import TextStream
from lm.tokenizers import Tokenizer


@dataclasses.dataclass
class Told:
    """One token of a choice: how likely it was, and where its text begins in the choice's."""

    step: Step | None  # None: the first token of a text, before which there is nothing
    id: int
    start: int


@dataclasses.dataclass
class Piece:
    """What a choice has gained."""

    index: int
    text: str = ""
    tokens: list[Told] = dataclasses.field(default_factory=list)
    finish: str | None = None  # "stop" or "length"


class Choice:
    """One text of a reply, from the events of its request.

    A token is told once some of its text is out, so that tokens give away no more of a stop string
    than the text does.

    Args:
      index: its place among the choices.
      prompt: the ids before it, where they belong to its text (not to an encoder).
      stop: what ends it (`StopStrings`).
      echo: ids that its text begins with.
      discard: whether nothing drawn is wanted: the echo alone.
      grammar: what it keeps to; a text that ends before it is complete was cut off.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        index: int,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        echo: Sequence[int] = (),
        discard: bool = False,
        grammar: Grammar | None = None,
    ):
        self.index, self.drawn, self.finished = index, 0, False
        self._grammar = grammar and grammar.start()
        self._complete = True  # whether it was before the last token
        self._echo, self._discard = echo, discard
        self._stream = TextStream(tokenizer, () if echo else prompt, stop, len(echo))
        self._out = 0  # characters that are out
        self._waiting: collections.deque[Told] = collections.deque()

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended it, so that its request is to be cancelled."""
        return self._stream.stop is not None

    def push(self, event: Event) -> Piece | None:
        """What has become certain with an event of its request; None: nothing yet."""
        if self.finished:
            return None
        text = ""
        if self._echo and (event.prompt is not None or event.steps or event.finish):
            steps = [None, *(event.prompt or [None] * (len(self._echo) - 1))]
            for id, step in zip(self._echo, steps, strict=True):
                text += self._push(id, step)
            self._echo = ()
        for step in () if self._discard else event.steps:
            self.drawn += 1
            if self._grammar is not None:
                self._complete = self._grammar.complete
                self._grammar.advance(step.id)
            text += self._push(step.id, step)
            if self.stopped:
                break
        finish = "stop" if self.stopped else event.finish
        kept = self._grammar is None or self._complete or self._grammar.complete
        if finish is not None and (self._discard or not (kept or self.stopped)):
            finish = "length"
        if finish is not None:
            self.finished = True
            text += self._stream.flush()
        piece = Piece(self.index, text, finish=finish)
        self._out += len(text)
        while self._waiting and (
            self._waiting[0].start < self._out or (self.finished and not self.stopped)
        ):
            piece.tokens.append(self._waiting.popleft())
        return piece if text or piece.tokens or finish else None

    def _push(self, id: int, step: Step | None) -> str:
        self._waiting.append(Told(step, id, self._stream.length))
        return self._stream.push(id)


class Names:
    """Tokens as a reply names them."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def text(self, id: int) -> str:
        """The token's text; the name of a special; "bytes:\\xe2\\x82" for a part of a character."""
        if id in self._tokenizer.special_names:
            return self._tokenizer.special_names[id]
        data = self.bytes(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def bytes(self, id: int) -> bytes:
        """What the token adds to the text; of ids that the tokenizer does not know, nothing."""
        known = id < self._tokenizer.vocab_size
        return self._tokenizer.token_bytes(id) if known else b""

    def content(self, tokens: Sequence[Told]) -> list[dict[str, Any]]:
        """Chat's `logprobs.content`: each token, how likely it was, and its alternatives."""
        return [self._entry(t.id, t.step) for t in tokens]

    def _entry(self, id: int, step: Step | None) -> dict[str, Any]:
        entry = self._alternative(id, step.logprob if step else None)
        top = step.top if step else ()
        ranks = [rank for rank, (other, _) in enumerate(top, 1) if other == id]
        if ranks:
            entry["rank"] = ranks[0]
        return {**entry, "top_logprobs": [self._alternative(*pair) for pair in top]}

    def _alternative(self, id: int, logprob: float | None) -> dict[str, Any]:
        logprob = None if logprob is None else json_logprob(logprob)
        data = list(self.bytes(id))
        return {"token": self.text(id), "logprob": logprob, "bytes": data, "id": id}

    def lists(self, tokens: Sequence[Told]) -> dict[str, Any]:
        """Completions' `logprobs`: the same as lists side by side, and as `content`."""
        content = self.content(tokens)
        tops = [
            {other["token"]: other["logprob"] for other in reversed(entry["top_logprobs"])}
            for entry in content
        ]
        return {
            "tokens": [entry["token"] for entry in content],
            "token_logprobs": [entry["logprob"] for entry in content],
            "top_logprobs": [top if t.step else None for top, t in zip(tops, tokens)],
            "text_offset": [t.start for t in tokens],
            "content": content,
        }
