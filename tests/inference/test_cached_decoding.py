"""Decoding with a cache gives the logits of the full forward pass."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import tiny_model

from lm.inference.prompts import padded
from lm.models import bind
from lm.models.config import POSITIONS

KV_HEADS = {"multi-head": None, "grouped-query": 2, "multi-query": 1}


def cases():
    """Every combination; every third one is enough to meet every pair, and quick."""
    kinds = itertools.product(POSITIONS, KV_HEADS, ["pre", "post"], [True, False])
    for i, (positions, heads, norm, scan) in enumerate(kinds):
        marks = () if (i + i // 4) % 4 == i // 12 else pytest.mark.slow
        name = f"{positions}-{heads}-{norm}-{'scanned' if scan else 'unrolled'}"
        yield pytest.param(positions, KV_HEADS[heads], norm, scan, id=name, marks=marks)


@pytest.mark.parametrize("positions, kv_heads, norm_position, scan_layers", list(cases()))
def test_prefill_and_single_steps_equal_the_full_forward_pass(
    positions, kv_heads, norm_position, scan_layers
):
    model, params = tiny_model(
        num_heads=4,
        num_kv_heads=kv_heads,
        positions=positions,
        norm_position=norm_position,
        scan_layers=scan_layers,
        norm="layernorm",
        bias=True,
        vocab_size=61,
        initializer_std=0.1,
    )
    bound = bind(model, params)
    lengths, steps = (3, 7, 1), 3  # tokens of each row's prompt; tokens one by one after it
    tokens = np.random.default_rng(0).integers(0, 61, (3, max(lengths) + steps))
    expected_BTV = jax.jit(lambda p, t: bind(model, p)(t))(params, tokens)

    @jax.jit
    def extend(params, tokens_BT, positions_BT, cache):
        bound = bind(model, params)
        x_BTD, cache = bound.extend(tokens_BT, positions_BT, cache)
        return bound.unembed(x_BTD), cache

    prompts = [row[:n].tolist() for row, n in zip(tokens, lengths)]
    tokens_BT, positions_BT = padded(prompts, model.config.max_length)
    cache = bound.new_cache(3, tokens_BT.shape[1] + steps)
    logits_BTV, cache = extend(params, tokens_BT, positions_BT, cache)
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(logits_BTV[row, -n:], expected_BTV[row, :n], atol=1e-5)
    for step in range(steps):
        at_B = jnp.array(lengths) + step
        next_B1 = jnp.take_along_axis(jnp.asarray(tokens), at_B[:, None], 1)
        logits_B1V, cache = extend(params, next_B1, at_B[:, None], cache)
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(logits_B1V[row, 0], expected_BTV[row, n + step], atol=1e-5)


def test_a_row_that_has_ended_leaves_no_trace():
    # A token at position -1, as generation feeds for rows that have ended, changes no later logits.
    model, params = tiny_model(positions="learned")
    bound = bind(model, params)
    cache = model.new_cache(1, 4)
    for token, position in [(5, 0), (9, -1), (6, 1)]:
        x_BTD, cache = bound.extend(jnp.array([[token]]), jnp.array([[position]]), cache)
    np.testing.assert_allclose(
        bound.unembed(x_BTD)[:, 0], bound(jnp.array([[5, 6]]))[:, -1], atol=1e-5
    )
