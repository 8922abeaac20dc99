"""Decoders before and beside Llama: GPT-2, GPT-J, OPT, BLOOM, GPT-NeoX with Pythia, Falcon,
StarCoder 2.
"""

from __future__ import annotations

from typing import Any

from lm.config import check
from lm.models.config import ModelConfig
from lm.models.huggingface.config_fields import (
    Field,
    Json,
    Together,
    activation,
    classifier,
    demand,
    only,
)
from lm.models.huggingface.family import Family
from lm.models.huggingface.llama import BODY, LAYER, family, one_window, rotary
from lm.models.huggingface.name_map import QKV, Linear, Table
from lm.models.huggingface.rope import ROPE_FIELDS, read_rotary, write_rotary

# ---- GPT-2 (Radford et al. 2019) -------------------------------------------------------------

_GPT2 = Family(
    "gpt2",
    ("GPT2LMHeadModel", "GPT2Model", "GPT2ForSequenceClassification"),
    constants={"positions": "learned", "norm": "layernorm", "bias": True, "initializer": "gpt2"},
    fields={
        "vocab_size": Field("vocab_size", 50_257),
        "n_positions": Field("max_length", 1024),
        "n_embd": Field("width", 768),
        "n_layer": Field("num_layers", 12),
        "n_head": Field("num_heads", 12),
        "n_inner": Field("mlp_width"),
        "activation_function": activation("gelu_new"),
        "layer_norm_epsilon": Field("norm_epsilon", 1e-5),
        "resid_pdrop": Field("dropout", 0.1),
        "initializer_range": Field("initializer_std", 0.02),
        "tie_word_embeddings": Field("tie_embeddings", True),
        "scale_attn_weights": Field(
            "attention_scale",
            True,
            lambda name, scaled: None if scaled else 1.0,
            lambda scale: scale != 1,
        ),
        "scale_attn_by_inverse_layer_idx": Field("scale_by_layer", False),
    },
    together=(classifier("GPT2ForSequenceClassification"),),
    # Besides dropout elsewhere, that of the residual stream being ours: the precision of scores,
    # which are always float32 here, and the head of a class that we do not read.
    inert=(
        "embd_pdrop", "attn_pdrop", "n_ctx", "reorder_and_upcast_attn", "summary_type",
        "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    ),
    written=lambda config: {
        "n_inner": config.mlp_width, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout
    },
    tensors={
        "embedding.tokens": "transformer.wte.weight",
        "embedding.positions": "transformer.wpe.weight",
        "blocks.attention_norm": "transformer.h.{layer}.ln_1",
        QKV: Linear("transformer.h.{layer}.attn.c_attn", conv1d=True),
        "blocks.attention.output": Linear("transformer.h.{layer}.attn.c_proj", conv1d=True),
        "blocks.mlp_norm": "transformer.h.{layer}.ln_2",
        "blocks.mlp.up": Linear("transformer.h.{layer}.mlp.c_fc", conv1d=True),
        "blocks.mlp.down": Linear("transformer.h.{layer}.mlp.c_proj", conv1d=True),
        "final_norm": "transformer.ln_f",
        "head": "lm_head.weight",
        "classifier": "score",
    },
    base_prefix="transformer.",
    ignored=(r"\.attn\.(bias|masked_bias)$",),
)  # fmt: skip

# ---- GPT-J (Wang & Komatsuzaki 2021) ---------------------------------------------------------


def _read_gptj_rotary(values: Json) -> dict[str, Any]:
    rotated, heads = values["rotary_dim"], values["n_head"]
    head = values["n_embd"] // heads
    check(
        0 < rotated <= head,
        f"config.json: rotary_dim={rotated} must be 1 to {head}, as n_embd={values['n_embd']} and "
        f"n_head={heads} make heads",
    )
    # The least share that comes to so many, also after rounding.
    return {"rotary_fraction": rotated / head + (int(rotated / head * head) < rotated) * 1e-9}


def _gptj_tensors(config: ModelConfig) -> Table:
    layer = "transformer.h.{layer}"
    turned = {"interleaved": config.rotary_dim}
    return {
        "embedding.tokens": "transformer.wte.weight",
        "blocks.attention_norm": f"{layer}.ln_1",
        "blocks.attention.query": Linear(f"{layer}.attn.q_proj", **turned),
        "blocks.attention.key": Linear(f"{layer}.attn.k_proj", **turned),
        "blocks.attention.value": f"{layer}.attn.v_proj",
        "blocks.attention.output": f"{layer}.attn.out_proj",
        "blocks.mlp.up": f"{layer}.mlp.fc_in",
        "blocks.mlp.down": f"{layer}.mlp.fc_out",
        "final_norm": "transformer.ln_f",
        "head": "lm_head.weight",
        "head_bias": "lm_head.bias",
        "classifier": "score",
    }


_GPTJ = Family(
    "gptj",
    ("GPTJForCausalLM", "GPTJModel", "GPTJForSequenceClassification"),
    constants={
        "norm": "layernorm", "parallel": True, "shared_norm": True, "bias": True,
        "qkv_bias": False, "attention_bias": False, "head_bias": True, "initializer": "normal",
    },
    fields={
        "vocab_size": Field("vocab_size", 50_400),
        "n_positions": Field("max_length", 2048),
        "n_embd": Field("width", 4096),
        "n_layer": Field("num_layers", 28),
        "n_head": Field("num_heads", 16),
        "n_inner": Field("mlp_width"),
        "activation_function": activation("gelu_new"),
        "layer_norm_epsilon": Field("norm_epsilon", 1e-5),
        "resid_pdrop": Field("dropout", 0.0),
        "initializer_range": Field("initializer_std", 0.02),
        "tie_word_embeddings": Field("tie_embeddings", False),
        "scale_attn_weights": only(True),
        "rotary": only(True),
    },
    together=(
        Together(
            {"rotary_dim": 64},
            _read_gptj_rotary,
            lambda config: {"rotary_dim": config.rotary_dim},
        ),
        classifier("GPTJForSequenceClassification"),
    ),
    inert=(
        "embd_pdrop", "attn_pdrop", "n_ctx", "summary_type", "summary_use_proj",
        "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    ),
    written=lambda config: {"embd_pdrop": config.dropout, "attn_pdrop": config.dropout},
    tensors=_gptj_tensors,
    base_prefix="transformer.",
    ignored=(r"\.attn\.(bias|masked_bias)$",),
    old_fields={
        "max_position_embeddings": "n_positions", "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    },
)  # fmt: skip

# ---- OPT (Zhang et al. 2022) -----------------------------------------------------------------


def _read_opt_norms(values: Json) -> dict[str, Any]:
    before = values["do_layer_norm_before"]
    return {
        "norm_position": "pre" if before else "post",
        "final_norm": before and not values["_remove_final_layer_norm"],
    }


def _write_opt_norms(config: ModelConfig) -> dict[str, Any]:
    before = config.norm_position == "pre"
    return {
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and not config.has_final_norm,
    }


_OPT = Family(
    "opt",
    ("OPTForCausalLM", "OPTModel", "OPTForSequenceClassification"),
    constants={
        "positions": "learned", "position_offset": 2, "norm": "layernorm", "norm_epsilon": 1e-5,
        "norm_bias": True, "initializer": "normal",
    },
    fields={
        "vocab_size": Field("vocab_size", 50_272),
        "hidden_size": Field("width", 768),
        "word_embed_proj_dim": Field("embedding_width"),
        "num_hidden_layers": Field("num_layers", 12),
        "num_attention_heads": Field("num_heads", 12),
        "ffn_dim": Field("mlp_width", 3072),
        "max_position_embeddings": Field("max_length", 2048),
        "activation_function": activation("relu"),
        "enable_bias": Field("bias", True),
        "dropout": Field("dropout", 0.1),
        "init_std": Field("initializer_std", 0.02),
        "tie_word_embeddings": Field("tie_embeddings", True),
        "layer_norm_elementwise_affine": only(True),
    },
    together=(
        Together(
            {"do_layer_norm_before": True, "_remove_final_layer_norm": False},
            _read_opt_norms,
            _write_opt_norms,
        ),
        classifier("OPTForSequenceClassification"),
    ),
    inert=("attention_dropout", "activation_dropout", "layerdrop"),  # than the residual stream's
    written=lambda config: {
        "attention_dropout": config.dropout, "layer_norm_elementwise_affine": True
    },
    tensors={
        "embedding.tokens": "model.decoder.embed_tokens.weight",
        "embedding.project": "model.decoder.project_in",
        "project": "model.decoder.project_out",
        "embedding.positions": "model.decoder.embed_positions.weight",
        "blocks.attention_norm": "model.decoder.layers.{layer}.self_attn_layer_norm",
        "blocks.attention.query": "model.decoder.layers.{layer}.self_attn.q_proj",
        "blocks.attention.key": "model.decoder.layers.{layer}.self_attn.k_proj",
        "blocks.attention.value": "model.decoder.layers.{layer}.self_attn.v_proj",
        "blocks.attention.output": "model.decoder.layers.{layer}.self_attn.out_proj",
        "blocks.mlp_norm": "model.decoder.layers.{layer}.final_layer_norm",
        "blocks.mlp.up": "model.decoder.layers.{layer}.fc1",
        "blocks.mlp.down": "model.decoder.layers.{layer}.fc2",
        "final_norm": "model.decoder.final_layer_norm",
        "head": "lm_head.weight",
        "classifier": "score",
    },
    base_prefix="model.",
)  # fmt: skip

# ---- BLOOM (Le Scao et al. 2022) -------------------------------------------------------------


def _read_bloom_inner(values: Json) -> dict[str, Any]:
    demand("n_inner", values["n_inner"], None, 4 * values["hidden_size"])
    return {}


_BLOOM = Family(
    "bloom",
    ("BloomForCausalLM", "BloomModel", "BloomForSequenceClassification"),
    constants={
        "embedding_norm": True, "positions": "alibi", "norm": "layernorm",
        "activation": "gelu_tanh", "bias": True, "initializer": "normal",
    },
    fields={
        "vocab_size": Field("vocab_size", 250_880),
        "hidden_size": Field("width", 64),
        "n_layer": Field("num_layers", 2),
        "n_head": Field("num_heads", 8),
        "seq_length": Field("max_length", 2048),  # it was trained for; nothing ends there
        "layer_norm_epsilon": Field("norm_epsilon", 1e-5),
        "hidden_dropout": Field("dropout", 0.0),
        "initializer_range": Field("initializer_std", 0.02),
        "tie_word_embeddings": Field("tie_embeddings", True),
        "apply_residual_connection_post_layernorm": only(False),
    },
    together=(
        Together({"n_inner": None}, _read_bloom_inner),
        classifier("BloomForSequenceClassification"),
    ),
    # Other dropout than that of the residual stream, and how to compute.
    inert=(
        "attention_dropout", "attention_softmax_in_fp32", "bias_dropout_fusion", "offset_alibi",
        "masked_softmax_fusion", "pretraining_tp", "skip_bias_add", "skip_bias_add_qkv",
        "slow_but_exact",
    ),
    written=lambda config: {
        "attention_dropout": config.dropout, "apply_residual_connection_post_layernorm": False
    },
    tensors={
        "embedding.tokens": "transformer.word_embeddings.weight",
        "embedding.norm": "transformer.word_embeddings_layernorm",
        "blocks.attention_norm": "transformer.h.{layer}.input_layernorm",
        QKV: Linear("transformer.h.{layer}.self_attention.query_key_value", by_head=True),
        "blocks.attention.output": "transformer.h.{layer}.self_attention.dense",
        "blocks.mlp_norm": "transformer.h.{layer}.post_attention_layernorm",
        "blocks.mlp.up": "transformer.h.{layer}.mlp.dense_h_to_4h",
        "blocks.mlp.down": "transformer.h.{layer}.mlp.dense_4h_to_h",
        "final_norm": "transformer.ln_f",
        "head": "lm_head.weight",
        "classifier": "score",
    },
    base_prefix="transformer.",
    old_fields={
        "n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"
    },
)  # fmt: skip

# ---- GPT-NeoX (Black et al. 2022) and Pythia (Biderman et al. 2023) --------------------------


def _read_neox_rotary(values: Json) -> dict[str, Any]:
    # Outside rope_parameters the base and the fraction have these names alone.
    rope = {**values, "rope_theta": None, "partial_rotary_factor": None}
    return read_rotary(rope, values["rotary_emb_base"], values["rotary_pct"])


def _write_neox_rotary(config: ModelConfig) -> dict[str, Any]:
    rotary = write_rotary(config)
    rotary["rotary_emb_base"] = rotary.pop("rope_theta")
    # Silence would mean a quarter.
    rotary["rope_parameters"]["partial_rotary_factor"] = config.rotary_fraction
    return {**rotary, "rotary_pct": config.rotary_fraction}


_NEOX = Family(
    "gpt_neox",
    ("GPTNeoXForCausalLM", "GPTNeoXModel", "GPTNeoXForSequenceClassification"),
    constants={"norm": "layernorm", "bias": True, "initializer": "normal"},
    fields={
        "vocab_size": Field("vocab_size", 50_432),
        "hidden_size": Field("width", 6144),
        "num_hidden_layers": Field("num_layers", 44),
        "num_attention_heads": Field("num_heads", 64),
        "intermediate_size": Field("mlp_width", 24_576),
        "hidden_act": activation("gelu"),
        "max_position_embeddings": Field("max_length", 2048),
        "layer_norm_eps": Field("norm_epsilon", 1e-5),
        "use_parallel_residual": Field("parallel", True),
        "attention_bias": Field("qkv_bias attention_bias", True),
        "hidden_dropout": Field("dropout", 0.0),
        "initializer_range": Field("initializer_std", 0.02),
        "tie_word_embeddings": Field("tie_embeddings", False),
    },
    together=(
        Together(
            {"rotary_pct": 0.25, "rotary_emb_base": 10_000.0, **ROPE_FIELDS},
            _read_neox_rotary,
            _write_neox_rotary,
        ),
        classifier("GPTNeoXForSequenceClassification"),
    ),
    # Other dropout than that of the residual stream.
    inert=("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob"),
    written=lambda config: {"attention_dropout": config.dropout},
    tensors={
        "embedding.tokens": "gpt_neox.embed_in.weight",
        "blocks.attention_norm": "gpt_neox.layers.{layer}.input_layernorm",
        QKV: Linear("gpt_neox.layers.{layer}.attention.query_key_value", by_head=True),
        "blocks.attention.output": "gpt_neox.layers.{layer}.attention.dense",
        "blocks.mlp_norm": "gpt_neox.layers.{layer}.post_attention_layernorm",
        "blocks.mlp.up": "gpt_neox.layers.{layer}.mlp.dense_h_to_4h",
        "blocks.mlp.down": "gpt_neox.layers.{layer}.mlp.dense_4h_to_h",
        "final_norm": "gpt_neox.final_layer_norm",
        "head": "embed_out.weight",
        "classifier": "score",
    },
    base_prefix="gpt_neox.",
    ignored=(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",),
    old_tensors=((r"^lm_head\.", "embed_out."),),
)

# ---- Falcon (Almazrouei et al. 2023) ---------------------------------------------------------


def _read_falcon_block(values: Json) -> dict[str, Any]:
    new, heads = values["new_decoder_architecture"], values["num_attention_heads"]
    if new is None:  # the first files of 40B lack it, and those of 7B, which differ by their type
        new = values["model_type"] == "RefinedWeb"
    kv_heads, norms = values["num_kv_heads"], values["num_ln_in_parallel_attn"]
    if new:
        demand("parallel_attn", values["parallel_attn"], True)
        demand("num_ln_in_parallel_attn", norms, None, 1, 2)
        return {"num_kv_heads": kv_heads, "parallel": True, "shared_norm": norms == 1}
    parallel, single = values["parallel_attn"], values["multi_query"]
    if parallel:
        demand("num_ln_in_parallel_attn", norms, None, 1)
    if not single:
        demand("num_kv_heads", kv_heads, None, heads)
    return {"num_kv_heads": 1 if single else heads, "parallel": parallel, "shared_norm": parallel}


def _write_falcon_block(config: ModelConfig) -> dict[str, Any]:
    single, norms = config.kv_heads == 1, 2 - config.shared_norm
    grouped = not (single or config.kv_heads == config.num_heads)
    new = config.parallel and (grouped or not config.shared_norm)
    return {
        "new_decoder_architecture": new,
        "multi_query": single,
        "num_kv_heads": config.kv_heads,
        "parallel_attn": config.parallel,
        "num_ln_in_parallel_attn": norms if new else None,
    }


def _falcon_tensors(config: ModelConfig) -> Table:
    layer = "transformer.h.{layer}"
    two = config.parallel and not config.shared_norm
    return {
        "embedding.tokens": "transformer.word_embeddings.weight",
        "blocks.attention_norm": f"{layer}.{'ln_attn' if two else 'input_layernorm'}",
        QKV: Linear(f"{layer}.self_attention.query_key_value", by_head=True),
        "blocks.attention.output": f"{layer}.self_attention.dense",
        "blocks.mlp_norm": f"{layer}.{'ln_mlp' if two else 'post_attention_layernorm'}",
        "blocks.mlp.up": f"{layer}.mlp.dense_h_to_4h",
        "blocks.mlp.down": f"{layer}.mlp.dense_4h_to_h",
        "final_norm": "transformer.ln_f",
        "head": "lm_head.weight",
        "classifier": "score",
    }


_FALCON = Family(
    "falcon",
    (
        "FalconForCausalLM", "FalconModel", "FalconForSequenceClassification", "RWForCausalLM",
        "RWModel",
    ),
    constants={"norm": "layernorm", "norm_bias": True, "initializer": "normal"},
    fields={
        "vocab_size": Field("vocab_size", 65_024),
        "hidden_size": Field("width", 4544),
        "num_hidden_layers": Field("num_layers", 32),
        "num_attention_heads": Field("num_heads", 71),
        "ffn_hidden_size": Field("mlp_width"),
        "activation": activation("gelu"),
        "bias": Field("bias", False),
        "max_position_embeddings": Field("max_length", 2048),
        "layer_norm_epsilon": Field("norm_epsilon", 1e-5),
        "hidden_dropout": Field("dropout", 0.0),
        "initializer_range": Field("initializer_std", 0.02),
        "tie_word_embeddings": Field("tie_embeddings", True),
        # Its biases are those of absolute positions, rounded to bfloat16, and scaled with scores.
        "alibi": only(False),
        "apply_residual_connection_post_layernorm": only(False),
    },
    together=(
        rotary(),
        Together(
            {
                "new_decoder_architecture": None, "multi_query": True, "num_kv_heads": None,
                "parallel_attn": True, "num_ln_in_parallel_attn": None, "model_type": None,
            },
            _read_falcon_block,
            _write_falcon_block,
        ),
        classifier("FalconForSequenceClassification"),
    ),
    # Other dropout than that of the residual stream; code of the time before transformers had it;
    # a factor that became ffn_hidden_size.
    inert=("attention_dropout", "auto_map", "ff_factor"),
    written=lambda config: {"attention_dropout": config.dropout, "alibi": False},
    tensors=_falcon_tensors,
    base_prefix="transformer.",
    ignored=(r"rotary(_emb)?\.inv_freq$",),
    old_fields={
        "n_embed": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
        "n_head_kv": "num_kv_heads",
    },
    old_types=("RefinedWeb", "RefinedWebModel"),
)  # fmt: skip

# ---- StarCoder 2 (Lozhkov et al. 2024) -------------------------------------------------------

_STARCODER2 = family(
    "starcoder2",
    "Starcoder2ForCausalLM Starcoder2Model",
    constants={"norm": "layernorm", "norm_bias": True},
    fields={
        "vocab_size": Field("vocab_size", 49_152),
        "hidden_size": Field("width", 3072),
        "intermediate_size": Field("mlp_width", 12_288),
        "num_hidden_layers": Field("num_layers", 30),
        "num_attention_heads": Field("num_heads", 24),
        "num_key_value_heads": Field("num_kv_heads", 2),
        "hidden_act": activation("gelu_pytorch_tanh"),
        "max_position_embeddings": Field("max_length", 4096),
        "norm_epsilon": Field("norm_epsilon", 1e-5),
        "use_bias": Field("bias", True),
        "residual_dropout": Field("dropout", 0.0),
        "initializer_range": Field("initializer_std", 0.018042),
        "tie_word_embeddings": Field("tie_embeddings", True),
        "norm_type": only("layer_norm"),
        "mlp_type": only("default"),
    },
    together=(rotary(), one_window(None)),
    inert=("embedding_dropout",),  # than the residual stream's
    written=lambda config: dict.fromkeys(
        ("embedding_dropout", "attention_dropout"), config.dropout
    ),
    tensors={
        **BODY,
        "blocks.mlp.up": f"{LAYER}.mlp.c_fc",
        "blocks.mlp.down": f"{LAYER}.mlp.c_proj",
    },
)

FAMILIES = (_GPT2, _GPTJ, _OPT, _BLOOM, _NEOX, _FALCON, _STARCODER2)
