"""Filters keep exactly the tokens they should; draws follow the distribution that remains."""

import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import ConfigError, view
from lm.inference import SamplingConfig
from lm.inference.sampling import (
    HEAD,
    json_logprob,
    log_distribution,
    sample,
    scores,
    warping,
)
from lm.inference.warpers import DRAWS, History, Kind

# Probabilities 0.4, 0.3, 0.2, 0.1 at ids 2, 0, 3, 1.
LOGITS = jnp.log(jnp.array([[0.3, 0.1, 0.4, 0.2]]))

draw = jax.jit(sample, static_argnames="kind")
distribution = jax.jit(log_distribution, static_argnames="kind")


def probabilities(logits_BV, **settings):
    configs = [SamplingConfig(**settings)] * len(logits_BV)
    values, kind = warping(configs, logits_BV.shape[1])
    return np.exp(distribution(logits_BV, values, kind=kind))


def support(logits_BV, **settings):
    return np.flatnonzero(probabilities(logits_BV, **settings)[0]).tolist()


def test_top_k_keeps_the_k_likeliest():
    assert support(LOGITS, top_k=1) == [2]
    assert support(LOGITS, top_k=2) == [0, 2]
    assert support(LOGITS, top_k=3) == [0, 2, 3]
    assert support(LOGITS, top_k=99) == [0, 1, 2, 3]
    assert support(LOGITS, top_k=0, top_p=0.0) == [0, 1, 2, 3]  # as None: all
    assert support(LOGITS, top_k=-1) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "p, kept", [(0.01, [2]), (0.39, [2]), (0.41, [0, 2]), (0.71, [0, 2, 3]), (0.91, [0, 1, 2, 3])]
)
def test_nucleus_is_the_fewest_tokens_that_hold_p(p, kept):
    assert support(LOGITS, top_p=p) == kept


def test_filters_apply_one_after_the_other():
    # Of 0.4 and 0.3, the first alone is 0.571.
    assert support(LOGITS, top_k=2, top_p=0.55) == [2]
    assert support(LOGITS, top_p=0.55) == [0, 2]
    # At temperature 1/2 the shares are 0.16, 0.09, 0.04, 0.01 of 0.30: the first holds 0.533.
    assert support(LOGITS, temperature=0.5, top_p=0.53) == [2]
    halved = np.array([9, 1, 16, 4]) / 30
    np.testing.assert_allclose(probabilities(LOGITS, temperature=0.5)[0], halved, rtol=1e-5)


def test_min_p_is_relative_to_the_likeliest():
    assert support(LOGITS, min_p=0.76) == [2]
    assert support(LOGITS, min_p=0.74) == [0, 2]
    assert support(LOGITS, min_p=0.24) == [0, 1, 2, 3]


def test_typical_tokens_come_in_the_order_of_their_distance_from_the_entropy():
    # The entropy is 1.280; the surprises 0.916, 1.204, 1.609, 2.303 are 0.36, 0.08, 0.33, 1.02 off.
    assert support(LOGITS, typical_p=0.29) == [0]
    assert support(LOGITS, typical_p=0.49) == [0, 3]
    assert support(LOGITS, typical_p=0.51) == [0, 2, 3]


def test_ties_go_to_the_lower_id_and_do_not_widen_the_choice():
    tied = jnp.zeros((1, 8))
    assert support(tied, top_k=3) == [0, 1, 2]
    assert support(tied, top_p=0.3) == [0, 1, 2]  # three eighths, not all eight
    assert support(tied, temperature=0.0) == support(tied, temperature=1e-45) == [0]


