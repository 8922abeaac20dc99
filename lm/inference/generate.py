"""Prefill and decode: prompts of token ids to their continuations.

Two compiled functions. `prefill` reads every prompt at once and draws each row's first token;
`decode` is one `lax.while_loop` that draws up to `CHUNK` further tokens a dispatch and ends early
when every row has ended. The next chunk is dispatched before the last one is read, so the device
does not wait for the host to print.

Shapes are rounded up, so that prompts of similar lengths share what was compiled. Rows of different
lengths stand together: padding comes first, at position -1, where nothing attends to it. A row's
tokens depend on its prompt, its key and its limit, not on its companions or on the chunks.
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
from lm.inference.sampling import sample
from lm.models import Transformer, bind, param_specs
from lm.models.numerics import compute_dtype
from lm.models.transformer import Cache, Layers
from lm.parallel.params import ParamSpec

CHUNK = 8  # tokens a row draws in one dispatch: what a reader sees appear at once
UNROLLED_LAYERS = 24  # up to here the time to compile them one by one is bearable
NOTHING = -1  # in place of a token, in a row that has ended


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where a batch of continuations stands, between two tokens."""

    cache: Cache
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
      model: the skeleton.
      params: its parameters.
      end_of_text: the id that ends a row.
      vocab_size: ids from here up are never drawn, for models whose vocabulary is padded.
    """

    def __init__(
        self,
        model: Transformer,
        params: Mapping[str, jax.Array],
        *,
        end_of_text: int,
        vocab_size: int | None = None,
    ):
        self.model = model = for_decoding(model)
        self.end_of_text = end_of_text
        self.vocab_size = vocab_size or model.config.vocab_size
        self.params = in_compute_dtype(model, params)
        if not model.config.scan_layers:
            self.params = {
                name: tuple(array) if "layers" in spec.axes else array
                for (name, spec), array in zip(param_specs(model).items(), self.params.values())
            }
        self._programs: dict[tuple, tuple[jax.stages.Compiled, Any]] = {}

    @property
    def context(self) -> int:
        """The longest text, in tokens, that the model was made for."""
        return self.model.config.max_length

    def room(self, prompt_length: int) -> int:
        """How many tokens can follow a prompt; the last one drawn needs no place of its own."""
        return self.context - prompt_length + 1

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seed: int = 0,
        chunk: int = CHUNK,
    ) -> Generation:
        """Continues every prompt `sampling.num_samples` times; iterate over the result.

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
            check(len(ids) >= 1, "prompt='' must have at least one token to start from")
            check(
                len(ids) <= self.context,
                f"prompt is {len(ids)} tokens long, but the model's context is {self.context}: "
                f"shorten it by {len(ids) - self.context}, or train with a larger "
                "config.model.max_length",
            )
            check(
                min(ids) >= 0 and max(ids) < self.model.config.vocab_size,
                f"prompt has token ids outside 0 … {self.model.config.vocab_size - 1}: they come "
                "from another tokenizer",
            )
        return Generation(self, prompts, sampling, seed, chunk)

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
        stop = self.end_of_text if sampling.stop_at_end_of_text else NOTHING
        settings = Settings(self.model, sampling, length, chunk, stop, self.vocab_size)
        prompts, longest = arguments[1].shape
        known = len(self._programs)
        key = (sampling, length, prompts, longest)
        if key not in self._programs:
            lowered = jax.jit(functools.partial(prefill, settings)).lower(*arguments)
            self._programs[key] = lowered.compile(), lowered.out_info[0]
        prefilling, state = self._programs[key]
        key = (sampling, length, prompts, "decode", chunk)
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
        tokens_PT, positions_PT = padded(prompts, generator.context)
        limits_P, seed = np.array(limits, np.int32), np.uint32(seed % 2**32)
        self._arguments = (generator.params, tokens_PT, positions_PT, limits_P, seed)
        self.timing = Timing()

    def __iter__(self) -> Iterator[np.ndarray]:
        # The last token drawn is not read, so the cache has room for one fewer.
        length = round_up(self._arguments[1].shape[1] + self._limit - 1, 64)
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

    model: Transformer
    sampling: SamplingConfig
    length: int  # slots in the cache
    chunk: int  # most tokens a row draws in one `decode`
    stop: int  # the id that ends a row; NOTHING for none
    vocab_size: int  # ids from here up are never drawn


