"""Continuous batching: many requests share one model, and none sees the others in its tokens.

`Engine.step` admits who waits, reads a piece of a prompt, then draws a few tokens for all that
have read theirs; who waits longest goes first. Keys and values lie in pages (`lm.inference.pages`),
and prompts that start alike share them. What a request gets, tokens and log-probabilities, is the
same to the last bit of float32 whatever else the engine does, and whatever it did before: a text is
cut into the same pieces, whose shapes alone choose the program, in whatever company.

A text that outgrows the model's context slides: the window that the model reads drops its first
quarter, the rest is read anew at positions from 0 on, and fills up again. Every token is thus drawn
from exactly what the model makes of the last three quarters of a context of text, or more. An
encoder-decoder reads prompts with its encoder; its decoder continues a start token, and ends where
the context does.

Where the angles of a text's tokens depend on its length (`ModelConfig.angles_until`), a text whose
next token changes them is read anew: once, or of `dynamic` ones for every token beyond the original
context.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lm.config import check, view
from lm.inference.pages import Pages
from lm.inference.prepare import for_decoding, mesh_of
from lm.inference.programs import Device, Level, Rows, Settings
from lm.inference.prompts import (
    NOTHING,
    Framing,
    check_ids,
    check_writes,
    kept_length,
)
from lm.inference.requests import EngineConfig, Event, QueueFull, Request, Stats, Step
from lm.inference.rows import ALTERNATIVES, LEVELS, Batch
from lm.inference.sampling import SamplingConfig
from lm.inference.scheduler import Scheduler, Text
from lm.models import Model
from lm.models.attention.paged import PagedCache, Paging
from lm.models.reading import TILE
from lm.parallel.platform import device_memory, platform
from lm.tokenizers import Tokenizer


class Engine:
    """A model that serves many requests; made for one thread.

    Args:
      model: the skeleton: a decoder or an encoder-decoder, of whatever cells.
      params: its parameters; on a mesh they stay split as they are, and pages are split too.
      framing: `end_of_text` ends a text, `before` stays in front of one that slides.
      tokenizer: ids beyond its are never drawn.
      config: sizes.

    Raises:
      ConfigError: an encoder, no `decoder_start` where one must be, or fewer pages than one text
        needs.
    """

    def __init__(
        self,
        model: Model,
        params: Mapping[str, jax.Array],
        framing: Framing,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
    ):
        config = view(EngineConfig, config or EngineConfig(), "config.engine")
        check_writes(model.config, framing)
        mesh = mesh_of(next(iter(params.values())))
        self.model = model = for_decoding(model, mesh)
        self.framing, self.tokenizer, self.config = framing, tokenizer, config
        self.context = model.config.max_length
        self.version, self._next = 0, 0
        self.stats_read = self.stats_drawn = 0
        # As few rows as programs are compiled for, where they are not batch-invariant: for the last
        # ones of many texts that is not worth it.
        self.least_rows = 1
        known = tokenizer.vocab_size if tokenizer else model.config.vocab_size
        self.vocab_size = known
        self.encodes = model.config.architecture == "encoder_decoder"
        # A recurrent model needs no pages; it is as if a whole text had room on one.
        self.paged = model.config.cell == "attention"
        check(
            self.paged or config.cache == "compute",
            f"cache={config.cache!r} is for Transformers, and config.model.cell="
            f"{model.config.cell!r} has no keys and values: use cache='compute'",
        )
        self.page_size = config.page_size if self.paged else self.context
        self._width = -(-self.context // self.page_size)  # pages of a whole context
        kv_heads, across = model.config.cached_heads, mesh.shape["tensor"] if mesh else 1
        self._devices = across if kv_heads % across == 0 else 1  # that share a page
        settings = Settings(model.config, known, config.weights, config.cache)
        self._device = Device(settings, params, self.page_size, config.decode_chunk)
        chunk = config.prefill_chunk
        self._pieces = [size for size in (chunk // 16, chunk // 4, chunk) if size >= min(8, chunk)]
        whole = config.max_slots * self._width
        number = config.num_pages or min(whole, max(self._width, self.fitting // 2))
        check(
            number >= self._width,
            f"config.engine.num_pages={number} cannot hold one text of the model's context, "
            f"{self.context} tokens: use {self._width} at least",
        )
        self.resize(config.max_slots, number)
        if config.num_pages is not None:
            self.check_memory()

    def check_memory(self) -> None:
        """Raises ConfigError where pages need more memory than there is; none is taken before."""
        number, page = self.config.num_pages, self.page_bytes
        memory = (device_memory() or 0) * self._devices
        check(
            number <= self.fitting,
            f"config.engine.num_pages={number} of {self.page_size} tokens need "
            f"{number * page / 2**30:,.1f} GiB, and there are {memory / 2**30:,.1f} "
            f"GiB: use fewer than {self.fitting:,}, or a smaller config.model.max_length",
        )

    def resize(self, slots: int, pages: int) -> None:
        """Makes room for so many texts at once, in so many pages, and forgets all there is."""
        self.config = dataclasses.replace(self.config, max_slots=slots, num_pages=pages)
        # One page more, which is nobody's, and one slot, of rows that are no text.
        self._device.resize(pages + 1, slots + 1)
        config, device = self.model.config, self._device
        local = all(config.is_local(layer) for layer in range(config.num_layers))
        self._scheduler = Scheduler(
            Pages(pages + 1),
            slots,
            self.page_size,
            self.config.prefill_chunk,
            config.window if local else 0,
            device.save,
            device.restore,
        )
        self._sizes = self._row_sizes()
        self._used: set[int] = set()
        self._cancelled: dict[int, Text] = {}
        self._texts: dict[int, Text] = {}
        end, length = self.framing.end_of_text or (), self.context + self.config.decode_chunk
        self._batch = Batch(self.vocab_size, end, slots, length)
        self._prompt_steps: dict[int, list[Step]] = {}

    def reset(self) -> None:
        """Forgets all there is; what to do after `step` was interrupted."""
        self.resize(self.config.max_slots, self.config.num_pages)

    def _row_sizes(self) -> list[int]:
        """How many rows programs that draw may have."""
        slots = self.config.max_slots
        if not self.config.batch_invariant:
            return [*(1 << n for n in range((slots - 1).bit_length())), slots]
        # Another number of rows is another program, in which a row may get other bits. On a CPU
        # more rows at once win little: more texts draw in several dispatches.
        return [min(slots, TILE) if platform() == "cpu" else slots]

    @functools.cached_property
    def page_bytes(self) -> int:
        """Of the keys and values of a page, where there are pages."""
        one = (self.model.config, 1, self.page_size, 1, True, self.config.cache == "int8")
        pools = jax.eval_shape(lambda: PagedCache.empty(*one).own)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pools))

    @property
    def fitting(self) -> int:
        """How many pages memory holds, as far as is known."""
        has = device_memory()
        known = has is not None and self.paged
        return has * self._devices // self.page_bytes if known else sys.maxsize

    # ---- Requests ----------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Queues a request; its number, which `Event`s bear.

        Raises:
          QueueFull: too many wait.
          ConfigError: a prompt that is empty or too long, or settings out of range.
        """
        if len(self._scheduler.waiting) >= self.config.max_queue:
            raise QueueFull(f"{len(self._scheduler.waiting):,} requests are waiting")
        sampling = self.framing.allowed(view(SamplingConfig, request.sampling, "sampling"))
        sampling.check_ids(self.vocab_size)
        request = dataclasses.replace(request, sampling=sampling)
        ids = list(request.ids)
        if sampling.truncate_prompt and not self.encodes:
            ids = self.framing.window(ids, self.context)
        check_ids("prompt", ids, self.model.config)
        source = tuple(ids) if self.encodes else ()
        ids = list(self.framing.decoder_start) if self.encodes else ids
        number, self._next = self._next, self._next + 1
        grammar = request.grammar and request.grammar.start()
        text = Text(number, request, ids, source, grammar, submitted=time.perf_counter())
        self._name(text)
        self._texts[number] = text
        self._scheduler.waiting.append(text)
        return number

    def cancel(self, number: int) -> None:
        """Ends a request, if it has not ended: its pages are free at once."""
        if text := self._texts.pop(number, None):
            self._scheduler.remove(text)
            self._prompt_steps.pop(number, None)
            self._cancelled[number] = text

    def update(self, params: Mapping[str, jax.Array]) -> None:
        """Takes new weights; what the old ones have made of any text is never used again.

        Requests under way go on with the tokens they have, read anew.
        """
        self._device.update(params)
        self.version += 1
        for text in [*self._scheduler.admitted, *self._scheduler.waiting]:
            self._scheduler.restart(text, text.ids)
            self._name(text)
            self._prompt_steps.pop(text.number, None)
        self._scheduler.pages.forget_all()

    def _name(self, text: Text) -> None:
        """Lets a prompt be found in pages, and be remembered there, where it can be."""
        shared = self.paged and not self.encodes and not text.drawn
        if shared and text.request.sampling.prompt_logprobs is None:
            self._scheduler.name(text, self._root + f"{self._steady(text)}".encode())

    def _steady(self, text: Text) -> int | None:
        """How long a text may grow before its keys and values are stale; None: any length."""
        return self.model.config.angles_until(len(text.ids))

    @property
    def under_way(self) -> int:
        """How many requests have not ended."""
        return len(self._texts)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._texts and not self._cancelled

    @property
    def stats(self) -> Stats:
        """Counts, as they are now."""
        scheduler = self._scheduler
        return Stats(
            queued=len(scheduler.waiting),
            running=len(scheduler.admitted),
            pages_used=scheduler.pages.used,
            pages=scheduler.pages.number - 1,
            prompt_tokens=self.stats_read + scheduler.found,
            found_tokens=scheduler.found,
            tokens=self.stats_drawn,
            preemptions=scheduler.preemptions,
        )

    @property
    def params(self) -> dict[str, Any]:
        """As `lm.inference.prepare.for_reading` has made them."""
        return self._device.params

    @property
    def compile_seconds(self) -> float:
        """What compiling has taken so far."""
        return self._device.compile_seconds

    @property
    def held(self) -> int:
        """How many pages texts hold, remembered prompts not counted."""
        return self._scheduler.pages.held

    @property
    def _root(self) -> bytes:
        """What the names of this version's chunks start from."""
        return hashlib.blake2b(f"weights {self.version}".encode()).digest()

    # ---- One step ----------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Reads up to a chunk of prompts, then draws up to `decode_chunk` tokens a text.

        Returns:
          What requests have gained; nothing where there was nothing to do.
        """
        events = [Event(number, [], "cancelled") for number in self._cancelled]
        self._cancelled = {}
        self._scheduler.admit()
        self._read()
        return events + self._decode()

    def _read(self) -> None:
        """Reads prompts in the order of arrival, a chunk's worth of tokens in all, or all.

        The last token of each is left to be read where the first one is drawn.
        """
        budget = self.config.prefill_chunk
        while budget > 0 or self.config.read_first:
            text = next((text for text in self._scheduler.admitted if text.reading), None)
            if text is None:
                break
            self._scheduler.find(text)
            left = len(text.ids) - 1 - text.cached
            length = min(left, self.config.prefill_chunk)
            if length:
                piece = next(size for size in self._pieces if size >= length)
                if not self._scheduler.room(text, text.cached + length):
                    break
                budget -= piece
                self._read_piece(text, length, piece)
            if length == left:
                alike = [other for other in self._scheduler.admitted if self._same(text, other)]
                for each in (text, *(other for other in alike if self._copied(text, other))):
                    each.reading = False
                    self.stats_read += 1

    def _read_piece(self, text: Text, length: int, piece: int) -> None:
        self._begin(text)
        start = text.cached
        tokens_T = np.zeros(piece, np.int32)
        positions_T = np.full(piece, NOTHING, np.int32)
        tokens_T[:length] = text.ids[start : start + length]
        positions_T[:length] = np.arange(start, start + length)
        table_1N = np.zeros((1, self._width), np.int32)
        table_1N[0, : len(text.pages)] = text.pages
        one = (table_1N, positions_T[None], text.slot, len(text.ids))
        paging = Paging.of_one(self.model.config, *one)
        x_1TD = self._device.read(tokens_T[None], paging)
        text.cached += length
        self.stats_read += length
        self._scheduler.keep(text)
        self._scheduler.roll(text)
        if text.request.sampling.prompt_logprobs is not None and not text.drawn:
            self._score(text, x_1TD, start, length, piece)

    def _same(self, text: Text, other: Text) -> bool:
        """Whether another text, which still reads, is to read just what this one has read."""
        return (
            other is not text
            and other.reading
            and (other.ids, other.source) == (text.ids, text.source)
            and other.request.sampling.prompt_logprobs is None
        )

    def _copied(self, text: Text, other: Text) -> bool:
        """Gives another text what one has read, as long as there is a page for it to write on."""
        part = text.cached % self.page_size if self.paged else 0
        if (pages := self._scheduler.copy(text, other, part > 0)) is None:
            return False
        self._device.copy(pages, (text.slot, other.slot))
        other.begun = True
        return True

    def _begin(self, text: Text) -> None:
        """Fills the slot of a text with what it needs besides pages."""
        if not text.begun and (self.encodes or not self.paged):
            length = max(8, 1 << max(len(text.source) - 1, 0).bit_length())
            source = text.source + (0,) * (min(length, self.context) - len(text.source))
            self._device.begin(text.slot, source, len(text.source))
        text.begun = True

    def _score(self, text: Text, x_1TD, start: int, length: int, piece: int) -> None:
        """How likely the tokens after those of a piece were."""
        next_T = np.zeros(piece, np.int32)
        ids = text.ids[start + 1 : start + length + 1]
        next_T[: len(ids)] = ids
        found = self._device.score(ALTERNATIVES, x_1TD, next_T)
        steps = self._prompt_steps.setdefault(text.number, [])
        wanted = text.request.sampling.prompt_logprobs
        for t, id in enumerate(ids):
            top = _top(found.top_ids_BN[t], found.top_logprobs_BN[t], wanted)
            logprob = float(found.logprob_B[t])
            steps.append(Step(id, logprob, logprob, top))

    def _decode(self) -> list[Event]:
        """Draws tokens for every text that has read its window but for the last token."""
        scheduler, steps = self._scheduler, self.config.decode_chunk
        texts = [text for text in scheduler.admitted if not text.reading]
        if any(text.reading for text in scheduler.admitted):
            steps = max(steps // 2, 1)  # others wait to go on reading
        if any(text.grammar is not None or not text.drawn for text in texts):
            steps = 1  # the first token is told as soon as it is there
        for text in texts:
            if text in scheduler.admitted:  # else it has left its pages to an older one
                scheduler.room(text, text.cached + self._limit(text, steps))
        texts = [text for text in texts if text in scheduler.admitted]
        for text in texts:
            self._begin(text)
        most, events = self._sizes[-1], []
        for start in range(0, len(texts), most):
            events += self._decode_rows(texts[start : start + most], steps)
        return events

    def _decode_rows(self, texts: list[Text], steps: int) -> list[Event]:
        """One dispatch of `_decode`."""
        least = min(self.least_rows, self._sizes[-1])
        fitting = [size for size in self._sizes if size >= len(texts)]
        size = next(size for size in fitting if size >= least or size in self._used)
        self._used.add(size)
        level, rows = self._rows(texts, size, steps)
        drawn = self._device.decode(level, rows, steps)
        for row, text in enumerate(texts):
            text.cached += int((drawn.ids_BN[row] != NOTHING).sum())
            self._scheduler.roll(text)
        return [self._gained(text, drawn, row) for row, text in enumerate(texts)]

    def _limit(self, text: Text, steps: int) -> int:
        """How many tokens a text may draw in a dispatch of so many."""
        left = text.request.sampling.max_new_tokens - text.drawn
        if (steady := self._steady(text)) is not None:
            steps = min(steps, steady - len(text.ids) + 1)
        return min(steps, left, self.context - text.cached)

    def _rows(
        self, texts: list[Text], size: int, steps: int = 1, level: Level = LEVELS[0]
    ) -> tuple[Level, Rows]:
        """The texts as rows of one dispatch of so many steps; see `Batch.rows`."""
        return self._batch.rows(
            texts, size, self._width, lambda text: self._limit(text, steps), level
        )

    def _gained(self, text: Text, drawn, row: int) -> Event:
        """Adds what a row drew to its text, and ends it, or lets it slide, where it is time."""
        sampling, steps, steady = text.request.sampling, [], self._steady(text)
        stops = sampling.ends(self.framing.end_of_text or ())
        for column, id in enumerate(drawn.ids_BN[row].tolist()):
            if id == NOTHING:
                break
            top = _top(
                drawn.top_ids_BNA[row, column],
                drawn.top_logprobs_BNA[row, column],
                sampling.logprobs or 0,
            )
            numbers = (drawn.logprob_BN, drawn.sampled_BN)
            steps.append(Step(id, *(float(x[row, column]) for x in numbers), top))
            text.ids.append(id)
            text.drawn += 1
            text.window_drawn += 1
            if text.grammar is not None and id not in stops:
                text.grammar.advance(id)
            if id in stops or (text.grammar is not None and text.grammar.ended):
                text.finish = "stop"
        self.stats_drawn += len(steps)
        text.latest = time.perf_counter()
        full = self.encodes and text.cached >= self.context
        if text.finish is None and (full or text.drawn >= sampling.max_new_tokens):
            text.finish = "length"
        if text.finish is not None:
            self._scheduler.remove(text)
            del self._texts[text.number]
        elif text.cached >= self.context:
            kept = self.framing.window(text.ids, kept_length(self.context))
            self._scheduler.restart(text, kept)
        elif steady is not None and len(text.ids) > steady:
            self._scheduler.restart(text, text.ids)
        error = text.grammar.error if text.grammar is not None and text.finish == "stop" else ""
        prompt = self._prompt_steps.pop(text.number, None)
        if text.drawn == len(steps) and sampling.prompt_logprobs is not None:
            prompt = prompt or []
        return Event(text.number, steps, text.finish, prompt, error)

    def warm_up(self, levels: Sequence[Level] = LEVELS) -> None:
        """Compiles all that requests of `levels` need; nothing must be under way.

        Raises:
          ConfigError: not even one text of the model's context fits into memory.
        """
        self.check_memory()
        device, slots = self._device, self.config.max_slots
        for piece in self._pieces:
            nothing_1T = np.full((1, piece), NOTHING, np.int32)
            table_1N = np.zeros((1, self._width), np.int32)
            paging = Paging.of_one(self.model.config, table_1N, nothing_1T, slots, 1)
            x_1TD = device.read(np.zeros_like(nothing_1T), paging)
            if levels is LEVELS:
                device.score(ALTERNATIVES, x_1TD, nothing_1T[0])
        for level in levels:
            for size in self._sizes:
                device.decode(level, self._rows([], size, level=level)[1], 1)
        if self.paged:
            device.restore([], device.save([]))
        device.copy((0, 0), (slots, slots))
        if self.encodes or not self.paged:
            lengths = range(3, (self.context - 1).bit_length() + 1) if self.encodes else (3,)
            for length in lengths:
                device.begin(slots, (0,) * min(1 << length, self.context), 0)

    @property
    def num_programs(self) -> int:
        """How many programs have been compiled."""
        return self._device.num_programs


def _top(ids_N: np.ndarray, logprobs_N: np.ndarray, wanted: int) -> tuple[tuple[int, float], ...]:
    return tuple(zip(ids_N[:wanted].tolist(), logprobs_N[:wanted].tolist()))
