"""What an engine is asked, what it answers, and how large it is."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

from lm.config import Size, check
from lm.inference.sampling import SamplingConfig


class QueueFull(Exception):
    """More requests wait than `EngineConfig.max_queue` allows; nothing was done for this one."""


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How much an engine does at once, and what it remembers."""

    max_slots: Size = 8  # texts that are worked on at the same time
    page_size: Size = 64  # tokens whose keys and values stand together
    num_pages: Size | None = None  # None: as many as `max_slots` texts of the whole context need
    prefill_chunk: Size = 64  # tokens of a prompt read in one dispatch, a multiple of `page_size`
    decode_chunk: Size = 8  # tokens a row draws in one dispatch where nobody waits in between
    max_queue: Size = 1024  # requests that may wait
    # A text gets the same bits in whatever company, as rows fill whole tiles. False: rows are as
    # few as texts, which is faster where these are few.
    batch_invariant: bool = True
    # Reads all prompts that are admitted before more is drawn: more tokens a second in all, and
    # pauses in a text while others are read.
    read_first: bool = False
    weights: Literal["compute", "int8"] = "compute"  # see `lm.inference.prepare.for_reading`
    # Keys and values in the compute dtype, or in eight bits: pages of a quarter of float32's size,
    # and half of bfloat16's. An encoder-decoder's keys of the source stay in the compute dtype.
    cache: Literal["compute", "int8"] = "compute"

    def validate(self, prefix: str = "config.engine") -> None:
        """Raises ConfigError unless chunks are whole pages."""
        check(
            self.prefill_chunk % self.page_size == 0,
            f"{prefix}.prefill_chunk={self.prefill_chunk} must be a multiple of page_size="
            f"{self.page_size}",
        )


@dataclasses.dataclass(frozen=True)
class Request:
    """One text to be continued. Several samples of a prompt are several requests."""

    ids: tuple[int, ...]  # the prompt, framed (`Framing.encode`)
    sampling: SamplingConfig
    seed: int = 0  # with `sample` and `prompt`, what the random draws follow from
    sample: int = 0
    grammar: Any = None  # lm.inference.grammar.Grammar: what may be drawn
    prompt: int = 0


class Step(NamedTuple):
    """One token that a request has drawn."""

    id: int
    logprob: float  # of the model's distribution, natural logarithm, float32
    sampled_logprob: float  # of the distribution it was drawn from
    top: tuple[tuple[int, float], ...] = ()  # the model's likeliest tokens: id and `logprob`


class Event(NamedTuple):
    """What one request has gained in one `Engine.step`."""

    number: int  # what `Engine.submit` returned
    steps: list[Step]
    finish: str | None = None  # "stop", "length" or "cancelled" where it has ended
    prompt: list[Step] | None = None  # once, where asked for: the prompt's tokens but the first,
    # each after those before it
    error: str = ""  # why a grammar has ended the text before its time


@dataclasses.dataclass
class Stats:
    """What an engine does now and has done."""

    queued: int = 0  # requests that wait
    running: int = 0  # requests that hold a slot
    pages_used: int = 0  # of texts and of prompts that are remembered
    pages: int = 0
    prompt_tokens: int = 0  # read, or found in pages
    found_tokens: int = 0  # found there
    tokens: int = 0  # drawn
    preemptions: int = 0
