"""Speculative decoding: cheap guesses of several tokens, of which the model keeps those it may.

A draft guesses d tokens; the model reads all of them at once. Each is kept with probability
min(1, p/q), where p and q are what the model and the draft gave it; in place of the first that is
not, a token is drawn from the residual, max(p − q, 0) in proportion; after the last comes one more.
What is written then has exactly the model's distribution (Leviathan et al. 2023, Chen et al. 2023).
Both distributions are what `SamplingConfig` makes of the logits, greedy included, and the draft's
token is drawn from the very numbers in the ratio.

The draft is a smaller model, or the text itself: what followed its last few tokens when they stood
in it before (prompt look-up; Saxena 2023). Such guesses are certain, so q is 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.inference.prepare import bound
from lm.inference.prompts import NOTHING, Prompt
from lm.inference.sampling import log_distribution, row_keys
from lm.inference.warpers import History, Kind, Warping
from lm.models import Model, ModelConfig, skeleton
from lm.models.cache import Cache

NGRAM = 3  # the most tokens that are looked for in the text before


class Speculation(NamedTuple):
    """What both functions are compiled for."""

    config: ModelConfig  # of `lm.inference.prepare.for_decoding`
    draft: ModelConfig | None  # None: the text itself is looked up
    kind: Kind  # of the warpers
    stop: tuple[int, ...]  # the ids that end a row
    vocab_size: int  # ids from here up are never drawn
    guesses: int  # at a time


class Params(NamedTuple):
    """Of both models, as `lm.inference.prepare.for_reading` makes them."""

    model: Mapping[str, jax.Array]
    draft: Mapping[str, jax.Array] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where B = P · samples rows stand, between two passes of the model."""

    cache: Cache
    draft_cache: Cache | None
    text_BH: jax.Array | None  # for looking up: what was read and drawn, `NOTHING` where nothing is
    token_B: jax.Array  # drawn last, not in the caches yet
    position_B: jax.Array  # its position
    done_B: jax.Array
    limit_B: jax.Array  # how many tokens the row may have drawn
    key_B: jax.Array
    count_B: jax.Array  # tokens drawn
    passes_B: jax.Array  # of the model, after the prompt's
    guessed_B: jax.Array
    kept_B: jax.Array  # of the guesses
    warping: Warping
    history: History | None  # where the warpers need it