def test_nucleus_of_a_large_vocabulary_equals_a_plain_computation():
    logits_BV = 3 * jax.random.normal(jax.random.key(0), (2, 5000))
    kept = probabilities(logits_BV, top_p=0.9) > 0
    for logits, mine in zip(np.asarray(logits_BV, np.float64), kept):
        shares = np.exp(logits) / np.exp(logits).sum()
        order = np.argsort(-shares)
        size = np.searchsorted(np.cumsum(shares[order]), 0.9) + 1
        assert set(np.flatnonzero(mine)) == set(order[:size])


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 3, "top_p": 0.9},
        {"min_p": 0.3}, {"typical_p": 0.6}, {"logit_bias": {1: 2.0}}, {"allowed_ids": (1, 3)},
    ],
    ids=str,
)  # fmt: skip
def test_frequencies_match_the_probabilities(settings):
    draws = 10_000
    values, kind = warping([SamplingConfig(**settings)] * draws, 4)
    keys_B = jax.random.split(jax.random.key(0), draws)
    logits_BV = jnp.broadcast_to(LOGITS, (draws, 4))
    zeros_B = jnp.zeros(draws, jnp.int32)
    drawn_B = draw(logits_BV, keys_B, values, kind=kind, count_B=zeros_B).token_B
    expected = np.exp(distribution(logits_BV, values, kind=kind, count_B=zeros_B))[0]
    check_frequencies(np.bincount(drawn_B, minlength=4), expected, 16.3)  # 3 degrees of freedom


def check_frequencies(counts, expected, bound):
    """`bound`: what chi-square passes by chance alone once in a thousand."""
    assert counts[expected == 0].sum() == 0
    kept, draws = expected > 0, counts.sum()
    assert ((counts - draws * expected)[kept] ** 2 / (draws * expected[kept])).sum() < bound


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8}], ids=str)
def test_a_draw_from_many_tokens_reaches_each_as_often_as_it_should(settings):
    draws = 10_000
    keys_B = jax.random.split(jax.random.key(1), draws)
    logits_V = jnp.concatenate([jnp.zeros(200), jnp.ones(80)])
    values, kind = warping([SamplingConfig(**settings)] * draws, 280)
    logits_BV = jnp.broadcast_to(logits_V, (draws, 280))
    drawn_B = draw(logits_BV, keys_B, values, kind=kind).token_B
    expected = np.exp(distribution(logits_BV[:1], jax.tree.map(lambda x: x[:1], values), kind=kind))
    check_frequencies(np.bincount(drawn_B, minlength=280), expected[0], 356)  # 279 degrees


# ---- A row and its company -------------------------------------------------------------------

V = 700  # more than a head
KINDS = [Kind(*of) for of in itertools.product(DRAWS, (False, True), (False, True))]
ROWS = [
    SamplingConfig(**row)
    for row in (
        {"temperature": 0}, {}, {"temperature": 0.7}, {"top_k": 20}, {"top_k": 400},
        {"top_p": 0.5}, {"top_p": 0.999}, {"min_p": 0.2}, {"typical_p": 0.4},
        {"top_k": 50, "typical_p": 0.9}, {"top_k": 300, "top_p": 0.6, "min_p": 0.01},
        {"repetition_penalty": 1.7, "temperature": 0},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "top_p": 0.9},
        {"no_repeat_ngram_size": 2}, {"logit_bias": {5: 3.0, 9: -4.0}},
        {"allowed_ids": tuple(range(0, V, 7)), "top_k": 30},
        {"min_new_tokens": 9, "stop_ids": (3, 4), "temperature": 0.3},
    )
]  # fmt: skip


@functools.cache
def inputs():
    rng = np.random.default_rng(0)
    B = len(ROWS)
    logits_BV = rng.normal(0, 2.5, (B, V)).astype(np.float32)
    history = History(
        rng.integers(0, 6, (B, 24)).astype(np.int32), np.full(B, 8), rng.integers(8, 24, B)
    )
    return logits_BV, jax.random.split(jax.random.key(4), B), history, np.arange(B)


