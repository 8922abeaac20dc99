"""The compiled functions of the engine: reading a piece of a prompt, and drawing tokens after it.

None of them holds anything but the pages: what else they need of a text comes with every dispatch.
Each runs at a few shapes only. Products at one shape treat all rows alike, and rows meet nowhere
else, so that what a text gets does not depend on its companions.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.inference.prepare import bound, cache_shardings, for_reading, mesh_of
from lm.inference.prompts import NOTHING
from lm.inference.sampling import Scores, row_keys, sample, scores
from lm.inference.warpers import History, Kind, Warping
from lm.models import Model, ModelConfig, skeleton
from lm.models.attention.paged import PagedCache, Paging
from lm.parallel.mesh import replicated


class Settings(NamedTuple):
    """What the functions are compiled for."""

    config: ModelConfig  # of `lm.inference.prepare.for_decoding`
    vocab_size: int  # ids from here up are never drawn
    weights: Literal["compute", "int8"] = "compute"  # see `lm.inference.prepare.for_reading`
    cache: Literal["compute", "int8"] = "compute"  # see `EngineConfig`

    @property
    def model(self) -> Model:
        """The skeleton that the config describes."""
        return skeleton(self.config)


class Level(NamedTuple):
    """How much a program can do for the rows it draws for."""

    kind: Kind
    alternatives: int  # how many likeliest tokens it names beside each


class Rows(NamedTuple):
    """B texts that draw tokens."""

    token_B: np.ndarray  # the last one of each, not in its pages yet
    position_B: np.ndarray  # of that token; -1: there is no text in this row
    limit_B: np.ndarray  # how many tokens it may draw now
    count_B: np.ndarray  # how many it has drawn
    seed_B: np.ndarray  # with the next two, what a text's random draws follow from
    prompt_B: np.ndarray
    sample_B: np.ndarray
    table_BN: np.ndarray  # its pages
    slot_B: np.ndarray  # and where what else is kept of it stands
    warping: Warping
    history: History | None  # where the level's kind has it


class Drawn(NamedTuple):
    """What B rows drew, N tokens each at most."""

    ids_BN: jax.Array  # `NOTHING` after a row's end
    sampled_BN: jax.Array  # log-probability, of what it was drawn from
    logprob_BN: jax.Array  # log-probability, of the model's distribution
    top_ids_BNA: jax.Array  # the model's likeliest tokens
    top_logprobs_BNA: jax.Array


def begin(settings: Settings, params, cache, slot, source_1S, segments_1S):
    """The cache ready for a new text in a slot; an encoder reads the text's source."""
    return bound(settings.model, params).begin(cache, slot, source_1S, segments_1S)


def read(settings: Settings, params, cache, tokens_1T, paging: Paging):
    """Reads a piece of one text into the text's pages.

    Returns:
      The cache, and the last residual stream [1, T, D].
    """
    x_1TD, cache = bound(settings.model, params).extend_pages(tokens_1T, paging, cache)
    return cache, x_1TD


def score(settings: Settings, alternatives: int, params, x_1TD, tokens_T):
    """How likely the model finds `tokens_T`, each after one of the tokens that `read` has read.

    Returns:
      As of `lm.inference.sampling.scores`.
    """
    logits_TV = bound(settings.model, params).unembed(x_1TD)[0, :, : settings.vocab_size]
    return scores(logits_TV, tokens_T, alternatives)


