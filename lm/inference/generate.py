"""Prompts to their continuations, as token ids or as text that appears piece by piece.

What draws is the engine (`lm.inference.engine`): the texts of a call are its requests, as many at a
time as memory and `MOST` allow. An encoder-decoder reads a prompt as its source, and what comes is
a text of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from lm.config import check, view
from lm.inference.engine import Engine
from lm.inference.grammar import Grammar, Grammars
from lm.inference.prepare import CacheKind, Weights
from lm.inference.prompts import (
    NOTHING,
    Framing,
    Prompt,
    check_ids,
    kept_length,
    padded,
    padded_after,
)
from lm.inference.requests import EngineConfig, Event, Request, Step
from lm.inference.sampling import SamplingConfig
from lm.inference.stream import TextStream
from lm.models import Model
from lm.tokenizers import Tokenizer

CHUNK = 8  # tokens a row draws in one dispatch: what a reader sees appear at once
AT_ONCE = 2**20  # texts that are asked for together
MOST = 64  # texts that are worked on at the same time
LITTLE = 2**24  # bytes that are taken for keys and values at once


@dataclasses.dataclass
class Timing:
    """What generating took, in seconds of wall time. Compilation is apart from all the rest."""

    compile_seconds: float = 0.0  # 0 when the shapes and settings were compiled before
    first_token_seconds: float = 0.0  # from the prompts' ids to the first tokens on the host
    seconds: float = 0.0  # from the prompts' ids to the last tokens on the host
    tokens: int = 0  # drawn, over all rows, end-of-text included
    # For each token after the first: its dispatch's time over the most tokens of a row in it.
    token_seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all rows over `seconds`."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        parts = [f"{self.tokens:,} tokens", f"{self.tokens_per_second:,.0f} tokens/s"]
        parts.append(f"first after {1e3 * self.first_token_seconds:.1f} ms")
        if self.token_seconds:
            parts.append(f"then one every {1e3 * statistics.mean(self.token_seconds):.2f} ms")
        if self.compile_seconds:
            parts.append(f"compiled in {self.compile_seconds:.1f} s")
        return " · ".join(parts)


class Generator:
    """A model ready to write: an engine for one caller, as large as what was asked of it.

    A decoder's prompt is the start of a text. An encoder-decoder's is the source: what comes is a
    text of its own, its translation or whatever else the model was trained to make of it.

    Args:
      model: the skeleton: a decoder or an encoder-decoder, of whatever cells.
      params: its parameters; on a mesh they stay split as they are, and caches are split too.
      framing: `end_of_text` ends a row, `before` stays in front of a text that begins with it when
        its window slides, an encoder-decoder's decoder continues `decoder_start`. With a tokenizer,
        complete (`Framing.filled`).
      tokenizer: the one the model was trained with: ids beyond its are never drawn. Without one
        there is no text, only ids.
      weights: see `lm.inference.prepare.for_reading`.
      chunk: tokens a row draws in one dispatch.
      cache: see `EngineConfig`; not of searches, whose cache is their own.

    Raises:
      ConfigError: an encoder, which predicts no next token; no `decoder_start` where one must be.
    """

    def __init__(
        self,
        model: Model,
        params: Mapping[str, jax.Array],
        framing: Framing,
        tokenizer: Tokenizer | None = None,
        weights: Weights = "compute",
        chunk: int = CHUNK,
        cache: CacheKind = "compute",
    ):
        config = EngineConfig(
            max_slots=1,
            prefill_chunk=256,
            decode_chunk=chunk,
            weights=weights,
            cache=cache,
            batch_invariant=False,
            read_first=True,
        )
        self.engine = Engine(model, params, framing, tokenizer, config)
        self.model, self.framing, self.tokenizer = self.engine.model, framing, tokenizer
        self.encodes, self.context = self.engine.encodes, self.engine.context
        self._events: dict[int, list[Event]] = {}  # of requests, not told yet

    @property
    def params(self) -> dict:
        """As `lm.inference.prepare.for_reading` has made them."""
        return self.engine.params

    @property
    def kept(self) -> int:
        """How many tokens of a text the model reads on with when its window slides."""
        return kept_length(self.context)

    @property
    def vocab_size(self) -> int:
        """Ids from here up are never drawn: the tokenizer does not have them."""
        return self.engine.vocab_size

    def room(self, prompt_length: int) -> int:
        """How many tokens can follow a prompt; the last one drawn needs no place of its own."""
        read = len(self.framing.decoder_start) if self.encodes else prompt_length
        return self.context - read + 1

    def encode(self, prompt: str) -> list[int]:
        """The tokens the model reads for a prompt of text; see `Framing.encode`."""
        return self.framing.encode(self.tokenizer, prompt)

    def opening(self, prompt: str) -> str:
        """What of the prompt belongs to the text that is made: all, or nothing of a source."""
        return "" if self.encodes else prompt

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seed: int = 0,
        grammar: Grammar | None = None,
    ) -> Generation:
        """Continues every prompt `sampling.num_samples` times; iterate over the result.

        An encoder-decoder reads the prompt as its source; what comes is the target alone.

        Sample s of prompt p is a function of the prompt, `sampling` and (seed, p, s). A row ends
        after end-of-text, a stop string or `max_new_tokens`; an encoder-decoder's also where the
        context is full.

        Args:
          prompts: token ids, at least one each; see `encode`.
          sampling: how to draw, and how much.
          seed: of the random draws, from -2³¹ to 2³² - 1.
          grammar: of `grammars`; what every continuation keeps to, drawn token by token. Where it
            is met and nothing can follow, the row has ended.

        Raises:
          ConfigError: a prompt that is empty, or too long and not to be cut.
        """
        sampling = view(type(sampling), sampling, "sampling")
        sampling.check_ids(self.vocab_size)
        check(
            not sampling.stop or self.tokenizer is not None,
            f"stop={sampling.stop!r} is text, and the model has no tokenizer: use stop_ids",
        )
        check(
            isinstance(seed, int | np.integer) and -(2**31) <= seed < 2**32,
            f"seed={seed!r} must be a whole number from {-(2**31)} to {2**32 - 1}",
        )
        check(len(prompts) > 0, "prompts=[] must have one at least")
        check(
            len(prompts) * sampling.num_samples <= AT_ONCE,
            f"num_samples={sampling.num_samples} of {len(prompts):,} prompt(s) are too many texts "
            f"for one call: ask for {AT_ONCE // len(prompts):,} at most",
        )
        read = prompts
        if sampling.truncate_prompt and not self.encodes:
            read = [self.framing.window(ids, self.context) for ids in prompts]
        for ids in read:
            check_ids("prompt", ids, self.model.config)
        return Generation(self, prompts, read, sampling, seed, grammar)

    def grammar(self, **sources: str | dict | None) -> Grammar | None:
        """The one of json, regex and lark that is not None; see `Grammars.compile`."""
        given = {kind: source for kind, source in sources.items() if source is not None}
        check(len(given) <= 1, "a text keeps to one of json_schema, regex and grammar, not several")
        return next((self.grammars.compile(*one) for one in given.items()), None)

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Makes what a text must keep to; the model must have a tokenizer."""
        return Grammars(self.tokenizer, self.framing.end_of_text or ())

    def prompt(self, prompts: Sequence[Sequence[int]]) -> Prompt:
        """The prompts side by side, as `lm.inference.search` reads them."""
        if not self.encodes:
            return Prompt(*padded(prompts, self.context))
        start = np.array(self.framing.decoder_start, np.int32)
        shape = (len(prompts), len(start))
        return Prompt(
            np.broadcast_to(start, shape),
            np.broadcast_to(np.arange(len(start), dtype=np.int32), shape),
            *padded_after(prompts, self.context),
        )

    # ---- The engine --------------------------------------------------------------------------

    def make_room(self, rows: int, length: int) -> None:
        """Lets so many texts of at most `length` tokens be worked on together, where they can be.

        What grows, grows to a power of two, so that programs are compiled for a few sizes: for one
        where all that can ever be asked for is little.
        """
        engine, size = self.engine, self.engine.page_size
        whole, needed = (-(-tokens // size) for tokens in (self.context, length))
        pages = min(whole, _power_of_two(needed))
        slots = max(1, min(_power_of_two(rows), MOST, engine.fitting // 2 // pages))
        engine.least_rows = slots
        little = min(MOST * whole, LITTLE // engine.page_bytes) if engine.paged else 0
        number = max(slots * pages, little, engine.config.num_pages)
        wanted = max(slots, engine.config.max_slots), number
        if wanted != (engine.config.max_slots, engine.config.num_pages) and not engine.under_way:
            engine.resize(*wanted)

    def events(self, numbers: Mapping[int, int]) -> list[Event]:
        """What some requests have gained, and at last something; others' is kept for them.

        Raises:
          RuntimeError: the engine was interrupted, and has forgotten them.
        """
        while True:
            found = [e for number in numbers for e in self._events.pop(number, ())]
            if found:
                return found
            if not self.engine.under_way:
                raise RuntimeError("another text was interrupted, and this one with it: ask again")
            try:
                events = self.engine.step()
            except BaseException:
                self.engine.reset()  # what it was about to write is lost
                self._events.clear()
                raise
            for event in events:
                if event.finish != "cancelled":
                    self._events.setdefault(event.number, []).append(event)

    def cancel(self, number: int) -> None:
        """Ends a request, of which nothing more is asked."""
        self.engine.cancel(number)
        self._events.pop(number, None)


def _power_of_two(number: int) -> int:
    """The next one from `number` up."""
    return 1 << (number - 1).bit_length()


class Generation:
    """One call of `Generator.generate`: iterates over the tokens as they come, or over `texts`.

    Each item is an int32 array [B, N] of the tokens that the rows have gained, `NOTHING` (-1) where
    a row has fewer than another. The rows are sample 0, 1, … of prompt 0, then of prompt 1, and so
    on; where there are more than the engine works on at once, later ones begin when earlier ones
    have ended.

    Attributes, complete when the iteration is:
      timing: see `Timing`.
      ended: for each row, whether an end-of-text, a stop string or a grammar has ended it.
      steps: for each row, its tokens with their log-probabilities; the tokens that complete a stop
        string included. Of what is searched for (`lm.inference.search`), empty.
      prompt_steps: for each row, those of its prompt's tokens but the first, where
        `prompt_logprobs` asks for them.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[Sequence[int]],
        read: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seed: int,
        grammar: Grammar | None = None,
    ):
        self._generator, self._sampling, self._grammar = generator, sampling, grammar
        self._prompts, self.read = prompts, read  # as given, and as much as the model reads
        self._seed = int(seed) % 2**32
        self._as_text = bool(sampling.stop)
        self._start()

    def _start(self) -> None:
        rows = len(self._prompts) * self._sampling.num_samples
        self.timing = Timing()
        self.ended, self._drawn = [False] * rows, [0] * rows
        self.steps: list[list[Step]] = [[] for _ in range(rows)]
        self.prompt_steps: list[list[Step]] = [[] for _ in range(rows)]
        self._pieces: list[tuple[int, str]] = []
        self._stuck: set[str] = set()
        self._streams = [self._stream(row) for row in range(rows if self._as_text else 0)]

    def _stream(self, row: int) -> TextStream:
        generator = self._generator
        prompt = self._prompts[row // self._sampling.num_samples]
        return TextStream(
            generator.tokenizer, () if generator.encodes else prompt, self._sampling.stop
        )

    def __iter__(self) -> Iterator[np.ndarray]:
        self._start()
        for tokens in self._gained():
            yield self._taken(tokens)

    def _taken(self, tokens: Mapping[int, Sequence[int]]) -> np.ndarray:
        """Counts what rows have gained, and turns it into text; rows end at a stop string."""
        tokens_BN = np.full((len(self.ended), max(map(len, tokens.values()))), NOTHING, np.int32)
        for row, ids in tokens.items():
            stream, text = self._streams[row] if self._as_text else None, ""
            for column, id in enumerate(ids):
                tokens_BN[row, column] = id
                self._drawn[row] += 1
                if stream is not None:
                    text += stream.push(id)
                    if stream.stop is not None:
                        self.ended[row] = True
                        break
            if text:
                self._pieces.append((row, text))
        return tokens_BN

    def _gained(self) -> Iterator[dict[int, list[int]]]:
        """The tokens that rows gain, by row."""
        generator, sampling, timing = self._generator, self._sampling, self.timing
        engine, samples = generator.engine, sampling.num_samples
        longest = max(map(len, self.read)) + sampling.max_new_tokens
        generator.make_room(len(self.ended), longest)
        one = {f.name: getattr(sampling, f.name) for f in dataclasses.fields(SamplingConfig)}
        one = SamplingConfig(**{**one, "stop": (), "num_samples": 1})
        rows: dict[int, int] = {}  # of requests
        waiting = iter(range(len(self.ended)))
        before, compiled = time.perf_counter(), engine.compile_seconds
        try:
            while True:
                for row in itertools.islice(waiting, 2 * engine.config.max_slots - len(rows)):
                    prompt, sample = divmod(row, samples)
                    ids = tuple(self.read[prompt])
                    request = Request(ids, one, self._seed, sample, self._grammar, prompt)
                    rows[engine.submit(request)] = row
                if not rows:
                    return
                tokens: dict[int, list[int]] = {}
                for event in generator.events(rows):
                    row = rows[event.number]
                    tokens.setdefault(row, []).extend(step.id for step in event.steps)
                    self.steps[row] += event.steps
                    self.prompt_steps[row] += event.prompt or ()
                    if event.finish is not None:
                        del rows[event.number]
                        self.ended[row] = event.finish == "stop"
                    self._stuck |= {event.error} - {""}
                now = time.perf_counter()
                spent = engine.compile_seconds - compiled
                timing.compile_seconds += spent
                self._timed(tokens, now - before - spent)
                before, compiled = now, engine.compile_seconds
                yield tokens
                for row in tokens:
                    del self.steps[row][self._drawn[row] :]  # what follows a stop string
                for number, row in list(rows.items()):
                    if self.ended[row]:  # by a stop string
                        generator.cancel(number)
                        del rows[number]
        finally:
            for number in rows:
                generator.cancel(number)

    def _timed(self, tokens: Mapping[int, Sequence[int]], seconds: float) -> None:
        timing, steps = self.timing, max(1, *map(len, tokens.values()))
        if timing.tokens == 0:
            timing.first_token_seconds = seconds
        else:
            timing.token_seconds += [seconds / steps] * steps
        timing.tokens += sum(map(len, tokens.values()))
        timing.seconds += seconds

    def texts(self) -> Iterator[tuple[int, str]]:
        """Iterates over `(row, text)` as the text comes; see `lm.inference.stream`.

        `text` is what the row has gained; the joined texts of a row are its continuation, without
        its prompt, or an encoder-decoder's target.
        """
        self._as_text = True
        for _ in self:
            pieces, self._pieces = self._pieces, []
            yield from pieces
        for row, stream in enumerate(self._streams):
            if text := stream.flush():
                yield row, text

    @property
    def notices(self) -> list[str]:
        """What the reader should know when the iteration is over, one line each."""
        generator, wanted = self._generator, self._sampling.max_new_tokens
        context, notices = generator.context, []
        cut = [len(ids) for ids in self._prompts if len(ids) > context]
        if cut:
            notices.append(
                f"the model reads only the last of the prompt's {max(cut)} tokens, as many as its "
                f"context of {context} holds"
            )
        unk_id = generator.tokenizer.unk_id if generator.tokenizer else None
        unknown = sum(list(ids).count(unk_id) for ids in self._prompts)
        if unknown:
            notices.append(f"the tokenizer does not know {unknown} of the prompt's tokens")
        for error in sorted(self._stuck):
            notices.append(f"a text cannot go on as it should: {error}")
        samples = self._sampling.num_samples
        room = [generator.room(len(self.read[row // samples])) for row in range(len(self.ended))]
        if any(n > most for n, most in zip(self._drawn, room)):
            notices.append(
                f"the text outgrew the model's context of {context} tokens: from there on the "
                f"model read only the last {generator.kept} to {context}"
            )
        short = [n for n, ended in zip(self._drawn, self.ended) if n < wanted and not ended]
        if short:
            notices.append(
                f"{len(short)} of {len(self._drawn)} texts stopped short of "
                f"max_new_tokens={wanted}, where they filled the model's context of {context} "
                "tokens"
            )
        return notices
