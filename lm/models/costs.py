"""What a model costs to run, from its declarations alone: parameters, FLOPs and cache.

FLOPs of a token, the one definition behind every MFU this project reports:

    forward   2 × (every parameter that multiplies it) + 4·H·C × (the keys it sees), each attention;
              with values of another width V, 2·H·(C + V)
    training  3 × forward

A parameter that multiplies is one of a projection, of a recurrent cell or of the output head, tied
or not. Embedding look-ups, gains, biases and position biases do not multiply; softmax, norms,
activation functions and what a remat policy recomputes are not counted. Of experts only those that
a token visits count, with the shared ones and the router. The keys' term is attention's scores and
its mixing of values, 2·H·C each for every key a query sees: under the causal mask (T+1)/2 of T on
average, at most the window in a local layer, all T in an encoder or those in its window on either
side, all S of the source in cross-attention. (Chowdhery et al. 2022, appendix B, has the same sum
with all T keys.)

A token of an encoder-decoder is one of the target, and carries its share of the source: what a
source of S tokens costs in the encoder, and in the keys and values of cross-attention, is divided
by T. A forward pass ends in the logits of every token, or of those alone that are predicted, where
they are a few of many (BERT's masked ones); or in a classifier.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from lm.models import ModelConfig, param_specs, skeleton
from lm.parallel.sharding import ParamSpec

_TABLES = ("tokens", "positions", "types")  # looked up, of `embedding` and `encoder_embedding`

# ---- Parameters ------------------------------------------------------------------------------


class Parameters(NamedTuple):
    """How many there are."""

    total: int
    embedding: int  # tables of tokens, positions and types, and an untied head
    active: int  # all but the experts that a token does not visit

    @property
    def non_embedding(self) -> int:
        """The parameters of blocks, norms and small heads."""
        return self.total - self.embedding


def parameters(config: ModelConfig, specs: Mapping[str, ParamSpec] | None = None) -> Parameters:
    """The parameters of a model, tied ones counted once."""
    specs = param_specs(skeleton(config)) if specs is None else specs
    return Parameters(
        sum(spec.size for spec in specs.values()),
        sum(spec.size for name, spec in specs.items() if _is_table(name) or name == "head"),
        sum(round(spec.size * _share(config, spec)) for spec in specs.values()),
    )


def _is_table(name: str) -> bool:
    place, _, last = name.rpartition(".")
    return place in ("embedding", "encoder_embedding") and last in _TABLES


def _inner_axes(spec: ParamSpec) -> tuple[str | None, ...]:
    return spec.axes[1:] if spec.axes[:1] == ("layers",) else spec.axes


def _share(config: ModelConfig, spec: ParamSpec) -> float:
    """Which share of a parameter a token meets: of the weights of E experts, k of E."""
    routed = _inner_axes(spec)[:1] == ("expert",)
    return config.experts_per_token / config.num_experts if routed else 1.0


# ---- FLOPs -----------------------------------------------------------------------------------


class Multiplying(NamedTuple):
    """Parameters that multiply, by what they multiply."""

    token: float  # every token; of an encoder-decoder, of the target
    source: float  # every source token
    head: float  # every token that logits are made of
    row: float  # one vector a row: pooler and classifier of sequences, a recurrent decoder's start


def multiplying(config: ModelConfig, specs: Mapping[str, ParamSpec] | None = None) -> Multiplying:
    """The parameters that multiply activations, those of experts by the share a token meets."""
    specs = param_specs(skeleton(config)) if specs is None else specs
    sums = dict.fromkeys(Multiplying._fields, 0.0)
    for name, spec in specs.items():
        part = _part(config, name, spec)
        if part:
            sums[part] += spec.size * _share(config, spec)
    return Multiplying(**sums)


def _part(config: ModelConfig, name: str, spec: ParamSpec) -> str | None:
    """The field of `Multiplying` that a parameter counts in; None: it does not multiply."""
    last = name.rpartition(".")[2]
    if config.tie_embeddings and name == "embedding.tokens":
        last = "head"
    elif len(_inner_axes(spec)) < 2 or "bias" in last or last == "scale" or _is_table(name):
        return None
    through = ("head_transform.",) if config.classifier_transform else ()
    if name.startswith(("pooler.", "classifier.", *through)):
        if config.classifier == "none":
            return None
        return "token" if config.classifier == "token" and name[0] != "p" else "row"
    if last == "head" or name.startswith("head_transform."):
        alone = config.classifier == "none" or config.architecture == "decoder"
        return "head" if config.has_output_head and alone else None
    crosses = "cross_attention." in name and last in ("key", "value")
    if name.startswith("encoder.") or crosses or name == "attention.key":
        return "source"
    return "row" if last == "start" else "token"


def _attention(
    config: ModelConfig, keys: float, window_keys: float, source_keys: float, cached: bool = False
) -> float:
    """FLOPs of a token's attention in all layers of the decoder, or of an encoder by itself.

    A token sees `keys` in a global layer, `window_keys` in a local one, and `source_keys` across.
    Of a latent that is `cached`, every head reads all, for scores and as values.
    """
    if config.cell != "attention":
        # Additive attention, once for all layers: v·tanh(…) and the mean are 2·width a key each.
        return 4 * config.width * source_keys if config.cross_attention else 0.0
    local = sum(config.is_local(layer) for layer in range(config.num_layers))
    seen = (config.num_layers - local) * keys + local * window_keys
    seen += config.num_layers * source_keys
    read = 2 * config.cached_width if cached else config.head_width + config.value_width
    return 2 * config.num_heads * read * seen


def mean_keys(length: int, window: int, causal: bool = True) -> float:
    """Keys that a token sees on average, of the last `window`, and unless `causal` of the next."""
    reach = min(length, window)
    before = (reach * (reach + 1) / 2 + (length - reach) * reach) / length
    return before if causal else 2 * before - 1  # its own counts once


def _source_flops(config: ModelConfig, weights: Multiplying, length: int) -> float:
    """FLOPs of a source token of an encoder-decoder."""
    attention = 0.0
    if config.cell == "attention":
        attention = config.encoder_layers * 4 * config.num_heads * config.head_width * length
    return 2 * weights.source + attention


def _sequence_flops(
    config: ModelConfig, length: int, source_length: int | None, logits: int
) -> tuple[float, float]:
    """FLOPs of a source, and of a sequence of which `logits` tokens get logits."""
    weights = multiplying(config)
    both = config.architecture == "encoder_decoder"
    source_length = (length if source_length is None else source_length) if both else 0
    causal = config.architecture != "encoder"
    keys = mean_keys(length, length, causal)
    window_keys = mean_keys(length, config.window or length, causal)
    attention = _attention(config, keys, window_keys, source_length)
    target = length * (2 * weights.token + attention) + 2 * logits * weights.head
    return source_length * _source_flops(config, weights, source_length), target + 2 * weights.row


def forward_flops_per_token(
    config: ModelConfig, block_size: int, source_length: int | None = None, max_targets: int = 0
) -> float:
    """FLOPs of the forward pass for each token of a sequence of `block_size`.

    Args:
      config: with vocab_size and max_length set.
      block_size: tokens a sequence; of an encoder-decoder, of its target.
      source_length: tokens of an encoder-decoder's source; `block_size` unless given.
      max_targets: of how many tokens logits are made, where only some are predicted (BERT's
        masked ones); 0: of all.
    """
    logits = min(max_targets or block_size, block_size)
    return sum(_sequence_flops(config, block_size, source_length, logits)) / block_size


def training_flops_per_token(
    config: ModelConfig, block_size: int, source_length: int | None = None, max_targets: int = 0
) -> float:
    """FLOPs of forward and backward passes for each token: both operands of every product get a
    gradient, each of which is a product of the same size. Arguments as for the forward pass."""
    return 3 * forward_flops_per_token(config, block_size, source_length, max_targets)


def prefill_flops_per_token(config: ModelConfig, context: int) -> float:
    """FLOPs of each of `context` tokens read before the first is written.

    A decoder makes logits of the last one alone. What an encoder-decoder reads is its source.
    """
    if config.architecture == "encoder_decoder":
        return _source_flops(config, multiplying(config), context)
    logits = context if config.architecture == "encoder" else 1
    return sum(_sequence_flops(config, context, None, logits)) / context


def decode_flops_per_token(
    config: ModelConfig, context: int, source_length: int | None = None
) -> float:
    """FLOPs of writing a token that sees `context` tokens, its own included, through a cache.

    An encoder-decoder's source is as long as `context` unless `source_length` is given.
    """
    weights = multiplying(config)
    both = config.architecture == "encoder_decoder"
    source_length = (context if source_length is None else source_length) if both else 0
    window_keys = min(context, config.window or context)
    attention = _attention(config, context, window_keys, source_length, cached=True)
    return 2 * (weights.token + weights.head) + attention


# ---- Cache -----------------------------------------------------------------------------------


def cache_bytes(
    config: ModelConfig, context: int, dtype: Any = "float32", source_length: int = 0
) -> int:
    """Bytes that decoding must remember of one sequence.

    Keys and values of `context` tokens, in a local layer of its window alone, and of the source
    in cross-attention; of recurrent cells their state, whatever the length, and what attention
    reads of the source; of latent attention latents and shared keys. An encoder remembers nothing.
    """
    if config.architecture == "encoder":
        return 0
    itemsize = jnp.dtype(dtype).itemsize
    both = config.architecture == "encoder_decoder"
    if config.cell != "attention":
        states = config.num_layers * (2 if config.cell == "lstm" else 1)
        looks = 2 * source_length if both and config.cross_attention else 0
        return 4 * states * config.width + itemsize * looks * config.width
    slots = sum(
        min(context, config.window) if config.is_local(layer) else context
        for layer in range(config.num_layers)
    )
    slots += config.num_layers * source_length if both else 0
    return slots * config.cached_numbers * itemsize


def checkpoint_bytes(specs: Mapping[str, ParamSpec], bits: int) -> int:
    """Bytes of all parameters at this many bits each; of int8 without the scales beside them."""
    return math.ceil(sum(spec.size for spec in specs.values()) * bits / 8)
