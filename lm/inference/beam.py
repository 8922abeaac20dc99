"""Beam search: the texts of highest probability that keeping a few candidates a step can find.

Every prompt's beams are rows of one batch. Beams in groups are searches of their own that avoid
each other's tokens (Vijayakumar et al. 2018); one group is plain beam search. Of each step's
(1 + stop ids) · width best continuations, those that end go to the finished texts if they are among
the best `width`, and the best others go on: as in `transformers`, whose scores these are.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.inference import warpers
from lm.inference.prepare import bound
from lm.inference.prompts import NOTHING, Prompt
from lm.inference.sampling import filtered
from lm.inference.warpers import History, Kind, Warping
from lm.models import ModelConfig, skeleton
from lm.models.cache import Cache
from lm.models.recurrent import RecurrentCache

NEVER = -1e9  # the log-probability of what is not to be chosen; finite, so that sums stay ordered


class Beams(NamedTuple):
    """What the search is compiled for."""

    config: ModelConfig  # of `lm.inference.prepare.for_decoding`
    stop: tuple[int, ...]  # the ids that end a text
    vocab_size: int  # ids from here up are never chosen
    width: int  # beams of a group
    groups: int
    early_stopping: bool | Literal["never"]
    kind: Kind  # of the warpers
    draws: bool  # beams by chance; else the likeliest are kept


class Search(NamedTuple):
    """What the search is asked for, beside its prompts."""

    seed: np.uint32
    limit_P: np.ndarray  # tokens at which a prompt's texts end
    length_penalty: np.float32
    diversity_penalty: np.float32
    warping: Warping  # of one row, which is all rows'
    begun: np.float32  # tokens before the first that is drawn, which count in a text's length


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where the searches stand: of each prompt G groups of W beams, whose rows are in this order.

    The finished texts of a group are its W best so far, best first; -inf is the score of none.
    """

    cache: Cache | RecurrentCache
    position_P: jax.Array  # of the tokens drawn last, which are not in the cache yet
    step: jax.Array  # tokens drawn
    ids_PGWN: jax.Array
    sum_PGW: jax.Array  # of log-probabilities, with what diversity took from them; best first
    finished_PGWN: jax.Array
    score_PGW: jax.Array  # of finished texts: their sum over length ** length_penalty
    done_PG: jax.Array
    key_P: jax.Array
    read_BR: jax.Array  # what each beam's text begins with; -1: padding


def begin(beams: Beams, slots: int, steps: int, params, prompt: Prompt, search: Search) -> State:
    """Reads the prompts into a cache of `slots`, for texts of up to `steps` tokens; takes one."""
    model = bound(skeleton(beams.config), params)
    P, G, W = len(prompt.tokens_PT), beams.groups, beams.width
    cache = model.new_cache(P, slots, prompt.source_PS, prompt.segments_PS)
    x_PTD, cache = model.extend(prompt.tokens_PT, prompt.positions_PT, cache)
    logits_PV = model.unembed(x_PTD[:, -1:])[:, 0]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(search.seed), jnp.arange(P))
    state = State(
        cache=cache.repeat(G * W),
        position_P=jnp.asarray(prompt.positions_PT[:, -1]),
        step=jnp.int32(0),
        ids_PGWN=jnp.full((P, G, W, steps), NOTHING, jnp.int32),
        # All beams are the same so far: one of them may go on.
        sum_PGW=jnp.full((P, G, W), NEVER).at[..., 0].set(0.0),
        finished_PGWN=jnp.full((P, G, W, steps), NOTHING, jnp.int32),
        score_PGW=jnp.full((P, G, W), -jnp.inf),
        done_PG=jnp.zeros((P, G), bool),
        key_P=keys,
        read_BR=jnp.repeat(prompt.read_PT, G * W, 0),
    )
    return _step(beams, search, jnp.repeat(logits_PV, G * W, 0), state)


