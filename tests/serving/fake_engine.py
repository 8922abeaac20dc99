"""An engine without a model, and a server around it, so that what is tested is the server."""

import contextlib
import math
import random
import threading
import time
import types

import numpy as np
import uvicorn

from lm.inference.prompts import Framing
from lm.inference.requests import Event, QueueFull, Step
from lm.models import ModelConfig
from lm.serving.app import App
from lm.serving.asked import Served
from lm.serving.config import ServeConfig
from lm.serving.worker import Worker
from lm.tokenizers import TokenizerConfig, train

TOKENIZER = train(TokenizerConfig(kind="byte"), [])
MODEL = ModelConfig(vocab_size=TOKENIZER.vocab_size, max_length=512, width=32, num_heads=2)
FRAMING = Framing(end_of_text=(TOKENIZER.eos_id,)).filled(MODEL, TOKENIZER)


class FakeEngine:
    """Draws what `says` tells for a prompt's text, else letters that follow from the request.

    Attributes:
      held: the requests that hold a slot or wait for one.
      pause: seconds that each step takes.
    """

    def __init__(self, max_slots=4, max_queue=64):
        self.max_slots, self.max_queue = max_slots, max_queue
        self.says: dict[str, str] = {}
        self.pause, self.failing, self.steps = 0.0, False, 0
        self.held: dict[int, list] = {}  # number → request, ids to draw, how many are drawn
        self._numbers = iter(range(10**9))
        self._cancelled: list[int] = []

    @property
    def stats(self):
        running = min(len(self.held), self.max_slots)
        queued = len(self.held) - running
        counts = dict(pages_used=running, pages=8, prompt_tokens=9, found_tokens=7, preemptions=0)
        return types.SimpleNamespace(running=running, queued=queued, **counts)

    def submit(self, request):
        if len(self.held) >= self.max_slots + self.max_queue:
            raise QueueFull
        number = next(self._numbers)
        self.held[number] = [request, self.plan(request), 0]
        return number

    def plan(self, request):
        """What a request draws, were it alone and without an end."""
        ids = list(request.ids)
        text = TOKENIZER.decode(ids)
        for prompt, reply in self.says.items():
            if text.endswith(prompt):
                return [*TOKENIZER.encode(reply), TOKENIZER.eos_id]
        draw = random.Random(repr((ids, request.seed, request.prompt, request.sample)))
        return [draw.choice(b"abcdefgh \n") for _ in range(request.sampling.max_new_tokens)]

    def cancel(self, number):
        if self.held.pop(number, None):
            self._cancelled.append(number)

    def step(self):
        time.sleep(self.pause)
        self.steps += 1
        if self.failing:
            raise RuntimeError("out of order")
        events = [Event(number, [], "cancelled") for number in self._cancelled]
        self._cancelled = []
        for number in [*self.held][: self.max_slots]:
            request, ids, drawn = self.held[number]
            sampling = request.sampling
            step = self.told(ids[drawn], sampling.logprobs)
            self.held[number][2] = drawn = drawn + 1
            ended = step.id in (*request.sampling.stop_ids, TOKENIZER.eos_id)
            full = drawn >= min(sampling.max_new_tokens, len(ids))
            prompt = None
            if drawn == 1 and sampling.prompt_logprobs is not None:
                prompt = [self.told(id, sampling.prompt_logprobs) for id in request.ids[1:]]
            finish = "stop" if ended else "length" if full else None
            if finish:
                del self.held[number]
            events.append(Event(number, [step], finish, prompt))
        return events

    def told(self, id, logprobs):
        top = [(id, -0.5), (65, -1.0), (66, -math.inf)][: logprobs or 0]
        return Step(id, -0.5, -0.25, tuple(top))


def served(limits=None, **fields):
    def chat(messages, tools=None, add_generation_prompt=True, **variables):
        text = "".join(f"{m['role']}: {m.get('content')}\n" for m in messages)
        return TOKENIZER.encode(text + ("assistant: " if add_generation_prompt else ""))

    limits = limits or ServeConfig()
    return Served("tiny", MODEL, TOKENIZER, FRAMING, limits, **{"chat": chat, **fields})


def embed(texts):
    rows = [np.bincount(np.array(ids) % 32, minlength=32) for ids in texts]
    return np.array(rows, np.float32)


@contextlib.contextmanager
def running(app):
    """The address of a server that runs `app`, which is an `App`."""
    config = uvicorn.Config(app.asgi, port=0, log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
            assert thread.is_alive()
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server does not end"


@contextlib.contextmanager
def serving(engine=None, limits=None, keys=(), **fields):
    """The address of a server around a fake engine, and that engine."""
    engine = engine or FakeEngine()
    app = App(served(limits, **fields), Worker(engine), embed, keys)
    with running(app) as address:
        yield address, engine


def until(condition, seconds=20):
    """Waits until something holds."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about")
