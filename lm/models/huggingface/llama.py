"""Llama and the models of its make: Mistral, Mixtral, Qwen 2 and 3, Gemma 2 and 3 (its text)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm.config import check, check_choice
from lm.models.config import ModelConfig
from lm.models.huggingface.config_fields import (
    Field,
    Json,
    OrNull,
    Together,
    activation,
    activation_name,
    classifier,
    demand,
    only,
    with_defaults,
)
from lm.models.huggingface.family import Family
from lm.models.huggingface.rope import ROPE_FIELDS, read_rotary, rope_parameters, write_rotary

# ---- What they share -------------------------------------------------------------------------

_FIELDS = {
    "vocab_size": Field("vocab_size", 32_000),
    "hidden_size": Field("width", 4096),
    "intermediate_size": Field("mlp_width", 11_008),
    "num_hidden_layers": Field("num_layers", 32),
    "num_attention_heads": Field("num_heads", 32),
    "num_key_value_heads": Field("num_kv_heads"),
    "head_dim": Field("head_dim"),
    "hidden_act": activation("silu", gated=True),
    "max_position_embeddings": Field("max_length", 2048),
    "rms_norm_eps": Field("norm_epsilon", 1e-6),
    "initializer_range": Field("initializer_std", 0.02),
    "tie_word_embeddings": Field("tie_embeddings", False),
}
# Biases in all four projections of attention, or in none.
_BIASES = {"attention_bias": Field("qkv_bias attention_bias", False)}

_LAYER = "model.layers.{layer}"
_BODY = {
    "embedding.tokens": "model.embed_tokens.weight",
    "final_norm": "model.norm",
    "head": "lm_head.weight",
    "classifier": "score",
    "blocks.attention.query": f"{_LAYER}.self_attn.q_proj",
    "blocks.attention.key": f"{_LAYER}.self_attn.k_proj",
    "blocks.attention.value": f"{_LAYER}.self_attn.v_proj",
    "blocks.attention.output": f"{_LAYER}.self_attn.o_proj",
    "blocks.attention.query_norm": f"{_LAYER}.self_attn.q_norm",
    "blocks.attention.key_norm": f"{_LAYER}.self_attn.k_norm",
    "blocks.attention_norm": f"{_LAYER}.input_layernorm",
    "blocks.mlp_norm": f"{_LAYER}.post_attention_layernorm",
}
_MLP = {
    "blocks.mlp.gate": f"{_LAYER}.mlp.gate_proj",
    "blocks.mlp.up": f"{_LAYER}.mlp.up_proj",
    "blocks.mlp.down": f"{_LAYER}.mlp.down_proj",
}
_EXPERTS = {
    "blocks.mlp.router": f"{_LAYER}.block_sparse_moe.gate",
    "blocks.mlp.gate": f"{_LAYER}.block_sparse_moe.experts.{{expert}}.w1",
    "blocks.mlp.down": f"{_LAYER}.block_sparse_moe.experts.{{expert}}.w2",
    "blocks.mlp.up": f"{_LAYER}.block_sparse_moe.experts.{{expert}}.w3",
}


def _family(
    model_type: str, architectures: str, constants: Json | None = None, **attributes
) -> Family:
    """A family whose tensors are named as Llama's."""
    *_, body = architectures.split()
    scores = f"{body.removesuffix('Model')}ForSequenceClassification"
    attributes["together"] = (*attributes["together"], classifier(scores))
    attributes["inert"] = (
        # Dropout of attention alone, which ours is not, and how to compute.
        "attention_dropout", "pretraining_tp", "cache_implementation",
        *attributes.get("inert", ()),
    )  # fmt: skip
    return Family(
        model_type,
        (*architectures.split(), scores),
        constants={"norm": "rmsnorm", "initializer": "normal", **(constants or {})},
        base_prefix="model.",
        ignored=(r"rotary_emb\.inv_freq$",),
        **{"tensors": _BODY | _MLP, **attributes},
    )


def _rotary(base: float = 10_000.0) -> Together:
    """Rotations of whole heads; `base` where the file does not say."""

    def read(values: Json) -> dict[str, Any]:
        fields = read_rotary(values, base)
        demand("partial_rotary_factor", fields["rotary_fraction"], 1)
        return fields

    return Together(ROPE_FIELDS, read, write_rotary)


