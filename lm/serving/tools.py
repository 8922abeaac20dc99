"""Calls of functions in what a model writes: as JSON, or between tags in the Hermes way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import regex

from lm.serving.errors import ApiError

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_HEADER = regex.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


class Part(NamedTuple):
    """A stretch of a reply: plain text, the name of a function that is called, or arguments."""

    kind: Literal["text", "name", "arguments"]
    text: str


class CallReader:
    """Splits a reply, as it comes, into text and calls; arguments are passed on as written.

    Args:
      mode: "auto": calls stand between `OPEN` and `CLOSE`; "required": all of it is one call;
        "named": all of it is the arguments of `name`.
      several: whether more than one call is read.
    """

    def __init__(
        self, mode: Literal["auto", "required", "named"], name: str = "", several: bool = True
    ):
        self._mode, self._name = mode, name
        self._several = several and mode == "auto"
        self._state = {"auto": "text", "required": "header", "named": "name"}[mode]
        self._buffer = ""
        self._depth, self._quoted, self._escaped = 0, False, False
        self.calls = 0

    def push(self, text: str) -> list[Part]:
        """What of it has become certain."""
        self._buffer += text
        parts: list[Part] = []
        while self._buffer and self._advance(parts):
            pass
        return [part for part in parts if part.text]

    def flush(self) -> list[Part]:
        """The rest, when no more text comes: a call that was only begun is text."""
        rest, self._buffer = self._buffer, ""
        if self._state == "header":
            return [Part("text", (OPEN if self._mode == "auto" else "") + rest)]
        return [Part("text", rest)] if self._state == "text" and rest else []

    def _advance(self, parts: list[Part]) -> bool:
        """Moves on in the buffer; whether there may be more to do."""
        buffer = self._buffer
        if self._state == "name":
            self._call(self._name, parts)
        elif self._state == "text":
            before, tag, self._buffer = buffer.partition(OPEN)
            if not tag:
                kept = next(n for n in range(len(OPEN) - 1, -1, -1) if buffer.endswith(OPEN[:n]))
                before, self._buffer = buffer[: len(buffer) - kept], buffer[len(buffer) - kept :]
            parts.append(Part("text", before))
            self._state = "header" if tag else "text"
            return bool(tag)
        elif self._state == "header":
            found = _HEADER.match(buffer, partial=True)
            if found and found.partial:
                return False
            if not found:
                self._state = "text"
                parts.append(Part("text", OPEN if self._mode == "auto" else ""))
                return True
            self._buffer = buffer[found.end() :]
            self._call(_unquoted(found[1]), parts)
        elif self._state == "arguments":
            end = self._end(buffer)
            parts.append(Part("arguments", buffer[:end]))
            self._buffer = buffer[end:]
            if not self._depth and buffer[:end].strip():
                self._state = "close"
        else:  # "close": what stands behind the arguments
            _, tag, rest = buffer.partition(CLOSE)
            if not tag or not self._several:
                return False
            self._state, self._buffer = "text", rest.lstrip()
        return True

    def _call(self, name: str, parts: list[Part]) -> None:
        parts.append(Part("name", name))
        self.calls += 1
        self._state, self._depth = "arguments", 0

    def _end(self, text: str) -> int:
        """Where the arguments end in `text`: behind the brace that closes them, or not yet."""
        for at, c in enumerate(text):
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif c == "\\":
                    self._escaped = True
                elif c == '"':
                    self._quoted = False
            elif c == '"':
                self._quoted = True
            elif c in "{[":
                self._depth += 1
            elif c in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        return len(text)


def _unquoted(literal: str) -> str:
    try:
        return json.loads(literal, strict=False)
    except ValueError:
        return literal[1:-1]


def call_schema(tools: Sequence[dict[str, Any]], name: str | None) -> dict[str, Any]:
    """The JSON schema of a call of any of the functions, or of one's arguments.

    Args:
      tools: of the request, as JSON.
      name: the function whose arguments are wanted; None: a whole call.
    """
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    schemas = {n: dict(f.get("parameters") or {"type": "object"}) for n, f in functions.items()}
    for function, schema in schemas.items():
        if schema.setdefault("type", "object") != "object":
            where = f"tools: the parameters of {function!r} must be a schema of type 'object'"
            raise ApiError(where, "tools")
    if name is not None:
        if name not in schemas:
            raise ApiError(f"tool_choice names {name!r}, which is not in tools", "tool_choice")
        return schemas[name]
    shared: dict[str, Any] = {}
    for function, schema in schemas.items():
        for key in ("$defs", "definitions"):  # what references from anywhere begin with
            for defined, meaning in schema.pop(key, {}).items():
                if shared.setdefault(key, {}).setdefault(defined, meaning) != meaning:
                    where = f"tools: {function!r} and another define {defined!r} differently"
                    raise ApiError(where, "tools")
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function}, "arguments": schema},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function, schema in schemas.items()
    ]
    return {"anyOf": calls, **shared}