def drawn(numbers, kind=None):
    """The tokens and log-probabilities of these rows, drawn together."""
    values, kind = warping([ROWS[n] for n in numbers], V, kind=kind)
    logits_BV, keys_B, history, count_B = jax.tree.map(lambda x: x[np.array(numbers)], inputs())
    out = draw(logits_BV, keys_B, values, kind=kind, history=history, count_B=count_B)
    return list(zip(out.token_B.tolist(), out.logprob_B.tolist()))


@functools.cache
def alone():
    return [drawn([n])[0] for n in range(len(ROWS))]


def test_a_row_draws_the_same_in_any_company():
    everybody = list(range(len(ROWS)))
    assert drawn(everybody) == alone()
    for numbers in ([16, 0, 5, 5], everybody[::-1]):
        assert drawn(numbers) == [alone()[n] for n in numbers]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_draws_the_same_from_every_kind_of_program(kind):
    covered = [n for n, row in enumerate(ROWS) if Kind.covering([row.kind(), kind]) == kind]
    assert drawn(covered, kind) == [alone()[n] for n in covered]


def test_the_log_probability_is_that_of_the_distribution():
    values, kind = warping(ROWS, V)
    logits_BV, _, history, count_B = inputs()
    logs_BV = distribution(logits_BV, values, kind=kind, history=history, count_B=count_B)
    for row, (token, logprob) in enumerate(alone()):
        if not ROWS[row].greedy:
            np.testing.assert_allclose(logprob, logs_BV[row, token], atol=2e-6)
        else:
            assert logs_BV[row, token] == 0 and logprob < 0


def test_a_nucleus_draws_the_same_from_the_head_as_from_the_whole_ranking():
    # A flat row among peaked ones needs every rank; alone, the peaked ones need only the first.
    peaked_BV = 4 * jax.random.normal(jax.random.key(1), (64, 2000))
    keys_B = jax.random.split(jax.random.key(2), 65)
    values, kind = warping([SamplingConfig(top_p=0.9)] * 65, 2000)
    assert ((probabilities(peaked_BV, top_p=0.9) > 0).sum(-1) < HEAD).all()
    first = jax.tree.map(lambda x: x[:64], values)
    apart = draw(peaked_BV, keys_B[:64], first, kind=kind)
    flat_BV = jnp.concatenate([peaked_BV, jnp.zeros((1, 2000))])
    together = draw(flat_BV, keys_B, values, kind=kind)
    for mine, other in zip(apart, together):
        assert mine.tolist() == other[:64].tolist()


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.5}], ids=str)
def test_nothing_is_sorted_without_filters(settings):
    values, kind = warping([SamplingConfig(**settings)], 5000)
    logits_BV, keys_B = jnp.zeros((1, 5000)), jax.random.split(jax.random.key(0), 1)
    program = draw.lower(logits_BV, keys_B, values, kind=kind).as_text()
    assert ".sort" not in program and "top_k" not in program


# ---- How likely it was -----------------------------------------------------------------------


def test_scores_are_those_of_the_model_itself():
    logits_BV = 3 * jax.random.normal(jax.random.key(0), (3, 500))
    token_B = jnp.array([0, 7, 499])
    found = jax.jit(scores, static_argnums=2)(logits_BV, token_B, 4)
    logs_BV = jax.nn.log_softmax(logits_BV)
    np.testing.assert_allclose(found.logprob_B, logs_BV[np.arange(3), token_B], atol=1e-5)
    order_BV = np.argsort(-np.asarray(logits_BV), -1)
    assert found.top_ids_BN.tolist() == order_BV[:, :4].tolist()
    assert [order_BV[b, found.rank_B[b]] for b in range(3)] == token_B.tolist()
    np.testing.assert_allclose(
        found.top_logprobs_BN,
        np.take_along_axis(np.asarray(logs_BV), order_BV[:, :4], 1),
        atol=1e-5,
    )
    assert jax.jit(scores, static_argnums=2)(logits_BV, token_B, 0).top_ids_BN.shape == (3, 0)


