"""BART (Lewis et al. 2020) as Hugging Face writes it.

Its logits have a bias that is no parameter there but a buffer, of zeros in the published models:
only where it is something else does it become our output bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lm.config import check
from lm.models.config import ModelConfig
from lm.models.huggingface.family import Family, Rule, demand, same, settings
from lm.models.huggingface.parts import (
    activation,
    activation_name,
    attention,
    biased,
    norm,
    whole_heads,
    written,
)

_OFFSET = 2  # rows of the position tables before position 0
_EPSILON = 1e-5  # of its norms; config.json does not say

# What config.json leaves out has these values.
_DEFAULTS = {
    "vocab_size": 50_265,
    "max_position_embeddings": 1024,
    "encoder_layers": 12,
    "encoder_ffn_dim": 4096,
    "encoder_attention_heads": 16,
    "decoder_layers": 12,
    "decoder_ffn_dim": 4096,
    "decoder_attention_heads": 16,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "activation_function": "gelu",
    "d_model": 1024,
    "dropout": 0.1,
    "init_std": 0.02,
    "scale_embedding": False,
    "tie_word_embeddings": True,
    # Of the first files, which one class read for several models.
    "normalize_before": False,
    "normalize_embedding": True,
    "add_final_layer_norm": False,
    "add_bias_logits": False,
    "static_position_embeddings": False,
    "extra_pos_embeddings": _OFFSET,
}
# Other dropout than the residual stream's, and settings of generation.
_INERT = (
    "attention_dropout", "activation_dropout", "classif_dropout", "num_hidden_layers",
    "force_bos_token_to_be_generated",
)  # fmt: skip


def _read_config(hf: Mapping[str, Any]) -> ModelConfig:
    values = settings(hf, _DEFAULTS, _INERT)
    for name in ("encoder_layerdrop", "decoder_layerdrop"):
        demand(values, name, 0)
    for name in list(_DEFAULTS)[-6:]:
        demand(values, name, _DEFAULTS[name])
    for part in ("ffn_dim", "attention_heads"):
        encoder, decoder = values[f"encoder_{part}"], values[f"decoder_{part}"]
        check(
            encoder == decoder,
            f"config.json: encoder_{part}={encoder} and decoder_{part}={decoder} must be the same",
        )
    whole_heads(values, "d_model", "encoder_attention_heads")
    return ModelConfig(
        architecture="encoder_decoder",
        num_layers=values["decoder_layers"],
        num_encoder_layers=values["encoder_layers"],
        num_heads=values["encoder_attention_heads"],
        width=values["d_model"],
        mlp_width=values["encoder_ffn_dim"],
        vocab_size=values["vocab_size"],
        max_length=values["max_position_embeddings"],
        tie_embeddings=values["tie_word_embeddings"],
        embedding_scale=0.0 if values["scale_embedding"] else 1.0,
        embedding_norm=True,
        positions="learned",
        position_offset=_OFFSET,
        norm="layernorm",
        norm_position="post",
        norm_epsilon=_EPSILON,
        activation=activation(values["activation_function"], "activation_function"),
        bias=True,
        dropout=values["dropout"],
        initializer="normal",
        initializer_std=values["init_std"],
    )


def _write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "encoder_layers": config.encoder_layers,
        "encoder_ffn_dim": config.feed_forward,
        "encoder_attention_heads": config.num_heads,
        "decoder_layers": config.num_layers,
        "decoder_ffn_dim": config.feed_forward,
        "decoder_attention_heads": config.num_heads,
        "activation_function": activation_name(config.activation),
        "d_model": config.width,
        "dropout": config.dropout,
        "attention_dropout": config.dropout,
        "init_std": config.initializer_std,
        "scale_embedding": config.embedding_scale == 0,
        "tie_word_embeddings": config.tie_embeddings,
        "is_encoder_decoder": True,
    }


def _stack(ours: str, embedding: str, theirs: str, crosses: bool) -> list[Rule]:
    """The encoder or the decoder, with its positions and the norm of its embeddings."""
    layer = f"{theirs}.layers.{{layer}}"

    def attend(name: str, where: str) -> list[Rule]:
        parts = (f"{where}.{part}_proj" for part in ("q", "k", "v", "out"))
        return attention(f"{ours}blocks.{name}", *parts)

    rules = [
        same(f"{embedding}.positions", f"{theirs}.embed_positions.weight"),
        *norm(f"{embedding}.norm", f"{theirs}.layernorm_embedding"),
        *attend("attention", f"{layer}.self_attn"),
        *norm(f"{ours}blocks.attention_norm", f"{layer}.self_attn_layer_norm"),
        *biased(f"{ours}blocks.mlp.up", f"{layer}.fc1"),
        *biased(f"{ours}blocks.mlp.down", f"{layer}.fc2"),
        *norm(f"{ours}blocks.mlp_norm", f"{layer}.final_layer_norm"),
    ]
    if crosses:
        rules += attend("cross_attention", f"{layer}.encoder_attn")
        rules += norm(f"{ours}blocks.cross_norm", f"{layer}.encoder_attn_layer_norm")
    return rules


def _output_bias() -> Rule:
    """[V] here, [1, V] there."""
    return Rule(
        ("head_bias",),
        ("final_logits_bias",),
        lambda tensors, shapes: [tensors[0].reshape(shapes[0])],
        lambda arrays: [arrays[0][None]],
    )


def _rules(config: ModelConfig) -> list[Rule]:
    return [
        same("embedding.tokens", "model.shared.weight"),
        *_stack("encoder.", "encoder_embedding", "model.encoder", False),
        *_stack("", "embedding", "model.decoder", True),
        *([] if config.tie_embeddings else [same("head", "lm_head.weight")]),
        *([_output_bias()] if config.head_bias else []),
    ]


def _aliases(config: ModelConfig) -> dict[str, str]:
    copies = ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"]
    copies += ["lm_head.weight"] if config.tie_embeddings else []
    return dict.fromkeys(copies, "model.shared.weight")


def _settle(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> ModelConfig:
    biased = "final_logits_bias" in tensors and bool(np.any(tensors["final_logits_bias"]))
    tied = config.tie_embeddings or "lm_head.weight" not in tensors
    return dataclasses.replace(config, head_bias=biased, tie_embeddings=tied)


BART = Family(
    model_type="bart",
    architectures=("BartForConditionalGeneration", "BartModel"),
    read_config=_read_config,
    write_config=written(_read_config, _write_config, "head_bias"),
    rules=_rules,
    base_prefix="model.",
    aliases=_aliases,
    ignored=(r"^final_logits_bias$", r"(en|de)coder\.version$"),
    settle=_settle,
)

FAMILIES = (BART,)
