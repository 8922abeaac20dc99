"""A server without a model, which the page is tested against: what it writes is drawn by a hash.

Words in the last message ask for what a model seldom does: "markup" (text that looks like HTML),
"forever" (slowly, without an end), "hangup" (the connection breaks), "busy" (429 the first time),
"accents" (characters of several tokens).
"""

import asyncio
import codecs
import hashlib
import json
import math

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from lm.serving import page

WORDS = (
    " the a and of to in it was she he they there one old small dark river house garden light "
    "night window road stone tree bird song snow sea wind fire door voice hand long quiet slow "
    "bright cold under over through before after ran came went saw heard kept found opened waited"
)
MARKUP = [
    "<script>",
    "window.hacked=1",
    "</script>",
    "<img src=x onerror=hacked=1>",
    "&amp;",
    "<b>",
]
VOCABULARY = [
    *([f" {word}".encode() for word in WORDS.split()]),
    *[b".", b",", b"\n"],
    *[text.encode() for text in MARKUP],
    *[bytes([byte]) for byte in " né 🙂".encode()],
]
FIRST = {"markup": WORDS.split().__len__() + 3, "accents": len(VOCABULARY) - 9}
LENGTH = {"markup": len(MARKUP), "accents": 9}


def error(status: int, message: str, **headers: str) -> JSONResponse:
    body = {"error": {"message": message, "type": "error", "param": None, "code": None}}
    return JSONResponse(body, status, headers)


def draw(ids: list[int], seed: int) -> list[tuple[int, float]]:
    """The likeliest tokens after `ids`, and their log-probabilities."""
    state = hashlib.sha256(json.dumps([ids[-6:], seed]).encode()).digest()
    chosen = dict.fromkeys(byte % (len(WORDS.split()) + 2) for byte in state[1:])
    sharpness = 0.4 + state[0] / 160
    total = sum(math.exp(-sharpness * place) for place in range(len(chosen)))
    return [(id, -sharpness * place - math.log(total)) for place, id in enumerate(chosen)]


class Fake:
    """`asgi` is the server; `seen` the requests' bodies; `key` what it asks for, if anything."""

    def __init__(self, chat: bool = True, delay: float = 0.002):
        self.chat, self.delay, self.key, self.seen, self.was_busy = chat, delay, None, [], False
        self.left = 0  # clients that went away
        post = {"methods": ["POST"]}
        routes = [
            *page.ROUTES,
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chats, **post),
            Route("/v1/completions", self.completions, **post),
        ]
        self.asgi = Starlette(routes=routes)

    def refused(self, request: Request) -> JSONResponse | None:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return error(401, "This server asks for an API key.")
        return None

    async def models(self, request: Request) -> JSONResponse:
        card = {"id": "fake", "object": "model", "owned_by": "lm", "max_model_len": 512}
        card["chat"] = self.chat
        return self.refused(request) or JSONResponse({"object": "list", "data": [card]})

    async def chats(self, request: Request):
        body = await request.json()
        return self.answer(request, body, body["messages"][-1]["content"], list(b"\n" * 3))

    async def completions(self, request: Request):
        body = await request.json()
        text = body["prompt"] if isinstance(body["prompt"], str) else ""
        ids = [byte % 50 for byte in text.encode()] if text else body["prompt"]
        return self.answer(request, body, text, ids)

    def answer(self, request: Request, body: dict, asked: str, ids: list[int]):
        self.seen.append(body)
        if refused := self.refused(request):
            return refused
        if body.get("temperature", 1) > 1.9:
            return error(400, "temperature=2.0 must be at most 1.9")
        if "busy" in asked and not self.was_busy:
            self.was_busy = True
            return error(
                429, "The server is busy: 8 requests wait already.", **{"Retry-After": "1"}
            )
        return StreamingResponse(self.stream(body, asked, ids), media_type="text/event-stream")

    async def stream(self, body: dict, asked: str, ids: list[int]):
        seed, chat = body.get("seed", len(self.seen)), "messages" in body
        told = body["top_logprobs"] if chat else body["logprobs"]
        special = next((word for word in FIRST if word in asked), None)
        length = LENGTH.get(special, body.get("max_tokens", 16))
        prompt, decoder = list(ids), Decoder()
        try:
            for i in range(10**6 if "forever" in asked else length):
                if "hangup" in asked and i == 5:
                    await asyncio.sleep(0.5)
                    raise ConnectionResetError
                await asyncio.sleep(0.05 if "forever" in asked else self.delay)
                top = draw(ids, seed)
                place = min(
                    len(top) - 1, hashlib.sha256(json.dumps([ids, seed]).encode()).digest()[0] // 90
                )
                if special:
                    top[place] = (FIRST[special] + i, top[place][1])
                id, logprob = top[place]
                ids = [*ids, id]
                choice = {"index": 0, "finish_reason": None, "token_ids": [id]}
                shown = [self.entry(*one) for one in top[:told]]
                entry = {**self.entry(id, logprob), "rank": place + 1, "top_logprobs": shown}
                choice["logprobs"] = {"content": [entry]}
                text = decoder.decode(VOCABULARY[id])
                choice |= {"delta": {"content": text}} if chat else {"text": text}
                if not i:
                    choice["prompt_token_ids"] = prompt
                yield event({"choices": [choice]})
            end = {"index": 0, "finish_reason": "length", "logprobs": None}
            yield event({"choices": [end | ({"delta": {}} if chat else {"text": ""})]})
            yield event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": length}})
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left += 1
            raise

    def entry(self, id: int, logprob: float) -> dict:
        token = VOCABULARY[id]
        text = token.decode(errors="replace")
        return {"id": id, "token": text, "logprob": logprob, "bytes": list(token)}


def event(body: dict) -> str:
    return f"data: {json.dumps(body)}\n\n"


class Decoder:
    """Text of bytes, none of a character before its last."""

    def __init__(self):
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
