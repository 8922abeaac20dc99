"""Rotary positions in config.json, as transformers 4 and 5 write them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lm.config import check
from lm.models.config import ModelConfig
from lm.models.huggingface.config_fields import Json, demand

# Every field that tells of rotations, silent.
ROPE_FIELDS = {
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": None,
    "partial_rotary_factor": None,
    "original_max_position_embeddings": None,
}
# Of each way to stretch the context: ours → theirs.
_SCALINGS = {
    "default": {},
    "linear": {"rotary_factor": "factor"},
    "llama3": {
        "rotary_factor": "factor",
        "rotary_original_length": "original_max_position_embeddings",
        "rotary_low": "low_freq_factor",
        "rotary_high": "high_freq_factor",
    },
    "yarn": {
        "rotary_factor": "factor",
        "rotary_original_length": "original_max_position_embeddings",
        "rotary_low": "beta_slow",
        "rotary_high": "beta_fast",
    },
}
_ORIGINAL = "original_max_position_embeddings"
_YARN_VARIANTS = ("attention_factor", "mscale", "mscale_all_dim", "truncate")


def read_rotary(values: Json, base: float = 10_000.0, fraction: float = 1.0) -> dict[str, Any]:
    """The `rotary_*` fields of ModelConfig.

    Args:
      values: config.json: `rope_theta` and `rope_scaling` (before version 5), or
        `rope_parameters`; and `max_position_embeddings`.
      base, fraction: what a missing `rope_theta` or `partial_rotary_factor` means.

    Raises:
      ConfigError: naming a way of scaling, or a detail of one, that is not supported; an original
        length in two places.
    """
    rope = values["rope_scaling"] or values["rope_parameters"] or {}
    flat = isinstance(rope, Mapping) and not any(isinstance(v, Mapping) for v in rope.values())
    check(flat, f"config.json: rope_parameters={rope!r} must be one dictionary for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    demand("rope_type", kind, *_SCALINGS)
    names = _SCALINGS[kind]
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", _ORIGINAL, *names.values()}
    for key, value in rope.items():
        check(
            key in known or (kind == "yarn" and key in _YARN_VARIANTS),
            f"config.json: {key}={value!r} is not supported of rope_type={kind!r}",
        )
    outside, inside = values[_ORIGINAL], rope.get(_ORIGINAL)
    check(
        _ORIGINAL not in names.values() or None in (outside, inside) or outside == inside,
        f"config.json: {_ORIGINAL}={outside}, and {inside} in what it says of rope_type={kind!r}: "
        f"transformers 5 takes the former and 4 the latter; config.ignore={_ORIGINAL} leaves "
        "out the former",
    )
    length = outside or values["max_position_embeddings"]
    given = {_ORIGINAL: length, "beta_slow": 1.0, "beta_fast": 32.0}
    given |= {key: value for key, value in rope.items() if value is not None}
    for theirs in names.values():
        check(theirs in given, f"config.json: rope_type={kind!r} needs {theirs}")
    if kind == "yarn":
        _check_yarn(given)

    def either(key: str, otherwise: float) -> float:
        return next((x[key] for x in (rope, values) if x.get(key) is not None), otherwise)

    return {
        "rotary_base": either("rope_theta", base),
        "rotary_fraction": either("partial_rotary_factor", fraction),
        "rotary_scaling": "none" if kind == "default" else kind,
        **{ours: given[theirs] for ours, theirs in names.items()},
    }


def _check_yarn(rope: Json) -> None:
    """Refuses variants of YaRN: of the gain on sine and cosine, and of the ramp's ends."""

    def gain(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope["factor"]) + 1 if rope["factor"] > 1 else 1.0

    found = rope.get("attention_factor")
    if found is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        found = gain(rope["mscale"]) / gain(rope["mscale_all_dim"])
    check(
        found is None or math.isclose(found, gain(1), rel_tol=1e-6),
        f"config.json: attention_factor={found} of yarn is not supported, only 0.1·ln(factor) + 1 "
        f"= {gain(1)}",
    )
    demand("truncate", rope.get("truncate", True), True)


def rope_parameters(config: ModelConfig) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, of layers without a base of their own."""
    kind = "default" if config.rotary_scaling == "none" else config.rotary_scaling
    rope = {"rope_type": kind, "rope_theta": config.rotary_base}
    if config.rotary_fraction != 1:
        rope["partial_rotary_factor"] = config.rotary_fraction
    return rope | {theirs: getattr(config, ours) for ours, theirs in _SCALINGS[kind].items()}


def write_rotary(config: ModelConfig) -> dict[str, Any]:
    """Rotary positions of config.json, the same to either version."""
    rope = rope_parameters(config)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "rope_parameters": rope,
        "rope_theta": config.rotary_base,
        "rope_scaling": scaling if config.rotary_scaling != "none" else None,
    }
