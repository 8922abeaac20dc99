"""BART (Lewis et al. 2020) and its heirs, mBART (Liu et al. 2020) and Marian, as Hugging Face
writes them.

mBART normalises before each layer and after each stack (Tang et al. 2020 have more languages of
it); Marian (Junczys-Dowmunt et al. 2018, and the Opus models of Tiedemann and Thottingal 2020) is
the block of 2017: sinusoids, and no norm of the embeddings.

Their logits have a bias that is no parameter there but a buffer, of zeros in the published BARTs:
only where it is something else does it become our output bias. Marian's files may hold tables of
its sinusoids, which must be those.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from lm.config import check
from lm.models.config import ModelConfig
from lm.models.huggingface.config_fields import (
    Field,
    Json,
    Together,
    activation,
    demand,
    only,
    with_defaults,
)
from lm.models.huggingface.family import Family
from lm.models.huggingface.name_map import Rule, Table
from lm.models.positions import sinusoids


def _stack(ours: str, embedding: str, theirs: str) -> Table:
    """The encoder or the decoder, with its positions and the norm of its embeddings."""
    layer = f"{theirs}.layers.{{layer}}"
    return {
        f"{embedding}.positions": f"{theirs}.embed_positions.weight",
        f"{embedding}.norm": f"{theirs}.layernorm_embedding",
        f"{ours}blocks.attention.query": f"{layer}.self_attn.q_proj",
        f"{ours}blocks.attention.key": f"{layer}.self_attn.k_proj",
        f"{ours}blocks.attention.value": f"{layer}.self_attn.v_proj",
        f"{ours}blocks.attention.output": f"{layer}.self_attn.out_proj",
        f"{ours}blocks.attention_norm": f"{layer}.self_attn_layer_norm",
        f"{ours}blocks.mlp.up": f"{layer}.fc1",
        f"{ours}blocks.mlp.down": f"{layer}.fc2",
        f"{ours}blocks.mlp_norm": f"{layer}.final_layer_norm",
        f"{ours}blocks.cross_attention.query": f"{layer}.encoder_attn.q_proj",
        f"{ours}blocks.cross_attention.key": f"{layer}.encoder_attn.k_proj",
        f"{ours}blocks.cross_attention.value": f"{layer}.encoder_attn.v_proj",
        f"{ours}blocks.cross_attention.output": f"{layer}.encoder_attn.out_proj",
        f"{ours}blocks.cross_norm": f"{layer}.encoder_attn_layer_norm",
        f"{ours}final_norm": f"{theirs}.layer_norm",
    }


_TABLES = tuple(f"model.{stack}coder.embed_positions.weight" for stack in ("en", "de"))


def _settle(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> ModelConfig:
    biased = "final_logits_bias" in tensors and bool(np.any(tensors["final_logits_bias"]))
    tied = config.tie_embeddings or "lm_head.weight" not in tensors
    for name in _TABLES if config.positions == "sinusoidal" else ():
        if name in tensors:
            table = np.asarray(tensors[name], np.float32)
            # A file may hold them in sixteen bits.
            ours = sinusoids(np.arange(len(table)), config.width)
            exact = table.shape == ours.shape and np.allclose(table, ours, rtol=0, atol=5e-3)
            check(exact, f"{name} is not the table of sinusoids that this model adds")
    return dataclasses.replace(config, head_bias=biased, tie_embeddings=tied)


def _even(name: str, width: int) -> int:
    check(width % 2 == 0, f"config.json: {name}={width} must be even for sines and cosines")
    return width


def _shared_vocabulary(values: Json) -> dict:
    """Two vocabularies are two tables of embeddings, of which we have one."""
    name = "share_encoder_decoder_embeddings"
    demand(name, values[name], True)
    demand("decoder_vocab_size", values["decoder_vocab_size"], values["vocab_size"], None)
    return {}


_BLOCK = {
    "architecture": "encoder_decoder", "norm": "layernorm", "norm_epsilon": 1e-5, "bias": True,
    "initializer": "normal",
}  # fmt: skip
_LEARNED = {**_BLOCK, "embedding_norm": True, "positions": "learned", "position_offset": 2}
_FIELDS = {
    "vocab_size": Field("vocab_size", 50_265),
    "d_model": Field("width", 1024),
    "encoder_layers": Field("num_encoder_layers", 12),
    "decoder_layers": Field("num_layers", 12),
    "encoder_ffn_dim": Field("mlp_width", 4096),
    "decoder_ffn_dim": Field("mlp_width", 4096),
    "encoder_attention_heads": Field("num_heads", 16),
    "decoder_attention_heads": Field("num_heads", 16),
    "max_position_embeddings": Field("max_length", 1024),
    "activation_function": activation("gelu"),
    "scale_embedding": Field(
        "embedding_scale", False,
        lambda name, scaled: 0.0 if scaled else 1.0, lambda scale: scale != 1,
    ),
    "dropout": Field("dropout", 0.1),
    "init_std": Field("initializer_std", 0.02),
    "tie_word_embeddings": Field("tie_embeddings", True),
    "encoder_layerdrop": only(0.0),
    "decoder_layerdrop": only(0.0),
    # Of the first files, which one class read for several models.
    "normalize_before": only(False),
    "normalize_embedding": only(True),
    "add_final_layer_norm": only(False),
    "add_bias_logits": only(False),
    "static_position_embeddings": only(False),
    "extra_pos_embeddings": only(2),
}  # fmt: skip


def _family(
    model_type: str,
    classes: str,
    constants: Json,
    fields: Mapping[str, Field],
    written=lambda config: {},
    **more,
) -> Family:
    # Other dropout than the residual stream's, and settings of generation.
    inert = (
        "attention_dropout", "activation_dropout", "classif_dropout", "num_hidden_layers",
        "force_bos_token_to_be_generated",
    )  # fmt: skip
    return Family(
        model_type,
        tuple(classes.split()),
        constants=constants,
        fields=fields,
        inert=(*inert, *more.pop("inert", ())),
        written=lambda config: {
            "attention_dropout": config.dropout,
            "is_encoder_decoder": True,
            **written(config),
        },
        tensors={
            "embedding.tokens": (
                "model.shared.weight model.encoder.embed_tokens.weight "
                "model.decoder.embed_tokens.weight"
            ),
            **_stack("encoder.", "encoder_embedding", "model.encoder"),
            **_stack("", "embedding", "model.decoder"),
            "head": "lm_head.weight",
            "head_bias": Rule(  # [V] here, [1, V] there
                ("head_bias",),
                ("final_logits_bias",),
                lambda tensors, shapes: [tensors[0].reshape(shapes[0])],
                lambda arrays: [arrays[0][None]],
            ),
        },
        unsaid=("head_bias",),
        settle=_settle,
        base_prefix="model.",
        ignored=(r"^final_logits_bias$", r"(en|de)coder\.version$", *more.pop("ignored", ())),
        **more,
    )


_BART = _family(
    "bart",
    "BartForConditionalGeneration BartModel",
    {**_LEARNED, "norm_position": "post"},
    _FIELDS,
)
_MBART = _family(
    "mbart",
    "MBartForConditionalGeneration MBartModel",
    {**_LEARNED, "norm_position": "pre", "final_norm": True},
    {**_FIELDS, "normalize_before": only(True), "add_final_layer_norm": only(True)},
)
_MARIAN = _family(
    "marian",
    "MarianMTModel MarianModel",
    {**_BLOCK, "embedding_norm": False, "positions": "sinusoidal", "norm_position": "post"},
    {
        **{n: f for n, f in with_defaults(_FIELDS, vocab_size=58_101).items() if "extra" not in n},
        "d_model": Field("width", 1024, _even),
        "normalize_embedding": only(False),
        "static_position_embeddings": only(True),
        "add_bias_logits": only(False, True),  # there is one in any case
    },
    together=(
        Together(
            {"share_encoder_decoder_embeddings": True, "decoder_vocab_size": None},
            _shared_vocabulary,
        ),
    ),
    # The default of transformers is out of the bounds of most.
    written=lambda config: {"pad_token_id": config.vocab_size - 1},
    inert=("extra_pos_embeddings",),  # some have the size of the vocabulary here
    ignored=(r"coder\.embed_positions\.weight$",),
)

FAMILIES = (_BART, _MBART, _MARIAN)
