"""Replies in OpenAI's shapes, whole or as the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from typing import Any

from lm.serving.asked import Asked
from lm.serving.reply import Names, Piece
from lm.serving.schema import ChatBody, CompletionBody
from lm.serving.tools import CallReader, Part


class Reply:
    """What both kinds share: an identity, how much was read and drawn, and the shape of a chunk."""

    prefix, object, chunk_object = "", "", ""

    def __init__(self, model: str, asked: Asked, names: Names):
        self.asked, self.names = asked, names
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._begun: set[int] = set()

    def usage(self) -> dict[str, int]:
        """Tokens read, each prompt once, and drawn."""
        read = sum(map(len, self.asked.prompts))
        drawn = sum(choice.drawn for choice in self.asked.choices)
        return {
            "prompt_tokens": read,
            "completion_tokens": drawn,
            "total_tokens": read + drawn,
        }

    def chunk(self, piece: Piece) -> dict[str, Any] | None:
        """A piece of a choice, for a stream; None: it tells nothing."""
        choice = self._gained(piece)
        if not any(choice[field] for field in choice if field != "index"):
            return None
        chunk = {**self._head, "object": self.chunk_object, "choices": [choice]}
        return chunk | ({"usage": None} if self.counts else {})

    @property
    def counts(self) -> bool:
        """Whether the stream ends with the usage."""
        options = self.asked.body.stream_options
        return bool(options and options.include_usage)

    def last(self) -> dict[str, Any]:
        """The chunk that ends such a stream."""
        head = {**self._head, "object": self.chunk_object}
        return {**head, "choices": [], "usage": self.usage()}

    def whole(self, pieces: list[list[Piece]]) -> dict[str, Any]:
        """The reply at once, from the pieces of each choice."""
        joined = [
            Piece(
                number,
                "".join(piece.text for piece in several),
                [token for piece in several for token in piece.tokens],
                several[-1].finish,
            )
            for number, several in enumerate(pieces)
        ]
        choices = [self._complete(self._gained(piece)) for piece in joined]
        head = {**self._head, "object": self.object}
        return {**head, "choices": choices, "usage": self.usage()}

    def _ids(self, piece: Piece) -> dict[str, Any]:
        """Ids beside the text, where they are asked for (vLLM's `return_token_ids`)."""
        if not self.asked.body.return_token_ids:
            return {}
        ids: dict[str, Any] = {"token_ids": [token.id for token in piece.tokens]}
        if piece.index not in self._begun:
            several = len(self.asked.choices) // len(self.asked.prompts)
            ids["prompt_token_ids"] = self.asked.prompts[piece.index // several]
        return ids

    def _gained(self, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def _complete(self, choice: dict[str, Any]) -> dict[str, Any]:
        return choice


class CompletionReply(Reply):
    """Of `/v1/completions`."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _gained(self, piece: Piece) -> dict[str, Any]:
        body = self.asked.body
        assert isinstance(body, CompletionBody)
        told = body.logprobs is not None
        choice = {
            "index": piece.index,
            "text": piece.text,
            "logprobs": self.names.lists(piece.tokens) if told else None,
            "finish_reason": piece.finish,
            **self._ids(piece),
        }
        self._begun.add(piece.index)
        return choice


class ChatReply(Reply):
    """Of `/v1/chat/completions`."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, asked: Asked, names: Names):
        super().__init__(model, asked, names)
        self._readers = [asked.reader() if asked.reader else None for _ in asked.choices]

    def _gained(self, piece: Piece) -> dict[str, Any]:
        body, reader = self.asked.body, self._readers[piece.index]
        assert isinstance(body, ChatBody)
        parts = [Part("text", piece.text)]
        if reader is not None:
            parts = reader.push(piece.text) + (reader.flush() if piece.finish else [])
        text = "".join(part.text for part in parts if part.kind == "text")
        delta: dict[str, Any] = {}
        if piece.index not in self._begun:
            delta = {"role": "assistant", "content": text}
        elif text:
            delta = {"content": text}
        if calls := _calls(parts, reader):
            delta["tool_calls"] = calls
        called = reader is not None and reader.calls and piece.finish == "stop"
        logprobs = {"content": self.names.content(piece.tokens)} if body.logprobs else None
        choice = {
            "index": piece.index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": "tool_calls" if called else piece.finish,
            **self._ids(piece),
        }
        self._begun.add(piece.index)
        return choice

    def _complete(self, choice: dict[str, Any]) -> dict[str, Any]:
        delta = choice.pop("delta")
        message = {"role": "assistant", "content": delta["content"], "refusal": None}
        if calls := delta.get("tool_calls"):
            message["content"] = delta["content"] or None
            message["tool_calls"] = [
                {name: value for name, value in call.items() if name != "index"} for call in calls
            ]
        return {**choice, "message": message}


def _calls(parts: list[Part], reader: CallReader | None) -> list[dict[str, Any]]:
    """The calls that `parts` begin or go on with, each once."""
    calls: list[dict[str, Any]] = []
    number = (reader.calls if reader else 0) - sum(part.kind == "name" for part in parts) - 1
    for part in parts:
        if part.kind == "name":
            number += 1
            function = {"name": part.text, "arguments": ""}
            id = f"call_{uuid.uuid4().hex[:24]}"
            calls.append({"index": number, "id": id, "type": "function", "function": function})
        elif part.kind == "arguments":
            if not calls:
                calls.append({"index": number, "function": {"arguments": ""}})
            calls[-1]["function"]["arguments"] += part.text
    return calls
