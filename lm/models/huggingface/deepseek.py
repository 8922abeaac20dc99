"""DeepSeek-V2 and V3 (DeepSeek-AI 2024), with R1 and Moonlight, as Hugging Face writes them."""

from __future__ import annotations

import math
from typing import Any

from lm.models.config import ModelConfig
from lm.models.huggingface.config_fields import (
    Field,
    Json,
    OrNull,
    Together,
    demand,
    only,
    with_defaults,
)
from lm.models.huggingface.fp8 import BLOCK
from lm.models.huggingface.llama import BODY, FIELDS, LAYER, MLP, begun, family, rotary
from lm.models.huggingface.name_map import Linear, Table
from lm.models.huggingface.rope import ROPE_FIELDS, yarn_gain

_FIELDS = {
    **with_defaults(
        {name: field for name, field in FIELDS.items() if name != "head_dim"},
        vocab_size=129_280,
        hidden_size=7168,
        intermediate_size=18_432,
        num_hidden_layers=61,
        num_attention_heads=128,
        num_key_value_heads=OrNull(128),
        max_position_embeddings=4096,
    ),
    "q_lora_rank": Field(
        "query_rank", OrNull(1536), lambda name, rank: rank or 0, lambda rank: rank or None
    ),
    "kv_lora_rank": Field("kv_rank", 512),
    "v_head_dim": Field("value_dim", 128),
    "rope_interleave": only(True),
    "attention_bias": only(False),
    "moe_intermediate_size": Field("expert_width", 2048),
    "n_routed_experts": Field("num_experts", 256),
    "n_shared_experts": Field("shared_experts", 1),
    "num_experts_per_tok": Field("experts_per_token", 8),
    "first_k_dense_replace": Field("dense_layers", 3),
    "moe_layer_freq": only(1),
    "scoring_func": only("sigmoid"),
    "topk_method": only("noaux_tc"),
    "n_group": Field("router_groups", 8),
    "topk_group": Field("router_group_limit", 4),
    "norm_topk_prob": Field("router_normalize", True),
    "routed_scaling_factor": Field("router_scale", 2.5),
}

# ---- Widths of heads, and rotations ----------------------------------------------------------

_WIDTHS = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "qk_head_dim": None, "head_dim": None}
_ROTARY = rotary()


def _read_heads(values: Json) -> dict[str, Any]:
    """Of the widths, transformers derives two itself, whatever the file says of them."""
    shared = values["qk_rope_head_dim"]
    width = values["qk_nope_head_dim"] + shared
    fields = {"head_dim": width, "shared_key_dim": shared, **_ROTARY.read(values)}
    gain = 1.0
    if fields["rotary_scaling"] != "none":
        rope = values["rope_scaling"] or values["rope_parameters"]
        gain = yarn_gain(fields["rotary_factor"], rope.get("mscale_all_dim") or 0)
    return fields if gain == 1 else {**fields, "attention_scale": gain**2 * width**-0.5}


def _write_heads(config: ModelConfig) -> dict[str, Any]:
    rotary = _ROTARY.write(config)
    gain = math.sqrt(config.score_scale * math.sqrt(config.head_width))
    if rotary["rope_scaling"] and config.rotary_factor > 1 and gain != 1:
        spread = round((gain - 1) / (0.1 * math.log(config.rotary_factor)), 9)
        for rope in (rotary["rope_parameters"], rotary["rope_scaling"]):
            rope["mscale_all_dim"] = spread
    shared = config.shared_key_dim
    return {"qk_nope_head_dim": config.head_width - shared, "qk_rope_head_dim": shared, **rotary}


def _read_quantization(values: Json) -> dict[str, Any]:
    found = values["quantization_config"]
    if found is not None:
        demand("quantization_config", type(found), dict)
        for name, only_one in (("quant_method", "fp8"), ("weight_block_size", [BLOCK, BLOCK])):
            demand(f"quantization_config.{name}", found.get(name), only_one)
    return {}


# ---- Tensors ---------------------------------------------------------------------------------

_EXPERTS = {
    "blocks.mlp.router": f"{LAYER}.mlp.gate",
    "blocks.mlp.correction_bias": f"{LAYER}.mlp.gate.e_score_correction_bias",
    **{
        f"blocks.mlp.{place}{part}": f"{LAYER}.mlp.{theirs}.{part}_proj"
        for part in ("gate", "up", "down")
        for place, theirs in (("", "experts.{expert}"), ("shared.", "shared_experts"))
    },
}


