"""OLMo 2 and 3 (OLMo Team 2024, 2025) as Hugging Face writes them."""

from __future__ import annotations

from typing import Any

from lm.models.huggingface.config_fields import Json, Together, demand, with_defaults
from lm.models.huggingface.llama import (
    BIASES,
    BODY,
    FIELDS,
    LAYER,
    MLP,
    family,
    rotary,
    whole,
    windows,
)
from lm.models.huggingface.rope import ROPE_FIELDS, read_layered, write_layered

_BASE = 500_000.0  # OLMo 3's
_SHARED = {
    "constants": {"norm_position": "reordered", "qk_norm": True, "qk_norm_joint": True},
    "fields": {**with_defaults(FIELDS, vocab_size=50_304, rms_norm_eps=1e-5), **BIASES},
    "tensors": {
        **BODY,
        "blocks.attention_post_norm": f"{LAYER}.post_attention_layernorm",
        "blocks.mlp_post_norm": f"{LAYER}.post_feedforward_layernorm",
        **MLP,
    },
}


def _read_rotary(values: Json) -> dict[str, Any]:
    if not values["rope_parameters"]:  # of local layers too, but transformers 5 forgets them
        demand("rope_theta", values["rope_theta"], None, _BASE)
    return whole(read_layered(values, _BASE, _BASE))


_OLMO2 = family("olmo2", "Olmo2ForCausalLM Olmo2Model", together=(rotary(),), **_SHARED)
_OLMO3 = family(
    "olmo3",
    "Olmo3ForCausalLM Olmo3Model",
    together=(
        Together(ROPE_FIELDS, _read_rotary, write_layered),
        windows(lambda values, layer: (layer + 1) % 4 != 0),
    ),
    **_SHARED,
)

FAMILIES = (_OLMO2, _OLMO3)