def _check_divided(config: ModelConfig) -> dict[str, Any]:
    """Refuses what transformers does, though nothing depends on it where there is a head_dim."""
    check(
        config.width % config.num_heads == 0,
        f"config.model.width={config.width} must be a multiple of num_heads={config.num_heads} to "
        "be written for this Hugging Face family",
    )
    return {}


# ---- Windows ---------------------------------------------------------------------------------

_TYPES = ("full_attention", "sliding_attention")


def _layer_types(num_layers: int, is_local: Callable[[int], bool]) -> list[str]:
    """What layers 0, 1, … are called."""
    return [_TYPES[bool(is_local(layer))] for layer in range(num_layers)]


def _windows(
    is_local: Callable[[Json, int], bool], default: int | None = 4096, **others: Any
) -> Together:
    """Which layers see only a window: `layer_types`, or in older files what `is_local` says.

    Args:
      is_local: (the fields, a layer) → whether it is one of them.
      default: the window of files that lack it.
      **others: fields that `is_local` looks at, and what files mean that lack them.
    """

    def read(values: Json) -> dict[str, Any]:
        layers, types = values["num_hidden_layers"], values["layer_types"]
        if types is None:
            types = _layer_types(layers, lambda layer: is_local(values, layer))
        check(
            len(types) == layers,
            f"config.json: layer_types has {len(types)} entries, not num_hidden_layers={layers}",
        )
        for index, kind in enumerate(types):
            check_choice(f"config.json: layer_types[{index}]", kind, _TYPES)
        if "sliding_attention" not in types:
            return {}
        window = values["sliding_window"] if values.get("use_sliding_window", True) else None
        check(window, "config.json: sliding_attention layers need a sliding_window")
        # The shortest pattern that, repeated, gives every layer its type.
        period = next(
            period
            for period in range(1, layers + 1)
            if all(types[layer] == types[layer % period] for layer in range(layers))
        )
        local = [kind == "sliding_attention" for kind in types[:period]]
        pattern = tuple("local" if is_local else "global" for is_local in local)
        return {"attention_pattern": pattern, "window": window}

    def write(config: ModelConfig) -> dict[str, Any]:
        types = _layer_types(config.num_layers, config.is_local)
        return {"sliding_window": config.window or None, "layer_types": types}

    return Together({"sliding_window": OrNull(default), "layer_types": None, **others}, read, write)


def _one_window(default: int | None) -> Together:
    """Mistral's, which all layers have or none."""
    windows = _windows(lambda values, layer: values["sliding_window"] is not None, default)

    def read(values: Json) -> dict[str, Any]:
        window = values["sliding_window"]
        types = _layer_types(values["num_hidden_layers"], lambda layer: window is not None)
        demand("layer_types", values["layer_types"], None, types)
        return windows.read(values)

    write = lambda config: {"sliding_window": config.window or None}  # noqa: E731
    return Together(windows.defaults, read, write)


# ---- Llama, Mistral, Mixtral -----------------------------------------------------------------

_LLAMA = _family(
    "llama",
    "LlamaForCausalLM LlamaModel",
    fields={**_FIELDS, **_BIASES, "mlp_bias": Field("bias", False)},
    together=(_rotary(),),
    written=_check_divided,
)
_MISTRAL_FIELDS = with_defaults(
    _FIELDS,
    intermediate_size=14_336,
    num_key_value_heads=OrNull(8),
    max_position_embeddings=131_072,
)
_MISTRAL = _family(
    "mistral",
    "MistralForCausalLM MistralModel",
    fields=_MISTRAL_FIELDS,
    together=(_rotary(), _one_window(4096)),
)
_MIXTRAL = _family(
    "mixtral",
    "MixtralForCausalLM MixtralModel",
    fields={
        **with_defaults(_MISTRAL_FIELDS, rms_norm_eps=1e-5),
        "num_local_experts": Field("num_experts", 8),
        "num_experts_per_tok": Field("experts_per_token", 2),
    },
    together=(_rotary(base=1e6), _one_window(None)),
    inert=("router_aux_loss_coef", "output_router_logits", "router_jitter_noise"),
    written=lambda config: {"intermediate_size": config.expert_feed_forward},
    tensors=_BODY | _EXPERTS,
)

# ---- Qwen ------------------------------------------------------------------------------------

