"""Prefill and decode: prompts of token ids to their continuations.

Two compiled functions. `prefill` reads every prompt at once and draws each row's first token;
`decode` is one `lax.while_loop` that draws up to `CHUNK` further tokens a dispatch and ends early
when every row has ended. The next chunk is dispatched before the last one is read, so the device
does not wait for the host to print.

Shapes are rounded up, so that prompts of similar lengths share what was compiled. Rows of different
lengths stand together: padding comes first, at position -1, where nothing attends to it. A row's
tokens depend on its prompt, its key and its limit, not on its companions or on the chunks.

A text that outgrows the model's context slides: the window that the model reads drops its first
quarter, the rest is read anew at positions from 0 on, and fills up again. Every token is thus drawn
from exactly what the model makes of the last three quarters of a context of text, or more.

An encoder-decoder reads the prompts with its encoder, and its decoder continues a start token; it
ends where the context does.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import check, view
from lm.inference.config import SamplingConfig
from lm.inference.prepare import (
    Prompt,
    bound,
    check_ids,
    for_decoding,
    for_reading,
    padded,
    padded_after,
    round_up,
    split_over,
)
from lm.inference.sampling import sample
from lm.models import Model, ModelConfig
from lm.models.cache import Cache
from lm.models.matmul import compute_dtype
from lm.models.recurrent import RecurrentCache
from lm.parallel.mesh import replicated
from lm.parallel.platform import device_memory

CHUNK = 8  # tokens a row draws in one dispatch: what a reader sees appear at once
NOTHING = -1  # in place of a token, in a row that has ended


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where a batch of continuations stands, between two tokens."""

    cache: Cache | RecurrentCache
    token_B: jax.Array  # drawn last, not in the cache yet
    position_B: jax.Array  # its position
    done_B: jax.Array  # whether the row has ended
    limit_B: jax.Array  # how many tokens the row may have drawn
    key_B: jax.Array
    count_B: jax.Array  # tokens that a row which has not ended has drawn


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

    Args:
      model: the skeleton: a decoder or an encoder-decoder, of whatever cells.
      params: its parameters.
      end_of_text: the id that ends a row, or several of which each does.
      vocab_size: ids from here up are never drawn, for models whose vocabulary is padded.
      decoder_start: the id, or ids, that an encoder-decoder's decoder continues.
      begin_of_text: ids that stay in front of a text that begins with them when its window slides.

    Raises:
      ConfigError: an encoder, which predicts no next token; no `decoder_start` where one must be.
    """

    def __init__(
        self,
        model: Model,
        params: Mapping[str, jax.Array],
        *,
        end_of_text: int | Sequence[int],
        vocab_size: int | None = None,
        decoder_start: int | Sequence[int] = (),
        begin_of_text: int | Sequence[int] = (),
    ):
        check(
            model.config.architecture != "encoder",
            "config.model.architecture='encoder' sees both sides of a token and cannot generate: "
            "ask it for vectors (Run.embed) or for what a mask hides (Run.fill)",
        )
        self.model = model = for_decoding(model)
        self.end_of_text = _ids(end_of_text)
        self.decoder_start = _ids(decoder_start)
        self.begin_of_text = _ids(begin_of_text)
        check(
            not self.encodes or len(self.decoder_start) > 0,
            "decoder_start=() must name the token that the decoder starts from",
        )
        self.vocab_size = vocab_size or model.config.vocab_size
        self.params = for_reading(model, params)
        self._programs: dict[tuple, tuple[jax.stages.Compiled, Any]] = {}

    @property
    def encodes(self) -> bool:
        """Whether prompts go to an encoder, so that only what is drawn is the decoder's text."""
        return self.model.config.architecture == "encoder_decoder"

    @property
    def context(self) -> int:
        """The longest text, in tokens, that the model was made for: read, written, or each."""
        return self.model.config.max_length

    def room(self, prompt_length: int) -> int:
        """How many tokens can follow a prompt; the last one drawn needs no place of its own."""
        return self.context - (len(self.decoder_start) if self.encodes else prompt_length) + 1

    @property
    def kept(self) -> int:
        """How many tokens of a text the model reads on with when its window slides."""
        return self.context - self.context // 4

    def window(self, ids: Sequence[int], length: int) -> list[int]:
        """The last `length` of `ids`, begin-of-text still in front of them."""
        begin = list(self.begin_of_text)
        if len(ids) <= length or list(ids[: len(begin)]) != begin or len(begin) >= length:
            begin = []
        return begin + list(ids[max(len(begin), len(ids) - length + len(begin)) :])

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seed: int = 0,
        chunk: int = CHUNK,
    ) -> Generation:
        """Continues every prompt `sampling.num_samples` times; iterate over the result.

        An encoder-decoder reads the prompt as its source; what comes is the target alone.

        Sample s of prompt p is a function of the prompt, `sampling` and (seed, p, s). A row ends
        after end-of-text or `max_new_tokens`; an encoder-decoder's also where the context is full.

        Args:
          prompts: token ids, at least one each.
          sampling: how to draw, and how much.
          seed: of the random draws, from -2³¹ to 2³² - 1.
          chunk: tokens of a row per dispatch.

        Raises:
          ConfigError: a prompt that is empty, or too long and not to be cut; more rows than memory
            holds.
        """
        view(type(sampling), sampling, "sampling")
        check(
            isinstance(seed, int | np.integer) and -(2**31) <= seed < 2**32,
            f"seed={seed!r} must be a whole number from {-(2**31)} to {2**32 - 1}",
        )
        check(len(prompts) > 0, "prompts=[] must have one at least")
        if sampling.truncate_prompt and not self.encodes:
            prompts = [self.window(ids, self.context) for ids in prompts]
        for ids in prompts:
            check_ids("prompt", ids, self.model.config)
        longest = min(max(map(len, prompts)) + sampling.max_new_tokens, self.context)
        _check_memory(self.model.config, len(prompts), sampling.num_samples, longest)
        return Generation(self, prompts, sampling, seed, chunk)

    def prompt(self, prompts: Sequence[Sequence[int]]) -> Prompt:
        """The prompts in rows."""
        if not self.encodes:
            return Prompt(*padded(prompts, self.context))
        start = np.array(self.decoder_start, np.int32)
        shape = (len(prompts), len(start))
        return Prompt(
            np.broadcast_to(start, shape),
            np.broadcast_to(np.arange(len(start), dtype=np.int32), shape),
            *padded_after(prompts, self.context),
        )

    def programs(self, sampling: SamplingConfig, length: int, chunk: int, arguments: tuple):
        """`prefill` and `decode`, compiled, and the seconds that took: 0 if they were before.

        Args:
          sampling: static.
          length: slots in the cache.
          chunk: most tokens a row per `decode`.
          arguments: of `prefill`.
        """
        start = time.perf_counter()
        # These decide limits and shapes, not programs.
        sampling = dataclasses.replace(
            sampling, max_new_tokens=1, num_samples=1, truncate_prompt=True
        )
        stop = self.end_of_text if sampling.stop_at_end_of_text else ()
        settings = Settings(self.model, sampling, length, chunk, stop, self.vocab_size)
        known = len(self._programs)
        # On a mesh the parameters alone are split, and all processes see what is drawn.
        split = split_over(jax.tree.leaves(self.params)[0])
        whole = replicated(split.mesh) if split else None
        key = (sampling, length, _shapes(arguments[1:]))
        if key not in self._programs:
            prefilling = jax.jit(functools.partial(prefill, settings), out_shardings=whole)
            lowered = prefilling.lower(*arguments)
            state = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
                lowered.out_info[0],
            )
            self._programs[key] = lowered.compile(), state
        prefilling, state = self._programs[key]
        key = (sampling, chunk, _shapes(state))
        if key not in self._programs:
            # The state is donated: the cache is written where it lies, never copied.
            decoding = jax.jit(
                functools.partial(decode, settings), donate_argnums=1, out_shardings=whole
            )
            self._programs[key] = decoding.lower(self.params, state).compile(), None
        seconds = time.perf_counter() - start if len(self._programs) > known else 0.0
        return prefilling, self._programs[key][0], seconds


