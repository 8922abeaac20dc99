"""One small model of every kind that generates, by name: the fields of its config."""

_LAYERNORM = {"norm": "layernorm", "bias": True}
_BOTH = {"architecture": "encoder_decoder"}

DECODERS = {
    "opt": {**_LAYERNORM, "positions": "learned", "position_offset": 2, "activation": "relu"},
    "bloom": {**_LAYERNORM, "positions": "alibi", "embedding_norm": True},
    "neox": {
        **_LAYERNORM,
        "parallel": True,
        "rotary_fraction": 0.25,
        "tie_embeddings": False,
        "head_bias": True,
    },
    "palm": {"parallel": True, "shared_norm": True, "num_kv_heads": 1, "activation": "swiglu"},
    "qwen": {"qk_norm": True, "qkv_bias": True, "num_kv_heads": 1, "rotary_scaling": "llama3"},
    "gemma": {
        "num_layers": 3,
        "norm_position": "sandwich",
        "norm_unit_offset": True,
        "attention_pattern": ("local", "local", "global"),
        "window": 4,
        "rotary_local_base": 100.0,
        "embedding_scale": 0.0,
        "attention_softcap": 5.0,
        "attention_sinks": True,
        "logits_softcap": 8.0,
        "activation": "geglu",
    },
    "experts": {
        "num_layers": 3,
        "dense_layers": 1,
        "num_experts": 4,
        "shared_experts": 1,
        "expert_width": 16,
        "capacity_factor": 1.0,  # not kept to when decoding
        "activation": "swiglu_clipped",
        "expert_bias": True,
    },
    "deepseek": {
        "num_layers": 3,
        "head_dim": 12,
        "kv_rank": 10,
        "query_rank": 6,
        "shared_key_dim": 4,
        "value_dim": 5,
        "dense_layers": 1,
        "num_experts": 8,
        "shared_experts": 1,
        "expert_width": 16,
        "router_score": "sigmoid",
        "router_scale": 1.5,
        "router_bias": True,
        "router_groups": 4,
        "router_group_limit": 2,
        "activation": "swiglu",
    },
    "t5_decoder": {"positions": "relative", "relative_buckets": 8, "relative_distance": 10},
    "lstm": {"cell": "lstm"},
    "mistral_gpt2": {**_LAYERNORM, "num_layers": 3, "positions": "learned", "scale_by_layer": True},
}
ENCODER_DECODERS = {
    "t5": {
        **_BOTH,
        "num_encoder_layers": 3,
        "positions": "relative",
        "relative_buckets": 8,
        "relative_distance": 10,
        "attention_scale": 1.0,
        "output_scale": 0.0,
        "head_dim": 8,
    },
    "bart": {
        **_BOTH,
        **_LAYERNORM,
        "positions": "learned",
        "position_offset": 2,
        "norm_position": "post",
        "embedding_norm": True,
    },
    "vaswani": {**_BOTH, **_LAYERNORM, "positions": "sinusoidal", "embedding_scale": 0.0},
    "bahdanau": {**_BOTH, "cell": "gru"},
    "sutskever": {**_BOTH, "cell": "lstm", "cross_attention": False},
}
FAMILIES = {**DECODERS, **ENCODER_DECODERS}
