"""Rotary positions in config.json, as transformers 4 and 5 write them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lm.config import check
from lm.models.config import LOCAL_SCALINGS, ModelConfig
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
    "dynamic": {"rotary_factor": "factor"},
    "yarn": {
        "rotary_factor": "factor",
        "rotary_original_length": "original_max_position_embeddings",
        "rotary_low": "beta_slow",
        "rotary_high": "beta_fast",
        "rotary_gain": "attention_factor",
        "rotary_truncate": "truncate",
    },
    "longrope": {
        "rotary_factor": "factor",
        "rotary_original_length": "original_max_position_embeddings",
        "rotary_gain": "attention_factor",
        "rotary_short": "short_factor",
        "rotary_long": "long_factor",
    },
}
_ORIGINAL = "original_max_position_embeddings"
# Of yarn besides: two that `attention_factor` follows from, and one that changes nothing.
_YARN_ONLY = ("mscale", "mscale_all_dim", "finetuned")
_NUMBERS = (
    "factor", "beta_slow", "beta_fast", "attention_factor", "mscale", "mscale_all_dim", _ORIGINAL
)  # fmt: skip


def read_rotary(values: Json, base: float = 10_000.0, fraction: float = 1.0) -> dict[str, Any]:
    """The `rotary_*` fields of ModelConfig.

    Args:
      values: config.json: `rope_theta` and `rope_scaling` (before version 5), or
        `rope_parameters`; and `max_position_embeddings`.
      base, fraction: what a missing `rope_theta` or `partial_rotary_factor` means.

    Where angles are `dynamic`, max_position_embeddings is the original context, and the model's
    `factor` times that.

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
            key in known or (kind == "yarn" and key in _YARN_ONLY),
            f"config.json: {key}={value!r} is not supported of rope_type={kind!r}",
        )
    for key in _NUMBERS:
        value = rope.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        check(value is None or number, f"config.json: {key}={value!r} must be a number")
    outside, inside = values[_ORIGINAL], rope.get(_ORIGINAL)
    check(
        _ORIGINAL not in names.values() or None in (outside, inside) or outside == inside,
        f"config.json: {_ORIGINAL}={outside}, and {inside} in what it says of rope_type={kind!r}: "
        f"transformers 5 takes the former and 4 the latter; config.ignore={_ORIGINAL} leaves "
        "out the former",
    )
    length = outside or values["max_position_embeddings"]
    given = {_ORIGINAL: length, "beta_slow": 1.0, "beta_fast": 32.0, "truncate": True}
    given["attention_factor"] = None
    most = values["max_position_embeddings"]
    if kind in ("yarn", "longrope"):
        given["factor"] = most / (inside or length or 1)
    given |= {key: value for key, value in rope.items() if value is not None}
    for theirs in names.values():
        check(theirs in given, f"config.json: rope_type={kind!r} needs {theirs}")
    if kind == "yarn":
        given |= _read_yarn(rope, given["factor"])
    if kind == "longrope":
        given |= {key: _numbers(key, given[key]) for key in ("short_factor", "long_factor")}
    stretched = {}
    if kind == "dynamic":
        longest = max(most, int(most * given["factor"]))
        stretched = {"rotary_original_length": most, "max_length": longest}

    def either(key: str, otherwise: float) -> float:
        return next((x[key] for x in (rope, values) if x.get(key) is not None), otherwise)

    return {
        "rotary_base": either("rope_theta", base),
        "rotary_fraction": either("partial_rotary_factor", fraction),
        "rotary_scaling": "none" if kind == "default" else kind,
        **{ours: given[theirs] for ours, theirs in names.items()},
        **stretched,
    }


