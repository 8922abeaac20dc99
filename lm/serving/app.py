"""The server: routes to the engine, in OpenAI's words."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import functools
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lm.config import ConfigError
from lm.inference.requests import QueueFull
from lm.serving import asked, page, schema
from lm.serving.asked import Asked, Served
from lm.serving.connection import EventStream, check_key, read_body, while_connected
from lm.serving.errors import ApiError
from lm.serving.format import ChatReply, CompletionReply, Reply
from lm.serving.metrics import Metrics
from lm.serving.reply import Names, Piece
from lm.serving.worker import EngineFailed, Ticket, Worker

_log = logging.getLogger(__name__)
EMBEDDED_AT_ONCE = 32  # texts between two looks at whether the client is still there

# path → the body that is posted there and what it does; what is only read, None.
ROUTES: dict[str, tuple[type[schema.Body] | None, str]] = {
    "/v1/models": (None, "The models there are."),
    "/v1/completions": (schema.CompletionBody, "Continues texts."),
    "/v1/chat/completions": (schema.ChatBody, "Replies in a conversation."),
    "/v1/embeddings": (schema.EmbeddingBody, "A vector of length 1 for each text."),
    "/tokenize": (schema.TokenizeBody, "The tokens of a text or a conversation."),
    "/detokenize": (schema.DetokenizeBody, "The text of tokens."),
    "/health": (None, "Whether all is well."),
    "/metrics": (None, "Counts for Prometheus."),
}


class App:
    """What answers requests; `asgi` is what a web server runs.

    Args:
      served: the model.
      worker: runs its engine; None: it cannot write, only embed.
      embed: ids of texts → their vectors, float32 [N, D].
      keys: of which a request must have one; (): everyone may ask.
      width: numbers of a vector (D); None: as many as of the residual stream.
    """

    def __init__(
        self,
        served: Served,
        worker: Worker | None,
        embed: Callable[[Sequence[Sequence[int]]], np.ndarray],
        keys: Sequence[str] = (),
        width: int | None = None,
    ):
        self._width = width or served.model.width
        self.served, self.worker, self._embed, self._keys = served, worker, embed, keys
        self.names = Names(served.tokenizer)
        stats = (lambda: worker.engine.stats) if worker else None
        self.metrics = Metrics(served.name, stats)
        self._embedding = asyncio.Lock()
        self._created = int(time.time())
        self._document = schema.openapi(ROUTES, bool(keys))
        posted = {
            "/v1/completions": (self._generate, asked.completion, CompletionReply),
            "/v1/chat/completions": (self._generate, asked.chat, ChatReply),
            "/v1/embeddings": (self._embeddings,),
            "/tokenize": (self._tokenize,),
            "/detokenize": (self._detokenize,),
        }
        read = {
            "/v1/models": self._models,
            "/v1/models/{name:path}": self._models,
            "/health": self._health,
            "/metrics": self._metrics,
            "/openapi.json": self._openapi,
        }
        routes = [Route(path, endpoint) for path, endpoint in read.items()]
        for path, (endpoint, *more) in posted.items():
            body = ROUTES[path][0]
            routes.append(Route(path, self._post(body, endpoint, *more), methods=["POST"]))
        self.asgi = Starlette(
            routes=[*page.ROUTES, *routes],
            lifespan=self._lifespan,
            exception_handlers={
                ApiError: lambda request, error: error.response(),
                HTTPException: _not_there,
                Exception: _fault,
            },
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        if self.worker:
            self.worker.start()
        yield
        if self.worker:
            await asyncio.to_thread(self.worker.stop)

    def _post(
        self, kind: type[schema.Named], answer: Callable[..., Awaitable[Response]], *more: Any
    ) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint that reads a body of this kind and has it answered."""

        async def endpoint(request: Request) -> Response:
            check_key(request, self._keys)
            try:
                body = await read_body(request, kind, self.served.limits)
                if body.model is not None:
                    self._check_model(body.model)
                return await answer(request, body, *more)
            except ClientDisconnect:
                return Response(status_code=499)

        return endpoint

    def _check_model(self, name: str) -> None:
        if name != self.served.name:
            message = f"model={name[:200]!r} is not here: there is {self.served.name!r}"
            raise ApiError(message, "model", 404, "model_not_found")

    # ---- Text ------------------------------------------------------------------------------------

    async def _generate(
        self,
        request: Request,
        body: schema.Sampled,
        checked: Callable[[Served, Any], Asked],
        kind: type[Reply],
    ) -> Response:
        limit = self.served.limits.timeout
        deadline = asyncio.get_running_loop().time() + limit
        late = ApiError(f"the reply was not ready within {limit:g} s", status=408, code="timeout")
        begun: list[_Writing] = []
        try:
            async with asyncio.timeout_at(deadline):
                await while_connected(request.receive, self._begin(body, checked, begun))
                (writing,) = begun
                reply = kind(self.served.name, writing.asked, self.names)
                if body.stream:
                    begun.clear()  # the stream will close it
                    events = self._events(reply, writing, deadline, late)
                    return EventStream(events, deadline + 5, writing.close)
                whole = await while_connected(request.receive, self._whole(reply, writing))
                return JSONResponse(whole)
        except TimeoutError:
            raise late from None
        except EngineFailed as error:
            raise _failed(error) from None
        finally:
            for writing in begun:
                writing.close()

    async def _begin(
        self,
        body: schema.Sampled,
        checked: Callable[[Served, Any], Asked],
        begun: list[_Writing],
    ) -> None:
        """Hands what `body` asks for to the engine, and puts it into `begun`."""
        if self.worker is None:
            raise ApiError("the model cannot write: ask it for /v1/embeddings", "model", 404)
        wanted = await asyncio.to_thread(checked, self.served, body)
        try:
            ticket = await self.worker.submit(wanted.requests)
        except QueueFull:
            message = "too many requests wait: try again later"
            raise ApiError(message, None, 429, "queue_full", {"Retry-After": "1"}) from None
        except ConfigError as error:
            raise ApiError(str(error)) from None
        begun.append(_Writing(ticket, wanted, self.metrics))

    async def _whole(self, reply: Reply, writing: _Writing) -> dict[str, Any]:
        pieces: list[list[Piece]] = [[] for _ in reply.asked.choices]
        async for piece in writing.pieces():
            pieces[piece.index].append(piece)
        return reply.whole(pieces)

    async def _events(
        self, reply: Reply, writing: _Writing, deadline: float, late: ApiError
    ) -> AsyncIterator[str]:
        """The chunks of a stream as JSON; a fault on the way ends it with an error."""
        try:
            async for piece in writing.pieces(deadline):
                if chunk := reply.chunk(piece):
                    yield _json(chunk)
            if reply.counts:
                yield _json(reply.last())
        except TimeoutError:
            yield _json(late.body)
        except EngineFailed as error:
            yield _json(_failed(error).body)
        yield "[DONE]"

    # ---- The rest --------------------------------------------------------------------------------

    async def _embeddings(self, request: Request, body: schema.EmbeddingBody) -> Response:
        limit = self.served.limits
        if len(body.input) > limit.max_rows:
            message = f"input has {len(body.input):,} texts: {limit.max_rows} at most"
            raise ApiError(message, "input")
        if body.dimensions not in (None, self._width):
            message = f"dimensions={body.dimensions} must be {self._width}, as the model's are"
            raise ApiError(message, "dimensions")
        read = functools.partial(asked.readable, self.served, param="input")
        texts = await asyncio.to_thread(lambda: [*map(read, body.input)])

        async def work() -> np.ndarray:
            found = []
            for start in range(0, len(texts), EMBEDDED_AT_ONCE):
                async with self._embedding:
                    some = texts[start : start + EMBEDDED_AT_ONCE]
                    found.append(await asyncio.to_thread(self._embed, some))
            return np.concatenate(found)

        try:
            async with asyncio.timeout(limit.timeout):
                vectors_ND = await while_connected(request.receive, work())
        except TimeoutError:
            raise ApiError(f"not ready within {limit.timeout:g} s", status=408) from None
        norms_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        vectors_ND = np.nan_to_num(vectors_ND / np.maximum(norms_N1, 1e-12)).astype("<f4")
        tokens = sum(map(len, texts))

        def shown(vector_D: np.ndarray) -> Any:
            if body.encoding_format == "float":
                return vector_D.tolist()
            return base64.b64encode(vector_D.tobytes()).decode()

        data = [
            {"object": "embedding", "index": index, "embedding": shown(vector_D)}
            for index, vector_D in enumerate(vectors_ND)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        head = {"object": "list", "model": self.served.name}
        return JSONResponse({**head, "data": data, "usage": usage})

    async def _tokenize(self, request: Request, body: schema.TokenizeBody) -> Response:
        if (body.prompt is None) == (body.messages is None):
            raise ApiError("prompt: give it, or messages, and not both", "prompt")

        def work() -> list[int]:
            if body.messages is None:
                framed = body.add_special_tokens
                return asked.text_ids(self.served, body.prompt or "", "prompt", framed)
            reply = body.add_generation_prompt
            return asked.conversation(self.served, body.messages, body.tools, reply)

        ids = await asyncio.to_thread(work)
        strings = [*map(self.names.text, ids)] if body.return_token_strs else None
        length = self.served.model.max_length
        found = {"count": len(ids), "max_model_len": length, "tokens": ids}
        return JSONResponse({**found, "token_strs": strings})

    async def _detokenize(self, request: Request, body: schema.DetokenizeBody) -> Response:
        try:
            return JSONResponse({"prompt": self.served.tokenizer.decode(body.tokens)})
        except ConfigError as error:
            raise ApiError(f"tokens: {error}", "tokens") from None

    async def _models(self, request: Request) -> Response:
        check_key(request, self._keys)
        name = request.path_params.get("name")
        card = {
            "id": self.served.name,
            "object": "model",
            "created": self._created,
            "owned_by": "lm",
            "max_model_len": self.served.model.max_length,
            "chat": self.served.chat is not None,
        }
        if name is not None:
            self._check_model(name)
        return JSONResponse(card if name else {"object": "list", "data": [card]})

    async def _health(self, request: Request) -> Response:
        if self.worker and self.worker.failure:
            raise _failed(self.worker.failure)
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(self._document)


@dataclasses.dataclass
class _Writing:
    """Requests that an engine works on for one connection. `close` it, whatever happens."""

    ticket: Ticket
    asked: Asked
    metrics: Metrics

    def __post_init__(self) -> None:
        requests = self.asked.requests
        self._counts = [self.metrics.request(len(request.ids)) for request in requests]
        self._open = set(range(len(requests)))

    async def pieces(self, deadline: float | None = None) -> AsyncIterator[Piece]:
        """What the choices gain, until all have ended.

        Raises:
          TimeoutError: they have not by `deadline`, in the loop's time.
          EngineFailed: they never will.
        """
        choices = dict(zip(self.ticket.numbers, self.asked.choices, strict=True))
        while self._open:
            async with asyncio.timeout_at(deadline):
                event = await self.ticket.event()
            choice = choices[event.number]
            if choice.finished:
                continue
            self._counts[choice.index].drew(len(event.steps))
            piece = choice.push(event)
            if piece and piece.finish:
                self._open.discard(choice.index)
                self._counts[choice.index].ended(piece.finish)
                if event.finish is None:
                    self.ticket.cancel(event.number)
            if piece:
                yield piece

    def close(self) -> None:
        """Ends what still runs, for whatever reason."""
        self.ticket.close()
        for index in self._open:
            self._counts[index].ended("abort")
        self._open = set()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _failed(error: EngineFailed) -> ApiError:
    return ApiError(f"the engine has failed: {error}", status=503, code="engine_failed")


def _not_there(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return ApiError(message, None, error.status_code, None, error.headers).response()


def _fault(request: Request, error: Exception) -> Response:
    _log.error("a fault of the server, at %s", request.url.path, exc_info=error)
    return ApiError("a fault of the server; its log says more", status=500).response()