class Generation:
    """One call of `Generator.generate`: iterates over the tokens as they come.

    Each item is an int32 array [B, N] of the tokens that the rows drew, `NOTHING` (-1) where a row
    drew none: it has ended, or its window is full and slides when all are. N is 1 for the first
    item and after each slide, else `chunk`. The rows are sample 0, 1, … of prompt 0, then of prompt
    1, and so on. `timing` and `slides` are complete when the iteration is.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seed: int,
        chunk: int,
    ):
        self._generator, self._sampling, self._chunk = generator, sampling, chunk
        self._prompts, self._seed = prompts, np.uint32(seed % 2**32)
        self.timing = Timing()
        self.slides = 0  # how many times windows slid

    def __iter__(self) -> Iterator[np.ndarray]:
        generator, wanted = self._generator, self._sampling.max_new_tokens
        samples = self._sampling.num_samples
        stop = set(generator.end_of_text) if self._sampling.stop_at_end_of_text else set()
        windows = [list(ids) for ids in self._prompts for _ in range(samples)]
        left = [wanted] * len(windows)
        self.timing, self.slides = Timing(), 0
        read, length = self._prompts, 0
        while True:
            room = [generator.room(len(window)) for window in windows]
            draws_B = np.minimum(left, room).astype(np.int32)
            rows = Rows(
                seed=self._seed,
                number_B=np.arange(len(windows), dtype=np.int32) % samples,
                prompt_B=np.arange(len(windows), dtype=np.int32) // samples,
                drawn_B=wanted - np.array(left, np.int32),
                limit_B=wanted - np.array(left, np.int32) + draws_B,
            )
            prompt = generator.prompt(read)
            # The last token drawn is not read, so the cache has room for one fewer.
            longest = prompt.tokens_PT.shape[1] + int(draws_B.max()) - 1
            length = max(length, round_up(longest, 64))
            for tokens_BN in self._until_full(prompt, rows, length, int(draws_B.max())):
                for row, ids in enumerate(tokens_BN.tolist()):
                    drawn = [id for id in ids if id != NOTHING]
                    windows[row] += drawn
                    left[row] = 0 if stop.intersection(drawn) else left[row] - len(drawn)
                yield tokens_BN
            if generator.encodes or not any(left):
                return
            read = windows = [generator.window(ids, generator.kept) for ids in windows]
            self.slides += 1

    def _until_full(self, prompt: Prompt, rows: Rows, length: int, limit: int):
        """Reads `prompt` and draws until every row has reached its limit; at most `limit` more."""
        arguments = (self._generator.params, prompt, rows)
        prefill, decode, compile_seconds = self._generator.programs(
            self._sampling, length, self._chunk, arguments
        )
        timing = self.timing
        timing.compile_seconds += compile_seconds
        before = time.perf_counter()
        state, *arrays = prefill(*arguments)
        dispatched = 1
        while True:
            tokens_BN, done = arrays
            # The first token is read before anything else is asked for; from then on the device
            # works on the next chunk while the host reads this one.
            further = dispatched < limit
            if further and dispatched > 1:
                state, *arrays = decode(self._generator.params, state)
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
            if further and dispatched == 1:
                state, *arrays = decode(self._generator.params, state)
            yield tokens_BN
            if not further or bool(done):
                return
            dispatched += self._chunk


class Settings(NamedTuple):
    """What `prefill` and `decode` are compiled for."""

    model: Model
    sampling: SamplingConfig
    length: int  # slots in the cache
    chunk: int  # most tokens a row draws in one `decode`
    stop: tuple[int, ...]  # the ids that end a row
    vocab_size: int  # ids from here up are never drawn


class Rows(NamedTuple):
    """The B = P · samples continuations of a `Prompt`."""

    seed: np.uint32
    prompt_B: np.ndarray  # with the seed, what a row's random draws follow from: whose sample
    number_B: np.ndarray  # it is, and which one
    drawn_B: np.ndarray  # tokens it has drawn before
    limit_B: np.ndarray  # tokens it may have drawn when it stops; `drawn_B` where it has ended


def prefill(settings: Settings, params, prompt: Prompt, rows: Rows):
    """Reads the prompts and draws the next token of every row.

    Args:
      settings: static.
      params: as `Generator` holds them.
      prompt: from `Generator.prompt`.
      rows: what follows them.

    Returns:
      The `State`, the tokens [B, 1], and whether every row has ended.
    """
    model = bound(settings.model, params)
    P = prompt.tokens_PT.shape[0]
    samples = len(rows.drawn_B) // P
    cache = model.new_cache(P, settings.length, prompt.source_PS, prompt.segments_PS)
    x_PTD, cache = model.extend(prompt.tokens_PT, prompt.positions_PT, cache)
    fold_in = jax.vmap(jax.random.fold_in)
    seed_B = jnp.full(len(rows.drawn_B), rows.seed)
    key_B = fold_in(fold_in(jax.vmap(jax.random.key)(seed_B), rows.prompt_B), rows.number_B)

    def spread(x, axis=0):
        return jnp.repeat(x, samples, axis)

    done_B = rows.drawn_B >= rows.limit_B
    state = State(
        cache=cache.repeat(samples),
        token_B=jnp.zeros_like(rows.drawn_B),
        position_B=spread(prompt.positions_PT[:, -1]),
        done_B=done_B,
        limit_B=rows.limit_B,
        key_B=key_B,
        count_B=rows.drawn_B,
    )
    state = _draw(settings, model, state, spread(x_PTD[:, -1:]), state.cache)
    return state, jnp.where(done_B, NOTHING, state.token_B)[:, None], state.done_B.all()


def decode(settings: Settings, params, state: State):
    """Draws up to `settings.chunk` further tokens a row; ends early when every row has ended.

    Returns:
      The `State`, the tokens [B, chunk] (`NOTHING` after a row's end), whether every row has ended.
    """
    model = bound(settings.model, params)
    drawn_BN = jnp.full((len(state.token_B), settings.chunk), NOTHING, jnp.int32)

    def unfinished(carry):
        state, _, step = carry
        return (step < settings.chunk) & ~state.done_B.all()

    def one_token(carry):
        state, drawn_BN, step = carry
        # At position -1 the tokens of rows that have ended are seen by none.
        positions_B = jnp.where(state.done_B, NOTHING, state.position_B)
        x_B1D, cache = model.extend(state.token_B[:, None], positions_B[:, None], state.cache)
        done_B = state.done_B
        state = _draw(settings, model, state, x_B1D, cache)
        column_B = jnp.where(done_B, NOTHING, state.token_B)
        drawn_BN = jax.lax.dynamic_update_index_in_dim(drawn_BN, column_B, step, 1)
        return state, drawn_BN, step + 1

    state, drawn_BN, _ = jax.lax.while_loop(unfinished, one_token, (state, drawn_BN, jnp.int32(0)))
    return state, drawn_BN, state.done_B.all()


def _draw(settings: Settings, model: Model, state: State, x_B1D, cache) -> State:
    """The state after drawing a token from the residual stream of each row's last one."""
    logits_BV = model.unembed(x_B1D)[:, 0, : settings.vocab_size]
    keys_B = jax.vmap(jax.random.fold_in)(state.key_B, state.count_B)
    token_B = sample(logits_BV, keys_B, settings.sampling)
    stops_B = (token_B[:, None] == jnp.array(settings.stop, jnp.int32)).any(-1)
    count_B = state.count_B + 1
    return dataclasses.replace(
        state,
        cache=cache,
        token_B=token_B,
        position_B=state.position_B + 1,
        done_B=state.done_B | stops_B | (count_B >= state.limit_B),
        count_B=count_B,
    )


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


def _ids(ids: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(int(id) for id in np.atleast_1d(ids))


def _shapes(tree: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(leaf.shape for leaf in jax.tree.leaves(tree))