def yarn_gain(factor: float, mscale: float) -> float:
    """YaRN's gain on queries and keys (Peng et al. 2023, §3.4), `mscale` times as far from 1."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _read_yarn(rope: Json, factor: float) -> dict[str, Any]:
    """What transformers makes of the fields of YaRN that are none of ours, and of 0 and null."""

    found: dict[str, Any] = {"beta_slow": rope.get("beta_slow") or 1.0}
    found |= {"beta_fast": rope.get("beta_fast") or 32.0}
    found |= {"truncate": bool(rope.get("truncate", True))}
    over, under = rope.get("mscale"), rope.get("mscale_all_dim")
    if rope.get("attention_factor") is None and over and under:
        found["attention_factor"] = yarn_gain(factor, over) / yarn_gain(factor, under)
    return found


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    check(
        isinstance(values, list | tuple)
        and all(isinstance(x, int | float) and not isinstance(x, bool) for x in values),
        f"config.json: {name}={values!r} must be a list of numbers",
    )
    return tuple(map(float, values))


def read_layered(values: Json, base: float, local_base: float) -> dict[str, Any]:
    """As `read_rotary`, where local layers have angles of their own.

    Args:
      values: as of `read_rotary`; `rope_parameters` has what it says of either type of layer.
      base, local_base: of global and of local layers, where `rope_parameters` does not say.
    """
    rope, local = values["rope_parameters"], {"rotary_base": local_base, "rotary_scaling": "none"}
    if rope:
        demand("rope_parameters", sorted(rope), ["full_attention", "sliding_attention"])
        of_local = {"rope_theta": None, "rope_scaling": None, _ORIGINAL: None}
        of_local |= {"rope_parameters": rope["sliding_attention"]}
        local = read_rotary({**values, **of_local}, local_base)
        demand("rope_type of sliding_attention", local["rotary_scaling"], *LOCAL_SCALINGS)
        whole = {**(rope["full_attention"] or {}), **(values["rope_scaling"] or {})}
        # Of a type of layer transformers does not look at it.
        demand("truncate", whole.get("truncate", True), True)
        values = {**values, "rope_parameters": whole, "rope_scaling": None}
    shared = {
        name: local[name] for name in ("rotary_original_length", "max_length") if name in local
    }
    fields = {**shared, **read_rotary(values, base)}
    for name, value in shared.items():
        check(
            fields[name] == value,
            f"config.json: {_ORIGINAL}={fields[name]} of full_attention must be {value}, as of "
            "sliding_attention, where its rope_type is 'dynamic'",
        )
    return {
        **fields,
        "rotary_local_base": local["rotary_base"],
        "rotary_local_scaling": local["rotary_scaling"],
        "rotary_local_factor": local.get("rotary_factor", 1.0),
    }


def write_layered(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_layered`, but for names that older files have for the local base."""
    kind, local_base = config.rotary_local_scaling, config.rotary_local_base or config.rotary_base
    local = {"rope_type": "default" if kind == "none" else kind, "rope_theta": local_base}
    local |= {} if kind == "none" else {"factor": config.rotary_local_factor}
    whole = {"full_attention": rope_parameters(config), "sliding_attention": local}
    return {**write_rotary(config), "rope_parameters": whole}


def rope_parameters(config: ModelConfig) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, of layers without a base of their own."""
    kind = "default" if config.rotary_scaling == "none" else config.rotary_scaling
    rope = {"rope_type": kind, "rope_theta": config.rotary_base}
    if config.rotary_fraction != 1:
        rope["partial_rotary_factor"] = config.rotary_fraction
    said = {theirs: getattr(config, ours) for ours, theirs in _SCALINGS[kind].items()}
    # What says nothing is left out: older versions do not know it.
    unsaid = {"attention_factor": None, "truncate": True}
    said = {name: list(x) if isinstance(x, tuple) else x for name, x in said.items()}
    return rope | {name: x for name, x in said.items() if name not in unsaid or x != unsaid[name]}


def write_rotary(config: ModelConfig) -> dict[str, Any]:
    """Rotary positions of config.json, the same to either version."""
    rope = rope_parameters(config)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    dynamic = "dynamic" in (config.rotary_scaling, config.rotary_local_scaling)
    return {
        **({"max_position_embeddings": config.rotary_original_length} if dynamic else {}),
        "rope_parameters": rope,
        "rope_theta": config.rotary_base,
        "rope_scaling": scaling if config.rotary_scaling != "none" else None,
    }