def test_the_distribution_is_float32_whatever_the_logits_are():
    logits_BV = jax.random.normal(jax.random.key(0), (1, 300), jnp.bfloat16)
    shares = probabilities(logits_BV, top_p=0.99)
    assert shares.dtype == jnp.float32
    np.testing.assert_allclose(shares.sum(), 1, rtol=1e-5)
    found = scores(logits_BV, jnp.array([0]), 1)
    assert found.logprob_B.dtype == found.top_logprobs_BN.dtype == jnp.float32


def test_json_holds_every_log_probability():
    for value in (0.0, -3.5, -1e30, -math.inf, math.nan):
        text = json.dumps(json_logprob(np.float32(value)), allow_nan=False)
        assert float(text) == (value if value > -9999 else -9999)


# ---- Settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": math.inf}, "temperature=inf must be in [0, 1000]"),
        ({"temperature": -1}, "temperature=-1.0 must be in [0, 1000]"),
        ({"top_p": 1.5}, "top_p=1.5 must be in [0, 1]"),
        ({"min_p": math.nan}, "min_p=nan must be in [0, 1]"),
        ({"typical_p": -0.1}, "typical_p=-0.1 must be in [0, 1]"),
        ({"repetition_penalty": 0}, "repetition_penalty=0.0 must be in [0.01, 100]"),
        ({"presence_penalty": 3}, "presence_penalty=3.0 must be in [-2, 2]"),
        ({"frequency_penalty": -math.inf}, "frequency_penalty=-inf must be in [-2, 2]"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1 must be at least 0"),
        ({"logprobs": 21}, "logprobs=21 must be at most 20"),
        ({"min_new_tokens": 300}, "min_new_tokens=300 must be at most x.max_new_tokens=200"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"stop": ["a"] * 10_000}, "stop has 10,000 entries: it may have 32"),
        ({"stop": ["a", ""]}, "stop=('a', '') must not hold an empty text"),
        ({"stop": ["a" * 2000]}, "stop has a text of 2,000 characters: 1000 at most"),
        ({"stop_ids": list(range(99))}, "stop_ids has 99 entries: it may have 32"),
        ({"stop_ids": [-1]}, "stop_ids[0]=-1 must be at least 0"),
        ({"allowed_ids": []}, "allowed_ids=() must name a token, or be None"),
        ({"logit_bias": {"a": 1}}, "logit_bias: 'a' must be the id of a token"),
        ({"logit_bias": {-1: 1}}, "logit_bias: '-1' must be the id of a token"),
        ({"logit_bias": {"5": 1e9}}, "logit_bias[5]=1000000000.0 must be a number in [-100, 100]"),
        ({"logit_bias": {5: math.nan}}, "logit_bias[5]=nan must be a number in [-100, 100]"),
        ({"logit_bias": {5: "x"}}, "logit_bias[5]=x must be a number in [-100, 100]"),
        ({"logit_bias": dict.fromkeys(range(9999), 1)}, "logit_bias has 9,999 entries: it may"),
        ({"top_kk": 3}, "top_kk is not a known field (did you mean 'top_k'?)"),
    ],
    ids=lambda of: str(of)[:60],
)
def test_bad_settings_say_what_is_allowed(settings, message):
    with pytest.raises(ConfigError) as error:
        view(SamplingConfig, settings, "x")
    assert str(error.value).startswith(f"x.{message}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [{"logit_bias": {"61": 1}}, {"stop_ids": (5, 61)}, {"allowed_ids": (61,)}],
    ids=lambda of: next(iter(of)),
)
def test_ids_outside_the_vocabulary_are_named(settings):
    config = view(SamplingConfig, settings)
    with pytest.raises(ConfigError, match=r"61 is not a token: ids are 0 … 60"):
        warping([config], 61)
    warping([config], 62)


def test_settings_may_be_a_key():
    assert hash(SamplingConfig(logit_bias={1: 2.0})) == hash(SamplingConfig())
    assert SamplingConfig(logit_bias={1: 2.0}) != SamplingConfig()
