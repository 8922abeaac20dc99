"""Llama and the models of its make: Mistral, Mixtral, Qwen 2 and 3. Gemma's are built on these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lm.config import check, check_choice, view
from lm.models.config import ModelConfig
from lm.models.huggingface.config_roundtrip import exact
from lm.models.huggingface.family import (
    Arrays,
    Family,
    Rule,
    Shapes,
    demand,
    linear,
    same,
    settings,
)
from lm.models.huggingface.parts import activation, activation_name, biased
from lm.models.huggingface.rope import ROPE_FIELDS, read_rotary, write_rotary

Json = Mapping[str, Any]

# ---- config.json -----------------------------------------------------------------------------

# What config.json leaves out has these values.
DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    **ROPE_FIELDS,
}
_LLAMA = {**DEFAULTS, "attention_bias": False, "mlp_bias": False}
_MISTRAL = {
    **DEFAULTS,
    "intermediate_size": 14_336,
    "max_position_embeddings": 131_072,
    "sliding_window": None,
    "layer_types": None,
}
_MIXTRAL = {**_MISTRAL, "rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2}
_QWEN2 = {
    **DEFAULTS,
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 28,
    "layer_types": None,
    "use_mrope": False,
}
_QWEN3 = {**_QWEN2, "attention_bias": False}
# Dropout of attention alone, which ours is not, and how to compute.
INERT = ("attention_dropout", "pretraining_tp", "cache_implementation")
_ROUTER_TRAINING = ("router_aux_loss_coef", "output_router_logits", "router_jitter_noise")


def common(values: Json, **own: Any) -> ModelConfig:
    """The ModelConfig of what all of these families have, and of a family's `own` fields."""
    fields = {
        "num_layers": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "num_kv_heads": values["num_key_value_heads"],
        "width": values["hidden_size"],
        "head_dim": values["head_dim"],
        "mlp_width": values["intermediate_size"],
        "vocab_size": values["vocab_size"],
        "max_length": values["max_position_embeddings"],
        "tie_embeddings": values["tie_word_embeddings"],
        "activation": activation(values["hidden_act"], "hidden_act", gated=True),
        "norm": "rmsnorm",
        "norm_epsilon": values["rms_norm_eps"],
        "initializer": "normal",
        "initializer_std": values["initializer_range"],
        **(own if "rotary_base" in own else {**read_rotary(values), **own}),
    }
    demand({"partial_rotary_factor": fields["rotary_fraction"]}, "partial_rotary_factor", 1)
    return view(ModelConfig, fields, "config.json")


def write(config: ModelConfig, **own: Any) -> dict[str, Any]:
    """config.json of what all of these families have, and a family's `own` fields."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": activation_name(config.activation),
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_epsilon,
        "initializer_range": config.initializer_std,
        "tie_word_embeddings": config.tie_embeddings,
        **write_rotary(config),
        **own,
    }


def attention_biases(values: Json) -> dict[str, bool]:
    """Biases in all four projections of attention, or in none."""
    return {"qkv_bias": values["attention_bias"], "attention_bias": values["attention_bias"]}


def layer_types(num_layers: int, is_local: Callable[[int], bool]) -> list[str]:
    """What layers 0, 1, … are called."""
    layers = range(num_layers)
    return ["sliding_attention" if is_local(layer) else "full_attention" for layer in layers]


def windows(values: Json, types: Sequence[str]) -> dict[str, Any]:
    """The shortest pattern that, repeated, gives every layer its type; and the window."""
    layers, names = values["num_hidden_layers"], ("full_attention", "sliding_attention")
    check(
        len(types) == layers,
        f"config.json: layer_types has {len(types)} entries, not num_hidden_layers={layers}",
    )
    for index, kind in enumerate(types):
        check_choice(f"config.json: layer_types[{index}]", kind, names)
    if "sliding_attention" not in types:
        return {}
    check(values["sliding_window"], "config.json: sliding_attention layers need a sliding_window")
    period = next(
        period
        for period in range(1, layers + 1)
        if all(types[layer] == types[layer % period] for layer in range(layers))
    )
    local = [kind == "sliding_attention" for kind in types[:period]]
    return {
        "attention_pattern": tuple("local" if is_local else "global" for is_local in local),
        "window": values["sliding_window"],
    }


def check_divided(config: ModelConfig) -> None:
    """Refuses what transformers does, though nothing depends on it where there is a head_dim."""
    check(
        config.width % config.num_heads == 0,
        f"config.model.width={config.width} must be a multiple of num_heads={config.num_heads} to "
        "be written for this Hugging Face family",
    )


def _read_llama(hf: Json) -> ModelConfig:
    values = settings(hf, _LLAMA, INERT)
    return common(values, bias=values["mlp_bias"], **attention_biases(values))


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    check_divided(config)
    return write(config, attention_bias=config.has_bias("qkv"), mlp_bias=config.bias)


def _uniform(values: Json) -> dict[str, Any]:
    """Mistral's window, which all layers have or none."""
    types = layer_types(values["num_hidden_layers"], lambda _: values["sliding_window"] is not None)
    demand(values, "layer_types", None, types)
    return windows(values, types)


def _read_mistral(hf: Json) -> ModelConfig:
    hf = {"num_key_value_heads": 8, "sliding_window": 4096, **hf}
    values = settings(hf, _MISTRAL, INERT)
    return common(values, **_uniform(values))


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return write(config, sliding_window=config.window or None)


