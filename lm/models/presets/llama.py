"""Llama and its kin: Mistral, Mixtral, DeepSeekMoE, SmolLM 3, OLMo 2, Qwen, gpt-oss, Gemma."""

import math

from lm.models.presets.table import table

LLAMA = {
    "tie_embeddings": False,
    "positions": "rotary",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "initializer": "normal",
}
SIZES = "num_layers num_heads num_kv_heads width mlp_width"

# ---- Llama -----------------------------------------------------------------------------------

PRESETS = table(
    "Touvron et al. 2023a, table 2; huggyllama/llama-7b",
    {**LLAMA, "vocab_size": 32_000, "max_length": 2048, "norm_epsilon": 1e-6},
    SIZES,
    llama_7b=(32, 32, 32, 4096, 11_008),
    llama_13b=(40, 40, 40, 5120, 13_824),
    llama_30b=(60, 52, 52, 6656, 17_920),  # 32.5B in the paper
    llama_65b=(80, 64, 64, 8192, 22_016),
)

PRESETS |= table(
    "Touvron et al. 2023b, table 1; meta-llama/Llama-2-7b-hf",
    {**LLAMA, "vocab_size": 32_000, "max_length": 4096},
    SIZES,
    llama2_7b=(32, 32, 32, 4096, 11_008),
    llama2_13b=(40, 40, 40, 5120, 13_824),
    llama2_70b=(80, 64, 8, 8192, 28_672),
)

_LLAMA3 = {**LLAMA, "vocab_size": 128_256, "max_length": 8192, "rotary_base": 500_000.0}
_LLAMA3_1 = {
    **_LLAMA3,
    "max_length": 131_072,
    "rotary_scaling": "llama3",
    "rotary_original_length": 8192,
    "rotary_low": 1.0,
    "rotary_high": 4.0,
    "rotary_factor": 8.0,
}

PRESETS |= table(
    "Grattafiori et al. 2024, table 3; meta-llama/Meta-Llama-3-8B",
    _LLAMA3,
    SIZES,
    llama3_8b=(32, 32, 8, 4096, 14_336),
    llama3_70b=(80, 64, 8, 8192, 28_672),
)

PRESETS |= table(
    "Grattafiori et al. 2024, table 3; meta-llama/Llama-3.1-8B",
    _LLAMA3_1,
    SIZES,
    llama3_1_8b=(32, 32, 8, 4096, 14_336),
    llama3_1_70b=(80, 64, 8, 8192, 28_672),
    llama3_1_405b=(126, 128, 8, 16_384, 53_248),
)

PRESETS |= table(
    "meta-llama/Llama-3.2-1B, Llama-3.2-3B",
    {**_LLAMA3_1, "rotary_factor": 32.0, "tie_embeddings": True},
    SIZES,
    llama3_2_1b=(16, 32, 8, 2048, 8192),
    llama3_2_3b=(28, 24, 8, 3072, 8192),
)

# ---- Mistral, and mixtures of experts --------------------------------------------------------

PRESETS |= table(
    "Jiang et al. 2023, table 1; mistralai/Mistral-7B-v0.1",
    {**LLAMA, "vocab_size": 32_000, "max_length": 32_768},
    SIZES,
    mistral_7b=(32, 32, 8, 4096, 14_336, {"attention_pattern": ("local",), "window": 4096}),
)

PRESETS |= table(
    "mistralai/Mistral-7B-v0.3: a larger vocabulary, no window",
    {**LLAMA, "vocab_size": 32_768, "max_length": 32_768, "rotary_base": 1e6},
    SIZES,
    mistral_7b_v0_3=(32, 32, 8, 4096, 14_336),
)

PRESETS |= table(
    "Jiang et al. 2024, table 1; mistralai/Mixtral-8x7B-v0.1",
    {
        **LLAMA,
        "vocab_size": 32_000,
        "rotary_base": 1e6,
        "num_experts": 8,
        "experts_per_token": 2,
    },
    f"{SIZES} max_length",
    mixtral_8x7b=(32, 32, 8, 4096, 14_336, 32_768),
    mixtral_8x22b=(56, 48, 8, 6144, 16_384, 65_536),
)