def decode(settings: Settings, level: Level, most: int, params, cache, rows: Rows, steps):
    """Draws up to `steps` tokens a row, `most` at most; ends early when every row has ended.

    Returns:
      The cache, and what was `Drawn`, `most` columns of it.
    """
    model = bound(settings.model, params)
    B = len(rows.token_B)
    names = jnp.zeros((B, most, level.alternatives))
    numbers_BN = jnp.zeros((B, most), jnp.float32)
    drawn = Drawn(
        jnp.full((B, most), NOTHING), numbers_BN, numbers_BN, names.astype(jnp.int32), names
    )

    def unfinished(carry):
        step, _, _, done_B, *_ = carry
        return (step < steps) & ~done_B.all()

    def one_token(carry):
        step, cache, token_B, done_B, history, drawn = carry
        positions_B = jnp.where(done_B, NOTHING, rows.position_B + step)
        paging = Paging(rows.table_BN, positions_B[:, None], rows.slot_B)
        x_B1D, cache = model.extend_pages(token_B[:, None], paging, cache)
        count_B = rows.count_B + step
        new = _draw(settings, level, model, x_B1D, rows, history, count_B)
        token_B = new.ids_BN
        new = new._replace(ids_BN=jnp.where(done_B, NOTHING, token_B))
        drawn = jax.tree.map(
            lambda all, x: jax.lax.dynamic_update_index_in_dim(all, x, step, 1), drawn, new
        )
        stops_B = (token_B[:, None] == rows.warping.stop_BS).any(-1)
        done_B = done_B | stops_B | (step + 1 >= rows.limit_B)
        history = history and history.append(token_B)
        return step + 1, cache, token_B, done_B, history, drawn

    done_B = (rows.position_B < 0) | (rows.limit_B <= 0)
    carry = jnp.int32(0), cache, jnp.asarray(rows.token_B), done_B, rows.history, drawn
    _, cache, _, _, _, drawn = jax.lax.while_loop(unfinished, one_token, carry)
    return cache, drawn


def _draw(settings: Settings, level: Level, model: Model, x_B1D, rows: Rows, history, count_B):
    """A token for each row, without the axis of tokens that `Drawn` has."""
    # Finished before anything reads them, so that they do not depend on what does.
    logits_BV = jax.lax.optimization_barrier(model.unembed(x_B1D))[:, 0, : settings.vocab_size]

    keys_B = row_keys(rows.seed_B, rows.prompt_B, rows.sample_B, count_B)
    drawn = sample(logits_BV, keys_B, rows.warping, level.kind, history, count_B)
    raw = scores(logits_BV, drawn.token_B, level.alternatives)
    return Drawn(drawn.token_B, drawn.logprob_B, raw.logprob_B, raw.top_ids_BN, raw.top_logprobs_BN)


def take(settings: Settings, cache: PagedCache, pages_N):
    """What some pages hold."""
    return cache.take(settings.config, pages_N)


def put(settings: Settings, cache: PagedCache, pages_N, held) -> PagedCache:
    """The cache with what `take` returned in some pages."""
    return cache.put(settings.config, pages_N, held)


def copy(settings: Settings, cache: PagedCache, pages_2, slots_2) -> PagedCache:
    """The cache with one page, and what is kept for one slot, copied to another of each."""
    return cache.copy(settings.config, pages_2, slots_2)