def advance(beams: Beams, steps: int, params, search: Search, state: State):
    """Up to `steps` further tokens.

    Returns:
      The `State`, and whether all searches are done.
    """
    model = bound(skeleton(beams.config), params)
    B = beams.groups * beams.width * len(state.position_P)

    def further(carry):
        state, step = carry
        return (step < steps) & ~state.done_PG.all()

    def one_token(carry):
        state, step = carry
        token_B = jnp.take(state.ids_PGWN, state.step - 1, -1).reshape(B)
        # What is done is seen by none, wherever it would stand.
        position_P = jnp.where(state.done_PG.all(1), -1, state.position_P)
        position_B = jnp.repeat(position_P, B // len(position_P))
        x_B1D, cache = model.extend(token_B[:, None], position_B[:, None], state.cache)
        state = dataclasses.replace(state, cache=cache)
        return _step(beams, search, model.unembed(x_B1D)[:, 0], state), step + 1

    state, _ = jax.lax.while_loop(further, one_token, (state, jnp.int32(0)))
    return state, state.done_PG.all()


def best(state: State, number: int) -> tuple[list[list[int]], list[float]]:
    """The `number` finished texts of highest score of each prompt, and the scores; best first."""
    score_PN, finished_PGWN = np.asarray(state.score_PGW), np.asarray(state.finished_PGWN)
    score_PN = score_PN.reshape(len(score_PN), -1)
    finished_PNN = finished_PGWN.reshape(*score_PN.shape, -1)
    texts, scores = [], []
    for row, order in enumerate(np.argsort(-score_PN, kind="stable")[:, :number]):
        texts += [[id for id in finished_PNN[row, n].tolist() if id != NOTHING] for n in order]
        scores += score_PN[row, order].tolist()
    return texts, scores


def _step(beams: Beams, search: Search, logits_BV: jax.Array, state: State) -> State:
    """One more token for every beam, of the logits that follow it."""
    P, G, W, _ = state.ids_PGWN.shape
    logs_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32))[:, : beams.vocab_size]
    logs_BV = _warped(beams, search.warping, logs_BV, state)
    logs_PGWV = jnp.maximum(logs_BV, NEVER).reshape(P, G, W, -1)
    length = (state.step + 1).astype(jnp.float32) + search.begun
    chosen_PV = jnp.zeros(logs_PGWV.shape[::3])  # how often groups before have taken each token
    fields: dict[str, list] = {}
    for group in range(G):
        own = jax.tree.map(
            lambda x, group=group: x[:, group],
            (state.ids_PGWN, state.sum_PGW, state.finished_PGWN, state.score_PGW, state.done_PG),
        )
        logs_PWV = logs_PGWV[:, group] - search.diversity_penalty * chosen_PV[:, None]
        keys_P = jax.vmap(jax.random.fold_in, (0, None))(state.key_P, state.step * G + group)
        parent_PW, *after = _search(beams, search, state.step, length, logs_PWV, keys_P, *own)
        tokens_PW = jnp.take(after[0], state.step, -1)
        chosen_PV = chosen_PV.at[jnp.arange(P)[:, None], tokens_PW].add(1.0)
        names = ("row", "ids_PGWN", "sum_PGW", "finished_PGWN", "score_PGW", "done_PG")
        for name, value in zip(names, (parent_PW + group * W, *after)):
            fields.setdefault(name, []).append(value)
    together = {name: jnp.stack(values, 1) for name, values in fields.items()}
    row_PN = together.pop("row").reshape(P, G * W) + G * W * jnp.arange(P)[:, None]
    return dataclasses.replace(
        state,
        cache=state.cache.rows(row_PN.ravel(), source=False),
        position_P=state.position_P + 1,
        step=state.step + 1,
        **together,
    )


