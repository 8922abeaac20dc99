"""Small float32 models for tests, cheap to start and compiled once for each shape."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import view
from lm.models import ModelConfig, bind, param_specs, skeleton

# Compiling is most of what these tests do, and none of them is about speed.
compiled = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)

SIZES = {
    "num_layers": 2,
    "num_heads": 4,
    "width": 32,
    "vocab_size": 40,
    "max_length": 16,
    "mlp_width": 48,
}


def config(**fields) -> ModelConfig:
    result = ModelConfig(**{**SIZES, "compute_dtype": "float32", "scan_layers": True, **fields})
    view(type(result), result)
    return result


def params(config: ModelConfig) -> dict[str, np.ndarray]:
    """Values in general position: no gain is one, no bias zero, no two layers are alike."""
    values = {}
    for name, spec in param_specs(skeleton(config)).items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        values[name] = rng.normal(float("scale" in name), 0.1, spec.shape).astype(np.float32)
    return values


def tokens(batch: int = 2, length: int = 12) -> np.ndarray:
    return np.random.default_rng(0).integers(0, SIZES["vocab_size"], (batch, length), np.int32)


@functools.partial(compiled, static_argnums=0)
def logits(config: ModelConfig, values, tokens_BT, **arguments) -> jax.Array:
    return bind(skeleton(config), values)(tokens_BT, **arguments)


@functools.partial(compiled, static_argnums=0)
def score_and_gradient(config: ModelConfig, values, tokens_BT):
    """A scalar that depends on every logit, and its gradient."""

    def score(values):
        logits_BTV = bind(skeleton(config), values)(tokens_BT)
        return jnp.sum(jnp.sin(jnp.arange(logits_BTV.size)) * logits_BTV.ravel())

    return jax.value_and_grad(score)(values)
