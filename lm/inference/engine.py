"""Continuous batching: many requests share one model, and none sees the others in its tokens.

`Engine.step` admits who waits, reads a piece of a prompt, then draws a few tokens for all that
have read theirs; who waits longest goes first. Keys and values lie in pages (`lm.inference.pages`),
and prompts that start alike share them. What a request gets, tokens and log-probabilities, is the
same to the last bit of float32 whatever else the engine does, and whatever it did before: a text is
cut into the same pieces, whose shapes alone choose the program, in whatever company.

A text that outgrows the model's context slides, as `lm.inference.generate` says.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
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
    round_up,
)
from lm.inference.requests import EngineConfig, Event, QueueFull, Request, Stats, Step
from lm.inference.sampling import SamplingConfig, warping
from lm.inference.scheduler import Scheduler, Text
from lm.inference.warpers import History, Kind
from lm.models import Model
from lm.models.attention.paged import Paging
from lm.models.matmul import compute_dtype
from lm.models.reading import TILE
from lm.parallel.platform import device_memory
from lm.tokenizers import Tokenizer

ALTERNATIVES = 20  # most that a request may ask for beside each token
# What programs can do, from little to all: few, so that few are compiled.
LEVELS = (
    Level(Kind("plain"), 0),
    Level(Kind("filtered"), 0),
    Level(Kind("filtered", history=True, masked=True), ALTERNATIVES),
)


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
        self.model = model = for_decoding(model)
        self.framing, self.tokenizer, self.config = framing, tokenizer, config
        self.context = model.config.max_length
        self.version, self._next = 0, 0
        self.stats_read = self.stats_drawn = 0
        known = tokenizer.vocab_size if tokenizer else model.config.vocab_size
        self.vocab_size = known
        self.encodes = model.config.architecture == "encoder_decoder"
        # A recurrent model needs no pages; it is as if a whole text had room on one.
        self._paged = model.config.cell == "attention"
        page_size = config.page_size if self._paged else self.context
        self._width = -(-self.context // page_size)  # pages of a whole context
        mesh = mesh_of(next(iter(params.values())))
        number = self._number_of_pages(page_size, mesh.size if mesh else 1)
        settings = Settings(model, known, config.weights)
        # One page more, which is nobody's, and one slot, of rows that are no text.
        self._device = device = Device(
            settings, params, number + 1, page_size, config.max_slots + 1, config.decode_chunk
        )
        local = all(model.config.is_local(layer) for layer in range(model.config.num_layers))
        self._scheduler = Scheduler(
            Pages(number + 1),
            config.max_slots,
            page_size,
            config.prefill_chunk,
            model.config.window if local else 0,
            device.save,
            device.restore,
        )
        chunk = config.prefill_chunk
        self._pieces = [size for size in (chunk // 16, chunk // 4, chunk) if size >= min(8, chunk)]
        # Whole tiles of rows give a row the same bits, however many they are: the compiler adds up
        # in another order where they fill no vector register. Experts' shapes follow from them all.
        slots = config.max_slots
        self._sizes = [slots]
        if slots > TILE and device.invariant and not model.config.num_experts:
            most = round_up(slots, TILE)
            self._sizes = [*(size for size in (TILE, 4 * TILE) if size < most), most]
        self._cancelled: dict[int, Text] = {}
        self._texts: dict[int, Text] = {}
        self._warped: tuple[Any, Any] = (None, None)
        self._prompt_steps: dict[int, list[Step]] = {}

    def _number_of_pages(self, page_size: int, devices: int) -> int:
        """As configured, or what the texts of all slots need and half of the memory holds."""
        config, model = self.config, self.model.config
        whole = config.max_slots * self._width
        if not self._paged:
            return whole
        token = 2 * model.num_layers * model.kv_heads * model.head_width
        page = page_size * token * compute_dtype(model.compute_dtype).itemsize
        has = device_memory()
        fits = whole if has is None else has * devices // page
        number = config.num_pages or min(whole, max(self._width, fits // 2))
        check(
            number >= self._width,
            f"config.engine.num_pages={number} cannot hold one text of the model's context, "
            f"{self.context} tokens: use {self._width} at least",
        )
        check(
            has is None or number <= fits,
            f"config.engine.num_pages={number} of {page_size} tokens need "
            f"{number * page / 2**30:,.1f} GiB, and there are {(has or 0) * devices / 2**30:,.1f} "
            f"GiB: use fewer than {fits:,}, or a smaller config.model.max_length",
        )
        return number

    # ---- Requests ----------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Queues a request; its number, which `Event`s bear.

        Raises:
          QueueFull: too many wait.
          ConfigError: a prompt that is empty or too long, or settings out of range.
        """
        if len(self._scheduler.waiting) >= self.config.max_queue:
            raise QueueFull(f"{len(self._scheduler.waiting):,} requests are waiting")
        sampling = view(SamplingConfig, request.sampling, "sampling")
        sampling.check_ids(self.vocab_size)
        ids = list(request.ids)
        if sampling.truncate_prompt and not self.encodes:
            ids = self.framing.window(ids, self.context)
        check_ids("prompt", ids, self.model.config)
        source = tuple(ids) if self.encodes else ()
        ids = list(self.framing.decoder_start) if self.encodes else ids
        number = self._next
        self._next += 1
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
        shared = self._paged and not self.encodes and not text.drawn
        if shared and text.request.sampling.prompt_logprobs is None:
            self._scheduler.name(text, self._root)

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
        events += self._read()
        events += self._decode()
        return events

    def _read(self) -> list[Event]:
        """Reads prompts in the order of arrival, a chunk's worth of tokens in all."""
        events, budget = [], self.config.prefill_chunk
        while budget > 0:
            text = next((text for text in self._scheduler.admitted if text.reading), None)
            if text is None:
                break
            self._scheduler.find(text)
            length = min(len(text.ids) - text.cached, self.config.prefill_chunk)
            piece = next(size for size in self._pieces if size >= length)
            if not self._scheduler.room(text, text.cached + length):
                break
            budget -= piece
            events += self._read_piece(text, length, piece)
        return events

    def _read_piece(self, text: Text, length: int, piece: int) -> list[Event]:
        self._begin(text)
        start = text.cached
        tokens_T = np.zeros(piece, np.int32)
        positions_T = np.full(piece, NOTHING, np.int32)
        tokens_T[:length] = text.ids[start : start + length]
        positions_T[:length] = np.arange(start, start + length)
        table_1N = self._scheduler.table(text, self._width)[None]
        paging = Paging(table_1N, positions_T[None], np.array([text.slot], np.int32))
        x_1TD, x_11D = self._device.read(tokens_T[None], paging, length - 1)
        text.cached += length
        self.stats_read += length
        self._scheduler.keep(text)
        self._scheduler.roll(text)
        if text.request.sampling.prompt_logprobs is not None and not text.drawn:
            self._score(text, x_1TD, start, length, piece)
        if text.cached < len(text.ids):
            return []
        level, rows = self._rows([text], 1)
        drawn = self._device.first(level, x_11D, rows)
        text.reading = False
        return [self._gained(text, drawn, 0)]

    def _begin(self, text: Text) -> None:
        """Fills the slot of a text with what it needs besides pages."""
        if not text.begun and (self.encodes or not self._paged):
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
        """Draws tokens for every text that has read its window."""
        scheduler, steps = self._scheduler, self.config.decode_chunk
        texts = [text for text in scheduler.admitted if not text.reading]
        if any(text.reading for text in scheduler.admitted):
            steps = max(steps // 2, 1)  # others wait to go on reading
        if any(text.grammar is not None for text in texts):
            steps = 1
        for text in texts:
            if text in scheduler.admitted:  # else it has left its pages to an older one
                scheduler.room(text, text.cached + self._limit(text, steps))
        texts = [text for text in texts if text in scheduler.admitted]
        if not texts:
            return []
        for text in texts:
            self._begin(text)
        size = next(size for size in self._sizes if size >= len(texts))
        level, rows = self._rows(texts, size, steps)
        drawn = self._device.decode(level, rows, steps)
        for row, text in enumerate(texts):
            text.cached += int((drawn.ids_BN[row] != NOTHING).sum())
            scheduler.roll(text)
        return [self._gained(text, drawn, row) for row, text in enumerate(texts)]

    def _limit(self, text: Text, steps: int) -> int:
        """How many tokens a text may draw in a dispatch of so many."""
        left = text.request.sampling.max_new_tokens - text.drawn
        return min(steps, left, self.context - text.cached)

    def _rows(
        self, texts: list[Text], size: int, steps: int = 1, level: Level = LEVELS[0]
    ) -> tuple[Level, Rows]:
        """The texts as rows of one dispatch, filled up to `size`, and at what level, or above."""
        key = (size, level, *(text.number for text in texts))
        if self._warped[0] != key:
            self._warped = key, self._warping(texts, size, level)
        level, warped = self._warped[1]
        for row, text in enumerate(texts):
            if (grammar := text.grammar) is not None:
                mask_W = np.asarray(grammar.mask(), np.uint32)
                if warped.allowed_BW is self._warped[1][1].allowed_BW:
                    warped = warped._replace(allowed_BW=warped.allowed_BW.copy())
                warped.allowed_BW[row] &= mask_W[: warped.allowed_BW.shape[1]]
        filled = texts + [None] * (size - len(texts))

        def ints(of: Callable[[Text], int], nobody: int = 0) -> np.ndarray:
            return np.array([nobody if text is None else of(text) for text in filled], np.int32)

        def seed(text: Text | None) -> int:
            return 0 if text is None else text.request.seed % 2**32

        tables = [self._scheduler.table(text, self._width) for text in texts]
        tables += [np.zeros(self._width, np.int32)] * (size - len(texts))
        rows = Rows(
            token_B=ints(lambda text: text.ids[-1]),
            position_B=ints(lambda text: text.cached, NOTHING),
            limit_B=ints(lambda text: self._limit(text, steps)),
            count_B=ints(lambda text: text.drawn),
            seed_B=np.array([seed(text) for text in filled], np.uint32),
            prompt_B=ints(lambda text: text.request.prompt),
            sample_B=ints(lambda text: text.request.sample),
            table_BN=np.stack(tables),
            slot_B=ints(lambda text: text.slot, self.config.max_slots),
            warping=warped,
            history=self._history(filled) if level.kind.history else None,
        )
        return level, rows

    def _warping(self, texts: list[Text], size: int, least: Level):
        """The least of `LEVELS` that serves the texts, and their warpers' values."""
        settings = [text.request.sampling for text in texts]
        kinds = [text.request.sampling.kind(text.grammar is not None) for text in texts]
        named = any(config.logprobs for config in settings)

        def serves(level: Level) -> bool:
            covering = Kind.covering([level.kind, *kinds]) == level.kind
            return covering and (level.alternatives > 0 or not named)

        level = next(level for level in LEVELS[LEVELS.index(least) :] if serves(level))
        nobody = SamplingConfig(temperature=0)
        settings += [nobody] * (size - len(texts))
        vocabulary, end = self.vocab_size, self.framing.end_of_text or ()
        return level, warping(settings, vocabulary, end, level.kind)[0]

    def _history(self, texts: list[Text | None]) -> History:
        """What each window holds, and where what was drawn begins in it."""
        length = self.context + self.config.decode_chunk
        tokens_BL = np.full((len(texts), length), NOTHING, np.int32)
        output_B, end_B = np.zeros((2, len(texts)), np.int32)
        for row, text in enumerate(texts):
            if text is not None:
                tokens_BL[row, : len(text.ids)] = text.ids
                end_B[row] = len(text.ids)
                output_B[row] = len(text.ids) - text.window_drawn
        return History(tokens_BL, output_B, end_B)

    def _gained(self, text: Text, drawn, row: int) -> Event:
        """Adds what a row drew to its text, and ends it, or lets it slide, where it is time."""
        sampling, steps = text.request.sampling, []
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
        return Event(text.number, steps, text.finish, self._prompt_steps.pop(text.number, None))

    def warm_up(self) -> None:
        """Compiles all there is, so that no request waits for it; nothing must be under way."""
        device, slots = self._device, self.config.max_slots
        for piece in self._pieces:
            nothing_1T = np.full((1, piece), NOTHING, np.int32)
            table_1N = np.zeros((1, self._width), np.int32)
            paging = Paging(table_1N, nothing_1T, np.array([slots], np.int32))
            x_1TD, x_11D = device.read(np.zeros_like(nothing_1T), paging, 0)
            device.score(ALTERNATIVES, x_1TD, nothing_1T[0])
        for level in LEVELS:
            device.first(level, x_11D, self._rows([], 1, level=level)[1])
            for size in self._sizes:
                device.decode(level, self._rows([], size, level=level)[1], 1)
        if self._paged:
            device.restore([], device.save([]))
        if self.encodes or not self._paged:
            lengths = range(3, (self.context - 1).bit_length() + 1) if self.encodes else (3,)
            for length in lengths:
                device.begin(slots, (0,) * min(1 << length, self.context), 0)

    @property
    def num_programs(self) -> int:
        """How many programs have been compiled."""
        return self._device.num_programs


def _top(ids_N: np.ndarray, logprobs_N: np.ndarray, wanted: int) -> tuple[tuple[int, float], ...]:
    return tuple(zip(ids_N[:wanted].tolist(), logprobs_N[:wanted].tolist()))
