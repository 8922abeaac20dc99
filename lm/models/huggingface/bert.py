"""BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019) as Hugging Face writes them.

The encoder alone, or with a head: the masked language model's, one label a text, one label a
token. Whether there is a pooler only the tensors say, and whether BERT's masked language model
comes with its next-sentence head, which is our classifier.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lm.config import check
from lm.models.config import ModelConfig
from lm.models.huggingface.config_fields import (
    LABELS,
    Field,
    Json,
    Together,
    activation,
    demand,
    only,
    read_labels,
    with_defaults,
    write_labels,
)
from lm.models.huggingface.family import Family
from lm.models.huggingface.name_map import Rule, Table

_MASKED = ("ForMaskedLM", "ForPreTraining")
_CLASSIFIERS = {
    "ForPreTraining": "sequence",
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
}
_HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
_FIELDS = {
    "vocab_size": Field("vocab_size", 30_522),
    "hidden_size": Field("width", 768),
    "num_hidden_layers": Field("num_layers", 12),
    "num_attention_heads": Field("num_heads", 12),
    "intermediate_size": Field("mlp_width", 3072),
    "hidden_act": activation("gelu"),
    "hidden_dropout_prob": Field("dropout", 0.1),
    "type_vocab_size": Field("token_types", 2),
    "initializer_range": Field("initializer_std", 0.02),
    "layer_norm_eps": Field("norm_epsilon", 1e-12),
    "position_embedding_type": only("absolute"),
}


def head(kind: str, pooled: str = "Model") -> Together:
    """What comes after the encoder, by the name of the class.

    Args:
      kind: what classes' names begin with.
      pooled: the class that, beside the classifier of texts, has a pooler.
    """

    def read(values: Json) -> dict[str, Any]:
        head = (values["architectures"] or (f"{kind}Model",))[0].removeprefix(kind)
        masked, classifier = head in _MASKED, _CLASSIFIERS.get(head, "none")
        fields = {"pooler": head == pooled or classifier == "sequence", "classifier": classifier}
        if masked:
            fields["tie_embeddings"] = values["tie_word_embeddings"]
            if kind == "Roberta":  # its head has this nonlinearity, whatever the blocks have
                demand("hidden_act", values["hidden_act"], "gelu")
            fields |= {"head_transform": True, "head_bias": True}
        elif classifier != "none":
            fields["num_labels"] = read_labels(values)
        return fields

    def write(config: ModelConfig) -> dict[str, Any]:
        head, fields = "Model", {"tie_word_embeddings": config.tie_embeddings}
        if config.classifier != "none":
            fields |= write_labels(config)
            head = {"sequence": _HEADS[2], "token": _HEADS[3]}[config.classifier]
        if config.head_transform:
            head = _MASKED[config.classifier == "sequence"]
        return {"architectures": [kind + head], **fields}

    return Together({**LABELS, "tie_word_embeddings": True}, read, write)


def _read_roberta_positions(values: Json) -> dict[str, Any]:
    """Positions are counted from the one after padding's: so many rows of the table come before."""
    rows, pad = values["max_position_embeddings"], values["pad_token_id"]
    check(pad >= 0, f"config.json: pad_token_id={pad} must be at least 0")
    check(
        rows > pad + 1,
        f"config.json: max_position_embeddings={rows} must be more than the {pad + 1} rows before "
        "position 0",
    )
    return {"position_offset": pad + 1, "max_length": rows - pad - 1}


def _write_roberta_positions(config: ModelConfig) -> dict[str, Any]:
    return {
        "max_position_embeddings": config.max_length + config.position_offset,
        "pad_token_id": config.position_offset - 1,
    }


def _encoder(config: ModelConfig, base: str) -> tuple[str, Table]:
    """What stands before the encoder's tensors (nothing if there is nothing else), and those."""
    prefix = base if config.head_transform or config.classifier != "none" else ""
    embeddings, layer = f"{prefix}embeddings", f"{prefix}encoder.layer.{{layer}}"
    return prefix, {
        "embedding.tokens": f"{embeddings}.word_embeddings.weight",
        "embedding.positions": f"{embeddings}.position_embeddings.weight",
        "embedding.types": f"{embeddings}.token_type_embeddings.weight",
        "embedding.norm": f"{embeddings}.LayerNorm",
        "blocks.attention.query": f"{layer}.attention.self.query",
        "blocks.attention.key": f"{layer}.attention.self.key",
        "blocks.attention.value": f"{layer}.attention.self.value",
        "blocks.attention.output": f"{layer}.attention.output.dense",
        "blocks.attention_norm": f"{layer}.attention.output.LayerNorm",
        "blocks.mlp.up": f"{layer}.intermediate.dense",
        "blocks.mlp.down": f"{layer}.output.dense",
        "blocks.mlp_norm": f"{layer}.output.LayerNorm",
    }