PRESETS |= table(
    "Dai et al. 2024, §5.1.2; deepseek-ai/deepseek-moe-16b-base",
    {
        **LLAMA,
        "vocab_size": 102_400,
        "max_length": 4096,
        "norm_epsilon": 1e-6,
        "num_experts": 64,
        "experts_per_token": 6,
        "expert_width": 1408,
        "shared_experts": 2,
        "dense_layers": 1,
        "router_score": "softmax",
        "router_normalize": False,
    },
    SIZES,
    deepseek_moe_16b=(28, 16, 16, 2048, 10_944),
)

_LATENT = {**LLAMA, "head_dim": 192, "kv_rank": 512, "shared_key_dim": 64, "value_dim": 128}
_YARN = {
    "max_length": 163_840,
    "norm_epsilon": 1e-6,
    "rotary_scaling": "yarn",
    "rotary_factor": 40.0,
    "rotary_original_length": 4096,
    "rotary_low": 1.0,
    "rotary_high": 32.0,
    "rotary_gain": 1.0,
}


def _scale(mscale: float) -> float:
    return (0.1 * mscale * math.log(40) + 1) ** 2 * 192**-0.5


PRESETS |= table(
    "DeepSeek-AI 2024a, §3.1.2 and appendix B; deepseek-ai/DeepSeek-V2, DeepSeek-V2-Lite",
    {
        **_LATENT,
        **_YARN,
        "vocab_size": 102_400,
        "attention_scale": _scale(0.707),
        "experts_per_token": 6,
        "shared_experts": 2,
        "dense_layers": 1,
        "router_normalize": False,
    },
    f"{SIZES} num_experts expert_width",
    deepseek_v2_lite=(27, 16, 16, 2048, 10_944, 64, 1408),
    deepseek_v2=(
        *(60, 128, 128, 5120, 12_288, 160, 1536),
        {
            "query_rank": 1536,
            "router_scale": 16.0,
            "router_groups": 8,
            "router_group_limit": 3,
            "router_group_best": 1,
        },
    ),
)

_DEEPSEEK_V3 = {**_LATENT, "router_score": "sigmoid", "router_bias": True}

PRESETS |= table(
    "DeepSeek-AI 2024b, §4.2; deepseek-ai/DeepSeek-V3 and R1, without multi-token prediction",
    {
        **_DEEPSEEK_V3,
        **_YARN,
        "vocab_size": 129_280,
        "attention_scale": _scale(1.0),
        "query_rank": 1536,
        "num_experts": 256,
        "experts_per_token": 8,
        "expert_width": 2048,
        "shared_experts": 1,
        "dense_layers": 3,
        "router_scale": 2.5,
        "router_groups": 8,
        "router_group_limit": 4,
    },
    SIZES,
    deepseek_v3=(61, 128, 128, 7168, 18_432),
)

PRESETS |= table(
    "Liu et al. 2025, table 3; moonshotai/Moonlight-16B-A3B",
    {
        **_DEEPSEEK_V3,
        "vocab_size": 163_840,
        "max_length": 8192,
        "rotary_base": 50_000.0,
        "num_experts": 64,
        "experts_per_token": 6,
        "expert_width": 1408,
        "shared_experts": 2,
        "dense_layers": 1,
        "router_scale": 2.446,
    },
    SIZES,
    moonlight_16b_a3b=(27, 16, 16, 2048, 11_264),
)

# ---- SmolLM 3 and OLMo ----------------------------------------------------------------------

PRESETS |= table(
    "HuggingFaceTB/SmolLM3-3B; every fourth layer is not rotated (Yang et al. 2025b)",
    {
        **LLAMA,
        "tie_embeddings": True,
        "vocab_size": 128_256,
        "max_length": 65_536,
        "rotary_base": 5e6,
        "rotary_pattern": (True, True, True, False),
        "norm_epsilon": 1e-6,
    },
    SIZES,
    smollm3_3b=(36, 16, 4, 2048, 11_008),
)

