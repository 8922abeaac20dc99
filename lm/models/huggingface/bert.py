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
from lm.models.huggingface.family import Family, Rule, demand, same, settings
from lm.models.huggingface.parts import (
    activation,
    activation_name,
    architecture,
    attention,
    biased,
    labels,
    norm,
    num_labels,
    projection,
    whole_heads,
    written,
)

# What config.json leaves out has these values.
_DEFAULTS = {
    "vocab_size": 30_522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
    "tie_word_embeddings": True,
}
_ROBERTA_DEFAULTS = _DEFAULTS | {"vocab_size": 50_265, "pad_token_id": 1}
# Other dropout than the residual stream's, and what Google's own files say of the pooler.
_INERT = (
    "attention_probs_dropout_prob", "directionality", "pooler_fc_size",
    "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type",
)  # fmt: skip

_MASKED = ("ForMaskedLM", "ForPreTraining")
_CLASSIFIERS = {
    "ForPreTraining": "sequence",
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
}
_HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")


def _model(values: Mapping[str, Any], hf: Mapping[str, Any], head: str, offset: int) -> ModelConfig:
    """The encoder with `head`, whose position 0 is row `offset` of the table."""
    demand(values, "position_embedding_type", "absolute")
    whole_heads(values, "hidden_size", "num_attention_heads")
    length = values["max_position_embeddings"] - offset
    check(
        length > 0,
        f"config.json: max_position_embeddings={values['max_position_embeddings']} must be more "
        f"than the {offset} rows before position 0",
    )
    masked = head in _MASKED
    if masked:
        demand(values, "tie_word_embeddings", True)
    classifier = _CLASSIFIERS.get(head, "none")
    return ModelConfig(
        architecture="encoder",
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        width=values["hidden_size"],
        mlp_width=values["intermediate_size"],
        vocab_size=values["vocab_size"],
        max_length=length,
        embedding_norm=True,
        token_types=values["type_vocab_size"],
        positions="learned",
        position_offset=offset,
        norm="layernorm",
        norm_position="post",
        norm_epsilon=values["layer_norm_eps"],
        activation=activation(values["hidden_act"], "hidden_act"),
        bias=True,
        dropout=values["hidden_dropout_prob"],
        head_transform=masked,
        head_bias=masked,
        pooler=head == "Model" or classifier == "sequence",
        classifier=classifier,
        num_labels=2 if masked or classifier == "none" else num_labels(hf),
        initializer="normal",
        initializer_std=values["initializer_range"],
    )


def _read_bert(hf: Mapping[str, Any]) -> ModelConfig:
    head = architecture(hf, "BertModel").removeprefix("Bert")
    return _model(settings(hf, _DEFAULTS, _INERT), hf, head, 0)


def _read_roberta(hf: Mapping[str, Any]) -> ModelConfig:
    values = settings(hf, _ROBERTA_DEFAULTS, _INERT)
    head = architecture(hf, "RobertaModel").removeprefix("Roberta")
    if head in _MASKED:  # its head has this nonlinearity, whatever the blocks have
        demand(values, "hidden_act", "gelu")
    pad = values["pad_token_id"]  # positions are counted from the one after it
    check(pad >= 0, f"config.json: pad_token_id={pad} must be at least 0")
    return _model(values, hf, head, pad + 1)


