"""Latent attention: with values of another width in every kernel; and what is refused of it."""

import dataclasses

import jax
import numpy as np
import pytest
from test_kernels import inputs

from lm.config import ConfigError
from lm.interpretability.edges import Graph
from lm.interpretability.heads import head_weights
from lm.models import ModelConfig
from lm.models.attention import kernels
from lm.models.attention.attention import attend

LATENT = ModelConfig(num_heads=4, head_dim=16, kv_rank=20, shared_key_dim=6, value_dim=10)


@pytest.mark.parametrize("width", [10, 24])
def test_values_may_be_narrower_or_wider_than_keys(width):
    (query, key, value), _, context = inputs(24, packed=True)
    value = jax.random.normal(jax.random.key(1), (*value.shape[:3], width))

    def both(query, key, value):
        arrays = (query, key, value, context)
        return kernels.compute("ring", LATENT, *arrays), attend(LATENT, *arrays)

    heads, pull = jax.vjp(both, query, key, value)
    np.testing.assert_allclose(*heads, atol=2e-6)
    assert heads[0].shape == (*query.shape[:3], width)
    ones = np.ones(heads[0].shape, np.float32)
    for one, other in zip(pull((ones, 0 * ones)), pull((0 * ones, ones))):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_what_is_wrong_of_latents_is_refused():
    LATENT.validate()
    for of in (Graph.of, lambda config: head_weights(config, {})):
        with pytest.raises(ConfigError, match="kv_rank=20"):
            of(LATENT)


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"kv_rank": 0}, "shared_key_dim=6 needs .*kv_rank"),
        ({"shared_key_dim": 16}, "shared_key_dim=16 .* less than head_dim=16"),
        ({"shared_key_dim": 5}, "shared_key_dim=5 must be even"),
        ({"num_kv_heads": 2}, "num_kv_heads=2 must be num_heads=4"),
        ({"positions": "learned"}, "kv_rank=20 needs .*positions='rotary'"),
        ({"qkv_bias": True}, "qkv_bias=False"),
        ({"num_experts": 6, "activation": "swiglu", "router_groups": 4}, "router_groups=4"),
        (
            {"num_experts": 8, "experts_per_token": 5, "activation": "swiglu", "router_groups": 2},
            "router_group_limit=1",
        ),
    ],
)
def test_impossible_latents_and_groups_are_named(fields, named):
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(LATENT, **fields).validate()
