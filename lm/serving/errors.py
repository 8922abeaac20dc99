"""What a client is told where it asked for what cannot be: OpenAI's shape, naming the field."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pydantic
from starlette.responses import JSONResponse

from lm.config import ConfigError, printable

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that cannot be served, with the HTTP status that says why.

    Attributes:
      body: `{"error": {"message", "type", "param", "code"}}`.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        shown = printable(message if len(message) <= 1000 else f"{message[:1000]} …")
        self.body = {"error": {"message": shown, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """The answer to a request of which nothing was sent yet."""
        return JSONResponse(self.body, self.status, self.headers)


def of_validation(error: pydantic.ValidationError) -> ApiError:
    """The first thing that is wrong with a body, by the name and the place of the field."""
    first = error.errors(include_url=False, include_context=False)[0]
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if first["type"] == "json_invalid":
        return ApiError(f"the body is not JSON: {message}")
    param = ""
    for place in first["loc"]:
        param += f"[{place}]" if isinstance(place, int) else f".{place}" if param else str(place)
    if first["type"] == "missing":
        return ApiError(f"{param} is missing: the request must have it", param)
    if first["type"] == "extra_forbidden":
        return ApiError(f"{param} is not a parameter of this request", param)
    if not param:
        return ApiError(f"the body {message}")
    return ApiError(f"{param}={_shown(first['input'])}: {message}", param)


def of_config(error: ConfigError, names: Mapping[str, str], param: str | None = None) -> ApiError:
    """A mistake found further inside, which calls fields "sampling.NAME".

    Args:
      error: its message.
      names: what the API calls a field, where that is not its own name.
      param: the field that is wrong where the message does not say.
    """
    found = re.search(r"\bsampling\.(\w+)", str(error))
    if found:
        param = names.get(found[1], found[1])
    message = re.sub(r"\bsampling\.(\w+)", lambda m: names.get(m[1], m[1]), str(error))
    return ApiError(message, param)


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number too long to be written
        text = "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:100]}…"
