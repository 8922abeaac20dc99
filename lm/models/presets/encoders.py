"""Models with an encoder: the first Transformer, BERT and its heirs, T5, BART, mBART, Marian."""

from lm.models.presets.table import table

# ---- The Transformer (Vaswani et al. 2017) ---------------------------------------------------
# Encoder-decoder, post-norm, sinusoids, ReLU, embeddings shared three ways and scaled by √width.
# Biases everywhere but in the shared head, as in the usual implementations; the paper names only
# those of the feed-forward layers. "About 37,000" tokens; 256 a sentence is tensor2tensor's limit.

_TRANSFORMER = {
    "architecture": "encoder_decoder",
    "num_layers": 6,
    "vocab_size": 37_000,
    "max_length": 256,
    "embedding_scale": 0.0,
    "positions": "sinusoidal",
    "norm": "layernorm",
    "norm_position": "post",
    "activation": "relu",
    "bias": True,
    "initializer": "xavier",
}

PRESETS = table(
    "Vaswani et al. 2017, table 3",
    _TRANSFORMER,
    "num_heads width dropout initializer_std",  # tensor2tensor: embeddings start at width^-½
    transformer_base=(8, 512, 0.1, 512**-0.5),
    transformer_big=(16, 1024, 0.3, 1024**-0.5),
)

# ---- BERT and RoBERTa ------------------------------------------------------------------------

_BERT = {
    "architecture": "encoder",
    "vocab_size": 30_522,
    "max_length": 512,
    "embedding_norm": True,
    "token_types": 2,
    "positions": "learned",
    "norm": "layernorm",
    "norm_position": "post",
    "norm_epsilon": 1e-12,
    "activation": "gelu",
    "bias": True,
    "dropout": 0.1,
    "initializer": "normal",
}
_MASKED = {"head_transform": True, "head_bias": True}

PRESETS |= table(
    "Devlin et al. 2019, §3, uncased: the encoder with its pooler",
    {**_BERT, "pooler": True},
    "num_layers num_heads width",
    bert_base=(12, 12, 768),
    bert_large=(24, 16, 1024),
)

PRESETS |= table(
    "Devlin et al. 2019, §3, uncased: with the masked language model's head and no pooler",
    {**_BERT, **_MASKED},
    "num_layers num_heads width",
    bert_base_mlm=(12, 12, 768),
    bert_large_mlm=(24, 16, 1024),
)

PRESETS |= table(
    "Liu et al. 2019, table 9, with the masked language model's head",
    {
        **_BERT,
        **_MASKED,
        "vocab_size": 50_265,
        "position_offset": 2,  # position 0 is row 2 of 514
        "token_types": 1,
        "norm_epsilon": 1e-5,
    },
    "num_layers num_heads width",
    roberta_base=(12, 12, 768),
    roberta_large=(24, 16, 1024),
)

PRESETS |= table(
    "Sanh et al. 2019, §3, uncased, with the masked language model's head",
    {**_BERT, **_MASKED, "token_types": 0, "pooler_activation": "relu"},
    "num_layers num_heads width",
    distilbert_base=(6, 12, 768),
)

# ---- ModernBERT (Warner et al. 2024) ---------------------------------------------------------
# Pre-norm, of which the first block's attention has none as it follows the embeddings', rotations,
# GeGLU, two of three layers local, and no biases but the decoder's.

PRESETS |= table(
    "Warner et al. 2024, table 4, with the masked language model's head",
    {
        **_MASKED,
        "architecture": "encoder",
        "vocab_size": 50_368,
        "max_length": 8192,
        "embedding_norm": True,
        "rotary_base": 160_000.0,
        "rotary_local_base": 10_000.0,
        "attention_pattern": ("global", "local", "local"),
        "window": 65,  # 128 on both sides together
        "norm": "layernorm",
        "first_norm": False,
        "activation": "geglu_exact",
        "transform_bias": False,
        "classifier_pooling": "mean",
    },
    "num_layers num_heads width mlp_width",
    modernbert_base=(22, 12, 768, 1152),
    modernbert_large=(28, 16, 1024, 2624),
)

# ---- T5 (Raffel et al. 2020) -----------------------------------------------------------------
# Biases of relative positions only, RMSNorm, no biases, no attention scale, and of the tied
# embeddings a head scaled by width^-½.

_T5 = {
    "architecture": "encoder_decoder",
    "vocab_size": 32_128,
    "max_length": 512,
    "positions": "relative",
    "relative_buckets": 32,
    "relative_distance": 128,
    "attention_scale": 1.0,
    "norm": "rmsnorm",
    "norm_epsilon": 1e-6,
    "initializer": "t5",
}

PRESETS |= table(
    "Raffel et al. 2020, §3.7",
    {**_T5, "activation": "relu", "output_scale": 0.0, "dropout": 0.1},
    "num_layers num_heads width head_dim mlp_width",
    t5_small=(6, 8, 512, 64, 2048),
    t5_base=(12, 12, 768, 64, 3072),
    t5_large=(24, 16, 1024, 64, 4096),
    t5_3b=(24, 32, 1024, 128, 16_384),
    t5_11b=(24, 128, 1024, 128, 65_536),
)

PRESETS |= table(
    "google-research/text-to-text-transfer-transformer, released_checkpoints.md, T5 v1.1",
    {**_T5, "activation": "geglu", "tie_embeddings": False},  # and no dropout in pre-training
    "num_layers num_heads width head_dim mlp_width",
    t5_v1_1_small=(8, 6, 512, 64, 1024),
    t5_v1_1_base=(12, 12, 768, 64, 2048),
    t5_v1_1_large=(24, 16, 1024, 64, 2816),
    t5_v1_1_xl=(24, 32, 2048, 64, 5120),
    t5_v1_1_xxl=(24, 64, 4096, 64, 10_240),
)

# ---- BART (Lewis et al. 2020) and mBART ------------------------------------------------------

_BART = {
    "architecture": "encoder_decoder",
    "vocab_size": 50_265,
    "max_length": 1024,
    "embedding_norm": True,
    "positions": "learned",
    "position_offset": 2,
    "norm": "layernorm",
    "norm_position": "post",
    "activation": "gelu",
    "bias": True,
    "dropout": 0.1,
    "initializer": "normal",
}

PRESETS |= table(
    "Lewis et al. 2020, §2.1; fairseq examples/bart",
    _BART,
    "num_layers num_heads width",
    bart_base=(6, 12, 768),
    bart_large=(12, 16, 1024),
)

PRESETS |= table(
    "Liu et al. 2020, §2.2, and Tang et al. 2020, §3.1; fairseq examples/mbart, multilingual",
    {
        **_BART,
        "num_layers": 12,
        "num_heads": 16,
        "width": 1024,
        "norm_position": "pre",
        "embedding_scale": 0.0,
    },
    "vocab_size",  # 250,001 pieces, 25 or 52 languages, and a mask
    mbart_large_cc25=(250_027,),
    mbart_large_50=(250_054,),
)

# ---- Marian (Junczys-Dowmunt et al. 2018) ----------------------------------------------------

PRESETS |= table(
    "Tiedemann and Thottingal 2020, §2: transformer-base with swish and tied embeddings, en-de",
    {
        **_TRANSFORMER,
        "vocab_size": 58_101,
        "max_length": 512,
        "activation": "silu",
        "head_bias": True,
        "initializer": "normal",
    },
    "num_heads width dropout",
    opus_mt=(8, 512, 0.1),
)