def _search(
    beams, search, step, length, logs_PWV, keys_P, ids_PWN, sum_PW, finished_PWN, score_PW, done_P
):
    """A step of every prompt's beams of one group: which beam each continues, and what follows."""
    P, W, V = logs_PWV.shape
    keep = max(2, 1 + len(beams.stop)) * W  # so that W of them go on, whatever ends
    total_PM = (sum_PW[..., None] + logs_PWV).reshape(P, W * V)
    if not beams.draws:
        sum_PX, index_PX = jax.lax.top_k(total_PM, min(keep, W * V))
    else:
        # Without replacement, by the Gumbel-top-k trick (Kool et al. 2019).
        noise_PM = jax.vmap(lambda key: jax.random.gumbel(key, (W * V,)))(keys_P)
        _, drawn_PX = jax.lax.top_k(total_PM + noise_PM, min(keep, W * V))
        sum_PX, order_PX = jax.lax.top_k(_taken(total_PM, drawn_PX), drawn_PX.shape[1])
        index_PX = _taken(drawn_PX, order_PX)
    token_PX, parent_PX = index_PX % V, index_PX // V
    ids_PXN = _taken(ids_PWN, parent_PX)
    ids_PXN = jax.lax.dynamic_update_index_in_dim(ids_PXN, token_PX, step, 2)
    stops_PX = (token_PX[..., None] == jnp.array(beams.stop, jnp.int32)).any(-1)
    ends_PX = stops_PX | (step + 1 >= search.limit_P)[:, None]
    sum_PW, on_PW = jax.lax.top_k(jnp.where(stops_PX, sum_PX + NEVER, sum_PX), W)

    # Only what is among the best W counts as finished; the others are there to go on.
    counts_PX = ends_PX & (jnp.arange(ends_PX.shape[1]) < W) & ~done_P[:, None]
    ended_PX = jnp.where(counts_PX, sum_PX / length**search.length_penalty, -jnp.inf)
    score_PW, kept_PW = jax.lax.top_k(jnp.concatenate([score_PW, ended_PX], 1), W)
    finished_PWN = _taken(jnp.concatenate([finished_PWN, ids_PXN], 1), kept_PW)

    full_P = (score_PW > -jnp.inf).all(1)
    longest_P = jnp.full(P, length)
    if beams.early_stopping == "never":
        longest_P = jnp.where(search.length_penalty > 0, search.limit_P + search.begun, longest_P)
    hopeless_P = sum_PW[:, 0] / longest_P**search.length_penalty <= score_PW[:, -1]
    if beams.early_stopping is True:
        hopeless_P |= True
    done_P |= (full_P & hopeless_P) | ends_PX.all(1)
    return _taken(parent_PX, on_PW), _taken(ids_PXN, on_PW), sum_PW, finished_PWN, score_PW, done_P


def _taken(x_PN: jax.Array, index_PM: jax.Array) -> jax.Array:
    """[P, M, …]: of each prompt the entries at its own indices."""
    index = index_PM.reshape(index_PM.shape + (1,) * (x_PN.ndim - 2))
    return jnp.take_along_axis(x_PN, index, 1)


def _warped(beams: Beams, warping: Warping, logs_BV: jax.Array, state: State) -> jax.Array:
    """Log-probabilities as the warpers leave them; -inf for what they rule out."""
    B, read = len(logs_BV), state.read_BR.shape[1]
    warping = jax.tree.map(lambda x: jnp.repeat(x, B, 0), warping)
    history, count_B = None, jnp.full(B, state.step)
    if beams.kind.history:
        tokens_BL = jnp.concatenate([state.read_BR, state.ids_PGWN.reshape(B, -1)], 1)
        history = History(tokens_BL, jnp.full(B, read), read + count_B)
    logs_BV = warpers.processed(logs_BV, warping, beams.kind, history, count_B)
    if not beams.draws:
        return logs_BV
    logs_BV = warpers.temperature(logs_BV, warping.temperature_B)
    return filtered(logs_BV, warping) if beams.kind.draws == "filtered" else logs_BV
