"""Decoders before and beside Llama: GPT-1 to GPT-3, OPT, BLOOM, Pythia and GPT-NeoX, PaLM."""

from lm.models.presets.table import table

_GPT = {
    "positions": "learned",
    "norm": "layernorm",
    "activation": "gelu_tanh",
    "bias": True,
    "initializer": "gpt2",
}

PRESETS = table(
    "Radford et al. 2018, §4.1; openai-community/openai-gpt",
    {
        **_GPT,
        "norm_position": "post",
        "vocab_size": 40_478,
        "max_length": 512,
        "dropout": 0.1,
        "initializer": "normal",
    },
    "num_layers num_heads width",
    gpt1=(12, 12, 768),
)

PRESETS |= table(
    "Radford et al. 2019, table 2; openai-community/gpt2",
    {**_GPT, "vocab_size": 50_257, "max_length": 1024, "dropout": 0.1},
    "num_layers num_heads width",
    gpt2_small=(12, 12, 768),
    gpt2_medium=(24, 16, 1024),
    gpt2_large=(36, 20, 1280),
    gpt2_xl=(48, 25, 1600),
)

# Every layer attends to the whole context: the paper alternates such layers with banded sparse
# ones, whose band it does not give. Two entries of its table contradict themselves: XL has 24 heads
# of 128 in a width of 2,048 (16 make the 1.3B it states), and 13B a width of 5,140 for 40 of 128.
PRESETS |= table(
    "Brown et al. 2020, table 2.1",
    {**_GPT, "vocab_size": 50_257, "max_length": 2048},
    "num_layers num_heads width",
    gpt3_small=(12, 12, 768),
    gpt3_medium=(24, 16, 1024),
    gpt3_large=(24, 16, 1536),
    gpt3_xl=(24, 16, 2048),
    gpt3_2_7b=(32, 32, 2560),
    gpt3_6_7b=(32, 32, 4096),
    gpt3_13b=(40, 40, 5120),
    gpt3_175b=(96, 96, 12_288),
)

PRESETS |= table(
    "Zhang et al. 2022, table 1; facebook/opt-125m",
    {
        **_GPT,
        "activation": "relu",
        "position_offset": 2,
        "vocab_size": 50_272,
        "max_length": 2048,
        "dropout": 0.1,
        "initializer_std": 0.006,
    },
    "num_layers num_heads width",
    opt_125m=(12, 12, 768),
    opt_350m=(24, 16, 1024, {"embedding_width": 512, "norm_position": "post"}),
    opt_1_3b=(24, 32, 2048),
    opt_2_7b=(32, 32, 2560),
    opt_6_7b=(32, 32, 4096),
    opt_13b=(40, 40, 5120),
    opt_30b=(48, 56, 7168),
    opt_66b=(64, 72, 9216),
    opt_175b=(96, 96, 12_288),
)

PRESETS |= table(
    "Le Scao et al. 2022, table 3; bigscience/bloom",
    {
        **_GPT,
        "positions": "alibi",
        "embedding_norm": True,
        "vocab_size": 250_880,
        "max_length": 2048,
    },
    "num_layers num_heads width",
    bloom_560m=(24, 16, 1024),
    bloom_1b1=(24, 16, 1536),
    bloom_1b7=(24, 16, 2048),
    bloom_3b=(30, 32, 2560),
    bloom_7b1=(30, 32, 4096),
    bloom_176b=(70, 112, 14_336),
)

_NEOX = {
    "vocab_size": 50_304,
    "max_length": 2048,
    "tie_embeddings": False,
    "positions": "rotary",
    "rotary_fraction": 0.25,
    "norm": "layernorm",
    "parallel": True,
    "bias": True,
    "initializer": "normal",
}

