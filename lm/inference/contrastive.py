"""Contrastive search (Su et al. 2022): likely tokens that do not repeat what the model has said.

Of the k likeliest tokens v the next one maximizes

    (1 − α) · p(v) − α · max_j cos(h_v, h_j)                                          (eq. 5)

where h are last hidden states: h_v as it would be after v, and h_j those of all tokens before it,
the prompt's included. All k candidates are read at once, as rows of a batch, each from the cache so
far; the chosen one's row then takes the place of the others.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.inference import warpers
from lm.inference.prepare import bound
from lm.inference.prompts import NOTHING, Prompt
from lm.inference.warpers import History, Kind, Warping
from lm.models import ModelConfig, skeleton
from lm.models.cache import Cache
from lm.models.recurrent import RecurrentCache


class Contrast(NamedTuple):
    """What the search is compiled for."""

    config: ModelConfig  # of `lm.inference.prepare.for_decoding`
    stop: tuple[int, ...]  # the ids that end a text
    vocab_size: int  # ids from here up are never chosen
    k: int  # candidates a step
    kind: Kind  # of the warpers


class Search(NamedTuple):
    """What the search is asked for, beside its prompts."""

    alpha: np.float32
    limit_P: np.ndarray  # tokens at which a prompt's text ends
    warping: Warping  # of one row, which is all rows'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where each prompt's text stands, between two tokens."""

    cache: Cache | RecurrentCache  # k equal rows a prompt
    logits_PV: jax.Array  # of the next token
    hidden_PSD: jax.Array  # of all tokens, float32, each of length 1; 0 where there is none
    position_P: jax.Array  # of the next token
    slot: jax.Array  # its place in `hidden_PSD`
    count_P: jax.Array  # tokens chosen
    done_P: jax.Array
    history: History | None  # where the warpers need it


def begin(contrast: Contrast, slots: int, params, prompt: Prompt, search: Search) -> State:
    """Reads the prompts into a cache of `slots`."""
    model = bound(skeleton(contrast.config), params)
    P, T = prompt.tokens_PT.shape
    cache = model.new_cache(P, slots, prompt.source_PS, prompt.segments_PS)
    x_PTD, cache = model.extend(prompt.tokens_PT, prompt.positions_PT, cache)
    hidden_PTD = jnp.where(prompt.positions_PT[..., None] >= 0, _unit(x_PTD), 0)
    history, read_P = None, jnp.full(P, T)
    if contrast.kind.history:
        tokens_PL = jnp.pad(prompt.read_PT, ((0, 0), (0, slots - T)))
        history = History(tokens_PL, read_P, read_P)
    return State(
        cache=cache.repeat(contrast.k),
        logits_PV=model.unembed(x_PTD[:, -1:])[:, 0],
        hidden_PSD=jnp.pad(hidden_PTD, ((0, 0), (0, slots - T), (0, 0))),
        position_P=jnp.asarray(prompt.positions_PT[:, -1]) + 1,
        slot=jnp.int32(T),
        count_P=jnp.zeros(P, jnp.int32),
        done_P=jnp.asarray(search.limit_P) <= 0,
        history=history,
    )


def advance(contrast: Contrast, steps: int, params, search: Search, state: State):
    """Up to `steps` further tokens of every text.

    Returns:
      The `State`, the tokens [P, steps] (`NOTHING` after a text's end), and whether all have ended.
    """
    model = bound(skeleton(contrast.config), params)
    P, k = len(state.done_P), contrast.k
    warping = jax.tree.map(lambda x: jnp.repeat(x, P, 0), search.warping)

    def further(carry):
        state, _, step = carry
        return (step < steps) & ~state.done_P.all()

    def one_token(carry):
        state, tokens_PN, step = carry
        logits_PV = state.logits_PV[:, : contrast.vocab_size]
        warped = (warping, contrast.kind, state.history, state.count_P)
        shares_PV = jax.nn.softmax(warpers.processed(logits_PV, *warped))
        share_Pk, id_Pk = jax.lax.top_k(shares_PV, k)
        position_B1 = jnp.repeat(jnp.where(state.done_P, -1, state.position_P), k)[:, None]
        x_B1D, cache = model.extend(id_Pk.reshape(-1, 1), position_B1, state.cache)
        x_PkD = x_B1D.reshape(P, k, -1)
        unit_PkD = _unit(x_PkD)
        score_Pk = chosen_by(search.alpha, share_Pk, unit_PkD, state.hidden_PSD)
        best_P = jnp.argmax(score_Pk, 1)

        def of_best(x_Pk):
            index = best_P.reshape((P,) + (1,) * (x_Pk.ndim - 1))
            return jnp.take_along_axis(x_Pk, index, 1)

        token_P = of_best(id_Pk)[:, 0]
        unit_P1D = jnp.where(state.done_P[:, None, None], 0, of_best(unit_PkD))
        row_P = best_P + k * jnp.arange(P)
        stops_P = (token_P[:, None] == jnp.array(contrast.stop, jnp.int32)).any(-1)
        count_P = state.count_P + ~state.done_P
        column_P = jnp.where(state.done_P, NOTHING, token_P)
        state = State(
            cache=cache.rows(jnp.repeat(row_P, k), source=False),
            logits_PV=model.unembed(of_best(x_PkD))[:, 0],
            hidden_PSD=jax.lax.dynamic_update_slice_in_dim(
                state.hidden_PSD, unit_P1D, state.slot, 1
            ),
            position_P=state.position_P + 1,
            slot=state.slot + 1,
            count_P=count_P,
            done_P=state.done_P | stops_P | (count_P >= search.limit_P),
            history=state.history and state.history.append(token_P),
        )
        return state, jax.lax.dynamic_update_index_in_dim(tokens_PN, column_P, step, 1), step + 1

    tokens_PN = jnp.full((P, steps), NOTHING, jnp.int32)
    carry = (state, tokens_PN, jnp.int32(0))
    state, tokens_PN, _ = jax.lax.while_loop(further, one_token, carry)
    return state, tokens_PN, state.done_P.all()


def chosen_by(alpha, share_Pk: jax.Array, unit_PkD: jax.Array, before_PSD: jax.Array) -> jax.Array:
    """What the next token maximizes [P, k]: equation 5 of the paper.

    Args:
      alpha: how much repeating is held against a token, from 0 (not at all) to 1.
      share_Pk: the candidates' probabilities.
      unit_PkD: their last hidden states, each of length 1.
      before_PSD: those of the tokens before; 0 where there is none.
    """
    cosine_PkS = jnp.einsum("pkd,psd->pks", unit_PkD, before_PSD)
    there_P1S = (before_PSD != 0).any(-1)[:, None]
    degeneration_Pk = jnp.where(there_P1S, cosine_PkS, -1.0).max(-1)
    return (1 - alpha) * share_Pk - alpha * degeneration_Pk


def _unit(x_D: jax.Array) -> jax.Array:
    x_D = x_D.astype(jnp.float32)
    return x_D / jnp.maximum(jnp.linalg.norm(x_D, axis=-1, keepdims=True), 1e-30)
