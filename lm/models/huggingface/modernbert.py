"""ModernBERT (Warner et al. 2024) as Hugging Face writes it.

Its classifiers read what the transform before the output head makes: of each token, or of a text's
first token or their mean.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lm.models.config import ModelConfig
from lm.models.huggingface import bert
from lm.models.huggingface.config_fields import Field, Json, Together, activation, demand
from lm.models.huggingface.family import Family
from lm.models.huggingface.llama import BIASES, FIELDS, whole, windows
from lm.models.huggingface.name_map import Table
from lm.models.huggingface.rope import ROPE_FIELDS, read_layered, write_layered

_POOLINGS = {"cls": "first", "mean": "mean"}
_HEAD = bert.head("ModernBert", pooled="")
# One layer in so many is global, beginning with the first.
_WINDOWS = windows(
    lambda values, layer: layer % values["global_attn_every_n_layers"] != 0,
    global_attn_every_n_layers=3,
)
_LOCAL = {name: x for name, x in _WINDOWS.defaults.items() if name != "sliding_window"}


def _read_head(values: Json) -> dict[str, Any]:
    demand("classifier_activation", values["classifier_activation"], values["hidden_activation"])
    demand("classifier_pooling", values["classifier_pooling"], *_POOLINGS)
    fields = _HEAD.read(values)
    classifies = fields["classifier"] != "none"
    return {
        **fields,
        "pooler": False,
        "head_transform": classifies or fields.get("head_transform", False),
        "head_bias": not classifies and fields.get("head_bias", False) and values["decoder_bias"],
        "classifier_transform": classifies,
        "classifier_pooling": _POOLINGS[values["classifier_pooling"]],
    }


def _write_head(config: ModelConfig) -> dict[str, Any]:
    masked = config.head_transform and config.classifier == "none"
    return {
        **_HEAD.write(dataclasses.replace(config, head_transform=masked)),
        "decoder_bias": config.head_bias or not masked,
        "classifier_activation": _FIELDS["hidden_activation"].write(config.activation),
        "classifier_pooling": "mean" if config.classifier_pooling == "mean" else "cls",
    }


def _read_windows(values: Json) -> dict[str, Any]:
    """The file's window is that of both sides together."""
    fields = _WINDOWS.read({**values, "sliding_window": values["local_attention"]})
    return {**fields, "window": fields["window"] // 2 + 1} if fields else {}


def _write_windows(config: ModelConfig) -> dict[str, Any]:
    local = {"local_attention": 2 * (config.window - 1)} if config.window else {}
    return {"layer_types": _WINDOWS.write(config)["layer_types"], **local}


def _read_rotary(values: Json) -> dict[str, Any]:
    demand("rope_scaling", values["rope_scaling"], None)
    bases = (values[f"{kind}_rope_theta"] for kind in ("global", "local"))
    return whole(read_layered({**values, "rope_theta": None}, *bases))


def _write_rotary(config: ModelConfig) -> dict[str, Any]:
    return {
        "rope_parameters": write_layered(config)["rope_parameters"],
        "global_rope_theta": config.rotary_base,
        "local_rope_theta": config.rotary_local_base or config.rotary_base,
    }


def _blocks(ours: str, theirs: str) -> Table:
    return {
        f"{ours}.attention_norm": f"{theirs}.attn_norm",
        tuple(f"{ours}.attention.{x}" for x in ("query", "key", "value")): f"{theirs}.attn.Wqkv",
        f"{ours}.attention.output": f"{theirs}.attn.Wo",
        f"{ours}.mlp_norm": f"{theirs}.mlp_norm",
        (f"{ours}.mlp.gate", f"{ours}.mlp.up"): f"{theirs}.mlp.Wi",
        f"{ours}.mlp.down": f"{theirs}.mlp.Wo",
    }


def _tensors(config: ModelConfig) -> Table:
    prefix = "model." if config.head_transform else ""
    masked = config.head_transform and config.classifier == "none"
    tied = " decoder.weight" if masked and config.tie_embeddings else ""
    return {
        "embedding.tokens": f"{prefix}embeddings.tok_embeddings.weight{tied}",
        "embedding.norm": f"{prefix}embeddings.norm",
        **_blocks("dense_blocks", f"{prefix}layers.{{layer}}"),
        **_blocks("blocks", f"{prefix}layers.{{layer+1}}"),
        "final_norm": f"{prefix}final_norm",
        "head_transform": "head.dense",
        "head_transform.norm": "head.norm",
        **({} if config.tie_embeddings else {"head": "decoder.weight"}),
        "head_bias": "decoder.bias",
        "classifier": "classifier",
    }


_FIELDS = {
    **BIASES,
    "vocab_size": Field("vocab_size", 50_368),
    "hidden_size": Field("width", 768),
    "intermediate_size": Field("mlp_width", 1152),
    "num_hidden_layers": Field("num_layers", 22),
    "num_attention_heads": Field("num_heads", 12),
    "initializer_range": FIELDS["initializer_range"],
    "hidden_activation": activation("gelu", gated=True),
    "max_position_embeddings": Field("max_length", 8192),
    "norm_eps": Field("norm_epsilon", 1e-5),
    "norm_bias": Field("norm_bias", False),
    "mlp_bias": Field("bias", False),
    "classifier_bias": Field("transform_bias", False),
}
_IDS = tuple(f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep"))
_SILENT = {"decoder_bias": True, "classifier_activation": "gelu", "classifier_pooling": "cls"}
_MODERNBERT = Family(
    "modernbert",
    (
        "ModernBertForMaskedLM", "ModernBertModel", "ModernBertForSequenceClassification",
        "ModernBertForTokenClassification",
    ),
    constants={
        "architecture": "encoder", "embedding_norm": True, "first_norm": False,
        "norm": "layernorm", "initializer": "gpt2",
    },
    fields=_FIELDS,
    together=(
        Together({**_HEAD.defaults, **_SILENT}, _read_head, _write_head),
        Together({**_LOCAL, "local_attention": 128}, _read_windows, _write_windows),
        Together(
            {**ROPE_FIELDS, "global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0},
            _read_rotary,
            _write_rotary,
        ),
    ),
    # Dropout in places where ours is not, how to compute, and fields that nothing there looks at.
    inert=(
        "attention_dropout", "embedding_dropout", "mlp_dropout", "deterministic_flash_attn",
        "initializer_cutoff_factor", "layer_norm_eps", "position_embedding_type",
        "reference_compile", "repad_logits_with_grad", "sparse_prediction",
        "sparse_pred_ignore_index",
    ),
    # The class's own ids are of rows that smaller vocabularies do not have.
    written=lambda config: dict.fromkeys(_IDS),
    base_prefix="model.",
    tensors=_tensors,
)  # fmt: skip

FAMILIES = (_MODERNBERT,)