def _write(config: ModelConfig, kind: str) -> dict[str, Any]:
    head = "Model"
    if config.head_transform:
        head = _MASKED[config.classifier == "sequence"]
    elif config.classifier != "none":
        head = {"sequence": _HEADS[2], "token": _HEADS[3]}[config.classifier]
    fields = {
        "architectures": [kind + head],
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.feed_forward,
        "hidden_act": activation_name(config.activation),
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "max_position_embeddings": config.max_length + config.position_offset,
        "type_vocab_size": config.token_types,
        "initializer_range": config.initializer_std,
        "layer_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if kind == "Roberta":
        fields["pad_token_id"] = config.position_offset - 1
    return fields | (labels(config.num_labels) if config.classifier != "none" else {})


def _prefix(config: ModelConfig, name: str) -> str:
    """What stands before the encoder's tensors: nothing if there is nothing else."""
    return name if config.head_transform or config.classifier != "none" else ""


def _encoder(prefix: str) -> list[Rule]:
    embeddings, layer = f"{prefix}embeddings", f"{prefix}encoder.layer.{{layer}}"
    within = f"{layer}.attention.self"
    return [
        same("embedding.tokens", f"{embeddings}.word_embeddings.weight"),
        same("embedding.positions", f"{embeddings}.position_embeddings.weight"),
        same("embedding.types", f"{embeddings}.token_type_embeddings.weight"),
        *norm("embedding.norm", f"{embeddings}.LayerNorm"),
        *attention(
            "blocks.attention",
            f"{within}.query",
            f"{within}.key",
            f"{within}.value",
            f"{layer}.attention.output.dense",
        ),
        *norm("blocks.attention_norm", f"{layer}.attention.output.LayerNorm"),
        *biased("blocks.mlp.up", f"{layer}.intermediate.dense"),
        *biased("blocks.mlp.down", f"{layer}.output.dense"),
        *norm("blocks.mlp_norm", f"{layer}.output.LayerNorm"),
    ]


def _masked_head(head: str, transform: str, after: str) -> list[Rule]:
    """The masked language model's head, less the token embedding."""
    return [
        *projection("head_transform", f"{head}.{transform}"),
        *norm("head_transform.norm", f"{head}.{after}"),
        same("head_bias", f"{head}.bias"),
    ]


def _bert_rules(config: ModelConfig) -> list[Rule]:
    prefix = _prefix(config, "bert.")
    rules = _encoder(prefix)
    if config.pooler:
        rules += projection("pooler", f"{prefix}pooler.dense")
    if config.head_transform:
        rules += _masked_head("cls.predictions", "transform.dense", "transform.LayerNorm")
    if config.classifier != "none":
        rules += projection(
            "classifier", "cls.seq_relationship" if config.head_transform else "classifier"
        )
    return rules


def _roberta_rules(config: ModelConfig) -> list[Rule]:
    prefix = _prefix(config, "roberta.")
    rules = _encoder(prefix)
    of_text = config.classifier == "sequence"
    if config.pooler:
        rules += projection("pooler", "classifier.dense" if of_text else f"{prefix}pooler.dense")
    if config.head_transform:
        rules += _masked_head("lm_head", "dense", "layer_norm")
    if config.classifier != "none":
        rules += projection("classifier", "classifier.out_proj" if of_text else "classifier")
    return rules


def _aliases(config: ModelConfig, prefix: str, head: str) -> dict[str, str]:
    if not config.head_transform:
        return {}
    return {
        f"{head}.decoder.weight": f"{prefix}embeddings.word_embeddings.weight",
        f"{head}.decoder.bias": f"{head}.bias",
    }


def _settle(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> ModelConfig:
    if config.classifier == "sequence" and not config.head_transform:
        return config
    pooler = any(name.endswith("pooler.dense.weight") for name in tensors)
    if config.head_transform:
        follows = "cls.seq_relationship.weight" in tensors
        config = dataclasses.replace(config, classifier="sequence" if follows else "none")
    return dataclasses.replace(config, pooler=pooler)


_OLD_NAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))

BERT = Family(
    model_type="bert",
    architectures=(*(f"Bert{head}" for head in _HEADS), "BertForPreTraining"),
    read_config=_read_bert,
    write_config=written(_read_bert, lambda config: _write(config, "Bert"), "pooler"),
    rules=_bert_rules,
    base_prefix="bert.",
    aliases=lambda config: _aliases(config, "bert.", "cls.predictions"),
    ignored=(r"embeddings\.position_ids$",),
    settle=_settle,
    renamed=_OLD_NAMES,
)

ROBERTA = Family(
    model_type="roberta",
    architectures=tuple(f"Roberta{head}" for head in _HEADS),
    read_config=_read_roberta,
    write_config=written(_read_roberta, lambda config: _write(config, "Roberta"), "pooler"),
    rules=_roberta_rules,
    base_prefix="roberta.",
    aliases=lambda config: _aliases(config, "roberta.", "lm_head"),
    ignored=(r"embeddings\.position_ids$",),
    settle=_settle,
    renamed=_OLD_NAMES,
)

FAMILIES = (BERT, ROBERTA)
