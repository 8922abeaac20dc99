"""Known models by name: every published size as the `ModelConfig` that makes it.

    preset("gpt2_small")                        # 124,439,808 parameters
    preset("llama3_8b", num_layers=2)           # the same block, two layers deep
    config.model = lm.config.defaults(preset("bert_base", vocab_size=0))  # in a config file

A preset fixes what is computed: sizes, order of operations, constants, vocabulary and context as
published. How training starts is as published where `model.initializer` has it, and a normal
distribution with the published spread elsewhere; dropout is that of the published training.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lm.config import check, hints, nearest, view
from lm.models.config import ModelConfig
from lm.models.presets import decoders, encoders, llama, phi
from lm.models.presets.table import Preset

PRESETS: dict[str, Preset] = {
    name: known
    for module in (encoders, decoders, llama, phi)
    for name, known in module.PRESETS.items()
}

# A section with every field of ModelConfig, in which None leaves it as the preset says.
Overrides = dataclasses.make_dataclass(
    "Overrides",
    [
        (name, hint | None, dataclasses.field(default=None))
        for name, hint in hints(ModelConfig).items()
    ],
    frozen=True,
)
Overrides.__wrapped__ = ModelConfig  # whose source says what the fields mean


def preset(name: str, /, prefix: str = "config.model", **overrides: Any) -> ModelConfig:
    """The configuration of the known model `name`, some of its fields replaced.

    Args:
      name: a key of `PRESETS`.
      prefix: what errors put before a field's name.
      **overrides: fields of `ModelConfig`. A field that a preset leaves to another one follows it:
        `mlp_width` of GPT-2 is 4 × `width`, that of Llama is a number.

    Raises:
      ConfigError: an unknown name or field, naming the nearest; a value of the wrong type; or a
        combination that no model can have.
    """
    check(
        name in PRESETS,
        f"{prefix.removesuffix('.model')}.preset={name!r} is not a known model"
        f"{nearest(name, PRESETS)}: configs/describe.py lists them with --config.list=True",
    )
    return view(ModelConfig, {**PRESETS[name].fields, **overrides}, prefix)


__all__ = ["PRESETS", "Overrides", "Preset", "preset"]
