"""A run directory as training leaves it, with random parameters."""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import to_dict, view
from lm.models import ModelConfig, init, param_specs, skeleton
from lm.tokenizers import TokenizerConfig, train
from lm.training.checkpoints import CheckpointConfig, Checkpointer

TINY = {
    "num_layers": 2,
    "num_heads": 2,
    "width": 32,
    "max_length": 32,
    "vocab_size": 257,
    "compute_dtype": "float32",
    "initializer_std": 0.3,  # so that the logits of a random model are not all alike
}


def tiny_model(seed=0, **fields):
    """A skeleton and its random parameters."""
    config = ModelConfig(**{**TINY, **fields})
    view(type(config), config)
    model = skeleton(config)
    return model, init(param_specs(model), jax.random.key(seed))


def general_params(model):
    """Values in general position: no gain is one, no bias zero, no two layers are alike."""
    params = {}
    for name, spec in param_specs(model).items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        gain = name.endswith("scale") and not model.config.norm_unit_offset
        params[name] = jnp.asarray(rng.normal(float(gain), 0.2, spec.shape), jnp.float32)
    return params


def write_tiny_run(directory, end_of_text=True, steps=(3,), tokenizer=None, **fields):
    """Writes a run whose checkpoints are those of `steps`; returns its tokenizer."""
    tokenizer = tokenizer or train(TokenizerConfig(kind="byte"), [])
    fields = {"vocab_size": tokenizer.vocab_size, "num_layers": 1, **fields}
    tokenizer.save(directory / "tokenizer")
    for step in steps:
        model, params = tiny_model(seed=step, **fields)
        with Checkpointer(directory / "checkpoints", CheckpointConfig()) as checkpointer:
            moments = jax.tree.map(jnp.zeros_like, params)
            state = {"params": params, "optimizer": moments, "step": jnp.int32(step)}
            checkpointer.save(step, state, wait=True)
    model, _ = tiny_model(**fields)
    config = {
        "job": "train",
        "data": {"path": "storyworld", "end_of_text": end_of_text},
        "tokenizer": {"kind": tokenizer.kind},
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "model": to_dict(model.config),
    }
    (directory / "config.json").write_text(json.dumps(config))
    records = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return tokenizer


def write_talker(directory, max_length):
    """Writes a run that can chat, about bytes."""
    tokenizer = train(TokenizerConfig(kind="byte", chat_template="chatml"), [])
    write_tiny_run(directory, tokenizer=tokenizer, max_length=max_length)
    return directory