class Device:
    """Parameters, pages, and the functions above compiled as needed; on one device or a mesh.

    Args:
      settings, params: the model, and its parameters as they are trained.
      page_size: tokens.
      most: tokens a row may draw in one dispatch.

    Attributes:
      compile_seconds: what compiling has taken so far.
    """

    def __init__(self, settings: Settings, params, page_size: int, most: int):
        self._settings, self._page_size, self._most = settings, page_size, most
        self.most_pages = -(-settings.config.max_length // page_size)  # of one text
        self._compiled: dict[tuple, Callable] = {}
        self.compile_seconds = 0.0
        self.update(params)
        self._mesh = mesh_of(jax.tree.leaves(self.params)[0])
        self._whole = replicated(self._mesh) if self._mesh else None
        self._split = None

    def resize(self, pages: int, slots: int) -> None:
        """Forgets the cache; the next has so many pages, and room for so many texts."""

        def new_pages(params):
            model = bound(self._settings.model, params)
            return model.new_pages(pages, self._page_size, slots, self._settings.cache == "int8")

        self.__dict__.pop("cache", None)
        self._shapes = jax.eval_shape(new_pages, self.params)
        split = cache_shardings(self._shapes, self._mesh) if self._mesh else None
        if split != self._split:
            self._compiled.clear()
        self._split = split

    @functools.cached_property
    def cache(self) -> PagedCache:
        """Keys and values, from when they are first needed; every program returns the next."""

        def empty():
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._shapes)

        # Where the parameters are, and committed to it as what programs return may be: they would
        # be compiled once for a cache that is not, and again for the next.
        at = self._split or jax.tree.leaves(self.params)[0].sharding
        return jax.jit(empty, out_shardings=at)()

    def update(self, params) -> None:
        """Takes other parameters."""
        self.params = for_reading(self._settings.model, params, self._settings.weights)

    def begin(self, slot: int, source: Sequence[int], length: int) -> None:
        """Makes a slot ready for a new text, whose source, if it has one, is so long."""
        source_1S = np.array([source], np.int32)
        segments_1S = (np.arange(len(source)) < length).astype(np.int32)[None]
        program = self._program(begin, donated=(1,), out=self._split)
        self.cache = program(self.params, self.cache, np.int32(slot), source_1S, segments_1S)

    def read(self, tokens_1T: np.ndarray, paging: Paging) -> jax.Array:
        """What `read` returns but the cache, still on the device."""
        program = self._program(read, donated=(1,), out=(self._split, self._whole))
        self.cache, x_1TD = program(self.params, self.cache, tokens_1T, paging)
        return x_1TD

    def score(self, alternatives: int, x_1TD: jax.Array, tokens_T: np.ndarray) -> Scores:
        """What `score` returns, on the host."""
        return jax.device_get(self._program(score, alternatives)(self.params, x_1TD, tokens_T))

    def decode(self, level: Level, rows: Rows, steps: int) -> Drawn:
        """What `decode` returns but the cache, on the host."""
        out = (self._split, self._whole)
        program = self._program(decode, level, self._most, donated=(1,), out=out)
        self.cache, drawn = program(self.params, self.cache, rows, np.int32(steps))
        return jax.device_get(drawn)

    def save(self, pages: Sequence[int]) -> Any:
        """What pages hold, on the host."""
        held = self._program(take)(self.cache, self._padded(pages))
        return jax.device_get(held)

    def restore(self, pages: Sequence[int], saved: Any) -> None:
        """Puts what `save` returned into pages."""
        program = self._program(put, donated=(0,), out=self._split)
        self.cache = program(self.cache, self._padded(pages), saved)

    def copy(self, pages: tuple[int, int], slots: tuple[int, int]) -> None:
        """Copies the first page, and what is kept for the first slot, to the second of each."""
        program = self._program(copy, donated=(0,), out=self._split)
        self.cache = program(self.cache, *(np.array(pair, np.int32) for pair in (pages, slots)))

    @property
    def num_programs(self) -> int:
        """How many programs have been compiled."""
        return sum(function._cache_size() for function in self._compiled.values())

    def _padded(self, pages: Sequence[int]) -> np.ndarray:
        return np.array([*pages, *[0] * (self.most_pages - len(pages))], np.int32)

    def _program(self, function: Callable, *static, donated: tuple = (), out=None) -> Callable:
        """One of the functions above, compiled for each shape it meets."""
        key = (function, *static)
        if key not in self._compiled:
            leaves, tree = jax.tree.flatten((out or self._whole) if self._mesh else None)
            self._compiled[key] = _jitted(key, self._settings, donated, tuple(leaves), tree)

        program = self._compiled[key]

        def call(*arguments):
            known, began = program._cache_size(), time.perf_counter()
            with jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext():
                out = program(*arguments)
            if program._cache_size() > known:
                self.compile_seconds += time.perf_counter() - began
            return out

        return call


@functools.lru_cache(maxsize=256)
def _jitted(key: tuple, settings: Settings, donated: tuple, leaves: tuple, tree) -> Callable:
    """A function and its static arguments, compiled once for all models of one config."""
    function, *static = key
    return jax.jit(
        functools.partial(function, settings, *static),
        donate_argnums=donated,
        out_shardings=jax.tree.unflatten(tree, leaves),
    )
