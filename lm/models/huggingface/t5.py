"""T5 and T5 v1.1 (Raffel et al. 2020), and mT5 (Xue et al. 2021), as Hugging Face writes them.

T5's head is its token embedding, of a stream scaled by width^-½; v1.1 has a head of its own and no
scale. config.json says `tie_word_embeddings` for both, but files are written in which it is true
of neither; so `scale_decoder_outputs` says whether to scale where it is there, and the tensors say
whether the head is the embedding.

Attention scores have no scale here. A model of ours that scales them is written with the scale in
its queries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lm.models.config import ModelConfig
from lm.models.huggingface.config_fields import (
    Field,
    Json,
    Together,
    activation,
    activation_name,
    demand,
    with_defaults,
)
from lm.models.huggingface.family import Family
from lm.models.huggingface.name_map import Linear, Table

_FIELDS = {
    "vocab_size": Field("vocab_size", 32_128),
    "d_model": Field("width", 512),
    "d_kv": Field("head_dim", 64),
    "d_ff": Field("mlp_width", 2048),
    "num_heads": Field("num_heads", 8),
    "relative_attention_num_buckets": Field("relative_buckets", 32),
    "relative_attention_max_distance": Field("relative_distance", 128),
    "dropout_rate": Field("dropout", 0.1),
    "layer_norm_epsilon": Field("norm_epsilon", 1e-6),
    "n_positions": Field("max_length", 512),
}
# Of two gates the names that are no others' there: "gated-gelu" means the usual approximation.
_GATES = {"geglu": "gelu_new", "geglu_exact": "gelu_python"}


def _activation(default: str) -> Together:
    """The nonlinearity; what a file says in detail must be what `feed_forward_proj` implies."""

    def read(values: Json) -> dict[str, Any]:
        written = values["feed_forward_proj"]
        name = written.removeprefix("gated-")
        gated = name != written
        name = "gelu_new" if written == "gated-gelu" else name
        ours = activation(default, gated=gated).read("feed_forward_proj", name)
        demand("dense_act_fn", values["dense_act_fn"], name, None)
        demand("is_gated_act", values["is_gated_act"], gated, None)
        return {"activation": ours}

    def write(config: ModelConfig) -> dict[str, Any]:
        name = _GATES.get(config.activation) or activation_name(config.activation)
        written = f"gated-{name}" if config.gated else name
        return {
            "feed_forward_proj": "gated-gelu" if config.activation == "geglu" else written,
            "dense_act_fn": name,
            "is_gated_act": config.gated,
        }

    silent = {"dense_act_fn": None, "is_gated_act": None}
    return Together({"feed_forward_proj": default, **silent}, read, write)


def _stacks(kind: str, num_layers: int) -> Together:
    """Encoder and decoder or the encoder alone, and the head; the latter of T5 may be scaled."""

    def read(values: Json) -> dict[str, Any]:
        if (values["architectures"] or ("",))[0].endswith("EncoderModel"):
            return {"architecture": "encoder", "num_layers": values["num_layers"]}
        tied, scaled = values["tie_word_embeddings"], values["scale_decoder_outputs"]
        if scaled is None:
            scaled = tied and kind == "T5"
        return {
            "architecture": "encoder_decoder",
            "num_layers": values["num_decoder_layers"] or values["num_layers"],
            "num_encoder_layers": values["num_layers"],
            "tie_embeddings": tied,
            "output_scale": 0.0 if scaled else 1.0,
        }

    def write(config: ModelConfig) -> dict[str, Any]:
        encoder = config.architecture == "encoder"
        fields = {
            "architectures": [kind + ("EncoderModel" if encoder else "ForConditionalGeneration")],
            "num_layers": config.encoder_layers,
            "num_decoder_layers": config.num_layers,
            "is_encoder_decoder": not encoder,
            "tie_word_embeddings": config.tie_embeddings,
        }
        scaled = {"scale_decoder_outputs": config.output_scale == 0}
        return fields | (scaled if kind == "T5" else {})

    silent = dict.fromkeys(("architectures", "num_decoder_layers", "scale_decoder_outputs"))
    return Together({"num_layers": num_layers, "tie_word_embeddings": True, **silent}, read, write)


def _stack(config: ModelConfig, ours: str, theirs: str) -> Table:
    """The encoder or the decoder."""
    layer, mlp = f"{theirs}.block.{{layer}}.layer", 2 if theirs == "decoder" else 1
    first = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    hidden = f"{layer}.{mlp}.DenseReluDense"
    inward = {"up": "wi"} if not config.gated else {"gate": "wi_0", "up": "wi_1"}
    scale = config.attention_scale or config.head_width**-0.5

    def attention(name: str, where: str) -> Table:
        return {
            f"{ours}blocks.{name}.query": Linear(f"{where}.q", scale=scale),
            f"{ours}blocks.{name}.key": f"{where}.k",
            f"{ours}blocks.{name}.value": f"{where}.v",
            f"{ours}blocks.{name}.output": f"{where}.o",
        }

    return {
        f"{ours}relative_bias": first,
        **attention("attention", f"{layer}.0.SelfAttention"),
        f"{ours}blocks.attention_norm": f"{layer}.0.layer_norm",
        **{f"{ours}blocks.mlp.{part}": f"{hidden}.{name}" for part, name in inward.items()},
        f"{ours}blocks.mlp.down": f"{hidden}.wo",
        f"{ours}blocks.mlp_norm": f"{layer}.{mlp}.layer_norm",
        f"{ours}final_norm": f"{theirs}.final_layer_norm",
        **attention("cross_attention", f"{layer}.1.EncDecAttention"),
        f"{ours}blocks.cross_norm": f"{layer}.1.layer_norm",
    }


def _tensors(config: ModelConfig) -> Table:
    tokens = "shared.weight encoder.embed_tokens.weight"
    if config.architecture == "encoder":
        return {"embedding.tokens": tokens, **_stack(config, "", "encoder")}
    return {
        "embedding.tokens": f"{tokens} decoder.embed_tokens.weight",
        **_stack(config, "encoder.", "encoder"),
        **_stack(config, "", "decoder"),
        "head": "lm_head.weight",
    }


def _settle(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> ModelConfig:
    if config.architecture == "encoder" or "shared.weight" not in tensors:
        return config
    head = tensors.get("lm_head.weight")
    tied = head is None or np.array_equal(head, tensors["shared.weight"])
    return dataclasses.replace(config, tie_embeddings=tied)


def _family(model_type: str, kind: str, classes: str, fields, together) -> Family:
    return Family(
        model_type,
        tuple(kind + name for name in classes.split()),
        constants={
            "positions": "relative", "attention_scale": 1.0, "norm": "rmsnorm", "initializer": "t5"
        },
        fields=fields,
        together=together,
        inert=("initializer_factor",),
        tensors=_tensors,
        unsaid=("tie_embeddings", "attention_scale"),  # of the latter only ours
        settle=_settle,
        base_prefix="transformer.",
        # Trained along by mistake, never read.
        ignored=(
            r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",
        ),
    )  # fmt: skip


_CLASSES = "ForConditionalGeneration Model EncoderModel"
_T5 = _family(
    "t5",
    "T5",
    f"{_CLASSES} WithLMHeadModel",  # what the first files call it
    _FIELDS,
    (_activation("relu"), _stacks("T5", num_layers=6)),
)
_MT5 = _family(
    "mt5",
    "MT5",
    _CLASSES,
    with_defaults(_FIELDS, vocab_size=250_112, d_ff=1024, num_heads=6),
    (_activation("gated-gelu"), _stacks("MT5", num_layers=8)),
)

FAMILIES = (_T5, _MT5)
