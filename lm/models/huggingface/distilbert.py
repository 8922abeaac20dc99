"""DistilBERT (Sanh et al. 2019) as Hugging Face writes it: BERT without types of tokens.

Its classifier of texts reads the first token through a pooler with ReLU; nothing else has a pooler.
"""

from __future__ import annotations

from lm.models.config import ModelConfig
from lm.models.huggingface.bert import head
from lm.models.huggingface.config_fields import Field, activation
from lm.models.huggingface.family import Family
from lm.models.huggingface.name_map import Table


def _tensors(config: ModelConfig) -> Table:
    prefix = "distilbert." if config.head_transform or config.classifier != "none" else ""
    embeddings, layer = f"{prefix}embeddings", f"{prefix}transformer.layer.{{layer}}"
    tied = " vocab_projector.weight" if config.head_transform and config.tie_embeddings else ""
    return {
        "embedding.tokens": f"{embeddings}.word_embeddings.weight{tied}",
        "embedding.positions": f"{embeddings}.position_embeddings.weight",
        "embedding.norm": f"{embeddings}.LayerNorm",
        "blocks.attention.query": f"{layer}.attention.q_lin",
        "blocks.attention.key": f"{layer}.attention.k_lin",
        "blocks.attention.value": f"{layer}.attention.v_lin",
        "blocks.attention.output": f"{layer}.attention.out_lin",
        "blocks.attention_norm": f"{layer}.sa_layer_norm",
        "blocks.mlp.up": f"{layer}.ffn.lin1",
        "blocks.mlp.down": f"{layer}.ffn.lin2",
        "blocks.mlp_norm": f"{layer}.output_layer_norm",
        "head_transform": "vocab_transform",
        "head_transform.norm": "vocab_layer_norm",
        **({} if config.tie_embeddings else {"head": "vocab_projector.weight"}),
        "head_bias": "vocab_projector.bias",
        "pooler": "pre_classifier",
        "classifier": "classifier",
    }


_DISTILBERT = Family(
    "distilbert",
    (
        "DistilBertForMaskedLM", "DistilBertModel", "DistilBertForSequenceClassification",
        "DistilBertForTokenClassification",
    ),
    constants={
        "architecture": "encoder", "embedding_norm": True, "positions": "learned",
        "norm": "layernorm", "norm_position": "post", "norm_epsilon": 1e-12, "bias": True,
        "pooler_activation": "relu", "initializer": "normal",
    },
    fields={
        "vocab_size": Field("vocab_size", 30_522),
        "dim": Field("width", 768),
        "n_layers": Field("num_layers", 6),
        "n_heads": Field("num_heads", 12),
        "hidden_dim": Field("mlp_width", 3072),
        "activation": activation("gelu"),
        "dropout": Field("dropout", 0.1),
        "max_position_embeddings": Field("max_length", 512),
        "initializer_range": Field("initializer_std", 0.02),
    },
    together=(head("DistilBert", pooled=""),),
    # Other dropout than the residual stream's; and how the table of positions began, which is in
    # the file like any other.
    inert=(
        "attention_dropout", "qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds",
        "tie_weights_",
    ),
    written=lambda config: {"attention_dropout": config.dropout},
    base_prefix="distilbert.",
    ignored=(r"embeddings\.position_ids$",),
    old_fields={
        "hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"
    },
    tensors=_tensors,
)  # fmt: skip

FAMILIES = (_DISTILBERT,)