def begin(
    speculation: Speculation,
    slots: int,
    params: Params,
    prompt: Prompt,
    read_PR: np.ndarray,
    seed: np.uint32,
    limit_B: np.ndarray,
    warping: Warping,
):
    """Reads the prompts into caches of `slots` and draws every row's first token.

    Args:
      read_PR: the texts to look guesses up in, as far as they are there; `NOTHING` is padding.
      limit_B: tokens at which each row ends.
      warping: of one row, which is all rows'.

    Returns:
      The `State`, the tokens [B, 1], and whether every row has ended.
    """
    P, samples = len(prompt.tokens_PT), len(limit_B) // len(prompt.tokens_PT)

    def read(config, params):
        model = bound(skeleton(config), params)
        cache = model.new_cache(P, slots, prompt.source_PS, prompt.segments_PS)
        x_PTD, cache = model.extend(prompt.tokens_PT, prompt.positions_PT, cache)
        return model, x_PTD[:, -1:], cache.repeat(samples)

    model, x_P1D, cache = read(speculation.config, params.model)

    def room_after(tokens_PT):
        tokens_BT = jnp.repeat(tokens_PT, samples, 0)
        return jnp.pad(tokens_BT, ((0, 0), (0, slots)), constant_values=NOTHING)

    draft_cache = text_BH = history = None
    if speculation.draft is not None:
        _, _, draft_cache = read(speculation.draft, params.draft)
    else:
        text_BH = room_after(read_PR)
    if speculation.kind.history:
        end_B = jnp.full(P * samples, prompt.tokens_PT.shape[1])
        history = History(room_after(prompt.read_PT), end_B, end_B)
    warping = jax.tree.map(lambda x: jnp.repeat(x, P * samples, 0), warping)
    x_B1D, zeros_B = jnp.repeat(x_P1D, samples, 0), jnp.zeros(P * samples, jnp.int32)
    logs_BV = _logs(speculation, model, x_B1D, warping, history, zeros_B)[:, 0]
    number_B = jnp.arange(P * samples)
    seed_B = jnp.full(P * samples, seed)
    key_B = row_keys(seed_B, number_B // samples, number_B % samples)
    token_B = _draw(logs_BV, jax.vmap(jax.random.fold_in)(key_B, zeros_B))
    state = State(
        cache=cache,
        draft_cache=draft_cache,
        text_BH=text_BH,
        token_B=token_B,
        position_B=jnp.repeat(prompt.positions_PT[:, -1] + 1, samples),
        done_B=_stops(speculation, token_B) | (limit_B <= 1),
        limit_B=limit_B,
        key_B=key_B,
        count_B=zeros_B + 1,
        passes_B=zeros_B,
        guessed_B=zeros_B,
        kept_B=zeros_B,
        warping=warping,
        history=history and history.append(token_B),
    )
    if text_BH is not None:
        text_BH = text_BH.at[:, read_PR.shape[1]].set(token_B)
        state = dataclasses.replace(state, text_BH=text_BH)
    return state, token_B[:, None], state.done_B.all()


def advance(speculation: Speculation, passes: int, params: Params, state: State):
    """Up to `passes` further passes of the model; ends early when every row has ended.

    Returns:
      The `State`, the tokens [B, passes · (guesses + 1)] with `NOTHING` where a row drew fewer, and
      whether every row has ended.
    """
    model, draft = bound(skeleton(speculation.config), params.model), None
    if speculation.draft is not None:
        draft = bound(skeleton(speculation.draft), params.draft)
    width = speculation.guesses + 1
    drawn_BN = jnp.full((len(state.token_B), passes * width), NOTHING, jnp.int32)

    def unfinished(carry):
        state, _, step = carry
        return (step < passes) & ~state.done_B.all()

    def one_pass(carry):
        state, drawn_BN, step = carry
        state, tokens_BT = _pass(speculation, model, draft, state)
        return state, jax.lax.dynamic_update_slice(drawn_BN, tokens_BT, (0, step * width)), step + 1

    state, drawn_BN, _ = jax.lax.while_loop(unfinished, one_pass, (state, drawn_BN, jnp.int32(0)))
    return state, drawn_BN, state.done_B.all()


def keep_share(p_BV: jax.Array, q_BV: jax.Array) -> jax.Array:
    """With which probability [B, V] a guess is kept: min(1, p/q)."""
    return jnp.where(q_BV > 0, jnp.minimum(1, p_BV / jnp.where(q_BV > 0, q_BV, 1)), 1)


def residual(p_BV: jax.Array, q_BV: jax.Array) -> jax.Array:
    """The distribution [B, V] of what takes a guess's place: max(p − q, 0), in proportion."""
    more_BV = jnp.maximum(p_BV - q_BV, 0)
    total_B1 = more_BV.sum(-1, keepdims=True)
    # Equal distributions leave nothing: what rounding alone refused is drawn again.
    return jnp.where(total_B1 > 0, more_BV / jnp.where(total_B1 > 0, total_B1, 1), p_BV)


def verified(p_BTV, q_BTV, guesses_BT, guessed_BT, keys_B) -> tuple[jax.Array, jax.Array]:
    """What rows gain of their guesses: tokens [B, T + 1], and how many guesses were kept [B].

    Args:
      p_BTV: the model's distributions [B, T + 1, V], of each guess and of the token after them.
      q_BTV: the draft's, [B, T, V].
      guesses_BT, guessed_BT: the tokens, drawn from `q_BTV`, and whether there is one.
      keys_B: random keys.
    """
    B, T = guesses_BT.shape
    keep_B, draw_B = jax.vmap(jax.random.split, out_axes=1)(keys_B)
    chance_BT = jax.vmap(lambda key: jax.random.uniform(key, (T,)))(keep_B)
    share_BTV = keep_share(p_BTV[:, :-1], q_BTV)
    share_BT = jnp.take_along_axis(share_BTV, guesses_BT[..., None], 2)[..., 0]
    kept_BT = guessed_BT & (chance_BT < share_BT)
    kept_B = jnp.cumprod(kept_BT.astype(jnp.int32), 1).sum(1)
    # Where there is no guess, q is 0 and the residual is p itself.
    q_BTV = jnp.pad(jnp.where(guessed_BT[..., None], q_BTV, 0), ((0, 0), (0, 1), (0, 0)))
    at_B11 = kept_B[:, None, None]
    p_BV, q_BV = (jnp.take_along_axis(x, at_B11, 1)[:, 0] for x in (p_BTV, q_BTV))
    last_B = _draw(jnp.log(residual(p_BV, q_BV)), draw_B)
    tokens_BT = jnp.pad(guesses_BT, ((0, 0), (0, 1))).at[jnp.arange(B), kept_B].set(last_B)
    return tokens_BT, kept_B


def look_up(text_BH: jax.Array, length_B: jax.Array, guesses: int) -> jax.Array:
    """The tokens [B, guesses] that followed a text's last few; `NOTHING` where there are none.

    The longest of the last `NGRAM`, …, 1 tokens that stand in it before count, where they stand
    last.

    Args:
      text_BH, length_B: the texts and where they end; `NOTHING` is padding.
      guesses: how many to find.
    """
    B, H = text_BH.shape
    places_H = jnp.arange(H)
    rows_B1 = jnp.arange(B)[:, None]
    start_B = jnp.full(B, H)
    same_BH = jnp.ones((B, H), bool)
    for n in range(1, NGRAM + 1):
        # Whether the n tokens up to each place are the last n.
        ago_BH = jnp.pad(text_BH, ((0, 0), (n - 1, 0)), constant_values=NOTHING)[:, :H]
        last_B1 = text_BH[rows_B1, length_B[:, None] - n]
        same_BH &= (ago_BH == last_B1) & (last_B1 != NOTHING)
        found_BH = same_BH & (places_H < length_B[:, None] - 1)
        after_B = jnp.where(found_BH, places_H, -1).max(1) + 1
        start_B = jnp.where(found_BH.any(1), after_B, start_B)
    at_BT = start_B[:, None] + jnp.arange(guesses)
    found_BT = text_BH[rows_B1, jnp.minimum(at_BT, H - 1)]
    return jnp.where(at_BT < length_B[:, None], found_BT, NOTHING)


def _pass(speculation: Speculation, model: Model, draft: Model | None, state: State):
    """The state after a pass of the model, and the tokens [B, guesses + 1] it drew."""
    B, width = len(state.token_B), speculation.guesses + 1
    steps_T = jnp.arange(width)
    # Of the tokens that are read, the drawn one and the guesses, the last that a row has use for:
    # after it comes one that is not read.
    useful_BT = (steps_T < (state.limit_B - state.count_B)[:, None]) & ~state.done_B[:, None]
    position_BT = jnp.where(useful_BT, state.position_B[:, None] + steps_T, NOTHING)
    keys_B = jax.vmap(jax.random.fold_in)(state.key_B, state.count_B)
    draft_cache = state.draft_cache
    if draft is not None:
        guesses_BT, q_BTV, draft_cache = _guess(speculation, draft, state, position_BT, keys_B)
        guessed_BT = useful_BT[:, 1:]
    else:
        length_B = state.text_BH.shape[1] - _slots(state) + state.count_B
        found_BT = look_up(state.text_BH, length_B, speculation.guesses)
        guesses_BT = jnp.maximum(found_BT, 0)
        guessed_BT = useful_BT[:, 1:] & (found_BT != NOTHING)
        q_BTV = jax.nn.one_hot(guesses_BT, speculation.vocab_size)
    read_BT = jnp.concatenate([state.token_B[:, None], guesses_BT], 1)
    x_BTD, cache = model.extend(read_BT, position_BT, state.cache)
    history = state.history
    if history is not None:  # as it is after each guess
        at_BT = history.end_B[:, None] + steps_T[:-1]
        tokens_BL = history.tokens_BL.at[jnp.arange(B)[:, None], at_BT].set(guesses_BT, mode="drop")
        history = history._replace(tokens_BL=tokens_BL)
    logs_BTV = _logs(speculation, model, x_BTD, state.warping, history, state.count_B)
    verify_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, width)
    tokens_BT, kept_B = verified(jnp.exp(logs_BTV), q_BTV, guesses_BT, guessed_BT, verify_B)

    drawn_BT = (steps_T <= kept_B[:, None]) & ~state.done_B[:, None]
    stops_BT = _stops(speculation, tokens_BT) & drawn_BT
    drawn_BT &= jnp.cumsum(stops_BT, 1) - stops_BT == 0  # nothing after an end
    count_B = state.count_B + drawn_BT.sum(1)
    unread_B = speculation.guesses - kept_B
    text_BH = state.text_BH
    if history is not None:
        rows_B, end_B = jnp.arange(B), history.end_B + drawn_BT.sum(1)
        last_B = jnp.take_along_axis(tokens_BT, kept_B[:, None], 1)[:, 0]
        at_B = history.end_B + kept_B
        tokens_BL = history.tokens_BL.at[rows_B, at_B].set(last_B, mode="drop")
        history = history._replace(tokens_BL=tokens_BL, end_B=end_B)
    if text_BH is not None:
        at_BT = jnp.where(drawn_BT, length_B[:, None] + steps_T, text_BH.shape[1])
        text_BH = text_BH.at[jnp.arange(B)[:, None], at_BT].set(tokens_BT, mode="drop")
    state = dataclasses.replace(
        state,
        cache=cache.rewind(unread_B),
        draft_cache=None if draft is None else draft_cache.rewind(unread_B),
        text_BH=text_BH,
        token_B=jnp.take_along_axis(tokens_BT, kept_B[:, None], 1)[:, 0],
        position_B=state.position_B + kept_B + 1,
        done_B=state.done_B | stops_BT.any(1) | (count_B >= state.limit_B),
        count_B=count_B,
        passes_B=state.passes_B + ~state.done_B,
        guessed_B=state.guessed_B + guessed_BT.sum(1),
        kept_B=state.kept_B + jnp.where(state.done_B, 0, kept_B),
        history=history,
    )
    return state, jnp.where(drawn_BT, tokens_BT, NOTHING)