_OLMO = {
    **LLAMA,
    "rotary_base": 500_000.0,
    "norm_position": "reordered",
    "norm_epsilon": 1e-6,
    "qk_norm": True,
    "qk_norm_joint": True,
}

PRESETS |= table(
    "OLMo Team 2024, table 3; allenai/OLMo-2-1124-7B, OLMo-2-0425-1B, OLMo-2-0325-32B",
    {**_OLMO, "vocab_size": 100_352, "max_length": 4096},
    SIZES,
    olmo2_1b=(16, 16, 16, 2048, 8192),
    olmo2_7b=(32, 32, 32, 4096, 11_008),
    olmo2_13b=(40, 40, 40, 5120, 13_824),
    olmo2_32b=(64, 40, 8, 5120, 27_648),
)

PRESETS |= table(
    "OLMo Team 2025; allenai/Olmo-3-1025-7B, Olmo-3-1125-32B",
    {
        **_OLMO,
        "vocab_size": 100_278,
        "max_length": 65_536,
        "attention_pattern": ("local",) * 3 + ("global",),
        "window": 4096,
        "rotary_local_base": 500_000.0,
        "rotary_scaling": "yarn",
        "rotary_factor": 8.0,
        "rotary_original_length": 8192,
        "rotary_high": 32.0,
    },
    SIZES,
    olmo3_7b=(32, 32, 32, 4096, 11_008),
    olmo3_32b=(64, 40, 8, 5120, 27_648),
)

# ---- Qwen ------------------------------------------------------------------------------------

_QWEN = {**LLAMA, "rotary_base": 1e6, "norm_epsilon": 1e-6}

PRESETS |= table(
    "Qwen Team 2024, table 1; Qwen/Qwen2.5-0.5B",
    {
        **_QWEN,
        "qkv_bias": True,
        "vocab_size": 151_936,
        "max_length": 32_768,
        "tie_embeddings": True,
    },
    SIZES,
    qwen2_5_0_5b=(24, 14, 2, 896, 4864),
    qwen2_5_1_5b=(28, 12, 2, 1536, 8960),
    qwen2_5_3b=(36, 16, 2, 2048, 11_008),
)

PRESETS |= table(
    "Qwen Team 2024, table 1; Qwen/Qwen2.5-7B",
    {**_QWEN, "qkv_bias": True, "vocab_size": 152_064, "max_length": 131_072},
    f"{SIZES} norm_epsilon",
    qwen2_5_7b=(28, 28, 4, 3584, 18_944, 1e-6),
    qwen2_5_14b=(48, 40, 8, 5120, 13_824, 1e-5),
    qwen2_5_32b=(64, 40, 8, 5120, 27_648, 1e-5),
    qwen2_5_72b=(80, 64, 8, 8192, 29_568, 1e-5),
)

PRESETS |= table(
    "Yang et al. 2025, table 1; Qwen/Qwen3-0.6B",
    {**_QWEN, "qk_norm": True, "head_dim": 128, "vocab_size": 151_936, "max_length": 40_960},
    f"{SIZES} tie_embeddings",
    qwen3_0_6b=(28, 16, 8, 1024, 3072, True),
    qwen3_1_7b=(28, 16, 8, 2048, 6144, True),
    qwen3_4b=(36, 32, 8, 2560, 9728, True),
    qwen3_8b=(36, 32, 8, 4096, 12_288, False),
    qwen3_14b=(40, 40, 8, 5120, 17_408, False),
    qwen3_32b=(64, 64, 8, 5120, 25_600, False),
)

PRESETS |= table(
    "Yang et al. 2025, table 2; Qwen/Qwen3-30B-A3B, Qwen3-235B-A22B",
    {
        **_QWEN,
        "qk_norm": True,
        "head_dim": 128,
        "vocab_size": 151_936,
        "max_length": 40_960,
        "num_experts": 128,
        "experts_per_token": 8,
    },
    f"{SIZES} expert_width",
    qwen3_30b_a3b=(48, 32, 4, 2048, 6144, 768),
    qwen3_235b_a22b=(94, 64, 4, 4096, 12_288, 1536),
)

