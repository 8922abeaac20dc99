"""gpt-oss (OpenAI 2025) as Hugging Face writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm.models.huggingface.config_fields import Field, Json, Together, demand, only, with_defaults
from lm.models.huggingface.family import Family
from lm.models.huggingface.llama import BIASES, BODY, FIELDS, LAYER, family, rotary, windows
from lm.models.huggingface.name_map import Arrays, Rule, Shape

_EXPERTS = f"{LAYER}.mlp.experts"
_ROTARY = rotary(base=150_000.0)
_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def _read_rotary(values: Json) -> dict[str, Any]:
    silent = not (values["rope_scaling"] or values["rope_parameters"])
    return _ROTARY.read({**values, "rope_parameters": _ROPE} if silent else values)


def _read_quantization(values: Json) -> dict[str, Any]:
    found = values["quantization_config"]
    if isinstance(found, Mapping):
        demand("quantization_config.quant_method", found.get("quant_method"), "mxfp4")
    else:
        demand("quantization_config", found, None)
    return {}


def _interleaved(suffix: str) -> Rule:
    """Gates and what they multiply, in turn along the last axis of one tensor."""

    def load(tensors: Arrays, shapes: Sequence[Shape]) -> Arrays:
        return [tensors[0][..., 0::2], tensors[0][..., 1::2]]

    def save(arrays: Arrays) -> Arrays:
        *leading, width = arrays[0].shape
        return [np.stack(arrays, -1).reshape(*leading, 2 * width)]

    ours = (f"blocks.mlp.gate{suffix}", f"blocks.mlp.up{suffix}")
    return Rule(ours, (f"{_EXPERTS}.gate_up_proj{suffix}",), load, save)


def _as_it_is(ours: str, theirs: str) -> Rule:
    return Rule((ours,), (theirs,), lambda tensors, shapes: tensors, lambda arrays: arrays)


_GPT_OSS: Family = family(
    "gpt_oss",
    "GptOssForCausalLM GptOssModel",
    constants={"activation": "swiglu_clipped", "attention_sinks": True, "expert_bias": True},
    fields={
        **with_defaults(
            {name: field for name, field in FIELDS.items() if name != "hidden_act"},
            vocab_size=201_088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=36,
            num_attention_heads=64, num_key_value_heads=8, head_dim=64, rms_norm_eps=1e-5,
            max_position_embeddings=131_072,
        ),
        **with_defaults(BIASES, attention_bias=True),
        "hidden_act": only("silu"),
        "num_local_experts": Field("num_experts", 128),
        "num_experts_per_tok": Field("experts_per_token", 4),
        "swiglu_alpha": only(1.702),
        "swiglu_limit": Field("activation_limit", 7.0),
    },
    together=(
        Together(_ROTARY.defaults, _read_rotary, _ROTARY.write),
        windows(lambda values, layer: layer % 2 == 0, default=128),
        # Four-bit tensors are read as bfloat16 (`mxfp4`), and written as any others.
        Together({"quantization_config": None}, _read_quantization),
    ),
    inert=(
        "router_aux_loss_coef", "output_router_logits", "experts_per_token",
        "initial_context_length",
    ),
    written=lambda config: {"intermediate_size": config.expert_feed_forward},
    tensors={
        **BODY,
        "blocks.attention.sinks": f"{LAYER}.self_attn.sinks",
        "blocks.mlp.router": f"{LAYER}.mlp.router",
        "blocks.mlp.router_logit_bias": f"{LAYER}.mlp.router.bias",
        "gate and up": _interleaved(""),
        "gate and up's biases": _interleaved("_bias"),
        "down": _as_it_is("blocks.mlp.down", f"{_EXPERTS}.down_proj"),
        "down's bias": _as_it_is("blocks.mlp.down_bias", f"{_EXPERTS}.down_proj_bias"),
    },
)  # fmt: skip

FAMILIES = (_GPT_OSS,)