def _guess(speculation: Speculation, draft: Model, state: State, position_BT, keys_B):
    """What the draft draws [B, guesses], from which distributions, and its cache.

    It reads its last guess as well, so that both models have read the same.
    """

    def one_token(carry, step):
        token_B, cache, history = carry
        position_B = position_BT[:, step]
        x_B1D, cache = draft.extend(token_B[:, None], position_B[:, None], cache)
        count_B = state.count_B + step
        logs_BV = _logs(speculation, draft, x_B1D, state.warping, history, count_B)[:, 0]
        token_B = _draw(logs_BV, jax.vmap(jax.random.fold_in, (0, None))(keys_B, step))
        return (token_B, cache, history and history.append(token_B)), (token_B, jnp.exp(logs_BV))

    carry = (state.token_B, state.draft_cache, state.history)
    steps = jnp.arange(speculation.guesses + 1)
    (_, cache, _), (tokens_TB, share_TBV) = jax.lax.scan(one_token, carry, steps)
    return tokens_TB[:-1].T, share_TBV[:-1].swapaxes(0, 1), cache


def _logs(
    speculation: Speculation,
    model: Model,
    x_BTD: jax.Array,
    warping: Warping,
    history: History | None,
    count_B: jax.Array,
) -> jax.Array:
    """Logarithms [B, T, V] of the distributions that tokens are drawn from.

    `history` and `count_B` are as they are before the first of T tokens, but that the history has
    the others from its end on.
    """
    B, T, _ = x_BTD.shape
    logits_BTV = model.unembed(x_BTD)[..., : speculation.vocab_size]
    warping, history, count_N = jax.tree.map(
        lambda x: jnp.repeat(x, T, 0), (warping, history, count_B)
    )
    step_N = jnp.tile(jnp.arange(T), B)
    history = history and history._replace(end_B=history.end_B + step_N)
    flat_NV = logits_BTV.reshape(B * T, -1)
    logs_NV = log_distribution(flat_NV, warping, speculation.kind, history, count_N + step_N)
    return logs_NV.reshape(logits_BTV.shape)


def _draw(logs_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.categorical)(keys_B, logs_BV).astype(jnp.int32)


def _stops(speculation: Speculation, tokens: jax.Array) -> jax.Array:
    return (tokens[..., None] == jnp.array(speculation.stop, jnp.int32)).any(-1)


def _slots(state: State) -> int:
    """How many slots the cache has; a text that is looked up has as many after what was read."""
    return state.cache.positions_BS.shape[1]
