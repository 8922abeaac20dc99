"""Before the first token: a model set up for reading all its weights, and ids in rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lm.config import check
from lm.models import Model, ModelConfig, bind, param_specs, skeleton
from lm.models.matmul import compute_dtype
from lm.models.stack import Layers
from lm.parallel.platform import platform
from lm.parallel.sharding import ParamSpec

UNROLLED_LAYERS = 24  # up to here the time to compile them one by one is bearable

# What the model looks up, adds or multiplies in float32 though it has the axes of a matrix.
_FLOAT32 = ("positions", "types", "router")


def for_decoding(model: Model) -> Model:
    """The same skeleton, set up for reading all its weights for every token.

    On the CPU that means float32 unless the config names a dtype: a product with few rows spends
    its time reading weights, and widening bfloat16 ones takes longer than reading twice the bytes.
    Layers are unrolled, unless they are many: a loop over stacked layers would copy the weights of
    each before using them. Experts take all tokens that choose them: with a capacity, a token's
    output would depend on how many tokens are read at once.
    """
    config = model.config
    dtype = config.compute_dtype
    if dtype == "auto" and platform() == "cpu":
        dtype = "float32"
    many = max(config.num_layers, config.encoder_layers) > UNROLLED_LAYERS
    return skeleton(
        dataclasses.replace(config, compute_dtype=dtype, scan_layers=many, capacity_factor=0.0)
    )


def for_reading(model: Model, params: Mapping[str, jax.Array]) -> dict:
    """`params` in the compute dtype and, where layers are not scanned, apart: see `bound`."""
    params = in_compute_dtype(model, params)
    if model.config.scan_layers:
        return params
    return {
        name: _layers(params[name]) if "layers" in spec.axes else params[name]
        for name, spec in param_specs(model).items()
    }


def split_over(x: jax.Array) -> NamedSharding | None:
    """The sharding of an array that several devices share; None of any other."""
    sharding = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    named = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1
    return sharding if named else None


def _layers(x: jax.Array) -> tuple[jax.Array, ...]:
    """One array a layer, split as all of them together."""
    sharding = split_over(x)
    if sharding is None:
        return tuple(x)
    each = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.jit(lambda x: tuple(x), out_shardings=each)(x)


def bound(model: Model, params: Mapping[str, jax.Array | tuple[jax.Array, ...]]) -> Model:
    """The callable model, of what `for_reading` returned."""
    layers = {name: Layers(x) if isinstance(x, tuple) else x for name, x in params.items()}
    return bind(model, layers)


def in_compute_dtype(model: Model, params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """`params` with every matrix that is multiplied in the compute dtype, once for all tokens.

    The model casts them anyway, but inside the loop. What it uses in float32 stays: gains, biases,
    the router of a mixture of experts, and embeddings but for tokens that are also the output head.
    """
    dtype = compute_dtype(model.config.compute_dtype)

    def multiplied(name: str, spec: ParamSpec) -> bool:
        if name == "embedding.tokens":
            return model.config.tie_embeddings
        own = name.rpartition(".")[2]
        stays = own in _FLOAT32 or own.endswith("bias")
        return not stays and len(set(spec.axes) - {"layers"}) >= 2

    return {
        name: jnp.asarray(params[name], dtype if multiplied(name, spec) else None)
        for name, spec in param_specs(model).items()
    }


def check_ids(name: str, ids: Sequence[int], config: ModelConfig) -> None:
    """Raises ConfigError unless the model can read `ids`; `name` says what they are."""
    check(len(ids) >= 1, f"{name}='' must have at least one token to start from")
    check(
        len(ids) <= config.max_length,
        f"{name} is {len(ids)} tokens long, but the model's context is {config.max_length}: "
        f"shorten it by {len(ids) - config.max_length}, or train with a larger "
        "config.model.max_length",
    )
    check(
        min(ids) >= 0 and max(ids) < config.vocab_size,
        f"{name} has token ids outside 0 … {config.vocab_size - 1}: they come from another "
        "tokenizer",
    )


class Prompt(NamedTuple):
    """What a batch of P continuations starts from."""

    tokens_PT: np.ndarray  # what the decoder reads
    positions_PT: np.ndarray  # -1: padding
    source_PS: np.ndarray | None = None  # what an encoder-decoder's encoder reads
    segments_PS: np.ndarray | None = None  # 1, or 0: padding


def padded(prompts: Sequence[Sequence[int]], context: int) -> tuple[np.ndarray, np.ndarray]:
    """The prompts as rows of tokens and positions, int32 [P, T], padding (position -1) first.

    T is the longest prompt's length rounded up; see `rounded`.
    """
    length = rounded(max(map(len, prompts)), context)
    tokens_PT = np.zeros((len(prompts), length), np.int32)
    positions_PT = np.full((len(prompts), length), -1, np.int32)
    for row, ids in enumerate(prompts):
        tokens_PT[row, length - len(ids) :] = ids
        positions_PT[row, length - len(ids) :] = np.arange(len(ids))
    return tokens_PT, positions_PT


def padded_after(texts: Sequence[Sequence[int]], context: int) -> tuple[np.ndarray, np.ndarray]:
    """The texts as rows of tokens and segments (1, or 0 for padding), int32 [N, S], padding last.

    For what is read at once, an encoder's texts: a token's place in its row is its position.
    """
    length = rounded(max(map(len, texts)), context)
    tokens_NS = np.zeros((len(texts), length), np.int32)
    segments_NS = np.zeros((len(texts), length), np.int32)
    for row, ids in enumerate(texts):
        tokens_NS[row, : len(ids)] = ids
        segments_NS[row, : len(ids)] = 1
    return tokens_NS, segments_NS


def rounded(length: int, context: int) -> int:
    """`length`, up to a power of two and from 64 on to a multiple of 64, but not past `context`."""
    up = round_up(length, 64) if length > 32 else max(8, 1 << (length - 1).bit_length())
    return max(length, min(up, context))


def round_up(number: int, multiple: int) -> int:
    """The next multiple of `multiple` from `number` up."""
    return -(-number // multiple) * multiple
