"""Prefill and decode: prompts of token ids to their continuations.

Two compiled functions. `prefill` reads every prompt at once and draws each row's first token;
`decode` is one `lax.while_loop` that draws up to `CHUNK` further tokens a dispatch and ends early
when every row has ended. The next chunk is dispatched before the last one is read, so the device
does not wait for the host to print.

Shapes are rounded up, so that prompts of similar lengths share what was compiled. Rows of different
lengths stand together: padding comes first, at position -1, where nothing attends to it. A row's
tokens depend on its prompt, its key and its limit, not on its companions or on the chunks.

An encoder-decoder reads the prompts with its encoder, and its decoder continues a start token.
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

from lm.config import check
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
)
from lm.inference.sampling import sample
from lm.models import Model
from lm.models.cache import Cache
from lm.models.recurrent import RecurrentCache

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
    limit_B: jax.Array  # how many tokens the row may draw
    key_B: jax.Array
    count: jax.Array  # tokens drawn so far by every row that has not ended


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
        parts = [
            f"{self.tokens} tokens",
            f"first after {1e3 * self.first_token_seconds:.1f} ms",
        ]
        if self.token_seconds:
            p95 = float(np.percentile(self.token_seconds, 95))
            median = statistics.median(self.token_seconds)
            parts.append(f"then one every {1e3 * median:.2f} ms (95th percentile {1e3 * p95:.2f})")
        parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if self.compile_seconds:
            parts.append(f"compiled before that in {self.compile_seconds:.1f} s")
        return " · ".join(parts)


class Generator:
    """A model ready to write; holds its parameters in the compute dtype and what it compiled.

    Args:
      model: the skeleton: a decoder or an encoder-decoder, of whatever cells.
      params: its parameters.
      end_of_text: the id that ends a row, or several of which each does.
      vocab_size: ids from here up are never drawn, for models whose vocabulary is padded.
      decoder_start: the id, or ids, that an encoder-decoder's decoder continues.

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
    ):
        check(
            model.config.architecture != "encoder",
            "config.model.architecture='encoder' sees both sides of a token and cannot generate: "
            "ask it for vectors (Run.embed) or for what a mask hides (Run.fill)",
        )
        self.model = model = for_decoding(model)
        self.end_of_text = _ids(end_of_text)
        self.decoder_start = _ids(decoder_start)
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
        after end-of-text, after `max_new_tokens`, or where the model's context is full.

        Args:
          prompts: token ids, at least one each.
          sampling: how to draw, and how much.
          seed: of the random draws.
          chunk: tokens of a row per dispatch.

        Raises:
          ConfigError: a prompt that is empty or longer than the model's context.
        """
        sampling.validate("sampling")
        for ids in prompts:
            check_ids("prompt", ids, self.model.config)
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
        sampling = dataclasses.replace(sampling, max_new_tokens=1)  # decides limits, not programs
        stop = self.end_of_text if sampling.stop_at_end_of_text else ()
        settings = Settings(self.model, sampling, length, chunk, stop, self.vocab_size)
        known = len(self._programs)
        key = (sampling, length, _shapes(arguments[1]))
        if key not in self._programs:
            lowered = jax.jit(functools.partial(prefill, settings)).lower(*arguments)
            self._programs[key] = lowered.compile(), lowered.out_info[0]
        prefilling, state = self._programs[key]
        key = (sampling, chunk, _shapes(state))
        if key not in self._programs:
            # The state is donated: the cache is written where it lies, never copied.
            decoding = jax.jit(functools.partial(decode, settings), donate_argnums=1)
            self._programs[key] = decoding.lower(self.params, state).compile(), None
        seconds = time.perf_counter() - start if len(self._programs) > known else 0.0
        return prefilling, self._programs[key][0], seconds


class Generation:
    """One call of `Generator.generate`: iterates over the tokens as they come.

    Each item is an int32 array [B, N] of the tokens that the rows drew, `NOTHING` (-1) after a
    row's end; N is 1 for the first item, then `chunk`. The rows are sample 0, 1, … of prompt 0,
    then of prompt 1, and so on. `timing` is complete when the iteration is.
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
        limits = [min(sampling.max_new_tokens, generator.room(len(ids))) for ids in prompts]
        self._limit = max(limits)
        limits_P, seed = np.array(limits, np.int32), np.uint32(seed % 2**32)
        self._arguments = (generator.params, generator.prompt(prompts), limits_P, seed)
        self.timing = Timing()

    def __iter__(self) -> Iterator[np.ndarray]:
        # The last token drawn is not read, so the cache has room for one fewer.
        length = round_up(self._arguments[1].tokens_PT.shape[1] + self._limit - 1, 64)
        self.timing = timing = Timing()
        prefill, decode, timing.compile_seconds = self._generator.programs(
            self._sampling, length, self._chunk, self._arguments
        )
        start = before = time.perf_counter()
        state, *arrays = prefill(*self._arguments)
        dispatched = 1
        while True:
            tokens_BN, done = arrays
            # The first token is read before anything else is asked for; from then on the device
            # works on the next chunk while the host reads this one.
            further = dispatched < self._limit
            if further and dispatched > 1:
                state, *arrays = decode(self._generator.params, state)
            tokens_BN = np.asarray(tokens_BN)
            now = time.perf_counter()
            steps = int((tokens_BN != NOTHING).any(0).sum())
            timing.tokens += int((tokens_BN != NOTHING).sum())
            timing.seconds = now - start
            if dispatched == 1:
                timing.first_token_seconds = now - start
            else:
                timing.token_seconds += [(now - before) / steps] * steps
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


def prefill(settings: Settings, params, prompt: Prompt, limits_P, seed):
    """Reads the prompts and draws the first token of every sample.

    Args:
      settings: static.
      params: as `Generator` holds them.
      prompt: from `Generator.prompt`.
      limits_P: how many tokens may follow each prompt.
      seed: uint32.

    Returns:
      The `State`, the tokens [B, 1] with B = P · num_samples, and whether every row has ended.
    """
    model = bound(settings.model, params)
    P, samples = prompt.tokens_PT.shape[0], settings.sampling.num_samples
    cache = model.new_cache(P, settings.length, prompt.source_PS, prompt.segments_PS)
    x_PTD, cache = model.extend(prompt.tokens_PT, prompt.positions_PT, cache)
    key = jax.random.key(seed)
    keys_P = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(P))
    keys_PN = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(
        keys_P, jnp.arange(samples)
    )

    def spread(x, axis=0):
        return jnp.repeat(x, samples, axis)

    state = State(
        cache=cache.repeat(samples),
        token_B=jnp.zeros(P * samples, jnp.int32),
        position_B=spread(prompt.positions_PT[:, -1]),
        done_B=jnp.zeros(P * samples, bool),
        limit_B=spread(limits_P),
        key_B=keys_PN.reshape(-1),
        count=jnp.int32(0),
    )
    state = _draw(settings, model, state, spread(x_PTD[:, -1:]), state.cache)
    return state, state.token_B[:, None], state.done_B.all()


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
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(state.key_B, state.count)
    token_B = sample(logits_BV, keys_B, settings.sampling)
    stops_B = (token_B[:, None] == jnp.array(settings.stop, jnp.int32)).any(-1)
    count = state.count + 1
    return dataclasses.replace(
        state,
        cache=cache,
        token_B=token_B,
        position_B=state.position_B + 1,
        done_B=state.done_B | stops_B | (count >= state.limit_B),
        count=count,
    )


def _ids(ids: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(int(id) for id in np.atleast_1d(ids))


def _shapes(tree: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(leaf.shape for leaf in jax.tree.leaves(tree))
