"""OLMo 2 (OLMo Team 2024) as Hugging Face writes it."""

from __future__ import annotations

from lm.models.huggingface.config_fields import with_defaults
from lm.models.huggingface.llama import BIASES, BODY, FIELDS, LAYER, MLP, family, rotary

_OLMO2 = family(
    "olmo2",
    "Olmo2ForCausalLM Olmo2Model",
    constants={"norm_position": "reordered", "qk_norm": True, "qk_norm_joint": True},
    fields={
        **with_defaults(FIELDS, vocab_size=50_304, rms_norm_eps=1e-5),
        **BIASES,
    },
    together=(rotary(),),
    tensors={
        **BODY,
        "blocks.attention_post_norm": f"{LAYER}.post_attention_layernorm",
        "blocks.mlp_post_norm": f"{LAYER}.post_feedforward_layernorm",
        **MLP,
    },
)

FAMILIES = (_OLMO2,)
