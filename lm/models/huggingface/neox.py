"""GPT-NeoX (Black et al. 2022) and Pythia (Biderman et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lm.config import view
from lm.models.config import ModelConfig
from lm.models.huggingface.config_roundtrip import exact
from lm.models.huggingface.family import (
    Arrays,
    Family,
    Rule,
    Shapes,
    same,
    settings,
)
from lm.models.huggingface.parts import activation, activation_name, biased, norm, whole_heads
from lm.models.huggingface.rope import ROPE_FIELDS, read_rotary, write_rotary

# What config.json leaves out has these values.
_DEFAULTS = {
    "vocab_size": 50_432,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24_576,
    "hidden_act": "gelu",
    "hidden_dropout": 0.0,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "attention_bias": True,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10_000.0,
    **ROPE_FIELDS,
}
_UNREAD = {"rope_theta": None, "partial_rotary_factor": None}
# Other dropout than that of the residual stream.
_INERT = ("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob")


def _read_config(hf: Mapping[str, Any]) -> ModelConfig:
    values = settings(hf, _DEFAULTS, _INERT)
    whole_heads(values, "hidden_size", "num_attention_heads")
    fields = {
        "num_layers": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "width": values["hidden_size"],
        "mlp_width": values["intermediate_size"],
        "vocab_size": values["vocab_size"],
        "max_length": values["max_position_embeddings"],
        "tie_embeddings": values["tie_word_embeddings"],
        "norm": "layernorm",
        "norm_epsilon": values["layer_norm_eps"],
        "parallel": values["use_parallel_residual"],
        "activation": activation(values["hidden_act"], "hidden_act"),
        "bias": True,
        "qkv_bias": values["attention_bias"],
        "attention_bias": values["attention_bias"],
        "dropout": values["hidden_dropout"],
        "initializer": "normal",
        "initializer_std": values["initializer_range"],
        # Outside rope_parameters the base and the fraction have these names alone.
        **read_rotary({**values, **_UNREAD}, values["rotary_emb_base"], values["rotary_pct"]),
    }
    return view(ModelConfig, fields, "config.json")


def _write_config(config: ModelConfig) -> dict[str, Any]:
    rotary = write_rotary(config)
    del rotary["rope_theta"]  # here called rotary_emb_base
    # Silence would mean a quarter.
    rotary["rope_parameters"]["partial_rotary_factor"] = config.rotary_fraction
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.feed_forward,
        "hidden_act": activation_name(config.activation),
        "attention_dropout": config.dropout,
        "hidden_dropout": config.dropout,
        "max_position_embeddings": config.max_length,
        "initializer_range": config.initializer_std,
        "layer_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "use_parallel_residual": config.parallel,
        "attention_bias": config.has_bias("qkv"),
        "rotary_pct": config.rotary_fraction,
        "rotary_emb_base": config.rotary_base,
        **rotary,
    }


def fused_by_head(theirs: str, bias: bool = True) -> list[Rule]:
    """Queries, keys and values in one layer, each head's three together: outputs [H, 3, C]."""
    parts = ("query", "key", "value")

    def load_weight(tensors: Arrays, shapes: Shapes) -> Arrays:
        width, heads, head_width = shapes[0]
        stacked = tensors[0].reshape(heads, 3, head_width, width)
        return [np.moveaxis(stacked[:, part], -1, 0) for part in range(3)]

    def save_weight(arrays: Arrays) -> Arrays:
        stacked = np.stack(arrays, 2)  # [D, H, 3, C]
        return [np.ascontiguousarray(stacked.reshape(len(stacked), -1).T)]

    def load_bias(tensors: Arrays, shapes: Shapes) -> Arrays:
        heads, head_width = shapes[0]
        stacked = tensors[0].reshape(heads, 3, head_width)
        return [stacked[:, part] for part in range(3)]

    weights = tuple(f"blocks.attention.{part}" for part in parts)
    biases = tuple(f"{name}_bias" for name in weights)
    rules = [Rule(weights, (f"{theirs}.weight",), load_weight, save_weight)]
    if bias:
        save_bias = lambda arrays: [np.stack(arrays, 1).reshape(-1)]  # noqa: E731
        rules.append(Rule(biases, (f"{theirs}.bias",), load_bias, save_bias))
    return rules


def _rules(config: ModelConfig) -> list[Rule]:
    block = "gpt_neox.layers.{layer}"
    head = [] if config.tie_embeddings else [same("head", "embed_out.weight")]
    return [
        same("embedding.tokens", "gpt_neox.embed_in.weight"),
        *norm("blocks.attention_norm", f"{block}.input_layernorm"),
        *fused_by_head(f"{block}.attention.query_key_value", config.has_bias("qkv")),
        *biased(
            "blocks.attention.output", f"{block}.attention.dense", 2, config.has_bias("attention")
        ),
        *norm("blocks.mlp_norm", f"{block}.post_attention_layernorm"),
        *biased("blocks.mlp.up", f"{block}.mlp.dense_h_to_4h"),
        *biased("blocks.mlp.down", f"{block}.mlp.dense_4h_to_h"),
        *norm("final_norm", "gpt_neox.final_layer_norm"),
        *head,
    ]


def _aliases(config: ModelConfig) -> dict[str, str]:
    return {"embed_out.weight": "gpt_neox.embed_in.weight"} if config.tie_embeddings else {}


NEOX = Family(
    model_type="gpt_neox",
    architectures=("GPTNeoXForCausalLM", "GPTNeoXModel"),
    read_config=_read_config,
    write_config=exact(_read_config, _write_config),
    rules=_rules,
    base_prefix="gpt_neox.",
    aliases=_aliases,
    ignored=(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",),
    renamed=((r"^lm_head\.", "embed_out."),),
)

FAMILIES = (NEOX,)
