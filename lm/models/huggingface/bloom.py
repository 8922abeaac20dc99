"""BLOOM (Le Scao et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm.config import view
from lm.models.config import ModelConfig
from lm.models.huggingface.config_roundtrip import exact
from lm.models.huggingface.family import Family, Rule, demand, same, settings
from lm.models.huggingface.neox import fused_by_head
from lm.models.huggingface.parts import biased, norm, whole_heads

# What config.json leaves out has these values.
_DEFAULTS = {
    "vocab_size": 250_880,
    "hidden_size": 64,
    "n_layer": 2,
    "n_head": 8,
    "n_inner": None,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "apply_residual_connection_post_layernorm": False,
    "hidden_dropout": 0.0,
    "tie_word_embeddings": True,
    "seq_length": 2048,  # as long as it was trained for; nothing ends there
}
_OLD_NAMES = {
    "n_embed": "hidden_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
}
# Other dropout than that of the residual stream, and how to compute.
_INERT = (
    "attention_dropout", "attention_softmax_in_fp32", "bias_dropout_fusion", "offset_alibi",
    "masked_softmax_fusion", "pretraining_tp", "skip_bias_add", "skip_bias_add_qkv",
    "slow_but_exact",
)  # fmt: skip


def _read_config(hf: Mapping[str, Any]) -> ModelConfig:
    values = settings({_OLD_NAMES.get(name, name): v for name, v in hf.items()}, _DEFAULTS, _INERT)
    whole_heads(values, "hidden_size", "n_head")
    demand(values, "n_inner", None, 4 * values["hidden_size"])
    demand(values, "apply_residual_connection_post_layernorm", False)
    fields = {
        "num_layers": values["n_layer"],
        "num_heads": values["n_head"],
        "width": values["hidden_size"],
        "vocab_size": values["vocab_size"],
        "max_length": values["seq_length"],
        "tie_embeddings": values["tie_word_embeddings"],
        "embedding_norm": True,
        "positions": "alibi",
        "norm": "layernorm",
        "norm_epsilon": values["layer_norm_epsilon"],
        "activation": "gelu_tanh",
        "bias": True,
        "dropout": values["hidden_dropout"],
        "initializer": "normal",
        "initializer_std": values["initializer_range"],
    }
    return view(ModelConfig, fields, "config.json")


def _write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "layer_norm_epsilon": config.norm_epsilon,
        "initializer_range": config.initializer_std,
        "apply_residual_connection_post_layernorm": False,
        "hidden_dropout": config.dropout,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "seq_length": config.max_length,
    }


def _rules(config: ModelConfig) -> list[Rule]:
    block = "transformer.h.{layer}"
    return [
        same("embedding.tokens", "transformer.word_embeddings.weight"),
        *norm("embedding.norm", "transformer.word_embeddings_layernorm"),
        *norm("blocks.attention_norm", f"{block}.input_layernorm"),
        *fused_by_head(f"{block}.self_attention.query_key_value"),
        *biased("blocks.attention.output", f"{block}.self_attention.dense", 2),
        *norm("blocks.mlp_norm", f"{block}.post_attention_layernorm"),
        *biased("blocks.mlp.up", f"{block}.mlp.dense_h_to_4h"),
        *biased("blocks.mlp.down", f"{block}.mlp.dense_4h_to_h"),
        *norm("final_norm", "transformer.ln_f"),
        *([] if config.tie_embeddings else [same("head", "lm_head.weight")]),
    ]


def _aliases(config: ModelConfig) -> dict[str, str]:
    return {"lm_head.weight": "transformer.word_embeddings.weight"} if config.tie_embeddings else {}


BLOOM = Family(
    model_type="bloom",
    architectures=("BloomForCausalLM", "BloomModel"),
    read_config=_read_config,
    write_config=exact(_read_config, _write_config),
    rules=_rules,
    base_prefix="transformer.",
    aliases=_aliases,
)

FAMILIES = (BLOOM,)
