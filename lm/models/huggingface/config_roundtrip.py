"""Whether a config.json says everything that a model is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from lm.config import ConfigError
from lm.models.config import ModelConfig

Read = Callable[[Mapping[str, Any]], ModelConfig]
Write = Callable[[ModelConfig], dict[str, Any]]

# Choices of training and of how to compute, not of the function computed.
_FREE = (
    "dropout capacity_factor initializer initializer_std compute_dtype attention remat scan_layers"
)
# Fields that mean nothing unless another has the value.
_ONLY_IF: dict[str, Callable[[ModelConfig], bool]] = {
    "position_offset": lambda c: c.positions == "learned",
    "rotary_base rotary_fraction rotary_scaling": lambda c: c.positions == "rotary",
    "rotary_factor": lambda c: c.positions == "rotary" and c.rotary_scaling != "none",
    "rotary_original_length rotary_low rotary_high": lambda c: (
        c.positions == "rotary" and c.rotary_scaling in ("llama3", "yarn")
    ),
    "rotary_local_base": lambda c: c.positions == "rotary" and c.window > 0,
    "relative_buckets relative_distance": lambda c: c.positions == "relative",
    "experts_per_token expert_width shared_experts dense_layers router_score router_normalize": (
        lambda c: c.num_experts > 0
    ),
    "bias mlp_width": lambda c: c.num_experts == 0 or c.dense_layers > 0,
    "norm_bias": lambda c: c.norm == "layernorm",
    "num_labels": lambda c: c.classifier != "none",
    "cross_attention": lambda c: c.cell != "attention",
}


class NotExact(ConfigError):
    """A model that a family cannot say.

    Attributes:
      lost: fields of ModelConfig → (the model's value, what the family would make of it).
    """

    def __init__(self, lost: Mapping[str, tuple[Any, Any]]):
        self.lost = lost
        field, (value, other) = next(iter(lost.items()))
        super().__init__(
            f"config.model.{field}={value!r} cannot be written for this Hugging Face family, which "
            f"would have {other!r}"
        )


def exact(read: Read, write: Write) -> Write:
    """`write`, refusing what the family cannot say: what it writes must read as the same model.

    Raises (when called):
      NotExact: naming the first field that would be lost.
    """

    def written(config: ModelConfig) -> dict[str, Any]:
        hf = write(config)
        ours, theirs = essence(config), essence(read(hf))
        lost = {}
        for field, value in ours.items():
            other = theirs.get(field)
            close = isinstance(value, float) and isinstance(other, float)
            if not (math.isclose(value, other, rel_tol=1e-6) if close else value == other):
                lost[field] = (value, other)
        if lost:
            raise NotExact(lost)
        return hf

    return written


def essence(config: ModelConfig) -> dict[str, Any]:
    """Every field that the computed function depends on, in place of defaults what they mean."""
    fields = {
        **dataclasses.asdict(config),
        "num_encoder_layers": config.encoder_layers,
        "num_kv_heads": config.kv_heads,
        "head_dim": config.head_width,
        "mlp_width": config.feed_forward,
        "expert_width": config.expert_feed_forward,
        "embedding_scale": config.embedding_scale or math.sqrt(config.width),
        "output_scale": config.output_scale or config.width**-0.5,
        "attention_scale": config.attention_scale or config.head_width**-0.5,
        "attention_pattern": tuple(config.is_local(layer) for layer in range(config.num_layers)),
        "qkv_bias": config.has_bias("qkv"),
        "attention_bias": config.has_bias("attention"),
        "norm_bias": config.has_bias("norm"),
        "final_norm": config.has_final_norm,
    }
    meaningless = _FREE.split()
    for names, means in _ONLY_IF.items():
        meaningless += [] if means(config) else names.split()
    return {name: value for name, value in fields.items() if name not in meaningless}
