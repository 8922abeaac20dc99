"""Logits to the next token: how to draw, the draw, and how likely it was.

A row's token follows from its own key, logits and settings, whatever stands beside it: greedy rows
take the likeliest, plain ones draw from all tokens, filtered ones from what their filters leave.
Nothing is sorted that need not be: greedy and plain rows never are, and filtered ones only where
the `HEAD` likeliest tokens are too few.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import Bounds, Count, Positive, Share, check
from lm.inference import warpers
from lm.inference.warpers import GREEDY, Candidates, History, Kind, Warping

HEAD = 256  # ranks that nearly every nucleus stays within; sorting a whole vocabulary is slow
MOST_BIASED = 1024  # tokens with a logit bias, of one request
MOST_STOPS = 64  # ids, and texts, that end a row
LEAST_LOGPROB = -9999.0  # stands for -inf where there is none, as in JSON

Alternatives = Annotated[int, Bounds(0, 20)]


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Drawing tokens. Names, meanings and order (`lm.inference.warpers`) are transformers'."""

    temperature: Annotated[float, Bounds(0, 1000)] = 1.0  # divides the logits; 0 is greedy
    top_k: int | None = None  # draw from the k likeliest tokens only; 0 or less, None: from all
    top_p: Share | None = None  # the fewest that hold this share of the probability; 0, None: all
    min_p: Share = 0.0  # those at least so many times as likely as the likeliest
    typical_p: Share = 0.0  # those with the most expected surprise, up to this share; 0, 1: all
    # Divides the positive logits of all tokens in the text, prompt included; multiplies the others.
    repetition_penalty: Annotated[float, Bounds(0.01, 100)] = 1.0
    presence_penalty: Annotated[float, Bounds(-2, 2)] = 0.0  # off the logits of what was drawn
    frequency_penalty: Annotated[float, Bounds(-2, 2)] = 0.0  # the same, for each time
    no_repeat_ngram_size: Annotated[int, Bounds(0, 1024)] = 0  # none so long comes twice; 0: off
    logit_bias: dict | None = dataclasses.field(default=None, hash=False)  # id → what is added
    allowed_ids: tuple[Count, ...] | None = None  # no others are drawn
    min_new_tokens: Count = 0  # no end before; of each sample
    max_new_tokens: Positive = 200  # per sample, end-of-text included
    stop: tuple[str, ...] = ()  # a text ends before the first of these
    stop_ids: tuple[Count, ...] = ()  # these tokens end a text, as end-of-text does
    logprobs: Alternatives | None = None  # how likely each token was, and so many alternatives
    prompt_logprobs: Alternatives | None = None  # the same for the prompt's
    num_samples: Positive = 1  # continuations of each prompt
    truncate_prompt: bool = True  # one longer than the context loses what comes first; or an error
    stop_at_end_of_text: bool = True  # False goes on after end-of-text, into the next document

    def validate(self, prefix: str = "sampling") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        for name in ("stop", "stop_ids"):
            many = len(getattr(self, name))
            limit = MOST_STOPS // 2
            check(many <= limit, f"{prefix}.{name} has {many:,} entries: it may have {limit}")
        check(all(self.stop), f"{prefix}.stop={self.stop!r} must not hold an empty text")
        longest = max(map(len, self.stop), default=0)
        check(longest <= 1000, f"{prefix}.stop has a text of {longest:,} characters: 1000 at most")
        check(
            self.min_new_tokens <= self.max_new_tokens,
            f"{prefix}.min_new_tokens={self.min_new_tokens} must be at most "
            f"{prefix}.max_new_tokens={self.max_new_tokens}",
        )
        check(self.allowed_ids != (), f"{prefix}.allowed_ids=() must name a token, or be None")
        self.biases(prefix)

    @property
    def greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature < GREEDY or self.top_k == 1

    def biases(self, prefix: str = "sampling") -> dict[int, float]:
        """`logit_bias` with numbers for names, as JSON has only those.

        Raises:
          ConfigError: an id that is no whole number, a bias outside [-100, 100], or too many.
        """
        given = self.logit_bias or {}
        field = f"{prefix}.logit_bias"
        many = f"{field} has {len(given):,} entries: it may have {MOST_BIASED:,}"
        check(len(given) <= MOST_BIASED, many)
        biases = {}
        for id, bias in given.items():
            digits = isinstance(id, str) and id.isascii() and id.isdigit() and len(id) < 10
            whole = digits or (isinstance(id, int) and 0 <= id < 2**31 and id is not True)
            check(whole, f"{field}: {str(id)[:99]!r} must be the id of a token")
            number = isinstance(bias, int | float) and not isinstance(bias, bool)
            within = number and -100 <= bias <= 100
            check(within, f"{field}[{id}]={str(bias)[:99]} must be a number in [-100, 100]")
            biases[int(id)] = float(bias)
        return biases

    def check_ids(self, vocab_size: int, prefix: str = "sampling") -> None:
        """Raises `ConfigError` where a field names a token that the vocabulary does not have."""
        fields = {"logit_bias": self.biases(prefix), "stop_ids": self.stop_ids}
        for name, ids in {**fields, "allowed_ids": self.allowed_ids or ()}.items():
            most = max(ids, default=0)
            check(
                most < vocab_size,
                f"{prefix}.{name}: {most} is not a token: ids are 0 … {vocab_size - 1}",
            )

    def ending(self, ids: Iterable[int], texts: Iterable[str]) -> Self:
        """The same, which ends at these ids and texts, too: a chat template's `ends`."""
        stops = {"stop": (*self.stop, *texts), "stop_ids": (*self.stop_ids, *ids)}
        return dataclasses.replace(self, **stops)

    def ends(self, end_of_text: Sequence[int]) -> tuple[int, ...]:
        """The ids that end a text, where `end_of_text` are the model's own."""
        return (*self.stop_ids, *(end_of_text if self.stop_at_end_of_text else ()))

    def kind(self, grammar: bool = False) -> Kind:
        """The least `Kind` of program that can do this; `grammar`: masks come with every token."""
        nucleus, typical = (0 < (share or 0) < 1 for share in (self.top_p, self.typical_p))
        on = (self.top_k or 0) > 0 or self.min_p > 0 or nucleus or typical
        penalties = (self.presence_penalty, self.frequency_penalty, self.no_repeat_ngram_size)
        return Kind(
            "greedy" if self.greedy else "filtered" if on else "plain",
            any(penalties) or self.repetition_penalty != 1,
            bool(grammar or self.logit_bias or self.allowed_ids or self.min_new_tokens),
        )


