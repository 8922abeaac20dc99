"""Prefill and decode: the two compiled functions that draw tokens after prompts of token ids.

`prefill` reads every prompt at once and draws each row's first token; `decode` is one
`lax.while_loop` that draws up to `chunk` further tokens a dispatch and ends early when every row
has ended. Rows of different lengths stand together: padding comes first, at position -1, where
nothing attends to it. A row's tokens depend on its prompt, its key and its limit, not on its
companions or on the chunks.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.inference.prepare import bound
from lm.inference.prompts import NOTHING, Prompt
from lm.inference.sampling import row_keys, sample
from lm.inference.warpers import History, Kind, Warping
from lm.models import Model
from lm.models.cache import Cache
from lm.models.recurrent import RecurrentCache


class Settings(NamedTuple):
    """What both functions are compiled for."""

    model: Model  # of `lm.inference.prepare.for_decoding`
    kind: Kind  # of the rows' warpers
    vocab_size: int  # ids from here up are never drawn


class Rows(NamedTuple):
    """The B = P · samples continuations of a `Prompt`."""

    seed: np.uint32
    prompt_B: np.ndarray  # with the seed, what a row's random draws follow from: whose sample
    number_B: np.ndarray  # it is, and which one
    drawn_B: np.ndarray  # tokens it has drawn before
    limit_B: np.ndarray  # tokens it may have drawn when it stops; `drawn_B` where it has ended
    warping: Warping


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
    warping: Warping
    history: History | None  # where the warpers need it


def prefill(settings: Settings, length: int, params, prompt: Prompt, rows: Rows):
    """Reads the prompts, into a cache of `length` slots, and draws the next token of every row.

    `params` are those of `lm.inference.prepare.for_reading`.

    Returns:
      The `State`, the tokens [B, 1], and whether every row has ended.
    """
    model = bound(settings.model, params)
    P = prompt.tokens_PT.shape[0]
    samples = len(rows.drawn_B) // P
    cache = model.new_cache(P, length, prompt.source_PS, prompt.segments_PS)
    x_PTD, cache = model.extend(prompt.tokens_PT, prompt.positions_PT, cache)
    seed_B = jnp.full(len(rows.drawn_B), rows.seed)
    key_B = row_keys(seed_B, rows.prompt_B, rows.number_B)

    def repeated(x):
        return jnp.repeat(x, samples, 0)

    done_B = rows.drawn_B >= rows.limit_B
    history = None
    if settings.kind.history:
        read = prompt.tokens_PT.shape[1]
        tokens_BL = jnp.pad(repeated(prompt.read_PT), ((0, 0), (0, length + 1 - read)))
        end_B = jnp.full_like(rows.drawn_B, read)
        history = History(tokens_BL, jnp.maximum(end_B - rows.drawn_B, 0), end_B)
    state = State(
        cache=cache.repeat(samples),
        token_B=jnp.zeros_like(rows.drawn_B),
        position_B=repeated(prompt.positions_PT[:, -1]),
        done_B=done_B,
        limit_B=rows.limit_B,
        key_B=key_B,
        count_B=rows.drawn_B,
        warping=rows.warping,
        history=history,
    )
    state = _draw(settings, model, state, repeated(x_PTD[:, -1:]), state.cache)
    return state, jnp.where(done_B, NOTHING, state.token_B)[:, None], state.done_B.all()


def decode(settings: Settings, chunk: int, params, state: State):
    """Draws up to `chunk` further tokens a row; ends early when every row has ended.

    Returns:
      The `State`, the tokens [B, chunk] (`NOTHING` after a row's end), whether every row has ended.
    """
    model = bound(settings.model, params)
    drawn_BN = jnp.full((len(state.token_B), chunk), NOTHING, jnp.int32)

    def unfinished(carry):
        state, _, step = carry
        return (step < chunk) & ~state.done_B.all()

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
    history, warping = state.history, state.warping
    drawn = sample(logits_BV, keys_B, warping, settings.kind, history, state.count_B)
    token_B = drawn.token_B
    stops_B = (token_B[:, None] == warping.stop_BS).any(-1)
    count_B = state.count_B + 1
    return dataclasses.replace(
        state,
        cache=cache,
        token_B=token_B,
        position_B=state.position_B + 1,
        done_B=state.done_B | stops_B | (count_B >= state.limit_B),
        count_B=count_B,
        history=history and history.append(token_B),
    )
