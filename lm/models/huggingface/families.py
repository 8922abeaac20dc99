"""The families we know, by the `model_type` of their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm.config import ConfigError, check, check_choice, nearest
from lm.models.config import ModelConfig
from lm.models.huggingface import (
    bart,
    bert,
    decoders,
    deepseek,
    distilbert,
    gemma,
    gpt_oss,
    llama,
    modernbert,
    olmo,
    phi,
    qwen,
    t5,
)
from lm.models.huggingface.config_fields import NotExact
from lm.models.huggingface.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for module in (
        decoders,
        llama,
        phi,
        qwen,
        gemma,
        deepseek,
        gpt_oss,
        olmo,
        bert,
        distilbert,
        modernbert,
        t5,
        bart,
    )
    for family in module.FAMILIES
}  # fmt: skip


def family_of(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
      ConfigError: an unknown `model_type`, or a class of it whose tensors we do not know.
    """
    named = {old: family for family in FAMILIES.values() for old in family.old_types} | FAMILIES
    check_choice("config.json: model_type", hf.get("model_type"), named)
    family = named[hf["model_type"]]
    for name in hf.get("architectures") or ():
        if name not in family.architectures:
            known = ", ".join(family.architectures)
            raise ConfigError(
                f"config.json: architectures=[{name!r}] is not one of {known}"
                f"{nearest(name, family.architectures)}"
            )
    return family


def family_for(config: ModelConfig, preferred: str | None = None) -> Family:
    """The first family that computes what `config` says; `preferred`, if that one does.

    Raises:
      ConfigError: there is none; it names what the nearest one would do otherwise.
    """
    for field, missing in (("mlp_width", 0), ("norm", "none")):
        check(
            getattr(config, field) != missing,
            f"config.model.{field}={missing!r}: every Hugging Face family has one in each block",
        )
    nearly: dict[str, NotExact] = {}
    for name, family in sorted(FAMILIES.items(), key=lambda item: item[0] != preferred):
        try:
            family.write_config(config)
            return family
        except NotExact as error:
            nearly[name] = error
        except ConfigError:  # too far from the family even to be written
            continue
    closest = min(
        nearly,
        key=lambda name: ("architecture" in nearly[name].lost, len(nearly[name].lost)),
        default=None,
    )
    lost = nearly[closest].lost if closest else {}
    instead = [f"model.{name}={other!r}, not {own!r}" for name, (own, other) in lost.items()]
    raise ConfigError(
        "no Hugging Face family computes what this model does"
        + (f"; the nearest, {closest!r}, has {' and '.join(instead)}" if closest else "")
    )
