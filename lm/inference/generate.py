"""Prompts to their continuations, as token ids or as text that appears piece by piece.

The device draws `CHUNK` tokens of every row a dispatch (`lm.inference.decode`), and the next chunk
is dispatched before the last one is read, so that it does not wait for the host to print. Shapes
are rounded up, so that prompts of similar lengths share what was compiled.

A text that outgrows the model's context slides: the window that the model reads drops its first
quarter, the rest is read anew at positions from 0 on, and fills up again. Every token is thus drawn
from exactly what the model makes of the last three quarters of a context of text, or more.

An encoder-decoder reads the prompts with its encoder, and its decoder continues a start token; it
ends where the context does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lm.config import check, view
from lm.inference.decode import Rows, Settings, State, decode, prefill
from lm.inference.grammar import Grammar, Grammars
from lm.inference.prepare import Weights, cache_shardings, for_decoding, for_reading, mesh_of
from lm.inference.prompts import (
    NOTHING,
    Framing,
    Prompt,
    check_ids,
    check_writes,
    kept_length,
    padded,
    padded_after,
    round_up,
)
from lm.inference.sampling import SamplingConfig, warping
from lm.inference.warpers import Kind, Warping
from lm.models import Model, ModelConfig
from lm.models.matmul import compute_dtype
from lm.parallel.mesh import replicated
from lm.parallel.platform import device_memory
from lm.tokenizers import Tokenizer

CHUNK = 8  # tokens a row draws in one dispatch: what a reader sees appear at once


@dataclasses.dataclass
class Timing:
    """What generating took, in seconds of wall time. Compilation is apart from all the rest."""

    compile_seconds: float = 0.0  # 0 when the shapes and settings were compiled before
    first_token_seconds: float = 0.0  # from the prompts' ids to the first tokens on the host
    seconds: float = 0.0  # from the prompts' ids to the last tokens on the host
    tokens: int = 0  # drawn, over all rows, end-of-text included
    # For each token after a row's first: its dispatch's time over the tokens in that dispatch.
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
    """A model ready to write; holds its parameters in the compute dtype and what it compiled.

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
    ):
        check_writes(model.config, framing)
        self.model = model = for_decoding(model)
        self.framing, self.tokenizer = framing, tokenizer
        self.params = for_reading(model, params, weights)
        self._programs: dict[tuple, tuple[jax.stages.Compiled, Any]] = {}

    @property
    def encodes(self) -> bool:
        """Whether prompts go to an encoder, so that only what is drawn is the decoder's text."""
        return self.model.config.architecture == "encoder_decoder"

    @property
    def context(self) -> int:
        """The longest text, in tokens, that the model was made for: read, written, or each."""
        return self.model.config.max_length

    @property
    def kept(self) -> int:
        """How many tokens of a text the model reads on with when its window slides."""
        return kept_length(self.context)

    @property
    def vocab_size(self) -> int:
        """Ids from here up are never drawn: the tokenizer does not have them."""
        return self.tokenizer.vocab_size if self.tokenizer else self.model.config.vocab_size

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
        chunk: int = CHUNK,
        grammar: Grammar | None = None,
    ) -> Generation:
        """Continues every prompt `sampling.num_samples` times; iterate over the result.

        An encoder-decoder reads the prompt as its source; what comes is the target alone.

        Sample s of prompt p is a function of the prompt, `sampling` and (seed, p, s). A row ends
        after end-of-text or `max_new_tokens`; an encoder-decoder's also where the context is full.

        Args:
          prompts: token ids, at least one each; see `encode`.
          sampling: how to draw, and how much.
          seed: of the random draws, from -2³¹ to 2³² - 1.
          chunk: tokens of a row per dispatch.
          grammar: of `grammars`; what every continuation keeps to, drawn token by token. Where it
            is met and nothing can follow, the row has ended.

        Raises:
          ConfigError: a prompt that is empty, or too long and not to be cut; more rows than memory
            holds.
        """
        view(type(sampling), sampling, "sampling")
        sampling.check_ids(self.vocab_size)
        check(not sampling.stop, f"stop={sampling.stop!r} is not looked for in this way yet")
        check(
            isinstance(seed, int | np.integer) and -(2**31) <= seed < 2**32,
            f"seed={seed!r} must be a whole number from {-(2**31)} to {2**32 - 1}",
        )
        check(len(prompts) > 0, "prompts=[] must have one at least")
        read = prompts
        if sampling.truncate_prompt and not self.encodes:
            read = [self.framing.window(ids, self.context) for ids in prompts]
        for ids in read:
            check_ids("prompt", ids, self.model.config)
        longest = min(max(map(len, read)) + sampling.max_new_tokens, self.context)
        _check_memory(self.model.config, len(read), sampling.num_samples, longest)
        return Generation(self, prompts, read, sampling, seed, chunk, grammar)

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
        """The prompts side by side, as `prefill` reads them."""
        if not self.encodes:
            return Prompt(*padded(prompts, self.context))
        start = np.array(self.framing.decoder_start, np.int32)
        shape = (len(prompts), len(start))
        return Prompt(
            np.broadcast_to(start, shape),
            np.broadcast_to(np.arange(len(start), dtype=np.int32), shape),
            *padded_after(prompts, self.context),
        )

    def compiled(self, function: Callable, kind: Kind, size: int, arguments: tuple):
        """`prefill` or `decode` as a program, the shapes of what it returns, and the seconds that
        compiling took: 0 if it was before.

        Args:
          function: of `lm.inference.decode`.
          kind: of the rows' warpers: static.
          size: slots in the cache, or most tokens a row: static.
          arguments: the parameters and the other arguments, or their shapes.
        """
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(arguments[1:]))
        key = (function, kind, size, shapes)
        if key in self._programs:
            return *self._programs[key], 0.0
        began = time.perf_counter()
        settings = Settings(self.model, kind, self.vocab_size)
        donated = (1,) if function is decode else ()
        function = functools.partial(function, settings, size)
        mesh = mesh_of(jax.tree.leaves(self.params)[0])
        with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
            shardings = _shardings(jax.eval_shape(function, *arguments), mesh) if mesh else None
            # The state is donated: the cache is written where it lies, never copied.
            jitted = jax.jit(function, donate_argnums=donated, out_shardings=shardings)
            lowered = jitted.lower(*arguments)
            program = lowered.compile()
        out = lowered.out_info
        self._programs[key] = program, jax.tree.map(_shape, out, *([shardings] if mesh else []))
        return *self._programs[key], time.perf_counter() - began


