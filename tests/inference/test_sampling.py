"""Filters keep exactly the tokens they should; draws follow the distribution that remains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.inference import SamplingConfig
from lm.inference.sampling import HEAD, probabilities, sample

# Probabilities 0.4, 0.3, 0.2, 0.1 at ids 2, 0, 3, 1.
LOGITS = jnp.log(jnp.array([[0.3, 0.1, 0.4, 0.2]]))


def support(logits_BV, **settings):
    return np.flatnonzero(probabilities(logits_BV, SamplingConfig(**settings))[0]).tolist()


def test_top_k_keeps_the_k_likeliest():
    assert support(LOGITS, top_k=1) == [2]
    assert support(LOGITS, top_k=2) == [0, 2]
    assert support(LOGITS, top_k=3) == [0, 2, 3]
    assert support(LOGITS, top_k=99) == [0, 1, 2, 3]
    assert support(LOGITS, top_k=0, top_p=0.0) == [0, 1, 2, 3]  # as None: all


@pytest.mark.parametrize(
    "p, kept", [(0.01, [2]), (0.39, [2]), (0.41, [0, 2]), (0.71, [0, 2, 3]), (0.91, [0, 1, 2, 3])]
)
def test_nucleus_is_the_fewest_tokens_that_hold_p(p, kept):
    assert support(LOGITS, top_p=p) == kept


def test_nucleus_after_top_k_counts_shares_of_what_top_k_left():
    # Of 0.4 and 0.3, the first alone is 0.571.
    assert support(LOGITS, top_k=2, top_p=0.55) == [2]
    assert support(LOGITS, top_p=0.55) == [0, 2]


def test_temperature_comes_first():
    # At temperature 1/2 the shares are 0.16, 0.09, 0.04, 0.01 of 0.30: the first holds 0.533.
    assert support(LOGITS, temperature=0.5, top_p=0.53) == [2]
    np.testing.assert_allclose(
        probabilities(LOGITS, SamplingConfig(temperature=0.5))[0],
        np.array([9, 1, 16, 4]) / 30,
        rtol=1e-5,
    )


def test_ties_go_to_the_lower_id_and_do_not_widen_the_choice():
    tied = jnp.zeros((1, 8))
    assert support(tied, top_k=3) == [0, 1, 2]
    assert support(tied, top_p=0.3) == [0, 1, 2]  # three eighths, not all eight
    assert support(tied, temperature=0.0) == support(tied, temperature=1e-45) == [0]


def test_nucleus_of_a_large_vocabulary_equals_a_plain_computation():
    logits_BV = 3 * jax.random.normal(jax.random.key(0), (2, 5000))
    kept = probabilities(logits_BV, SamplingConfig(top_p=0.9)) > 0
    for logits, mine in zip(np.asarray(logits_BV, np.float64), np.asarray(kept)):
        shares = np.exp(logits) / np.exp(logits).sum()
        order = np.argsort(-shares)
        size = np.searchsorted(np.cumsum(shares[order]), 0.9) + 1
        assert set(np.flatnonzero(mine)) == set(order[:size])


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 3, "top_p": 0.9}],
    ids=str,
)
def test_frequencies_match_the_probabilities(settings):
    draws = 20_000
    config = SamplingConfig(**settings)
    keys_B = jax.random.split(jax.random.key(0), draws)
    logits_BV = jnp.broadcast_to(LOGITS, (draws, 4))
    drawn_B = jax.jit(sample, static_argnums=2)(logits_BV, keys_B, config)
    expected = np.asarray(probabilities(LOGITS, config)[0])
    counts = np.bincount(drawn_B, minlength=4)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi_square = ((counts - draws * expected)[kept] ** 2 / (draws * expected[kept])).sum()
    assert chi_square < 16.3  # passed by chance alone once in a thousand (3 degrees of freedom)


def test_a_row_depends_on_its_own_key_and_logits_alone():
    logits_BV = jax.random.normal(jax.random.key(1), (6, 50))
    keys_B = jax.random.split(jax.random.key(2), 6)
    config = SamplingConfig(top_k=20, top_p=0.9)
    together_B = sample(logits_BV, keys_B, config)
    for row in range(6):
        alone = sample(logits_BV[row : row + 1], keys_B[row : row + 1], config)
        assert alone[0] == together_B[row]


def test_a_nucleus_draws_the_same_from_the_head_as_from_the_whole_ranking():
    # A flat row among peaked ones needs every rank; alone, the peaked ones need only the first.
    peaked_BV = 4 * jax.random.normal(jax.random.key(1), (64, 2000))
    keys_B = jax.random.split(jax.random.key(2), 65)
    config = SamplingConfig(top_p=0.9)
    shares = probabilities(peaked_BV, config)
    assert ((shares > 0).sum(-1) < HEAD).all()
    alone_B = sample(peaked_BV, keys_B[:64], config)
    with_flat_B = sample(jnp.concatenate([peaked_BV, jnp.zeros((1, 2000))]), keys_B, config)
    assert alone_B.tolist() == with_flat_B[:64].tolist()
    assert all(shares[row, token] > 0 for row, token in enumerate(alone_B.tolist()))


def test_a_nucleus_beyond_the_head_reaches_every_token_it_should():
    draws = 20_000
    keys_B = jax.random.split(jax.random.key(0), draws)
    flat_BV = jnp.zeros((draws, 400))
    drawn_B = jax.jit(sample, static_argnums=2)(flat_BV, keys_B, SamplingConfig(top_p=0.8))
    counts = np.bincount(drawn_B, minlength=400)
    kept = counts > 0
    assert kept[:320].all() and kept.sum() <= 321  # rounding may admit one at the edge
    assert ((counts[kept] - draws / 320) ** 2 / (draws / 320)).sum() < 405  # 1 in 1000, df 319


def test_the_distribution_is_float32_whatever_the_logits_are():
    logits_BV = jax.random.normal(jax.random.key(0), (1, 300), jnp.bfloat16)
    shares = probabilities(logits_BV, SamplingConfig(top_p=0.99))
    assert shares.dtype == jnp.float32
    np.testing.assert_allclose(shares.sum(), 1, rtol=1e-5)
