"""GPT-2 (Radford et al. 2019) as Hugging Face writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lm.models.config import ModelConfig
from lm.models.huggingface.config_roundtrip import exact
from lm.models.huggingface.family import Arrays, Family, Rule, Shapes, demand, same, settings
from lm.models.huggingface.parts import activation, activation_name

# What config.json leaves out has these values.
_DEFAULTS = {
    "vocab_size": 50_257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "resid_pdrop": 0.1,
    "initializer_range": 0.02,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
# Besides dropout elsewhere, that of the residual stream being ours: the precision of scores, which
# are always float32 here, and the head of a class that we do not read.
_INERT = (
    "embd_pdrop", "attn_pdrop", "n_ctx", "reorder_and_upcast_attn", "summary_type",
    "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
)  # fmt: skip


def _read_config(hf: Mapping[str, Any]) -> ModelConfig:
    values = settings(hf, _DEFAULTS, _INERT)
    demand(values, "scale_attn_weights", True)
    demand(values, "scale_attn_by_inverse_layer_idx", False)
    return ModelConfig(
        num_layers=values["n_layer"],
        num_heads=values["n_head"],
        width=values["n_embd"],
        mlp_width=values["n_inner"],
        vocab_size=values["vocab_size"],
        max_length=values["n_positions"],
        tie_embeddings=values["tie_word_embeddings"],
        positions="learned",
        norm="layernorm",
        norm_epsilon=values["layer_norm_epsilon"],
        activation=activation(values["activation_function"], "activation_function"),
        bias=True,
        dropout=values["resid_pdrop"],
        initializer="gpt2",
        initializer_std=values["initializer_range"],
    )


def _write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_length,
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_width,
        "activation_function": activation_name(config.activation),
        "layer_norm_epsilon": config.norm_epsilon,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "initializer_range": config.initializer_std,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _dense(ours: str, theirs: str) -> Rule:
    """A layer whose weights are [inputs, outputs] there as here (`Conv1D`)."""

    def load(tensors: Arrays, shapes: Shapes) -> Arrays:
        return [tensors[0].reshape(shapes[0])]

    def save(arrays: Arrays) -> Arrays:
        return [arrays[0].reshape(-1, arrays[0].shape[-1])]

    return Rule((ours,), (theirs,), load, save)


def _fused(ours: list[str], theirs: str) -> Rule:
    """Queries, keys and values side by side in one tensor: weights [D, 3D], biases [3D]."""

    def load(tensors: Arrays, shapes: Shapes) -> Arrays:
        parts = np.split(tensors[0], len(ours), -1)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def save(arrays: Arrays) -> Arrays:
        # The last two dimensions are heads and their width.
        flat = [array.reshape(*array.shape[:-2], -1) for array in arrays]
        return [np.concatenate(flat, -1)]

    return Rule(tuple(ours), (theirs,), load, save)


def _rules(config: ModelConfig) -> list[Rule]:
    block = "transformer.h.{layer}"
    parts = ("query", "key", "value")
    head = [] if config.tie_embeddings else [same("head", "lm_head.weight")]
    return [
        same("embedding.tokens", "transformer.wte.weight"),
        same("embedding.positions", "transformer.wpe.weight"),
        same("blocks.attention_norm.scale", f"{block}.ln_1.weight"),
        same("blocks.attention_norm.bias", f"{block}.ln_1.bias"),
        _fused([f"blocks.attention.{part}" for part in parts], f"{block}.attn.c_attn.weight"),
        _fused([f"blocks.attention.{part}_bias" for part in parts], f"{block}.attn.c_attn.bias"),
        _dense("blocks.attention.output", f"{block}.attn.c_proj.weight"),
        same("blocks.attention.output_bias", f"{block}.attn.c_proj.bias"),
        same("blocks.mlp_norm.scale", f"{block}.ln_2.weight"),
        same("blocks.mlp_norm.bias", f"{block}.ln_2.bias"),
        _dense("blocks.mlp.up", f"{block}.mlp.c_fc.weight"),
        same("blocks.mlp.up_bias", f"{block}.mlp.c_fc.bias"),
        _dense("blocks.mlp.down", f"{block}.mlp.c_proj.weight"),
        same("blocks.mlp.down_bias", f"{block}.mlp.c_proj.bias"),
        same("final_norm.scale", "transformer.ln_f.weight"),
        same("final_norm.bias", "transformer.ln_f.bias"),
        *head,
    ]


def _aliases(config: ModelConfig) -> dict[str, str]:
    return {"lm_head.weight": "transformer.wte.weight"} if config.tie_embeddings else {}


GPT2 = Family(
    model_type="gpt2",
    architectures=("GPT2LMHeadModel", "GPT2Model"),
    read_config=_read_config,
    write_config=exact(_read_config, _write_config),
    rules=_rules,
    base_prefix="transformer.",
    aliases=_aliases,
    ignored=(r"\.attn\.(bias|masked_bias)$",),
)

FAMILIES = (GPT2,)