def _read_mixtral(hf: Json) -> ModelConfig:
    values = settings({"num_key_value_heads": 8, **hf}, _MIXTRAL, INERT + _ROUTER_TRAINING)
    return common(
        values,
        num_experts=values["num_local_experts"],
        experts_per_token=values["num_experts_per_tok"],
        **_uniform(values),
        **read_rotary(values, base=1e6),
    )


def _write_mixtral(config: ModelConfig) -> dict[str, Any]:
    return write(
        config,
        intermediate_size=config.expert_feed_forward,
        sliding_window=config.window or None,
        num_local_experts=config.num_experts,
        num_experts_per_tok=config.experts_per_token,
    )


def _qwen_windows(values: Json) -> dict[str, Any]:
    demand(values, "use_mrope", False)
    window = values["sliding_window"] if values["use_sliding_window"] else None
    types = values["layer_types"]
    if types is None:  # older files say where local layers begin, if there are any
        first = values["max_window_layers"] if window else values["num_hidden_layers"]
        types = layer_types(values["num_hidden_layers"], lambda layer: layer >= first)
    return windows({**values, "sliding_window": window}, types)


def _write_qwen(config: ModelConfig, **own: Any) -> dict[str, Any]:
    types = layer_types(config.num_layers, config.is_local)
    return write(
        config,
        use_sliding_window=config.window > 0,
        sliding_window=config.window or None,
        max_window_layers=[*types, "sliding_attention"].index("sliding_attention"),
        layer_types=types,
        **own,
    )


def _read_qwen2(hf: Json) -> ModelConfig:
    values = settings({"num_key_value_heads": 32, "sliding_window": 4096, **hf}, _QWEN2, INERT)
    return common(values, qkv_bias=True, **_qwen_windows(values))


def _read_qwen3(hf: Json) -> ModelConfig:
    hf = {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128, **hf}
    values = settings(hf, _QWEN3, INERT)
    return common(values, qk_norm=True, **attention_biases(values), **_qwen_windows(values))


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return _write_qwen(config, attention_bias=config.has_bias("qkv"))


# ---- Tensors ---------------------------------------------------------------------------------

_LAYER = "model.layers.{layer}."


def rules(config: ModelConfig) -> list[Rule]:
    """Tensors of all of these families, Gemma's among them."""
    attention = f"{_LAYER}self_attn."
    head = [] if config.tie_embeddings else [same("head", "lm_head.weight")]
    found = [
        same("embedding.tokens", "model.embed_tokens.weight"),
        same("final_norm.scale", "model.norm.weight"),
        *head,
        *biased("blocks.attention.query", f"{attention}q_proj", bias=config.has_bias("qkv")),
        *biased("blocks.attention.key", f"{attention}k_proj", bias=config.has_bias("qkv")),
        *biased("blocks.attention.value", f"{attention}v_proj", bias=config.has_bias("qkv")),
        *biased(
            "blocks.attention.output", f"{attention}o_proj", 2, bias=config.has_bias("attention")
        ),
    ]
    if config.qk_norm:
        found.append(same("blocks.attention.query_norm.scale", f"{attention}q_norm.weight"))
        found.append(same("blocks.attention.key_norm.scale", f"{attention}k_norm.weight"))
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.norm_position == "sandwich":
        norms = {
            "attention_norm": "input_layernorm",
            "attention_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
    for ours, theirs in norms.items():
        found.append(same(f"blocks.{ours}.scale", f"{_LAYER}{theirs}.weight"))
    if config.num_experts:
        return found + _expert_rules(config)
    for part in ("gate", "up", "down"):
        found += biased(f"blocks.mlp.{part}", f"{_LAYER}mlp.{part}_proj", bias=config.bias)
    return found


def _expert_rules(config: ModelConfig) -> list[Rule]:
    mixture = f"{_LAYER}block_sparse_moe."
    found = [linear("blocks.mlp.router", f"{mixture}gate.weight")]
    for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        experts = range(config.num_experts)
        names = [f"{mixture}experts.{expert}.{theirs}.weight" for expert in experts]
        found.append(_one_each(f"blocks.mlp.{ours}", names))
    return found


def _one_each(ours: str, theirs: Sequence[str]) -> Rule:
    """A torch.nn.Linear for every expert there, one array [E, inputs, outputs] here."""

    def load(tensors: Arrays, shapes: Shapes) -> Arrays:
        return [np.stack([tensor.T for tensor in tensors])]

    def save(arrays: Arrays) -> Arrays:
        return [np.ascontiguousarray(matrix.T) for matrix in arrays[0]]

    return Rule((ours,), tuple(theirs), load, save)


def aliases(config: ModelConfig) -> dict[str, str]:
    """The output head, where it is the token embedding."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_embeddings else {}


def llama_like(model_type: str, architectures: str, read_config, write_config) -> Family:
    """A family whose tensors are named as Llama's."""
    return Family(
        model_type=model_type,
        architectures=tuple(architectures.split()),
        read_config=read_config,
        write_config=exact(read_config, write_config),
        rules=rules,
        base_prefix="model.",
        aliases=aliases,
        ignored=(r"rotary_emb\.inv_freq$",),
    )


FAMILIES = (
    llama_like("llama", "LlamaForCausalLM LlamaModel", _read_llama, _write_llama),
    llama_like("mistral", "MistralForCausalLM MistralModel", _read_mistral, _write_mistral),
    llama_like("mixtral", "MixtralForCausalLM MixtralModel", _read_mixtral, _write_mixtral),
    llama_like("qwen2", "Qwen2ForCausalLM Qwen2Model", _read_qwen2, _write_qwen),
    llama_like("qwen3", "Qwen3ForCausalLM Qwen3Model", _read_qwen3, _write_qwen3),
)
