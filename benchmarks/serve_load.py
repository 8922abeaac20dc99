"""A server under load: many streaming clients of whom some leave and some send nonsense.

    python benchmarks/serve_load.py --run=runs/quickstart            # two minutes, 64 clients
    python benchmarks/serve_load.py --run=DIR --seconds=20 --clients=16

Starts `main.py --config=configs/serve.py` on the run, asks for `--alone` texts one at a time, then
for texts of random lengths from all clients at once: one request in ten is left in the middle of
its stream, one in ten is malformed, and some are those that were asked for alone, whose tokens and
log-probabilities must be the same to the last bit. At last SIGTERM is sent under load, and every
request that was accepted must be answered whole. One line of JSON says how it went:

  faults: replies with a status of 500 or more, and streams that broke off
  different: of `compared` texts asked for alone and under load, those that differ
  held: requests that hold a slot or wait when all clients have gone
  lost: of `draining` requests accepted before SIGTERM, those not answered whole
  gap_ms: from one piece of a text to the next, in milliseconds; a piece is a few tokens
  token_ms: the same for each token of the piece
  speedup: tokens/s under load over tokens/s one at a time; the clients share the machine
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import time

import httpx
import numpy as np

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "bird", "in", "that", "tree"]
MALFORMED = [
    b"{",
    b'{"prompt": "\xff"}',
    b'{"prompt": []}',
    b'{"prompt": "a", "temperature": -1}',
    b'{"prompt": "a", "n": 1000000}',
    b'{"prompt": "a", "temprature": 1}',
    b'{"prompt": [99999999]}',
    b'{"prompt": "a", "stop": ' + json.dumps(["s"] * 10_000).encode() + b"}",
    b"[" * 50_000,
]


def spec(number: int) -> dict:
    """A request that follows from its number."""
    draw = random.Random(number)
    return {
        "prompt": " ".join(draw.choices(WORDS, k=draw.randrange(1, 40))),
        "max_tokens": draw.randrange(1, 100),
        "temperature": draw.choice([0, 0.7, 1.0]),
        "top_p": draw.choice([0.9, 1.0]),
        "seed": number,
        "logprobs": 2,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
    }


class Load:
    """What clients have met."""

    def __init__(self, url: str):
        self.url = url
        self.client = httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits())
        self.requests = self.faults = self.refused = self.left = self.tokens = 0
        self.gaps: list[float] = []
        self.token_gaps: list[float] = []
        self.firsts: list[float] = []

    async def ask(self, body: dict, leave: int | None = None, begun: list | None = None):
        """The ids and log-probabilities of a streamed text; None where it was not had whole."""
        self.requests += 1
        told, pieces, began = [], 0, time.perf_counter()
        last = began
        async with self.client.stream("POST", "/v1/completions", json=body) as reply:
            if reply.status_code != 200:
                self.faults += reply.status_code >= 500
                self.refused += reply.status_code == 429
                return None
            if begun is not None:
                begun.append(1)
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    return told
                if not line:
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    self.faults += 1
                    return None
                choice, now = event["choices"][0], time.perf_counter()
                logprobs = choice["logprobs"]["token_logprobs"]
                told += zip(choice["token_ids"], logprobs, strict=True)
                if pieces:
                    self.gaps.append(now - last)
                    self.token_gaps += [(now - last) / max(len(logprobs), 1)] * len(logprobs)
                else:
                    self.firsts.append(now - began)
                pieces, last = pieces + 1, now
                self.tokens += len(logprobs)
                if leave is not None and pieces > leave:
                    self.left += 1
                    return None
        self.faults += 1  # it broke off
        return None

    async def nonsense(self, body: bytes) -> None:
        """A body that must be refused as the client's mistake."""
        self.requests += 1
        headers = {"Content-Type": "application/json"}
        reply = await self.client.post("/v1/completions", content=body, headers=headers)
        self.faults += not 400 <= reply.status_code < 500


async def measure(url: str, process: subprocess.Popen, clients: int, seconds: float, alone: int):
    """All that the benchmark reports."""
    one = Load(url)
    for number in range(2):
        await one.ask(spec(10**6 + number))  # what is compiled on demand
    one = Load(url)
    began = time.perf_counter()
    wanted = {number: await one.ask(spec(number)) for number in range(alone)}
    rate_alone = one.tokens / (time.perf_counter() - began)

    load = Load(url)
    ends, compared, different = time.perf_counter() + seconds, 0, 0

    async def client(number: int) -> None:
        nonlocal compared, different
        draw = random.Random(f"client {number}")
        while time.perf_counter() < ends:
            chance = draw.random()
            if chance < 0.1:
                await load.nonsense(draw.choice(MALFORMED))
            elif chance < 0.2:
                await load.ask(spec(draw.randrange(10**6)), leave=draw.randrange(5))
            else:
                known = draw.randrange(alone) if draw.random() < 0.3 else None
                told = await load.ask(spec(draw.randrange(10**6) if known is None else known))
                if known is not None and told is not None:
                    compared += 1
                    different += told != wanted[known]

    began = time.perf_counter()
    await asyncio.gather(*map(client, range(clients)))
    rate = load.tokens / (time.perf_counter() - began)
    await asyncio.sleep(2)
    metrics = (await load.client.get("/metrics")).text.splitlines()
    held = sum(
        float(line.split()[-1])
        for line in metrics
        if line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{"))
    )

    begun: list = []
    last = [asyncio.ensure_future(load.ask(spec(n), begun=begun)) for n in range(clients)]
    while len(begun) < clients:
        await asyncio.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    answers = await asyncio.gather(*last, return_exceptions=True)
    lost = sum(not isinstance(answer, list) for answer in answers)

    def percentiles(values: list[float]) -> dict[str, float]:
        found = np.percentile(values, [50, 99]) if values else (float("nan"),) * 2
        return {"p50": round(1e3 * found[0], 2), "p99": round(1e3 * found[1], 2)}

    return {
        "clients": clients,
        "seconds": seconds,
        "requests": load.requests,
        "left": load.left,
        "refused": load.refused,
        "faults": one.faults + load.faults,
        "compared": compared,
        "different": different,
        "held": int(held),
        "draining": len(begun),
        "lost": lost,
        "exit_code": process.wait(60),
        "first_ms": percentiles(load.firsts),
        "gap_ms": percentiles(load.gaps),
        "token_ms": percentiles(load.token_gaps),
        "tokens_per_second": round(rate, 1),
        "alone_tokens_per_second": round(rate_alone, 1),
        "speedup": round(rate / rate_alone, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", default="runs/quickstart")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--alone", type=int, default=32)
    parser.add_argument("--slots", type=int, default=16)
    words, more = parser.parse_known_args()  # the rest goes to the server
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "main.py", "--config=configs/serve.py"]
    command += [f"--config.init_from={words.run}", f"--config.serve.port={port}"]
    command += [f"--config.engine.max_slots={words.slots}", *more]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                httpx.get(url + "/health")
                break
            except httpx.TransportError:
                assert process.poll() is None, "the server has ended"
                time.sleep(0.2)
        found = asyncio.run(measure(url, process, words.clients, words.seconds, words.alone))
        print(json.dumps(found))
    finally:
        if process.poll() is None:
            process.kill()


if __name__ == "__main__":
    main()
