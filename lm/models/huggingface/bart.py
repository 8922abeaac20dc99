"""BART (Lewis et al. 2020) as Hugging Face writes it.

Its logits have a bias that is no parameter there but a buffer, of zeros in the published models:
only where it is something else does it become our output bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from lm.models.config import ModelConfig
from lm.models.huggingface.config_fields import Field, activation, only
from lm.models.huggingface.family import Family
from lm.models.huggingface.name_map import Rule, Table


def _stack(ours: str, embedding: str, theirs: str) -> Table:
    """The encoder or the decoder, with its positions and the norm of its embeddings."""
    layer = f"{theirs}.layers.{{layer}}"
    return {
        f"{embedding}.positions": f"{theirs}.embed_positions.weight",
        f"{embedding}.norm": f"{theirs}.layernorm_embedding",
        f"{ours}blocks.attention.query": f"{layer}.self_attn.q_proj",
        f"{ours}blocks.attention.key": f"{layer}.self_attn.k_proj",
        f"{ours}blocks.attention.value": f"{layer}.self_attn.v_proj",
        f"{ours}blocks.attention.output": f"{layer}.self_attn.out_proj",
        f"{ours}blocks.attention_norm": f"{layer}.self_attn_layer_norm",
        f"{ours}blocks.mlp.up": f"{layer}.fc1",
        f"{ours}blocks.mlp.down": f"{layer}.fc2",
        f"{ours}blocks.mlp_norm": f"{layer}.final_layer_norm",
        f"{ours}blocks.cross_attention.query": f"{layer}.encoder_attn.q_proj",
        f"{ours}blocks.cross_attention.key": f"{layer}.encoder_attn.k_proj",
        f"{ours}blocks.cross_attention.value": f"{layer}.encoder_attn.v_proj",
        f"{ours}blocks.cross_attention.output": f"{layer}.encoder_attn.out_proj",
        f"{ours}blocks.cross_norm": f"{layer}.encoder_attn_layer_norm",
    }


def _settle(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> ModelConfig:
    biased = "final_logits_bias" in tensors and bool(np.any(tensors["final_logits_bias"]))
    tied = config.tie_embeddings or "lm_head.weight" not in tensors
    return dataclasses.replace(config, head_bias=biased, tie_embeddings=tied)


_BART = Family(
    "bart",
    ("BartForConditionalGeneration", "BartModel"),
    constants={
        "architecture": "encoder_decoder", "embedding_norm": True, "positions": "learned",
        "position_offset": 2, "norm": "layernorm", "norm_position": "post", "norm_epsilon": 1e-5,
        "bias": True, "initializer": "normal",
    },
    fields={
        "vocab_size": Field("vocab_size", 50_265),
        "d_model": Field("width", 1024),
        "encoder_layers": Field("num_encoder_layers", 12),
        "decoder_layers": Field("num_layers", 12),
        "encoder_ffn_dim": Field("mlp_width", 4096),
        "decoder_ffn_dim": Field("mlp_width", 4096),
        "encoder_attention_heads": Field("num_heads", 16),
        "decoder_attention_heads": Field("num_heads", 16),
        "max_position_embeddings": Field("max_length", 1024),
        "activation_function": activation("gelu"),
        "scale_embedding": Field(
            "embedding_scale", False,
            lambda name, scaled: 0.0 if scaled else 1.0, lambda scale: scale != 1,
        ),
        "dropout": Field("dropout", 0.1),
        "init_std": Field("initializer_std", 0.02),
        "tie_word_embeddings": Field("tie_embeddings", True),
        "encoder_layerdrop": only(0.0),
        "decoder_layerdrop": only(0.0),
        # Of the first files, which one class read for several models.
        "normalize_before": only(False),
        "normalize_embedding": only(True),
        "add_final_layer_norm": only(False),
        "add_bias_logits": only(False),
        "static_position_embeddings": only(False),
        "extra_pos_embeddings": only(2),
    },
    # Other dropout than the residual stream's, and settings of generation.
    inert=(
        "attention_dropout", "activation_dropout", "classif_dropout", "num_hidden_layers",
        "force_bos_token_to_be_generated",
    ),
    written=lambda config: {"attention_dropout": config.dropout, "is_encoder_decoder": True},
    tensors={
        "embedding.tokens": (
            "model.shared.weight model.encoder.embed_tokens.weight "
            "model.decoder.embed_tokens.weight"
        ),
        **_stack("encoder.", "encoder_embedding", "model.encoder"),
        **_stack("", "embedding", "model.decoder"),
        "head": "lm_head.weight",
        "head_bias": Rule(  # [V] here, [1, V] there
            ("head_bias",),
            ("final_logits_bias",),
            lambda tensors, shapes: [tensors[0].reshape(shapes[0])],
            lambda arrays: [arrays[0][None]],
        ),
    },
    unsaid=("head_bias",),
    settle=_settle,
    base_prefix="model.",
    ignored=(r"^final_logits_bias$", r"(en|de)coder\.version$"),
)  # fmt: skip

FAMILIES = (_BART,)
