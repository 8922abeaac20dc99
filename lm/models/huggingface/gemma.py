"""Gemma 2 and 3 (its text; Gemma Team 2024, 2025) as Hugging Face writes them."""

from __future__ import annotations

from typing import Any

from lm.config import check
from lm.models.config import ModelConfig
from lm.models.huggingface.config_fields import (
    Field,
    Json,
    OrNull,
    Together,
    activation,
    activation_name,
    demand,
    only,
    with_defaults,
)
from lm.models.huggingface.llama import (
    BIASES,
    BODY,
    FIELDS,
    LAYER,
    MLP,
    check_divided,
    family,
    rotary,
    whole,
    windows,
)
from lm.models.huggingface.name_map import Table
from lm.models.huggingface.rope import ROPE_FIELDS, read_layered, write_layered


def _softcap(ours: str, default: float | None) -> Field:
    def read(name: str, value: float | None) -> float:
        check(value != 0, f"config.json: {name}=0 would make everything 0; null is none")
        return value or 0.0

    return Field(ours, OrNull(default), read, lambda cap: cap or None)


_GEMMA_CONSTANTS = {
    "embedding_scale": 0.0, "norm_position": "sandwich", "norm_unit_offset": True
}  # fmt: skip
_GEMMA_FIELDS = {
    **with_defaults(
        FIELDS,
        vocab_size=256_000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=OrNull(4),
        head_dim=OrNull(256),
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    **BIASES,
    "hidden_activation": activation("gelu_pytorch_tanh", gated=True),
    "hidden_act": Field(""),  # is overruled
    "query_pre_attn_scalar": Field(
        "attention_scale",
        256.0,
        lambda name, scalar: scalar**-0.5,
        lambda scale: round(scale**-2),  # transformers wants a whole number
    ),
    "final_logit_softcapping": _softcap("logits_softcap", 30.0),
    "attn_logit_softcapping": _softcap("attention_softcap", 50.0),
}
_GEMMA_TENSORS = {
    **BODY,
    "blocks.attention_post_norm": f"{LAYER}.post_attention_layernorm",
    "blocks.mlp_norm": f"{LAYER}.pre_feedforward_layernorm",
    "blocks.mlp_post_norm": f"{LAYER}.post_feedforward_layernorm",
    **MLP,
}


def _read_old_window(values: Json) -> dict[str, Any]:
    """An old name of `sliding_window`, which transformers does not look at any more."""
    demand("sliding_window_size", values["sliding_window_size"], None, values["sliding_window"])
    return {}


def _gemma2_written(config: ModelConfig) -> dict[str, Any]:
    return {**check_divided(config), "hidden_act": activation_name(config.activation)}


def _write_gemma3_rotary(config: ModelConfig) -> dict[str, Any]:
    local_base = config.rotary_local_base or config.rotary_base
    return {**write_layered(config), "rope_local_base_freq": local_base}


def _read_bidirectional(values: Json) -> dict[str, Any]:
    """Of an encoder (EmbeddingGemma) the file's window is that of both sides together."""
    demand("use_bidirectional_attention", values[_BOTH_WAYS], None, False, True)
    fields = _GEMMA3_WINDOWS.read(values)
    if not values[_BOTH_WAYS]:
        return fields
    demand("architectures", values["architectures"], None, *([name] for name in _EMBEDDING))
    if fields:
        fields["window"] = fields["window"] // 2 + 1
    return {**fields, "architecture": "encoder"}


def _write_bidirectional(config: ModelConfig) -> dict[str, Any]:
    fields, encoder = _GEMMA3_WINDOWS.write(config), config.architecture == "encoder"
    if encoder:
        fields["architectures"] = [_EMBEDDING[0]]
        fields["sliding_window"] = 2 * (config.window - 1) if config.window else None
    return {**fields, _BOTH_WAYS: encoder}


def _gemma3_tensors(config: ModelConfig) -> Table:
    """An encoder's are saved as those of the body alone."""
    if config.architecture == "decoder":
        return _GEMMA_TENSORS
    return {ours: theirs.removeprefix("model.") for ours, theirs in _GEMMA_TENSORS.items()}


_BOTH_WAYS = "use_bidirectional_attention"
_EMBEDDING = ("Gemma3TextModel", "Gemma3ForCausalLM")
# Every so many layers one is global.
_GEMMA3_WINDOWS = windows(
    lambda values, layer: (layer + 1) % values["sliding_window_pattern"] != 0,
    sliding_window_pattern=6,
)
_GEMMA2 = family(
    "gemma2",
    "Gemma2ForCausalLM Gemma2Model",
    constants=_GEMMA_CONSTANTS,
    fields={**_GEMMA_FIELDS, _BOTH_WAYS: only(None, False)},
    together=(
        rotary(),
        windows(lambda values, layer: layer % 2 == 0),
        Together({"sliding_window_size": None}, _read_old_window),
    ),
    written=_gemma2_written,
    tensors=_GEMMA_TENSORS,
)
_GEMMA3 = family(
    "gemma3_text",
    "Gemma3ForCausalLM Gemma3TextModel",
    constants={**_GEMMA_CONSTANTS, "qk_norm": True},
    fields={
        **with_defaults(
            _GEMMA_FIELDS,
            vocab_size=262_208,
            max_position_embeddings=131_072,
            final_logit_softcapping=OrNull(None),
        ),
        "attn_logit_softcapping": only(None),  # a field that transformers does not look at
    },
    together=(
        Together(
            {**ROPE_FIELDS, "rope_local_base_freq": 10_000.0},
            lambda values: whole(read_layered(values, 1e6, values["rope_local_base_freq"])),
            _write_gemma3_rotary,
        ),
        Together(
            {**_GEMMA3_WINDOWS.defaults, _BOTH_WAYS: None, "architectures": None},
            _read_bidirectional,
            _write_bidirectional,
        ),
    ),
    inert=("_sliding_window_pattern",),
    written=_gemma2_written,
    tensors=_gemma3_tensors,
)

FAMILIES = (_GEMMA2, _GEMMA3)
