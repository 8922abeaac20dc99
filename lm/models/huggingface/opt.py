"""OPT (Zhang et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm.config import view
from lm.models.config import ModelConfig
from lm.models.huggingface.config_roundtrip import exact
from lm.models.huggingface.family import Family, Rule, demand, same, settings
from lm.models.huggingface.parts import (
    activation,
    activation_name,
    attention,
    biased,
    norm,
    whole_heads,
)

# What config.json leaves out has these values.
_DEFAULTS = {
    "vocab_size": 50_272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "word_embed_proj_dim": None,
    "dropout": 0.1,
    "num_attention_heads": 12,
    "activation_function": "relu",
    "init_std": 0.02,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
}
# Other dropout than that of the residual stream.
_INERT = ("attention_dropout", "activation_dropout", "layerdrop")


def _read_config(hf: Mapping[str, Any]) -> ModelConfig:
    values = settings(hf, _DEFAULTS, _INERT)
    whole_heads(values, "hidden_size", "num_attention_heads")
    demand(values, "word_embed_proj_dim", None, values["hidden_size"])
    demand(values, "layer_norm_elementwise_affine", True)
    before = values["do_layer_norm_before"]
    fields = {
        "num_layers": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "width": values["hidden_size"],
        "mlp_width": values["ffn_dim"],
        "vocab_size": values["vocab_size"],
        "max_length": values["max_position_embeddings"],
        "tie_embeddings": values["tie_word_embeddings"],
        "positions": "learned",
        "position_offset": 2,
        "norm": "layernorm",
        "norm_position": "pre" if before else "post",
        "norm_epsilon": 1e-5,
        "final_norm": before and not values["_remove_final_layer_norm"],
        "activation": activation(values["activation_function"], "activation_function"),
        "bias": values["enable_bias"],
        "norm_bias": True,
        "dropout": values["dropout"],
        "initializer": "normal",
        "initializer_std": values["init_std"],
    }
    return view(ModelConfig, fields, "config.json")


def _write_config(config: ModelConfig) -> dict[str, Any]:
    before = config.norm_position == "pre"
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "word_embed_proj_dim": config.width,
        "num_hidden_layers": config.num_layers,
        "ffn_dim": config.feed_forward,
        "max_position_embeddings": config.max_length,
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and not config.has_final_norm,
        "dropout": config.dropout,
        "attention_dropout": config.dropout,
        "num_attention_heads": config.num_heads,
        "activation_function": activation_name(config.activation),
        "init_std": config.initializer_std,
        "enable_bias": config.bias,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _rules(config: ModelConfig) -> list[Rule]:
    decoder, block = "model.decoder.", "model.decoder.layers.{layer}."
    heads = [f"{block}self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
    return [
        same("embedding.tokens", f"{decoder}embed_tokens.weight"),
        same("embedding.positions", f"{decoder}embed_positions.weight"),
        *norm("blocks.attention_norm", f"{block}self_attn_layer_norm"),
        *attention("blocks.attention", *heads, bias=config.bias),
        *norm("blocks.mlp_norm", f"{block}final_layer_norm"),
        *biased("blocks.mlp.up", f"{block}fc1", bias=config.bias),
        *biased("blocks.mlp.down", f"{block}fc2", bias=config.bias),
        *(norm("final_norm", f"{decoder}final_layer_norm") if config.has_final_norm else []),
        *([] if config.tie_embeddings else [same("head", "lm_head.weight")]),
    ]


def _aliases(config: ModelConfig) -> dict[str, str]:
    return {"lm_head.weight": "model.decoder.embed_tokens.weight"} if config.tie_embeddings else {}


OPT = Family(
    model_type="opt",
    architectures=("OPTForCausalLM", "OPTModel"),
    read_config=_read_config,
    write_config=exact(_read_config, _write_config),
    rules=_rules,
    base_prefix="model.",
    aliases=_aliases,
)

FAMILIES = (OPT,)
