"""Qwen 2 and 3, with experts too (Yang et al. 2024, 2025), as Hugging Face writes them."""

from __future__ import annotations

from typing import Any

from lm.config import check
from lm.models.config import ModelConfig
from lm.models.huggingface.config_fields import (
    Field,
    Json,
    OrNull,
    Together,
    only,
    with_defaults,
)
from lm.models.huggingface.llama import (
    BIASES,
    BODY,
    FIELDS,
    LAYER,
    MLP,
    begun,
    family,
    one_window,
    rotary,
    windows,
)

_QWEN_FIELDS = {
    **with_defaults(
        FIELDS,
        vocab_size=151_936,
        intermediate_size=22_016,
        num_key_value_heads=OrNull(32),
        max_position_embeddings=32_768,
    ),
    "use_mrope": only(False),
}
_QWEN_WINDOWS = windows(
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


_QWEN2 = family(
    "qwen2",
    "Qwen2ForCausalLM Qwen2Model",
    constants={"qkv_bias": True},
    fields=_QWEN_FIELDS,
    together=(rotary(), _QWEN_WINDOWS),
    written=_qwen_written,
)
_QWEN3 = family(
    "qwen3",
    "Qwen3ForCausalLM Qwen3Model",
    constants={"qk_norm": True},
    fields={**with_defaults(_QWEN_FIELDS, head_dim=OrNull(128)), **BIASES},
    together=(rotary(), _QWEN_WINDOWS),
    written=_qwen_written,
)

_EXPERTS = {
    "blocks.mlp.router": f"{LAYER}.mlp.gate",
    "blocks.mlp.gate": f"{LAYER}.mlp.experts.{{expert}}.gate_proj",
    "blocks.mlp.up": f"{LAYER}.mlp.experts.{{expert}}.up_proj",
    "blocks.mlp.down": f"{LAYER}.mlp.experts.{{expert}}.down_proj",
}


def _read_dense(values: Json) -> dict[str, Any]:
    """The layers without experts, which must be the first."""
    layers = values["mlp_only_layers"] or []
    check(
        sorted(layers) == list(range(len(layers))),
        f"config.json: mlp_only_layers={layers} is not supported, only the first layers: [0, 1, …]",
    )
    return {"dense_layers": len(layers)}


_QWEN3_MOE = family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM Qwen3MoeModel",
    constants={"qk_norm": True},
    fields={
        **with_defaults(
            _QWEN_FIELDS,
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=24,
            num_key_value_heads=4,
        ),
        **BIASES,
        "num_local_experts": Field("num_experts", 128),
        "num_experts_per_tok": Field("experts_per_token", 8),
        "moe_intermediate_size": Field("expert_width", 768),
        "norm_topk_prob": Field("router_normalize", False),
        "decoder_sparse_step": only(1),
    },
    together=(
        rotary(),
        one_window(4096, use_sliding_window=False),
        Together(
            {"mlp_only_layers": None},
            _read_dense,
            lambda config: {"mlp_only_layers": list(range(config.dense_layers))},
        ),
    ),
    inert=("router_aux_loss_coef", "output_router_logits", "max_window_layers"),
    # transformers 4 knows the number of experts by this name alone.
    old_fields={"num_experts": "num_local_experts"},
    written=lambda config: {
        "use_sliding_window": config.window > 0, "num_experts": config.num_experts
    },
    tensors=lambda config: {
        **begun(BODY | MLP, "dense_blocks", 0),
        **begun(BODY | (_EXPERTS if config.num_experts else MLP), "blocks", config.dense_layers),
    },
)  # fmt: skip

FAMILIES = (_QWEN2, _QWEN3, _QWEN3_MOE)