_QWEN_FIELDS = {
    **with_defaults(
        _FIELDS,
        vocab_size=151_936,
        intermediate_size=22_016,
        num_key_value_heads=OrNull(32),
        max_position_embeddings=32_768,
    ),
    "use_mrope": only(False),
}
_QWEN_WINDOWS = _windows(
    lambda values, layer: (
        values["use_sliding_window"] and values["sliding_window"] is not None
        and layer >= values["max_window_layers"]
    ),
    use_sliding_window=False,
    max_window_layers=28,
)  # fmt: skip


def _qwen_written(config: ModelConfig) -> dict[str, Any]:
    first = (layer for layer in range(config.num_layers) if config.is_local(layer))
    return {
        "use_sliding_window": config.window > 0,
        "max_window_layers": next(first, config.num_layers),
    }


_QWEN2 = _family(
    "qwen2",
    "Qwen2ForCausalLM Qwen2Model",
    constants={"qkv_bias": True},
    fields=_QWEN_FIELDS,
    together=(_rotary(), _QWEN_WINDOWS),
    written=_qwen_written,
)
_QWEN3 = _family(
    "qwen3",
    "Qwen3ForCausalLM Qwen3Model",
    constants={"qk_norm": True},
    fields={**with_defaults(_QWEN_FIELDS, head_dim=OrNull(128)), **_BIASES},
    together=(_rotary(), _QWEN_WINDOWS),
    written=_qwen_written,
)

# ---- Gemma -----------------------------------------------------------------------------------


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
        _FIELDS,
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
    **_BIASES,
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
    "use_bidirectional_attention": only(None, False),
}
_GEMMA_TENSORS = {
    **_BODY,
    "blocks.attention_post_norm": f"{_LAYER}.post_attention_layernorm",
    "blocks.mlp_norm": f"{_LAYER}.pre_feedforward_layernorm",
    "blocks.mlp_post_norm": f"{_LAYER}.post_feedforward_layernorm",
    **_MLP,
}


def _gemma2_written(config: ModelConfig) -> dict[str, Any]:
    return {**_check_divided(config), "hidden_act": activation_name(config.activation)}


def _read_gemma3_rotary(values: Json) -> dict[str, Any]:
    local_base, rope = values["rope_local_base_freq"], values["rope_parameters"]
    if rope:  # version 5 has parameters for each type of layer
        kinds = ["full_attention", "sliding_attention"]
        demand("rope_parameters", sorted(rope), kinds)
        length = {"max_position_embeddings": values["max_position_embeddings"]}
        local_rope = {**ROPE_FIELDS, **length, "rope_parameters": rope["sliding_attention"]}
        local = read_rotary(local_rope, local_base)
        demand("rope_type", local["rotary_scaling"], "none")
        local_base = local["rotary_base"]
        whole = {**rope["full_attention"], **(values["rope_scaling"] or {})}
        values = {**values, "rope_parameters": whole, "rope_scaling": None}
    return {**_rotary(1e6).read(values), "rotary_local_base": local_base}


def _write_gemma3_rotary(config: ModelConfig) -> dict[str, Any]:
    local_base = config.rotary_local_base or config.rotary_base
    return {
        **write_rotary(config),
        "rope_parameters": {
            "full_attention": rope_parameters(config),
            "sliding_attention": {"rope_type": "default", "rope_theta": local_base},
        },
        "rope_local_base_freq": local_base,
    }


_GEMMA2 = _family(
    "gemma2",
    "Gemma2ForCausalLM Gemma2Model",
    constants=_GEMMA_CONSTANTS,
    fields=_GEMMA_FIELDS,
    together=(_rotary(), _windows(lambda values, layer: layer % 2 == 0)),
    written=_gemma2_written,
    tensors=_GEMMA_TENSORS,
)
_GEMMA3 = _family(
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
            _read_gemma3_rotary,
            _write_gemma3_rotary,
        ),
        # Every so many layers one is global.
        _windows(
            lambda values, layer: (layer + 1) % values["sliding_window_pattern"] != 0,
            sliding_window_pattern=6,
        ),
    ),
    inert=("_sliding_window_pattern",),
    written=_gemma2_written,
    tensors=_GEMMA_TENSORS,
)

FAMILIES = (_LLAMA, _MISTRAL, _MIXTRAL, _QWEN2, _QWEN3, _GEMMA2, _GEMMA3)
