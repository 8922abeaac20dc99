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
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lm.models.config import ModelConfig
from lm.models.huggingface.family import Family, Rule, demand, linear, same, settings
from lm.models.huggingface.parts import architecture, attention, norm, written

# What config.json leaves out has these values.
_T5 = {
    "vocab_size": 32_128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_decoder_layers": None,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "initializer_factor": 1.0,
    "feed_forward_proj": "relu",
    "dense_act_fn": None,
    "is_gated_act": None,
    "n_positions": 512,
    "tie_word_embeddings": True,
    "scale_decoder_outputs": None,
}
_MT5 = _T5 | {
    "vocab_size": 250_112,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
}

# (feed_forward_proj, dense_act_fn, is_gated_act) → ours; the first of a kind is written.
_ACTIVATIONS = {
    ("relu", "relu", False): "relu",
    ("gated-gelu", "gelu_new", True): "geglu",
    ("gated-silu", "silu", True): "swiglu",
    ("gelu", "gelu", False): "gelu",
    ("gelu_new", "gelu_new", False): "gelu_tanh",
    ("silu", "silu", False): "silu",
    ("gated-gelu_new", "gelu_new", True): "geglu",
}


def _activation(values: Mapping[str, Any]) -> str:
    """Our nonlinearity; what the file says in detail must be what `feed_forward_proj` implies."""
    for (name, plain, gated), ours in _ACTIVATIONS.items():
        if name == values["feed_forward_proj"]:
            demand(values, "dense_act_fn", plain, None)
            demand(values, "is_gated_act", gated, None)
            return ours
    demand(values, "feed_forward_proj", *(name for name, _, _ in _ACTIVATIONS))
    raise AssertionError("unreachable")


def _read(hf: Mapping[str, Any], defaults: Mapping[str, Any], scales: bool) -> ModelConfig:
    """The ModelConfig.

    Args:
      hf: config.json.
      defaults: of its fields.
      scales: whether a tied model scales what its head reads.
    """
    values = settings(hf, defaults, ("classifier_dropout",))
    encoder = architecture(hf, "T5ForConditionalGeneration").endswith("EncoderModel")
    scaled = values["scale_decoder_outputs"]
    if scaled is None:
        scaled = scales and values["tie_word_embeddings"]
    decoder_layers = values["num_decoder_layers"] or values["num_layers"]
    size = {"num_layers": decoder_layers, "num_encoder_layers": values["num_layers"]}
    if encoder:
        size = {"num_layers": values["num_layers"]}
    return ModelConfig(
        architecture="encoder" if encoder else "encoder_decoder",
        **size,
        num_heads=values["num_heads"],
        width=values["d_model"],
        head_dim=values["d_kv"],
        mlp_width=values["d_ff"],
        vocab_size=values["vocab_size"],
        max_length=values["n_positions"],
        tie_embeddings=encoder or values["tie_word_embeddings"],
        positions="relative",
        relative_buckets=values["relative_attention_num_buckets"],
        relative_distance=values["relative_attention_max_distance"],
        attention_scale=1.0,
        norm="rmsnorm",
        norm_epsilon=values["layer_norm_epsilon"],
        activation=_activation(values),
        dropout=values["dropout_rate"],
        output_scale=0.0 if scaled and not encoder else 1.0,
        initializer="t5",
    )


def _read_t5(hf: Mapping[str, Any]) -> ModelConfig:
    return _read(hf, _T5, True)


def _read_mt5(hf: Mapping[str, Any]) -> ModelConfig:
    return _read(hf, _MT5, False)


def _writer(read: Callable[[Mapping[str, Any]], ModelConfig], kind: str):
    """`Family.write_config`; the scale of attention is in the tensors."""
    write = written(read, lambda config: _write(config, kind), "tie_embeddings")
    return lambda config: write(dataclasses.replace(config, attention_scale=1.0))


def _write(config: ModelConfig, kind: str) -> dict[str, Any]:
    encoder = config.architecture == "encoder"
    name, plain, gated = next(
        key for key, ours in _ACTIVATIONS.items() if ours == config.activation
    )
    fields = {
        "architectures": [kind + ("EncoderModel" if encoder else "ForConditionalGeneration")],
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "d_kv": config.head_width,
        "d_ff": config.feed_forward,
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.num_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "dropout_rate": config.dropout,
        "layer_norm_epsilon": config.norm_epsilon,
        "feed_forward_proj": name,
        "dense_act_fn": plain,
        "is_gated_act": gated,
        "n_positions": config.max_length,
        "is_encoder_decoder": not encoder,
        "tie_word_embeddings": config.tie_embeddings,
    }
    return fields | ({"scale_decoder_outputs": config.output_scale == 0} if kind == "T5" else {})


