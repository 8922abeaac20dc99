"""Decoders before and beside Llama: GPT-2, GPT-J, OPT, BLOOM, GPT-NeoX with Pythia."""

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

FAMILIES = (_GPT2, _GPTJ, _OPT, _BLOOM, _NEOX)
