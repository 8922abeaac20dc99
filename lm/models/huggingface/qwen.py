"""Qwen 2 and 3 (Yang et al. 2024, 2025) as Hugging Face writes them."""

from __future__ import annotations

from typing import Any

from lm.models.config import ModelConfig
from lm.models.huggingface.config_fields import OrNull, only, with_defaults
from lm.models.huggingface.llama import BIASES, FIELDS, family, rotary, windows

_QWEN_FIELDS = {
    **with_defaults(
        FIELDS,
        vocab_size=151_936,
        intermediate_size=22_016,
        num_key_value_heads=OrNull(32),
        max_position_embeddings=32_768,
    ),
    "use_mrope": only(False),
}
_QWEN_WINDOWS = windows(
    lambda values, layer: (
        values["use_sliding_window"] and values["sliding_window"] is not None
        and layer >= values["max_window_layers"]
    ),
    use_sliding_window=False,
    max_window_layers=28,
)  # fmt: skip


def _qwen_written(config: ModelConfig) -> dict[str, Any]:
    first = (layer for layer in range(config.num_layers) if config.is_local(layer))
    return {
        "use_sliding_window": config.window > 0,
        "max_window_layers": next(first, config.num_layers),
    }


_QWEN2 = family(
    "qwen2",
    "Qwen2ForCausalLM Qwen2Model",
    constants={"qkv_bias": True},
    fields=_QWEN_FIELDS,
    together=(rotary(), _QWEN_WINDOWS),
    written=_qwen_written,
)
_QWEN3 = family(
    "qwen3",
    "Qwen3ForCausalLM Qwen3Model",
    constants={"qk_norm": True},
    fields={**with_defaults(_QWEN_FIELDS, head_dim=OrNull(128)), **BIASES},
    together=(rotary(), _QWEN_WINDOWS),
    written=_qwen_written,
)

FAMILIES = (_QWEN2, _QWEN3)