# ---- gpt-oss ---------------------------------------------------------------------------------

PRESETS |= table(
    "OpenAI 2025, table 1; openai/gpt-oss-20b",
    {
        **LLAMA,
        "activation": "swiglu_clipped",
        "vocab_size": 201_088,
        "max_length": 131_072,
        "head_dim": 64,
        "qkv_bias": True,
        "attention_bias": True,
        "attention_sinks": True,
        "attention_pattern": ("local", "global"),
        "window": 128,
        "rotary_base": 150_000.0,
        "rotary_scaling": "yarn",
        "rotary_factor": 32.0,
        "rotary_original_length": 4096,
        "rotary_high": 32.0,
        "rotary_truncate": False,
        "expert_bias": True,
        "experts_per_token": 4,
    },
    f"{SIZES} num_experts",
    gpt_oss_20b=(24, 64, 8, 2880, 2880, 32),
    gpt_oss_120b=(36, 64, 8, 2880, 2880, 128),
)

# ---- Gemma -----------------------------------------------------------------------------------

_GEMMA = {
    **LLAMA,
    "tie_embeddings": True,
    "embedding_scale": 0.0,
    "norm_position": "sandwich",
    "norm_epsilon": 1e-6,
    "norm_unit_offset": True,
    "activation": "geglu",
}

PRESETS |= table(
    "Gemma Team 2024, table 1; google/gemma-2-2b",
    {
        **_GEMMA,
        "vocab_size": 256_000,
        "max_length": 8192,
        "attention_pattern": ("local", "global"),
        "window": 4096,
        "attention_softcap": 50.0,
        "logits_softcap": 30.0,
    },
    f"{SIZES} head_dim attention_scale",
    gemma2_2b=(26, 8, 4, 2304, 9216, 256, 256**-0.5),
    gemma2_9b=(42, 16, 8, 3584, 14_336, 256, 256**-0.5),
    gemma2_27b=(46, 32, 16, 4608, 36_864, 128, 144**-0.5),  # of width / heads
)

_GEMMA3 = {
    **_GEMMA,
    "qk_norm": True,
    "attention_pattern": ("local",) * 5 + ("global",),
    "rotary_base": 1e6,
    "rotary_local_base": 10_000.0,
}

PRESETS |= table(
    "Gemma Team 2025, table 1; google/gemma-3-1b-pt, gemma-3-270m",
    {**_GEMMA3, "vocab_size": 262_144, "max_length": 32_768, "window": 512, "head_dim": 256},
    SIZES,
    gemma3_270m=(18, 4, 1, 640, 2048),
    gemma3_1b=(26, 4, 1, 1152, 6912),
)

PRESETS |= table(
    "Gemma Team 2025, table 1; google/gemma-3-4b-pt, the language model alone",
    {
        **_GEMMA3,
        "vocab_size": 262_208,  # 64 more, for images
        "max_length": 131_072,
        "window": 1024,
        "rotary_scaling": "linear",
        "rotary_factor": 8.0,
    },
    f"{SIZES} head_dim attention_scale",
    gemma3_4b=(34, 8, 4, 2560, 10_240, 256, 256**-0.5),
    gemma3_12b=(48, 16, 8, 3840, 15_360, 256, 256**-0.5),
    gemma3_27b=(62, 32, 16, 5376, 21_504, 128, 168**-0.5),  # of width / heads
)

PRESETS |= table(
    "Vera et al. 2025, §2.1; google/embeddinggemma-300m, without the dense layers after it",
    {
        **_GEMMA3,
        "architecture": "encoder",
        "vocab_size": 262_144,
        "max_length": 2048,
        "head_dim": 256,
        "window": 257,  # 512 on both sides together
    },
    SIZES,
    embeddinggemma_300m=(24, 3, 1, 768, 1152),
)
