"""What several families' name maps and configs have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lm.config import check, check_choice
from lm.models.config import ModelConfig
from lm.models.huggingface.config_roundtrip import exact
from lm.models.huggingface.family import ACTIVATIONS, Rule, linear, same

_GATED = {"gelu_tanh": "geglu", "silu": "swiglu"}
_WRITTEN = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "relu": "relu",
    "silu": "silu",
    "geglu": "gelu_pytorch_tanh",
    "swiglu": "silu",
}


def activation(name: str, field: str, gated: bool = False) -> str:
    """Our name of the nonlinearity `name`, or of the gated MLP around it.

    Raises:
      ConfigError: naming `field`, one that we do not have.
    """
    allowed = [theirs for theirs, ours in ACTIVATIONS.items() if not gated or ours in _GATED]
    check_choice(f"config.json: {field}", name, allowed)
    return _GATED[ACTIVATIONS[name]] if gated else ACTIVATIONS[name]


def activation_name(ours: str) -> str:
    """Hugging Face's name of our nonlinearity; of the one in the gate where there is a gate."""
    return _WRITTEN[ours]


def norm(ours: str, theirs: str, bias: bool = True) -> list[Rule]:
    """A norm's scale, and its bias."""
    rules = [same(f"{ours}.scale", f"{theirs}.weight")]
    return [*rules, same(f"{ours}.bias", f"{theirs}.bias")] if bias else rules


def projection(ours: str, theirs: str) -> list[Rule]:
    """A `Projection`."""
    return [
        linear(f"{ours}.projection", f"{theirs}.weight"),
        same(f"{ours}.bias", f"{theirs}.bias"),
    ]


def biased(ours: str, theirs: str, inputs: int = 1, bias: bool = True) -> list[Rule]:
    """A linear layer, and its bias, which here is called as its weight is, with `_bias`."""
    rules = [linear(ours, f"{theirs}.weight", inputs)]
    return [*rules, same(f"{ours}_bias", f"{theirs}.bias")] if bias else rules


def attention(
    ours: str, query: str, key: str, value: str, output: str, bias: bool = True
) -> list[Rule]:
    """The four linear layers of attention, each a tensor of its own."""
    return [
        *biased(f"{ours}.query", query, bias=bias),
        *biased(f"{ours}.key", key, bias=bias),
        *biased(f"{ours}.value", value, bias=bias),
        *biased(f"{ours}.output", output, inputs=2, bias=bias),
    ]


def written(
    read: Callable[[Mapping[str, Any]], ModelConfig],
    write: Callable[[ModelConfig], dict[str, Any]],
    *settled: str,
) -> Callable[[ModelConfig], dict[str, Any]]:
    """`write`, refusing models that are not of the family (see `exact`).

    Args:
      read, write: the family's.
      *settled: fields that config.json does not say and the tensors do.
    """

    def write_config(config: ModelConfig) -> dict[str, Any]:
        known = {name: getattr(config, name) for name in settled}
        return exact(lambda hf: dataclasses.replace(read(hf), **known), write)(config)

    return write_config


def architecture(hf: Mapping[str, Any], otherwise: str) -> str:
    """The class that wrote the file, `otherwise` where config.json does not say."""
    return (hf.get("architectures") or (otherwise,))[0]


def whole_heads(values: Mapping[str, Any], width: str, heads: str) -> None:
    """Raises ConfigError unless the field `width` is a multiple of the field `heads`."""
    check(
        values[heads] > 0 and values[width] % values[heads] == 0,
        f"config.json: {width}={values[width]} is not divisible by {heads}={values[heads]}",
    )


def num_labels(hf: Mapping[str, Any]) -> int:
    """How many labels a classifier tells apart."""
    return len(hf.get("id2label") or ()) or hf.get("num_labels") or hf.get("_num_labels") or 2


def labels(count: int) -> dict[str, Any]:
    """The fields of config.json that say how many."""
    names = {str(index): f"LABEL_{index}" for index in range(count)}
    return {"id2label": names, "label2id": {name: int(index) for index, name in names.items()}}
