"""Gemma 2 and the text models of Gemma 3, with Llama's names for tensors."""

from __future__ import annotations

from typing import Any

from lm.config import check
from lm.models.config import ModelConfig
from lm.models.huggingface.family import demand, settings
from lm.models.huggingface.llama import (
    DEFAULTS,
    INERT,
    Json,
    attention_biases,
    check_divided,
    common,
    layer_types,
    llama_like,
    windows,
    write,
)
from lm.models.huggingface.rope import ROPE_FIELDS, read_rotary, rope_parameters

_GEMMA2 = {
    **DEFAULTS,
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "hidden_activation": "gelu_pytorch_tanh",  # overrules hidden_act
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256.0,
    "sliding_window": None,
    "layer_types": None,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": None,
}
_GEMMA3 = {
    **_GEMMA2,
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "sliding_window_pattern": 6,
    "rope_local_base_freq": 10_000.0,
}
# What it means that these are missing; null means another thing.
_MISSING = {"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096}
_SOFTCAPS = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}


def _common(values: Json, pattern: int, **own: Any) -> ModelConfig:
    demand(values, "use_bidirectional_attention", None, False)
    for name in _SOFTCAPS:
        check(values[name] != 0, f"config.json: {name}=0 would make everything 0; null is none")
    layers, types = values["num_hidden_layers"], values["layer_types"]
    if types is None:  # older files: every so many layers one is global
        types = layer_types(layers, lambda layer: (layer + 1) % pattern != 0)
    return common(
        {**values, "hidden_act": values["hidden_activation"]},
        embedding_scale=0.0,
        norm_position="sandwich",
        norm_unit_offset=True,
        attention_scale=values["query_pre_attn_scalar"] ** -0.5,
        attention_softcap=values["attn_logit_softcapping"] or 0.0,
        logits_softcap=values["final_logit_softcapping"] or 0.0,
        **windows(values, types),
        **attention_biases(values),
        **own,
    )


def _read_gemma2(hf: Json) -> ModelConfig:
    return _common(settings({**_MISSING, **_SOFTCAPS, **hf}, _GEMMA2, INERT), pattern=2)


def _read_gemma3(hf: Json) -> ModelConfig:
    values = settings({**_MISSING, **hf}, _GEMMA3, (*INERT, "_sliding_window_pattern"))
    demand(values, "attn_logit_softcapping", None)  # a field that transformers does not look at
    local_base, rope = values["rope_local_base_freq"], values["rope_parameters"]
    if rope:  # version 5 has parameters for each type of layer
        kinds = ["full_attention", "sliding_attention"]
        demand({"rope_parameters": sorted(rope)}, "rope_parameters", kinds)
        length = {"max_position_embeddings": values["max_position_embeddings"]}
        local_rope = {**ROPE_FIELDS, **length, "rope_parameters": rope["sliding_attention"]}
        local = read_rotary(local_rope, local_base)
        demand({"rope_type": local["rotary_scaling"]}, "rope_type", "none")
        local_base = local["rotary_base"]
        values["rope_parameters"] = {**rope["full_attention"], **(values["rope_scaling"] or {})}
        values["rope_scaling"] = None
    return _common(
        values,
        pattern=values["sliding_window_pattern"],
        qk_norm=True,
        rotary_local_base=local_base,
        **read_rotary(values, base=1e6),
    )


def _write_gemma2(config: ModelConfig, **own: Any) -> dict[str, Any]:
    check_divided(config)
    fields = write(config)
    scale = config.attention_scale or config.head_width**-0.5
    return {
        **fields,
        "hidden_activation": fields["hidden_act"],
        "attention_bias": config.has_bias("qkv"),
        "query_pre_attn_scalar": round(scale**-2),  # transformers wants a whole number
        "sliding_window": config.window or None,
        "layer_types": layer_types(config.num_layers, config.is_local),
        "final_logit_softcapping": config.logits_softcap or None,
        "attn_logit_softcapping": config.attention_softcap or None,
        **own,
    }


def _write_gemma3(config: ModelConfig) -> dict[str, Any]:
    local_base = config.rotary_local_base or config.rotary_base
    return _write_gemma2(
        config,
        rope_parameters={
            "full_attention": rope_parameters(config),
            "sliding_attention": {"rope_type": "default", "rope_theta": local_base},
        },
        rope_local_base_freq=local_base,
    )


FAMILIES = (
    llama_like("gemma2", "Gemma2ForCausalLM Gemma2Model", _read_gemma2, _write_gemma2),
    llama_like("gemma3_text", "Gemma3ForCausalLM Gemma3TextModel", _read_gemma3, _write_gemma3),
)