def _table(ours: str, theirs: str) -> Rule:
    """The biases [buckets, H] of relative positions, which stand in the first block."""
    return Rule((ours,), (theirs,), lambda tensors, shapes: tensors, lambda arrays: arrays)


def _scaled(rule: Rule, scale: float) -> Rule:
    """`rule` for tensors that are `scale` times ours."""
    return dataclasses.replace(
        rule,
        load=lambda tensors, shapes: [array / scale for array in rule.load(tensors, shapes)],
        save=lambda arrays: rule.save([array * scale for array in arrays]),
    )


def _stack(config: ModelConfig, ours: str, theirs: str, crosses: bool) -> list[Rule]:
    """The encoder or the decoder."""
    layer, mlp = f"{theirs}.block.{{layer}}.layer", 2 if crosses else 1
    scale = config.attention_scale or config.head_width**-0.5

    def attend(name: str, where: str) -> list[Rule]:
        parts = (f"{where}.{part}" for part in ("q", "k", "v", "o"))
        query, *others = attention(f"{ours}blocks.{name}", *parts, bias=False)
        return [query if scale == 1 else _scaled(query, scale), *others]

    hidden = f"{layer}.{mlp}.DenseReluDense"
    inward = {"up": "wi"} if not config.gated else {"gate": "wi_0", "up": "wi_1"}
    first = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    rules = [
        _table(f"{ours}relative_bias", first),
        *attend("attention", f"{layer}.0.SelfAttention"),
        *norm(f"{ours}blocks.attention_norm", f"{layer}.0.layer_norm", bias=False),
        *(linear(f"{ours}blocks.mlp.{our}", f"{hidden}.{wi}.weight") for our, wi in inward.items()),
        linear(f"{ours}blocks.mlp.down", f"{hidden}.wo.weight"),
        *norm(f"{ours}blocks.mlp_norm", f"{layer}.{mlp}.layer_norm", bias=False),
        *norm(f"{ours}final_norm", f"{theirs}.final_layer_norm", bias=False),
    ]
    if crosses:
        rules += attend("cross_attention", f"{layer}.1.EncDecAttention")
        rules += norm(f"{ours}blocks.cross_norm", f"{layer}.1.layer_norm", bias=False)
    return rules


def _rules(config: ModelConfig) -> list[Rule]:
    tokens = same("embedding.tokens", "shared.weight")
    if config.architecture == "encoder":
        return [tokens, *_stack(config, "", "encoder", False)]
    return [
        tokens,
        *_stack(config, "encoder.", "encoder", False),
        *_stack(config, "", "decoder", True),
        *([] if config.tie_embeddings else [same("head", "lm_head.weight")]),
    ]


def _aliases(config: ModelConfig) -> dict[str, str]:
    copies = ["encoder.embed_tokens.weight"]
    if config.architecture != "encoder":
        copies.append("decoder.embed_tokens.weight")
        copies += ["lm_head.weight"] if config.tie_embeddings else []
    return dict.fromkeys(copies, "shared.weight")


def _settle(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> ModelConfig:
    if config.architecture == "encoder" or "shared.weight" not in tensors:
        return config
    head = tensors.get("lm_head.weight")
    tied = head is None or np.array_equal(head, tensors["shared.weight"])
    return dataclasses.replace(config, tie_embeddings=tied)


# Trained along by mistake, never read.
_UNUSED = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$"

T5 = Family(
    model_type="t5",
    architectures=(
        "T5ForConditionalGeneration",
        "T5Model",
        "T5EncoderModel",
        "T5WithLMHeadModel",  # what the first files call it
    ),
    read_config=_read_t5,
    write_config=_writer(_read_t5, "T5"),
    rules=_rules,
    base_prefix="transformer.",
    aliases=_aliases,
    ignored=(_UNUSED,),
    settle=_settle,
)

MT5 = Family(
    model_type="mt5",
    architectures=("MT5ForConditionalGeneration", "MT5Model", "MT5EncoderModel"),
    read_config=_read_mt5,
    write_config=_writer(_read_mt5, "MT5"),
    rules=_rules,
    base_prefix="transformer.",
    aliases=_aliases,
    ignored=(_UNUSED,),
    settle=_settle,
)

FAMILIES = (T5, MT5)
