"""Small models for tests: the float32 shapes they share, and their parameters."""

import functools

import jax
import jax.numpy as jnp

from lm.models import ModelConfig, Transformer, bind, init, param_specs

SIZES = dict(num_layers=2, num_heads=4, width=32, vocab_size=40, max_length=16, mlp_width=48)


def config(**fields) -> ModelConfig:
    result = ModelConfig(**{**SIZES, "compute_dtype": "float32", **fields})
    result.validate()
    return result


@functools.cache
def params(config: ModelConfig, seed: int = 0) -> dict[str, jax.Array]:
    """Initial parameters, moved away from symmetric values: gains are not one, biases not zero."""
    values = init(param_specs(Transformer(config)), jax.random.key(seed))
    keys = jax.random.split(jax.random.key(seed + 1), len(values))
    return {
        name: value + 0.1 * jax.random.normal(key, value.shape)
        for (name, value), key in zip(values.items(), keys)
    }


def tokens(batch: int = 2, length: int = 12, seed: int = 2) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, SIZES["vocab_size"])


def logits(config: ModelConfig, values, tokens_BT, **arguments) -> jax.Array:
    return bind(Transformer(config), values)(tokens_BT, **arguments)


def score(config: ModelConfig, values, tokens_BT, **arguments) -> jax.Array:
    """A scalar that depends on every logit, to differentiate."""
    logits_BTV = logits(config, values, tokens_BT, **arguments)
    return jnp.sum(jnp.sin(jnp.arange(logits_BTV.size)) * logits_BTV.ravel())


@functools.partial(jax.jit, static_argnums=0)
def score_and_gradient(config: ModelConfig, values, tokens_BT):
    return jax.value_and_grad(lambda p: score(config, p, tokens_BT))(values)