def _attention(config: ModelConfig) -> Table:
    """Of the layers; rotations, of the last of each head's dimensions, are of neighbours there."""
    attention, turned = f"{LAYER}.self_attn", -config.shared_key_dim
    query = "q_b_proj" if config.query_rank else "q_proj"
    return {
        "blocks.attention.query_latent": f"{attention}.q_a_proj",
        "blocks.attention.query_latent_norm": f"{attention}.q_a_layernorm",
        "blocks.attention.query": Linear(f"{attention}.{query}", interleaved=turned),
        "blocks.attention.latent": Linear(f"{attention}.kv_a_proj_with_mqa", interleaved=turned),
        "blocks.attention.latent_norm": f"{attention}.kv_a_layernorm",
        ("blocks.attention.key_up", "blocks.attention.value_up"): Linear(
            f"{attention}.kv_b_proj", by_head=True
        ),
    }


def _tensors(config: ModelConfig) -> Table:
    block = {**BODY, **_attention(config)}
    dense = begun({**block, **MLP}, "dense_blocks", 0)
    return {**dense, **begun({**block, **_EXPERTS}, "blocks", config.dense_layers)}


# How they were trained, what predicts tokens further on, and the code they came with.
_INERT = (
    "auto_map", "ep_size", "aux_loss_alpha", "seq_aux", "output_router_logits",
    "router_aux_loss_coef", "num_nextn_predict_layers", "num_mtp_layers",
)  # fmt: skip
# What transformers keeps in float32, in models and files of any dtype (its modules'
# `_keep_in_fp32_modules_strict`): a rounded bias or matrix of the router chooses other experts.
_EXACT = ("mlp.gate.weight", "mlp.gate.e_score_correction_bias")
_HEADS = Together({**ROPE_FIELDS, **_WIDTHS}, _read_heads, _write_heads)

# ---- DeepSeek-V2 -----------------------------------------------------------------------------

_METHODS = ("greedy", "group_limited_greedy")


def _read_groups(values: Json) -> dict[str, Any]:
    demand("topk_method", values["topk_method"], *_METHODS)
    if values["topk_method"] == "greedy":
        return {}
    limit = {"router_groups": values["n_group"], "router_group_limit": values["topk_group"]}
    return {"router_group_best": 1, **limit}


def _write_groups(config: ModelConfig) -> dict[str, Any]:
    method = _METHODS[config.router_groups > 1]
    groups = {"n_group": config.router_groups, "topk_group": config.router_group_limit}
    return {"topk_method": method, **groups}


_V2 = family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM DeepseekV2Model",
    constants={"router_normalize": False},
    fields={
        **with_defaults(
            {name: f for name, f in _FIELDS.items() if name not in ("n_group", "topk_group")},
            vocab_size=102_400,
            hidden_size=4096,
            intermediate_size=11_008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=None,
            max_position_embeddings=2048,
            moe_intermediate_size=1407,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=0,  # there is none
            first_k_dense_replace=0,
            routed_scaling_factor=1.0,
        ),
        "norm_topk_prob": only(False),  # transformers never does
        "scoring_func": only("softmax"),
        "topk_method": Field("", "greedy"),
        "mlp_bias": only(False),
    },
    together=(
        _HEADS,
        Together({"n_group": None, "topk_group": None}, _read_groups, _write_groups),
    ),
    inert=_INERT,
    exact=_EXACT,
    tensors=_tensors,
)

# ---- DeepSeek-V3 -----------------------------------------------------------------------------

_V3 = family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM DeepseekV3Model",
    constants={"router_score": "sigmoid", "router_bias": True},
    fields=_FIELDS,
    together=(
        _HEADS,
        # Eight-bit matrices are read as float32 (`fp8`), and written as any others.
        Together({"quantization_config": None}, _read_quantization),
    ),
    inert=_INERT,
    exact=_EXACT,
    tensors=_tensors,
    ignored=(r"^(model\.)?layers\.61\.",),  # of V3 and R1: it predicts the token after the next
)

FAMILIES = (_V2, _V3)
