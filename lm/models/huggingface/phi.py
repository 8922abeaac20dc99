"""Phi-3 and its heirs, Phi-4 and Phi-4-mini (Abdin et al. 2024), as Hugging Face writes them."""

from __future__ import annotations

import math
from typing import Any

from lm.models.config import ModelConfig
from lm.models.huggingface.config_fields import Field, Json, Together, demand, with_defaults
from lm.models.huggingface.llama import BODY, FIELDS, LAYER, MLP, family, one_window
from lm.models.huggingface.name_map import QKV, Linear
from lm.models.huggingface.rope import ROPE_FIELDS, read_rotary, write_rotary

_ORIGINAL = "original_max_position_embeddings"
_FUSED = ("attention.query", "attention.key", "attention.value", "mlp.gate", "mlp.up")
_SPLIT = {f"blocks.{part}" for part in _FUSED}


def _read_rotary(values: Json) -> dict[str, Any]:
    found = "rope_scaling" if values["rope_scaling"] else "rope_parameters"
    rope = dict(values[found] or {})
    kind = rope.pop("type", "default")
    rope.setdefault("rope_type", kind)
    if rope["rope_type"] in ("su", "yarn"):  # what the first files called it
        rope["rope_type"] = "longrope"
    demand("rope_type", rope["rope_type"], "default", "longrope")
    return read_rotary({**values, "rope_scaling": None, "rope_parameters": rope})


def _write_rotary(config: ModelConfig) -> dict[str, Any]:
    written = {**write_rotary(config), "partial_rotary_factor": config.rotary_fraction}
    if config.rotary_scaling != "longrope":
        return written
    rope, original = written["rope_scaling"], config.rotary_original_length
    # Version 4 knows three fields; the others are left out where they say nothing more.
    fields = {"type": "longrope", **{key: rope[key] for key in ("short_factor", "long_factor")}}
    if not math.isclose(config.rotary_factor, config.max_length / original):
        fields["factor"] = config.rotary_factor
    if config.rotary_gain is not None:
        fields["attention_factor"] = config.rotary_gain
    # Silence would mean 4096, whatever stands beside the factors.
    return {**written, "rope_scaling": fields, _ORIGINAL: original}


def _written(config: ModelConfig) -> dict[str, Any]:
    # The default is the published vocabulary's, and transformers wants it inside of any other.
    unpadded = {} if config.vocab_size > 32_000 else {"pad_token_id": None}
    return {"embd_pdrop": config.dropout, **unpadded}


_PHI3 = family(
    "phi3",
    "Phi3ForCausalLM Phi3Model",
    fields={
        **with_defaults(
            {name: field for name, field in FIELDS.items() if name != "head_dim"},
            vocab_size=32_064,
            hidden_size=3072,
            intermediate_size=8192,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
        ),
        "resid_pdrop": Field("dropout", 0.0),
    },
    together=(
        Together({**ROPE_FIELDS, _ORIGINAL: 4096}, _read_rotary, _write_rotary),
        one_window(None),
    ),
    # Besides dropout elsewhere: what its class does not look at, and the code that the first files
    # came with, which is what transformers has now.
    inert=(
        "embd_pdrop", "attention_bias", "lm_head_bias", "mlp_bias", "interpolate_factor",
        "full_attn_mod", "auto_map",
    ),
    written=_written,
    tensors={
        **{ours: theirs for ours, theirs in (BODY | MLP).items() if ours not in _SPLIT},
        QKV: Linear(f"{LAYER}.self_attn.qkv_proj"),
        ("blocks.mlp.gate", "blocks.mlp.up"): Linear(f"{LAYER}.mlp.gate_up_proj"),
    },
)  # fmt: skip

FAMILIES = (_PHI3,)