PRESETS |= table(
    "Biderman et al. 2023, table 1; EleutherAI/pythia-160m",
    {**_NEOX, "activation": "gelu"},
    "num_layers num_heads width",
    pythia_14m=(6, 4, 128),
    pythia_31m=(6, 8, 256),
    pythia_70m=(6, 8, 512),
    pythia_160m=(12, 12, 768),
    pythia_410m=(24, 16, 1024),
    pythia_1b=(16, 8, 2048),
    pythia_1_4b=(24, 16, 2048),
    pythia_2_8b=(32, 32, 2560),
    # Vocabularies padded to a multiple of 128 on every device that split them.
    pythia_6_9b=(32, 32, 4096, {"vocab_size": 50_432}),
    pythia_12b=(36, 40, 5120, {"vocab_size": 50_688}),
)

PRESETS |= table(
    "Black et al. 2022, §2; EleutherAI/gpt-neox-20b",
    {**_NEOX, "activation": "gelu_tanh", "vocab_size": 50_432},
    "num_layers num_heads width",
    gpt_neox_20b=(44, 64, 6144),
)

PRESETS |= table(
    "Wang & Komatsuzaki 2021; EleutherAI/gpt-j-6b",
    {
        **_NEOX,
        "vocab_size": 50_400,
        "shared_norm": True,
        "activation": "gelu_tanh",
        "qkv_bias": False,
        "attention_bias": False,
        "head_bias": True,
    },
    "num_layers num_heads width",
    gpt_j_6b=(28, 16, 4096),
)

_FALCON = {
    "vocab_size": 65_024,
    "max_length": 2048,
    "norm": "layernorm",
    "norm_bias": True,
    "parallel": True,
    "activation": "gelu",
    "initializer": "normal",
}
PRESETS |= table(
    "Almazrouei et al. 2023, table 16; tiiuae/falcon-7b, falcon-40b, falcon-180B",
    _FALCON,
    "num_layers num_heads num_kv_heads width",
    falcon_7b=(32, 71, 1, 4544, {"shared_norm": True}),
    falcon_40b=(60, 128, 8, 8192),
    falcon_180b=(80, 232, 8, 14_848),
)
PRESETS |= table(
    "Malartic et al. 2024, §3; tiiuae/falcon-11B",
    {
        **_FALCON,
        "max_length": 8192,
        "shared_norm": True,
        "rotary_base": 500_042.0,
        "tie_embeddings": False,
    },
    "num_layers num_heads num_kv_heads width",
    falcon2_11b=(60, 32, 8, 4096),
)

PRESETS |= table(
    "Lozhkov et al. 2024, table 5; bigcode/starcoder2-3b, -7b, -15b",
    {
        "vocab_size": 49_152,
        "max_length": 16_384,
        "norm": "layernorm",
        "bias": True,
        "activation": "gelu_tanh",
        "attention_pattern": ("local",),
        "window": 4096,
        "dropout": 0.1,
        "initializer": "normal",
    },
    "num_layers num_heads num_kv_heads width rotary_base initializer_std",
    starcoder2_3b=(30, 24, 2, 3072, 999_999.4420358813, 0.018042),
    starcoder2_7b=(32, 36, 4, 4608, 1e6, 0.018042),
    starcoder2_15b=(40, 48, 4, 6144, 1e5, 0.01275, {"tie_embeddings": False}),
)

# Attention and MLP in parallel behind one LayerNorm without bias, one key/value head, SwiGLU, and
# tied embeddings of unit spread behind a head scaled by width^-½.
PRESETS |= table(
    "Chowdhery et al. 2022, table 1 and §2",
    {
        "vocab_size": 256_000,
        "max_length": 2048,
        "num_kv_heads": 1,
        "head_dim": 256,
        "norm": "layernorm",
        "parallel": True,
        "shared_norm": True,
        "activation": "swiglu",
        "output_scale": 0.0,
        "initializer": "lecun",
        "initializer_std": 1.0,
    },
    "num_layers num_heads width mlp_width",
    palm_8b=(32, 16, 4096, 16_384),
    palm_62b=(64, 32, 8192, 32_768),
    palm_540b=(118, 48, 18_432, 73_728),
)