def _masked_head(config: ModelConfig, encoder: Table, head: str, transform: str, norm: str):
    """The masked language model's head, which ends in the token embedding if that is tied."""
    if not config.head_transform:
        return {}
    found = {"head_transform": f"{head}.{transform}", "head_transform.norm": f"{head}.{norm}"}
    if config.tie_embeddings:
        return found | {
            "embedding.tokens": f"{encoder['embedding.tokens']} {head}.decoder.weight",
            "head_bias": f"{head}.bias {head}.decoder.bias",
        }
    # The other bias is one that nothing reads.
    biases = (f"{head}.decoder.bias", f"{head}.bias")
    twice = Rule(("head_bias",), biases, lambda tensors, shapes: tensors[:1], lambda x: [*x, *x])
    return found | {"head": f"{head}.decoder.weight", "head_bias": twice}


def _bert_tensors(config: ModelConfig) -> Table:
    prefix, encoder = _encoder(config, "bert.")
    names = ("cls.predictions", "transform.dense", "transform.LayerNorm")
    return {
        **encoder,
        "pooler": f"{prefix}pooler.dense",
        **_masked_head(config, encoder, *names),
        "classifier": "cls.seq_relationship" if config.head_transform else "classifier",
    }


def _roberta_tensors(config: ModelConfig) -> Table:
    prefix, encoder = _encoder(config, "roberta.")
    of_text = config.classifier == "sequence"
    return {
        **encoder,
        "pooler": "classifier.dense" if of_text else f"{prefix}pooler.dense",
        **_masked_head(config, encoder, "lm_head", "dense", "layer_norm"),
        "classifier": "classifier.out_proj" if of_text else "classifier",
    }


def _written(config: ModelConfig) -> dict[str, Any]:
    check(
        config.token_types > 0,
        "config.model.token_types=0: BERT and RoBERTa have one or more; DistilBERT has none",
    )
    return {"attention_probs_dropout_prob": config.dropout}


def _settle(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> ModelConfig:
    if config.classifier == "sequence" and not config.head_transform:
        return config
    pooler = any(name.endswith("pooler.dense.weight") for name in tensors)
    if config.head_transform:
        follows = "cls.seq_relationship.weight" in tensors
        config = dataclasses.replace(config, classifier="sequence" if follows else "none")
    return dataclasses.replace(config, pooler=pooler)


def _family(model_type: str, kind: str, heads: tuple[str, ...], together=(), **attributes):
    return Family(
        model_type,
        tuple(kind + head for head in heads),
        constants={
            "architecture": "encoder", "embedding_norm": True, "positions": "learned",
            "norm": "layernorm", "norm_position": "post", "bias": True, "initializer": "normal",
        },
        together=(head(kind), *together),
        # Other dropout than the residual stream's, and what Google's own files say of the pooler.
        inert=(
            "attention_probs_dropout_prob", "directionality", "pooler_fc_size",
            "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head",
            "pooler_type",
        ),
        written=_written,
        unsaid=("pooler",),
        settle=_settle,
        base_prefix=f"{model_type}.",
        ignored=(r"embeddings\.position_ids$",),
        old_tensors=(
            (r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")
        ),
        **attributes,
    )  # fmt: skip


_BERT = _family(
    "bert",
    "Bert",
    (*_HEADS, "ForPreTraining"),
    fields={**_FIELDS, "max_position_embeddings": Field("max_length", 512)},
    tensors=_bert_tensors,
)
_ROBERTA = _family(
    "roberta",
    "Roberta",
    _HEADS,
    fields=with_defaults(_FIELDS, vocab_size=50_265),
    together=(
        Together(
            {"max_position_embeddings": 512, "pad_token_id": 1},
            _read_roberta_positions,
            _write_roberta_positions,
        ),
    ),
    tensors=_roberta_tensors,
)

FAMILIES = (_BERT, _ROBERTA)
