"""What a server has done and is doing, for Prometheus, under vLLM's names."""

from __future__ import annotations

import logging
import time
from typing import Any

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

_log = logging.getLogger("uvicorn.requests")  # heard as uvicorn itself is

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 50000)

# Of the engine's state (`Stats`): vLLM's name, what it says, and what it is.
_GAUGES = (
    ("vllm:num_requests_running", "Requests that hold a slot.", lambda s: s.running),
    ("vllm:num_requests_waiting", "Requests that wait for a slot.", lambda s: s.queued),
    ("vllm:kv_cache_usage_perc", "Share of pages in use.", lambda s: s.pages_used / s.pages),
)
_COUNTERS = (
    ("vllm:prefix_cache_queries", "Prompt tokens looked up.", lambda s: s.prompt_tokens),
    ("vllm:prefix_cache_hits", "Prompt tokens found in pages.", lambda s: s.found_tokens),
    ("vllm:num_preemptions", "Requests that made room for others.", lambda s: s.preemptions),
)


class Metrics:
    """Counts of one server, each labelled with the model's name."""

    def __init__(self, model: str, stats: Any = None):
        """`stats` gives the engine's state (`Engine.stats`) as it is; None: there is no engine."""
        self.registry = prometheus.CollectorRegistry()
        self._model, self._stats = model, stats
        self._success = self._new(
            prometheus.Counter,
            "vllm:request_success",
            "Requests that ended, by why.",
            more=("finished_reason",),
        )
        self._prompt = self._new(prometheus.Counter, "vllm:prompt_tokens", "Tokens read.")
        self._drawn = self._new(prometheus.Counter, "vllm:generation_tokens", "Tokens drawn.")
        seconds = {
            "first": ("vllm:time_to_first_token_seconds", "Until the first token."),
            "between": ("vllm:inter_token_latency_seconds", "Between two tokens of a text."),
            "whole": ("vllm:e2e_request_latency_seconds", "Until the last token."),
        }
        tokens = {
            "prompt": ("vllm:request_prompt_tokens", "Tokens read for a request."),
            "drawn": ("vllm:request_generation_tokens", "Tokens drawn for a request."),
        }
        self._seconds, self._tokens = (
            {
                name: self._new(prometheus.Histogram, *words, buckets=buckets)
                for name, words in histograms.items()
            }
            for histograms, buckets in ((seconds, _SECONDS), (tokens, _TOKENS))
        )
        self.registry.register(self)

    def _new(self, kind: Any, name: str, about: str, more: tuple[str, ...] = (), **others: Any):
        made = kind(name, about, ("model_name", *more), registry=self.registry, **others)
        return made if more else made.labels(self._model)

    def collect(self):
        """The engine's state, for the registry."""
        stats = self._stats() if self._stats else None
        for family, rows in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, about, value in rows if stats else ():
                made = family(name, about, labels=["model_name"])
                made.add_metric([self._model], value(stats))
                yield made

    def text(self) -> bytes:
        """All of it, in Prometheus' format."""
        return prometheus.generate_latest(self.registry)

    def request(self, prompt_tokens: int) -> RequestMetrics:
        """Begins to count one text of a request."""
        self._prompt.inc(prompt_tokens)
        self._tokens["prompt"].observe(prompt_tokens)
        return RequestMetrics(self, prompt_tokens)


class RequestMetrics:
    """The times of one text: to its first token, between tokens, in all."""

    def __init__(self, metrics: Metrics, read: int):
        self._metrics, self._read = metrics, read
        self._began = self._last = time.perf_counter()
        self._count, self._first = 0, 0.0

    def drew(self, tokens: int) -> None:
        """So many tokens came, together."""
        now, seconds = time.perf_counter(), self._metrics._seconds
        if tokens and not self._count:
            self._first = now - self._began
            seconds["first"].observe(self._first)
        # Those of one dispatch share its time.
        between = tokens - (not self._count)
        for _ in range(between):
            seconds["between"].observe((now - self._last) / between)
        self._metrics._drawn.inc(tokens)
        self._count, self._last = self._count + tokens, now if tokens else self._last

    def ended(self, why: str) -> None:
        """It is over: "stop", "length", or "abort" where nobody waits for it any more."""
        metrics, last = self._metrics, self._last - self._began
        between = (last - self._first) / max(self._count - 1, 1)
        _log.info(
            "%s: %d tokens read, %d drawn, the first after %.0f ms, then one every %.1f ms",
            *(why, self._read, self._count, 1e3 * self._first, 1e3 * between),
        )
        metrics._success.labels(metrics._model, why).inc()
        metrics._tokens["drawn"].observe(self._count)
        metrics._seconds["whole"].observe(time.perf_counter() - self._began)
