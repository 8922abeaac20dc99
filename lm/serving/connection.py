"""Between HTTP and what is asked: bodies read within limits, and clients that go away noticed."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import pydantic
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lm.serving.config import ServeConfig
from lm.serving.errors import ApiError, of_validation

B = TypeVar("B", bound=pydantic.BaseModel)
T = TypeVar("T")


async def read_body(request: Request, kind: type[B], limits: ServeConfig) -> B:
    """The body of a request, as a model of pydantic's.

    Raises:
      ApiError: not JSON, too large, too slow, or with a field that is wrong.
    """
    form = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if form != "application/json":
        # A browser sends other forms from any page, without asking.
        raise ApiError(f"Content-Type={form!r} must be 'application/json'", status=415)
    data = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout):
            async for part in request.stream():
                data += part
                if len(data) > limits.max_body:
                    message = f"the body has more than {limits.max_body:,} bytes"
                    raise ApiError(message, status=413, headers={"Connection": "close"})
    except TimeoutError:
        message = f"the body did not arrive within {limits.body_timeout:g} s"
        raise ApiError(message, status=408, headers={"Connection": "close"}) from None
    try:
        return kind.model_validate_json(bytes(data))
    except pydantic.ValidationError as error:
        raise of_validation(error) from None


def check_key(request: Request, keys: Sequence[str]) -> None:
    """Raises ApiError unless the request has one of `keys`, if there are any."""
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    right = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
    if keys and not (kind.lower() == "bearer" and any(right)):
        message = "the header 'Authorization: Bearer KEY' must hold one of the server's keys"
        headers = {"WWW-Authenticate": "Bearer"}
        raise ApiError(message, None, 401, "invalid_api_key", headers)


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """What `work` returns; it is cancelled where the client goes away, streaming or not.

    Raises:
      ClientDisconnect: it has gone.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class EventStream(Response):
    """Server-sent events.

    Args:
      events: what stands behind "data: ", one at a time.
      deadline: by the loop's clock: then a client that does not read is left.
      close: called at the end, whatever ends it, even before it has begun.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], deadline: float, close: Callable[[], Any]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._deadline, self._close = events, deadline, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events, until they end or the client goes away."""

        async def write() -> None:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            async for event in self._events:
                data = f"data: {event}\n\n".encode()
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        try:
            async with asyncio.timeout_at(self._deadline):
                await while_connected(receive, write())
        except (ClientDisconnect, OSError, TimeoutError):
            pass
        finally:
            self._close()