def _shardings(out: tuple[State, Any, Any], mesh: jax.sharding.Mesh):
    """The cache is split; all else is whole, so that all processes see what is drawn."""
    state, *others = jax.tree.map(lambda _: replicated(mesh), out)
    return (dataclasses.replace(state, cache=cache_shardings(out[0].cache, mesh)), *others)


def _shape(x: Any, sharding: jax.sharding.Sharding | None = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


class Generation:
    """One call of `Generator.generate`: iterates over the tokens as they come, or over `texts`.

    Each item is an int32 array [B, N] of the tokens that the rows drew, `NOTHING` (-1) where a row
    drew none: it has ended, or its window is full and slides when all are. N is 1 for the first
    item and after each slide, else `chunk`. The rows are sample 0, 1, … of prompt 0, then of prompt
    1, and so on.

    Attributes, complete when the iteration is:
      timing: see `Timing`.
      ended: for each row, whether it came to an end-of-text that ended it.
      slides: how many times windows slid.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[Sequence[int]],
        read: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seed: int,
        chunk: int,
        grammar: Grammar | None = None,
    ):
        self._generator, self._sampling, self._grammar = generator, sampling, grammar
        self._chunk = 1 if grammar else chunk
        self._prompts, self.read = prompts, read  # as given, and as much as the model reads
        self._seed = np.uint32(seed % 2**32)
        self._start()

    def _start(self) -> None:
        rows = len(self._prompts) * self._sampling.num_samples
        self.timing, self.slides = Timing(), 0
        self.ended, self._drawn = [False] * rows, [0] * rows
        self._grammars = [self._grammar.start() for _ in range(rows)] if self._grammar else []

    def __iter__(self) -> Iterator[np.ndarray]:
        self._start()
        generator, sampling = self._generator, self._sampling
        windows = [list(ids) for ids in self.read for _ in range(sampling.num_samples)]
        number_B = np.arange(len(windows), dtype=np.int32)
        end = generator.framing.end_of_text
        self._kind = sampling.kind(bool(self._grammars))
        settings = [sampling] * len(windows)
        self._warpers, _ = warping(settings, generator.vocab_size, end, self._kind)
        self._stop = stop = set(self._warpers.stop_BS.flat) - {NOTHING}
        read, length = self.read, 0
        while True:
            drawn_B = np.array(self._drawn, np.int32)
            room_B = np.array([generator.room(len(window)) for window in windows], np.int32)
            limit_B = np.minimum(drawn_B + room_B, sampling.max_new_tokens)
            limit_B = np.where(self.ended, drawn_B, limit_B)
            rows = Rows(
                seed=self._seed,
                number_B=number_B % sampling.num_samples,
                prompt_B=number_B // sampling.num_samples,
                drawn_B=drawn_B,
                limit_B=limit_B,
                warping=self._allowing(),
            )
            prompt, most = generator.prompt(read), int((limit_B - drawn_B).max())
            # The last token drawn is not read, so the cache has room for one fewer.
            length = max(length, round_up(prompt.tokens_PT.shape[1] + most - 1, 64))
            for tokens_BN in self._until_full(prompt, rows, length, most):
                for row, ids in enumerate(tokens_BN.tolist()):
                    drawn = [id for id in ids if id != NOTHING]
                    windows[row] += drawn
                    self._drawn[row] += len(drawn)
                    self.ended[row] |= not stop.isdisjoint(drawn)
                yield tokens_BN
            wanting = (n < sampling.max_new_tokens for n in self._drawn)
            if generator.encodes or not any(w and not e for w, e in zip(wanting, self.ended)):
                return
            read = windows = [generator.framing.window(ids, generator.kept) for ids in windows]
            self.slides += 1

    def _allowing(self) -> Warping:
        """The warpers, with what the grammars allow next."""
        if not self._grammars:
            return self._warpers
        masks_BW = np.stack([grammar.mask() for grammar in self._grammars])
        return self._warpers._replace(allowed_BW=self._warpers.allowed_BW & masks_BW)

    def _follow(self, state: State, tokens_BN: np.ndarray) -> State:
        """`state` as it is once the grammars know the tokens."""
        for row, grammar in enumerate(self._grammars):
            for id in tokens_BN[row].tolist():
                if id != NOTHING and id not in self._stop:
                    grammar.advance(id)
            self.ended[row] |= grammar.ended
        done_B = np.asarray(state.done_B) | np.array(self.ended)
        return dataclasses.replace(state, done_B=done_B, warping=self._allowing())

    def _until_full(self, prompt: Prompt, rows: Rows, length: int, limit: int):
        """Reads `prompt` and draws until every row has reached its limit; at most `limit` more."""
        params, timing = self._generator.params, self.timing
        compiled = functools.partial(self._generator.compiled, kind=self._kind)
        reading, out, first = compiled(prefill, size=length, arguments=(params, prompt, rows))
        drawing, _, second = compiled(decode, size=self._chunk, arguments=(params, out[0]))
        timing.compile_seconds += first + second
        before = time.perf_counter()
        state, *arrays = reading(params, prompt, rows)
        dispatched = 1
        while True:
            tokens_BN, done = arrays
            # The first token is read before anything else is asked for; from then on the device
            # works on the next chunk while the host reads this one.
            further = dispatched < limit
            ahead = dispatched > 1 and not self._grammars
            if further and ahead:
                state, *arrays = drawing(params, state)
            tokens_BN = np.asarray(tokens_BN)
            now = time.perf_counter()
            steps = int((tokens_BN != NOTHING).any(0).sum())
            if timing.tokens == 0:
                timing.first_token_seconds = now - before
            else:
                timing.token_seconds += [(now - before) / steps] * steps
            timing.tokens += int((tokens_BN != NOTHING).sum())
            timing.seconds += now - before
            before = now
            if self._grammars:
                state = self._follow(state, tokens_BN)
                further = further and not state.done_B.all()
            if further and not ahead:
                state, *arrays = drawing(params, state)
            yield tokens_BN
            if not further or bool(done):
                return
            dispatched += self._chunk

    def texts(self) -> Iterator[tuple[int, str]]:
        """Iterates over `(row, text)` as the text comes.

        `text` is what the row has gained; the joined texts of a row are its continuation, without
        its prompt, or an encoder-decoder's target.
        """
        generator, samples = self._generator, self._sampling.num_samples
        streams = [generator.tokenizer.decode_stream() for _ in self.ended]
        if not generator.encodes:
            for row, stream in enumerate(streams):
                # What a token adds to the text may depend on whether it is the first.
                for id in self._prompts[row // samples]:
                    stream.push(id)
        for tokens_BN in self:
            for row, ids in enumerate(tokens_BN.tolist()):
                if text := "".join(streams[row].push(id) for id in ids if id != NOTHING):
                    yield row, text
        for row, stream in enumerate(streams):
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
        stuck = {grammar.error for grammar in self._grammars} - {""}
        if stuck:
            notices.append(f"a text cannot go on as it should: {stuck.pop()}")
        short = [n for n, ended in zip(self._drawn, self.ended) if n < wanted and not ended]
        if self.slides:
            notices.append(
                f"the text outgrew the model's context of {context} tokens: from there on the "
                f"model read only the last {generator.kept} to {context}"
            )
        elif short:
            notices.append(
                f"{len(short)} of {len(self._drawn)} texts stopped short of "
                f"max_new_tokens={wanted}, where they filled the model's context of {context} "
                "tokens"
            )
        return notices


def _check_memory(config: ModelConfig, prompts: int, samples: int, length: int) -> None:
    """Raises ConfigError where so many rows cannot fit: a rough count, before any is made."""
    cached = 2 * config.num_layers * length * config.kv_heads * config.head_width
    row = cached * compute_dtype(config.compute_dtype).itemsize + 8 * config.vocab_size
    has = device_memory()
    check(
        has is None or prompts * samples * row <= has,
        f"num_samples={samples} of {prompts} prompt(s) need {prompts * samples * row / 2**30:,.1f} "
        f"GiB to remember {length} tokens each, and there are {(has or 0) / 2**30:,.1f} GiB: ask "
        f"for {max((has or 0) // (row * prompts), 1):,} at most",
    )
