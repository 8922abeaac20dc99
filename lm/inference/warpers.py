"""What rules tokens out or makes them likelier: small pure functions on logits.

Each takes float32 logits and a value for every row, so that one compiled program serves any mixture
of requests, and a row's result depends on the row alone, bit for bit. -inf rules a token out.
`processed` and `filtered` apply them in the order of `transformers`:

    logit bias, repetition, presence and frequency penalties, n-gram bans, minimal length, allowed
    tokens; and where something is left to chance: temperature, top-k, top-p, min-p, typical

The second half works on `Candidates`, likeliest first: one ranking serves all filters, and where
few tokens can be left, so can their head alone. Among equal logits the lower id ranks first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

GREEDY = 1e-5  # temperatures below are taken for 0: logits would overflow
LANES = 128  # what sums over a vocabulary are grouped in
DRAWS = ("greedy", "plain", "filtered")


class Kind(NamedTuple):
    """What a program must be able to do for its rows; static, and there are 12 of them.

    A row's tokens are the same under every kind that covers what it asks for.
    """

    draws: Literal["greedy", "plain", "filtered"] = "greedy"  # plain: chance, without filters
    history: bool = False  # penalties and n-gram bans
    masked: bool = False  # logit bias, allowed tokens, a minimal length

    @classmethod
    def covering(cls, kinds: Iterable[Kind]) -> Kind:
        """The least kind that can do what each of `kinds` can."""
        draws, history, masked = zip(*kinds)
        return cls(max(draws, key=DRAWS.index), any(history), any(masked))


class Warping(NamedTuple):
    """The values of all warpers, for every row; `lm.inference.sampling.warping` makes one."""

    temperature_B: jax.Array  # 0: greedy
    top_k_B: jax.Array  # here and below 0 is off
    top_p_B: jax.Array
    min_p_B: jax.Array
    typical_p_B: jax.Array
    repetition_B: jax.Array  # 1 is off
    presence_B: jax.Array
    frequency_B: jax.Array
    ngram_B: jax.Array
    min_new_B: jax.Array
    stop_BS: jax.Array  # the ids that end a row; -1: none
    # Of width 0 where `Kind.masked` is False:
    bias_ids_BK: jax.Array  # -1: none
    bias_BK: jax.Array
    allowed_BW: jax.Array  # uint32, bit i of word w: whether token 32 w + i may come


class History(NamedTuple):
    """The tokens that rows hold: what they read and what they drew."""

    tokens_BL: jax.Array  # -1 in front of a row's first, anything from `end_B` on
    output_B: jax.Array  # where what the row drew begins
    end_B: jax.Array  # where the next token goes

    def append(self, token_B: jax.Array) -> History:
        """With one more token in every row."""
        rows_B = jnp.arange(len(token_B))
        tokens_BL = self.tokens_BL.at[rows_B, self.end_B].set(token_B, mode="drop")
        return self._replace(tokens_BL=tokens_BL, end_B=self.end_B + 1)


def row_sum(x: jax.Array) -> jax.Array:
    """The sum over the last axis, in an order that depends on its length alone; keeps the axis."""
    while x.shape[-1] > 1:
        half = (x.shape[-1] + 1) // 2
        short = 2 * half - x.shape[-1]
        x = x[..., :half] + jnp.pad(x[..., half:], [(0, 0)] * (x.ndim - 1) + [(0, short)])
    return x


def in_lanes(logits_BV: jax.Array) -> jax.Array:
    """Logits as [B, S, LANES], the last of them filled up with -inf."""
    B, V = logits_BV.shape
    short = -V % LANES
    padded = jnp.pad(logits_BV, ((0, 0), (0, short)), constant_values=-jnp.inf)
    return padded.reshape(B, -1, LANES)


def logsumexp(logits_BV: jax.Array) -> jax.Array:
    """log Σ exp of each row, [B, 1]; the same bits for every B."""
    most_B1 = logits_BV.max(-1, keepdims=True)
    sums_BS1 = row_sum(jnp.exp(in_lanes(logits_BV) - most_B1[:, :, None]))
    return most_B1 + jnp.log(row_sum(sums_BS1[..., 0]))


# ---- On logits in the order of ids -------------------------------------------------------------


def logit_bias(logits_BV: jax.Array, ids_BK: jax.Array, bias_BK: jax.Array) -> jax.Array:
    """Adds a bias to some tokens (OpenAI's `logit_bias`)."""
    rows_B1, ids_BK = _scattered(logits_BV, ids_BK)
    return logits_BV.at[rows_B1, ids_BK].add(bias_BK, mode="drop")


def seen(history: History, vocab_size: int) -> jax.Array:
    """Which tokens a row holds, bool [B, V]."""
    tokens_BL = _within(history, jnp.zeros_like(history.end_B))
    seen_BV = jnp.zeros((len(tokens_BL), vocab_size), bool)
    rows_B1, ids_BL = _scattered(seen_BV, tokens_BL)
    return seen_BV.at[rows_B1, ids_BL].set(True, mode="drop")


def counts(history: History, vocab_size: int) -> jax.Array:
    """How often a row has drawn each token, int32 [B, V]."""
    tokens_BL = _within(history, history.output_B)
    counts_BV = jnp.zeros((len(tokens_BL), vocab_size), jnp.int32)
    rows_B1, ids_BL = _scattered(counts_BV, tokens_BL)
    return counts_BV.at[rows_B1, ids_BL].add(1, mode="drop")


def repetition_penalty(logits_BV: jax.Array, penalty_B: jax.Array, seen_BV: jax.Array) -> jax.Array:
    """Divides the logits of seen tokens, or multiplies negative ones (Keskar et al. 2019, CTRL)."""
    penalty_B1 = penalty_B[:, None]
    lower_BV = jnp.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    return jnp.where(seen_BV, lower_BV, logits_BV)


def count_penalties(
    logits_BV: jax.Array, presence_B: jax.Array, frequency_B: jax.Array, counts_BV: jax.Array
) -> jax.Array:
    """Takes `presence` off every drawn token, and `frequency` for each time (OpenAI's API)."""
    presence_BV = jnp.where(counts_BV > 0, presence_B[:, None], 0.0)
    return logits_BV - (presence_BV + frequency_B[:, None] * counts_BV)


def no_repeat_ngram(logits_BV: jax.Array, size_B: jax.Array, history: History) -> jax.Array:
    """Rules out what would complete an n-gram that the row holds already (Paulus et al. 2017)."""
    tokens_BL = history.tokens_BL
    at_L = jnp.arange(tokens_BL.shape[1])
    rows_B1 = jnp.arange(len(tokens_BL))[:, None]

    def compare(carry):
        # Whether the token `back` places before each one is that before the next one.
        back, same_BL = carry
        last_B1 = tokens_BL[rows_B1, jnp.maximum(history.end_B[:, None] - back, 0)]
        before_BL = jnp.where(at_L >= back, jnp.roll(tokens_BL, back, 1), -1)
        alike_BL = (before_BL >= 0) & (before_BL == last_B1)
        return back + 1, same_BL & (alike_BL | (back >= size_B[:, None]))

    held_BL = _within(history, jnp.zeros_like(size_B)) >= 0
    longest = jnp.minimum(size_B.max(), tokens_BL.shape[1] + 1)
    carry = jnp.int32(1), held_BL & (size_B[:, None] > 0)
    _, banned_BL = jax.lax.while_loop(lambda carry: carry[0] < longest, compare, carry)
    rows_B1, ids_BL = _scattered(logits_BV, jnp.where(banned_BL, tokens_BL, -1))
    return logits_BV.at[rows_B1, ids_BL].set(-jnp.inf, mode="drop")


def min_new_tokens(
    logits_BV: jax.Array, least_B: jax.Array, stop_BS: jax.Array, count_B: jax.Array
) -> jax.Array:
    """Rules out the ids that end a row while it has drawn `count_B` < `least_B` tokens."""
    early_B1 = (count_B < least_B)[:, None]
    rows_B1, ids_BS = _scattered(logits_BV, jnp.where(early_B1, stop_BS, -1))
    return logits_BV.at[rows_B1, ids_BS].set(-jnp.inf, mode="drop")


def allowed(logits_BV: jax.Array, allowed_BW: jax.Array) -> jax.Array:
    """Rules out every token whose bit is 0: bit i of word w is that of token 32 w + i."""
    bits_BWI = (allowed_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    bits_BV = bits_BWI.reshape(len(allowed_BW), -1)[:, : logits_BV.shape[1]]
    return jnp.where(bits_BV > 0, logits_BV, -jnp.inf)


def processed(
    logits_BV: jax.Array,
    warping: Warping,
    kind: Kind,
    history: History | None = None,
    count_B: jax.Array | None = None,
) -> jax.Array:
    """Logits after all that does not need chance, float32.

    A row whose every allowed token would be banned, for its n-grams or as too early an end, is
    spared these bans: something must come.

    Args:
      logits_BV: the model's, of any float dtype.
      warping, kind: of the rows; `kind` is static.
      history: where `kind.history`.
      count_B: tokens drawn so far, where `kind.masked`.
    """
    x_BV = logits_BV.astype(jnp.float32)
    if kind.masked:
        x_BV = logit_bias(x_BV, warping.bias_ids_BK, warping.bias_BK)
    if kind.history:
        x_BV = repetition_penalty(x_BV, warping.repetition_B, seen(history, x_BV.shape[1]))
        drawn_BV = counts(history, x_BV.shape[1])
        x_BV = count_penalties(x_BV, warping.presence_B, warping.frequency_B, drawn_BV)
    if kind.masked:
        x_BV = allowed(x_BV, warping.allowed_BW)
    if not (kind.masked or kind.history):
        return x_BV
    rest_BV = x_BV
    if kind.history:
        rest_BV = no_repeat_ngram(rest_BV, warping.ngram_B, history)
    if kind.masked:
        rest_BV = min_new_tokens(rest_BV, warping.min_new_B, warping.stop_BS, count_B)
    return jnp.where(rest_BV.max(-1, keepdims=True) > -jnp.inf, rest_BV, x_BV)


def temperature(logits_BV: jax.Array, temperature_B: jax.Array) -> jax.Array:
    """Divides the logits (Ackley et al. 1985); those of greedy rows stay as they are."""
    return logits_BV / jnp.where(temperature_B < GREEDY, 1, temperature_B)[:, None]


def _scattered(logits_BV: jax.Array, ids_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Indices of rows and ids, to write with `mode="drop"`: ids that are none lie beyond."""
    V = logits_BV.shape[1]
    return jnp.arange(len(ids_BN))[:, None], jnp.where((ids_BN < 0) | (ids_BN >= V), V, ids_BN)


def _within(history: History, from_B: jax.Array) -> jax.Array:
    """A row's tokens from there to its end, -1 elsewhere."""
    at_L = jnp.arange(history.tokens_BL.shape[1])
    inside_BL = (at_L >= from_B[:, None]) & (at_L < history.end_B[:, None])
    return jnp.where(inside_BL, history.tokens_BL, -1)


# ---- On candidates, likeliest first ------------------------------------------------------------


class Candidates(NamedTuple):
    """Tokens that may be drawn: their logits (-inf rules one out) and ids, likeliest first."""

    logits_BN: jax.Array
    ids_BN: jax.Array


def ranked(logits_BV: jax.Array) -> Candidates:
    """Every token, likeliest first."""
    ids_BV = jnp.broadcast_to(jnp.arange(logits_BV.shape[-1]), logits_BV.shape)
    negated, ids_BV = jax.lax.sort((-logits_BV, ids_BV), is_stable=True, num_keys=1)
    return Candidates(-negated, ids_BV)


def ranked_sum(x_BN: jax.Array, head: int) -> jax.Array:
    """The sum of each row, [B, 1]; the same bits with and without what is 0 beyond `head`."""
    first_B1 = row_sum(x_BN[:, :head])
    return first_B1 + row_sum(x_BN[:, head:]) if x_BN.shape[1] > head else first_B1


def running_sum(x_BN: jax.Array) -> jax.Array:
    """Sums of the first 1, 2, … of each row; their bits do not depend on what follows."""
    return jax.lax.associative_scan(jnp.add, x_BN, axis=1)


def ranked_logsumexp(logits_BN: jax.Array, head: int) -> jax.Array:
    """log Σ exp of each row, [B, 1]; see `ranked_sum`."""
    most_B1 = logits_BN.max(-1, keepdims=True)
    return most_B1 + jnp.log(ranked_sum(jnp.exp(logits_BN - most_B1), head))


def is_part(share_B: jax.Array) -> jax.Array:
    """Whether each is a share of the whole: neither 0, which is off, nor all."""
    return (share_B > 0) & (share_B < 1)


def top_k(logits_BN: jax.Array, k_B: jax.Array) -> jax.Array:
    """The k likeliest tokens (Fan et al. 2018)."""
    k_B1 = k_B[:, None]
    keep_BN = (jnp.arange(logits_BN.shape[1]) < k_B1) | (k_B1 <= 0)
    return jnp.where(keep_BN, logits_BN, -jnp.inf)


def top_p(logits_BN: jax.Array, p_B: jax.Array, total_B1: jax.Array) -> jax.Array:
    """The nucleus: the fewest tokens whose probabilities sum to at least p (Holtzman et al. 2020).

    The likeliest token always stays. `total_B1` is the log of what probabilities are shares of.
    """
    p_B1 = p_B[:, None]
    sums_BN = running_sum(jnp.exp(logits_BN - total_B1))
    before_BN = jnp.pad(sums_BN[:, :-1], ((0, 0), (1, 0)))
    return jnp.where((before_BN < p_B1) | ~is_part(p_B1), logits_BN, -jnp.inf)


def min_p(logits_BN: jax.Array, p_B: jax.Array) -> jax.Array:
    """The tokens at least p times as likely as the likeliest (Nguyen et al. 2024)."""
    return jnp.where(logits_BN >= _least(logits_BN, p_B), logits_BN, -jnp.inf)


def typical(logits_BN: jax.Array, mass_B: jax.Array, head: int) -> jax.Array:
    """The tokens whose surprise is closest to the entropy, up to a mass (Meister et al. 2023)."""
    log_BN = logits_BN - ranked_logsumexp(logits_BN, head)
    share_BN = jnp.exp(log_BN)
    surprise_BN = jnp.where(share_BN > 0, -log_BN * share_BN, 0)
    off_BN = jnp.abs(-log_BN - ranked_sum(surprise_BN, head))
    sorted_BN, share_BN = jax.lax.sort((off_BN, share_BN), is_stable=True, num_keys=1)
    last_B = (running_sum(share_BN) < mass_B[:, None]).sum(-1)
    last_B = jnp.minimum(last_B, logits_BN.shape[1] - 1)
    farthest_B1 = jnp.take_along_axis(sorted_BN, last_B[:, None], 1)
    keep_BN = (off_BN <= farthest_B1) | ~is_part(mass_B)[:, None]
    return jnp.where(keep_BN, logits_BN, -jnp.inf)


def _least(logits_BN: jax.Array, p_B: jax.Array) -> jax.Array:
    """The least logit that `min_p` keeps, [B, 1]."""
    return logits_BN[:, :1] + jnp.log(p_B)[:, None]


def filtered(
    candidates: Candidates, warping: Warping, total_B1: jax.Array, head: int
) -> Candidates:
    """What top-k, top-p, min-p and typical leave of `candidates`, whose temperature is applied.

    Args:
      candidates: all, or as many as `within` says suffice.
      warping: of the rows.
      total_B1: `logsumexp` of a row over all tokens; used where there is top-p and no top-k.
      head: the size of a head.
    """
    logits_BN = top_k(candidates.logits_BN, warping.top_k_B)
    total_B1 = jnp.where(warping.top_k_B[:, None] > 0, ranked_logsumexp(logits_BN, head), total_B1)
    logits_BN = top_p(logits_BN, warping.top_p_B, total_B1)
    logits_BN = min_p(logits_BN, warping.min_p_B)

    def sorted_again() -> jax.Array:
        return typical(logits_BN, warping.typical_p_B, head)

    any_typical = is_part(warping.typical_p_B).any()
    left_BN = jax.lax.cond(any_typical, sorted_again, lambda: logits_BN)
    return candidates._replace(logits_BN=left_BN)


def within(head_BN: jax.Array, warping: Warping, total_B1: jax.Array) -> jax.Array:
    """Whether the filters leave nothing of a row beyond its N likeliest tokens, bool [B]."""
    held_B = row_sum(jnp.exp(head_BN - total_B1))[:, 0]
    nucleus_B = is_part(warping.top_p_B)
    near_B = head_BN[:, -1] < _least(head_BN, warping.min_p_B)[:, 0]
    few_B = (warping.top_k_B > 0) & (warping.top_k_B <= head_BN.shape[1])
    many_B = warping.top_k_B > head_BN.shape[1]
    others_B = jnp.where(
        many_B, near_B & ~nucleus_B, near_B | (nucleus_B & (held_B > warping.top_p_B))
    )
    return few_B | others_B