def prefill(settings: Settings, params, tokens_PT, positions_PT, limits_P, seed):
    """Reads the prompts and draws the first token of every sample.

    Args:
      settings: static.
      params: as `Generator` holds them.
      tokens_PT, positions_PT: from `padded`.
      limits_P: how many tokens may follow each prompt.
      seed: uint32.

    Returns:
      The `State`, the tokens [B, 1] with B = P · num_samples, and whether every row has ended.
    """
    model = _bind(settings.model, params)
    P, samples = tokens_PT.shape[0], settings.sampling.num_samples
    cache = Cache.empty(model.config, P, settings.length)
    x_PTD, cache = model.extend(tokens_PT, positions_PT, cache)
    key = jax.random.key(seed)
    keys_P = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(P))
    keys_PN = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(
        keys_P, jnp.arange(samples)
    )

    def spread(x, axis=0):
        return jnp.repeat(x, samples, axis)

    keys, values = spread(cache.keys_LBSKC, 1), spread(cache.values_LBSKC, 1)
    if not model.config.scan_layers:
        keys, values = tuple(keys), tuple(values)
    state = State(
        cache=Cache(keys, values, spread(cache.positions_BS), cache.slot),
        token_B=jnp.zeros(P * samples, jnp.int32),
        position_B=spread(positions_PT[:, -1]),
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
    model = _bind(settings.model, params)
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


def _draw(settings: Settings, model: Transformer, state: State, x_B1D, cache: Cache) -> State:
    """The state after drawing a token from the residual stream of each row's last one."""
    logits_BV = model.unembed(x_B1D)[:, 0, : settings.vocab_size]
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(state.key_B, state.count)
    token_B = sample(logits_BV, keys_B, settings.sampling)
    count = state.count + 1
    return dataclasses.replace(
        state,
        cache=cache,
        token_B=token_B,
        position_B=state.position_B + 1,
        done_B=state.done_B | (token_B == settings.stop) | (count >= state.limit_B),
        count=count,
    )


def for_decoding(model: Transformer) -> Transformer:
    """The same skeleton, set up for reading all its weights for every token.

    On the CPU that means float32 unless the config names a dtype: a product with few rows spends
    its time reading weights, and widening bfloat16 ones takes longer than reading twice the bytes.
    Layers are unrolled, unless they are many: a loop over stacked layers would copy the weights of
    each before using them.
    """
    config = model.config
    dtype = config.compute_dtype
    if dtype == "auto" and jax.default_backend() == "cpu":
        dtype = "float32"
    scan = config.num_layers > UNROLLED_LAYERS
    return Transformer(dataclasses.replace(config, compute_dtype=dtype, scan_layers=scan))


def _bind(model: Transformer, params) -> Transformer:
    layers = {name: Layers(x) if isinstance(x, tuple) else x for name, x in params.items()}
    return bind(model, layers)


def in_compute_dtype(model: Transformer, params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """`params` with every matrix that is multiplied in the compute dtype, once for all tokens.

    The model casts them anyway, but inside the loop. What it adds or scales in float32 stays:
    gains, biases, and embeddings but for tokens that are also the output head.
    """
    dtype = compute_dtype(model.config.compute_dtype)

    def multiplied(name: str, spec: ParamSpec) -> bool:
        if name.startswith("embedding."):
            return name == "embedding.tokens" and model.config.tie_embeddings
        return len(set(spec.axes) - {"layers"}) >= 2

    return {
        name: jnp.asarray(params[name], dtype if multiplied(name, spec) else None)
        for name, spec in param_specs(model).items()
    }


def padded(prompts: Sequence[Sequence[int]], context: int) -> tuple[np.ndarray, np.ndarray]:
    """The prompts as rows of tokens and positions, int32 [P, T], padding (position -1) first.

    T is the longest prompt's length rounded up, to a power of two and from 64 on to a multiple of
    64, but not beyond `context`.
    """
    longest = max(len(ids) for ids in prompts)
    length = round_up(longest, 64) if longest > 32 else max(8, 1 << (longest - 1).bit_length())
    length = max(longest, min(length, context))
    tokens_PT = np.zeros((len(prompts), length), np.int32)
    positions_PT = np.full((len(prompts), length), -1, np.int32)
    for row, ids in enumerate(prompts):
        tokens_PT[row, length - len(ids) :] = ids
        positions_PT[row, length - len(ids) :] = np.arange(len(ids))
    return tokens_PT, positions_PT


def round_up(number: int, multiple: int) -> int:
    """The next multiple of `multiple` from `number` up."""
    return -(-number // multiple) * multiple