def warping(
    configs: Sequence[SamplingConfig],
    vocab_size: int,
    end_of_text: Sequence[int] = (),
    kind: Kind | None = None,
) -> tuple[Warping, Kind]:
    """The warpers of rows with these settings, as NumPy arrays, and the least kind for them.

    Args:
      configs: one for each row.
      vocab_size: ids from here up are never drawn.
      end_of_text: the ids that end a row unless its `stop_at_end_of_text` is False.
      kind: one that covers all rows, where it is to be another.

    Raises:
      ConfigError: a field names a token that the vocabulary does not have.
    """
    for config in configs:
        config.check_ids(vocab_size)
    kind = kind or Kind.covering(config.kind() for config in configs)

    def floats(name: str) -> np.ndarray:
        return np.array([getattr(config, name) or 0 for config in configs], np.float32)

    def ints(name: str) -> np.ndarray:
        return np.array([max(getattr(config, name) or 0, 0) for config in configs], np.int32)

    stops = [config.ends(end_of_text) for config in configs]
    biases = [config.biases() if kind.masked else {} for config in configs]
    width = MOST_BIASED if kind.masked else 0
    words = -(-vocab_size // 32) if kind.masked else 0
    arrays = Warping(
        temperature_B=np.where([config.greedy for config in configs], 0, floats("temperature")),
        top_k_B=ints("top_k"),
        top_p_B=floats("top_p"),
        min_p_B=floats("min_p"),
        typical_p_B=floats("typical_p"),
        repetition_B=floats("repetition_penalty"),
        presence_B=floats("presence_penalty"),
        frequency_B=floats("frequency_penalty"),
        ngram_B=ints("no_repeat_ngram_size"),
        min_new_B=ints("min_new_tokens"),
        stop_BS=_filled(stops, MOST_STOPS, -1, np.int32),
        bias_ids_BK=_filled(biases, width, -1, np.int32),
        bias_BK=_filled([bias.values() for bias in biases], width, 0, np.float32),
        allowed_BW=np.full((len(configs), words), 0xFFFFFFFF, np.uint32),
    )
    for row, config in enumerate(configs):
        if config.allowed_ids is not None:
            arrays.allowed_BW[row] = packed(config.allowed_ids, vocab_size)
    return arrays, kind


def _filled(rows: Sequence[Any], width: int, value: float, dtype: type) -> np.ndarray:
    filled = np.full((len(rows), width), value, dtype)
    for row, values in enumerate(rows):
        filled[row, : len(values)] = list(values)
    return filled


def packed(ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """The mask uint32 [W] whose bits are 1 at `ids`; see `lm.inference.warpers.allowed`."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view("<u4")


# ---- The draw --------------------------------------------------------------------------------


def row_keys(seed_B: jax.Array, *numbers_B: jax.Array) -> jax.Array:
    """A random key for each row, of its seed and of numbers: whose sample it is, which, how far."""
    keys_B = jax.vmap(jax.random.key)(seed_B)
    for number_B in numbers_B:
        keys_B = jax.vmap(jax.random.fold_in)(keys_B, number_B)
    return keys_B


class Drawn(NamedTuple):
    """One token a row."""

    token_B: jax.Array  # int32
    logprob_B: jax.Array  # of what it was drawn from: after the warpers; a greedy row's at 1


def sample(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    warping: Warping,
    kind: Kind,
    history: History | None = None,
    count_B: jax.Array | None = None,
) -> Drawn:
    """One token for every row.

    Args:
      logits_BV: the model's, of any float dtype.
      keys_B: a random key for every row; a row's token depends on its own key and values alone.
      warping, kind, history, count_B: see `lm.inference.warpers.processed`.
    """
    logits_BV = warpers.processed(logits_BV, warping, kind, history, count_B)
    likeliest_B = greedy(logits_BV)
    if kind.draws == "greedy":
        return Drawn(likeliest_B, _logprobs(logits_BV, likeliest_B, warpers.logsumexp(logits_BV)))
    greedy_B = warping.temperature_B < GREEDY
    scaled_BV = warpers.temperature(logits_BV, warping.temperature_B)
    uniforms_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    if kind.draws == "plain":
        token_B, total_B1 = plain_draw(scaled_BV, uniforms_B2)
        token_B = jnp.where(greedy_B, likeliest_B, token_B)
        return Drawn(token_B, _logprobs(scaled_BV, token_B, total_B1))
    apart_B = greedy_B | ~_has_filters(warping)
    of_all_B = apart_B | ((warping.top_k_B <= 0) & (warping.top_p_B > 0))
    token_B, total_B1 = jax.lax.cond(
        of_all_B.any(),
        lambda: plain_draw(scaled_BV, uniforms_B2),
        lambda: (likeliest_B, jnp.zeros_like(scaled_BV[:, :1])),
    )

    filtered = _of_candidates(
        lambda candidates: ranked_draw(candidates, uniforms_B2),
        scaled_BV,
        warping,
        total_B1,
        apart_B,
    )
    token_B = jnp.where(greedy_B, likeliest_B, token_B)
    apart = Drawn(token_B, _logprobs(scaled_BV, token_B, total_B1))
    return jax.tree.map(lambda x, y: jnp.where(apart_B, x, y), apart, filtered)


def greedy(logits_BV: jax.Array) -> jax.Array:
    """The likeliest token of each row; the lowest id among equals."""
    return jnp.argmax(logits_BV, -1).astype(jnp.int32)


def plain_draw(logits_BV: jax.Array, uniforms_B2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A token of each row, by its probability: first a group of `LANES` tokens, then one of them.

    Returns:
      The tokens [B] and `lm.inference.warpers.logsumexp` of the logits, [B, 1].
    """
    most_B1 = logits_BV.max(-1, keepdims=True)
    shares_BSL = jnp.exp(warpers.in_lanes(logits_BV) - most_B1[:, :, None])
    sums_BS = warpers.row_sum(shares_BSL)[..., 0]
    group_B = _inverse(sums_BS, uniforms_B2[:, 0])
    shares_BL = jnp.take_along_axis(shares_BSL, group_B[:, None, None], 1)[:, 0]
    token_B = group_B * warpers.LANES + _inverse(shares_BL, uniforms_B2[:, 1])
    return token_B, most_B1 + jnp.log(warpers.row_sum(sums_BS))


def ranked_draw(candidates: Candidates, uniforms_B2: jax.Array) -> Drawn:
    """A candidate of each row, by its probability: the same whether ruled out ones follow."""
    most_B1 = candidates.logits_BN.max(-1, keepdims=True)
    rank_B = _inverse(jnp.exp(candidates.logits_BN - most_B1), uniforms_B2[:, 0])
    token_B = jnp.take_along_axis(candidates.ids_BN, rank_B[:, None], 1)[:, 0]
    total_B1 = warpers.ranked_logsumexp(candidates.logits_BN, HEAD)
    return Drawn(token_B.astype(jnp.int32), _logprobs(candidates.logits_BN, rank_B, total_B1))


def _inverse(shares_BN: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The first index up to which the shares sum to more than `uniform_B` of them all, int32 [B].

    Never one whose share is 0: rounding may let a running sum fall.
    """
    sums_BN = warpers.running_sum(shares_BN)
    some_BN = shares_BN > 0
    last_B = shares_BN.shape[1] - 1 - jnp.argmax(some_BN[:, ::-1], -1)
    total_B1 = jnp.take_along_axis(sums_BN, last_B[:, None], 1)
    hit_BN = (sums_BN > uniform_B[:, None] * total_B1) & some_BN
    return jnp.where(hit_BN.any(-1), jnp.argmax(hit_BN, -1), last_B).astype(jnp.int32)


def _has_filters(warping: Warping) -> jax.Array:
    shares_B = warpers.is_part(warping.top_p_B) | warpers.is_part(warping.typical_p_B)
    return shares_B | (warping.top_k_B > 0) | (warping.min_p_B > 0)


def log_distribution(
    logits_BV: jax.Array,
    warping: Warping,
    kind: Kind,
    history: History | None = None,
    count_B: jax.Array | None = None,
) -> jax.Array:
    """Log-probabilities [B, V] that `sample` draws from, float32; -inf for what is ruled out.

    All of a greedy row's probability is on one token.
    """
    logits_BV = warpers.processed(logits_BV, warping, kind, history, count_B)
    ids_V = jnp.arange(logits_BV.shape[1])
    likeliest_BV = jnp.where(greedy(logits_BV)[:, None] == ids_V, 0.0, -jnp.inf)
    scaled_BV = warpers.temperature(logits_BV, warping.temperature_B)
    if kind.draws == "filtered":
        scaled_BV = filtered(scaled_BV, warping)
    drawn_BV = scaled_BV - warpers.logsumexp(scaled_BV)
    return jnp.where((warping.temperature_B < GREEDY)[:, None], likeliest_BV, drawn_BV)


def filtered(scaled_BV: jax.Array, warping: Warping) -> jax.Array:
    """Logits, in the order of ids, that the filters leave; -inf for all others."""
    total_B1 = warpers.logsumexp(scaled_BV)
    rows_B1 = jnp.arange(len(scaled_BV))[:, None]

    def by_ids(candidates: Candidates) -> jax.Array:
        nothing_BV = jnp.full_like(scaled_BV, -jnp.inf)
        return nothing_BV.at[rows_B1, candidates.ids_BN].set(candidates.logits_BN)

    return _of_candidates(by_ids, scaled_BV, warping, total_B1)


def _of_candidates(
    function: Callable[[Candidates], Any],
    scaled_BV: jax.Array,
    warping: Warping,
    total_B1: jax.Array,
    spared_B: jax.Array | bool = False,
) -> Any:
    """`function` of the candidates that the filters leave: of a head alone where that is enough.

    Args:
      total_B1: see `lm.inference.warpers.filtered`.
      spared_B: rows for which any candidates will do.
    """

    def left(candidates: Candidates) -> Any:
        return function(warpers.filtered(candidates, warping, total_B1, HEAD))

    if scaled_BV.shape[1] <= HEAD:
        return left(warpers.ranked(scaled_BV))
    # The barrier keeps XLA from slicing what would then be a sort of the whole vocabulary. A third
    # array is in it, as XLA's own TopK on a mesh fails where a tuple of its two results is taken.
    *top, total_B1 = jax.lax.optimization_barrier((*jax.lax.top_k(scaled_BV, HEAD), total_B1))
    head = Candidates(*top)
    enough_B = warpers.within(head.logits_BN, warping, total_B1) | spared_B
    return jax.lax.cond(enough_B.all(), lambda: left(head), lambda: left(warpers.ranked(scaled_BV)))


# ---- How likely it was -----------------------------------------------------------------------


class Scores(NamedTuple):
    """How likely the model itself, before any warper, finds one token a row."""

    logprob_B: jax.Array
    rank_B: jax.Array  # 0: none is likelier
    top_ids_BN: jax.Array  # the likeliest, in this order
    top_logprobs_BN: jax.Array


def scores(logits_BV: jax.Array, token_B: jax.Array, alternatives: int = 0) -> Scores:
    """Raw log-probabilities of tokens and of the likeliest `alternatives`, which is static."""
    logits_BV = logits_BV.astype(jnp.float32)
    total_B1 = warpers.logsumexp(logits_BV)
    own_B1 = jnp.take_along_axis(logits_BV, token_B[:, None], 1)
    most = min(alternatives, logits_BV.shape[1])
    top = Candidates(*jax.lax.top_k(logits_BV, most))
    return Scores(
        (own_B1 - total_B1)[:, 0],
        (logits_BV > own_B1).sum(-1, dtype=jnp.int32),
        top.ids_BN.astype(jnp.int32),
        top.logits_BN - total_B1,
    )


def _logprobs(logits_BN: jax.Array, index_B: jax.Array, total_B1: jax.Array) -> jax.Array:
    return (jnp.take_along_axis(logits_BN, index_B[:, None], 1) - total_B1)[:, 0]


def json_logprob(logprob: float) -> float:
    """A log-probability that JSON can hold: -9999 for -inf and less, and for what is no number."""
    return max(float(logprob), LEAST_LOGPROB) if logprob > LEAST_LOGPROB else LEAST_LOGPROB
