"""Adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors.

PEFT adapts linear layers of the model there, one after the other: A [rank, inputs] and B [outputs,
rank] of each, and of DoRA a vector [outputs]. Where such a layer holds several matrices of ours
(GPT-2's queries, keys and values), their A stand side by side there, and B has blocks: the layer's
rank is the sum of theirs. Read back, each of ours has all of A and its own rows of B.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lm.config import check
from lm.files import read_json
from lm.models.adapters import LORA_A, LORA_B, MAGNITUDE, AdapterConfig, Sides, fits
from lm.models.huggingface import safetensors
from lm.models.huggingface.family import Array, NameMap
from lm.models.huggingface.name_map import Rule, of_layer
from lm.models.huggingface.write import new_directory

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
# Fields that change nothing of what the tensors mean, or that are read.
_KNOWN = (
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type",
    "inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules",
    "fan_in_fan_out", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "megatron_config",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying", "bias",
)  # fmt: skip
_INITIAL = (True, False, None, "gaussian", "orthogonal", "eva")  # others change the base, too


@dataclasses.dataclass(frozen=True, eq=False)
class _Layer:
    """A linear layer there, and the matrices of ours that it holds."""

    rule: Rule
    sides: tuple[Sides, ...]  # of each of ours
    order: np.ndarray  # of their outputs: which of ours, counted through, each is
    turned: bool  # whether the weight is [inputs, outputs] there
    factor: float  # theirs is so many times ours

    @classmethod
    def of(cls, names: NameMap, rule: Rule) -> _Layer:
        sides = tuple(Sides(name, names.specs[name]) for name in rule.ours)
        numbered, start = [], 0
        for side, shape in zip(sides, names.own_shapes(rule)):
            outputs = np.arange(start, start + side.outputs, dtype=np.float64)
            rest = shape[:1] if side.turned else shape[side.input_axes :]
            outputs = outputs.reshape((*rest, 1) if side.turned else rest)
            numbered.append(np.broadcast_to(outputs, shape))
            start += side.outputs
        ones = rule.save([np.ones(array.shape) for array in numbered])[0]
        there = rule.save(numbered)[0] / ones
        turned = not np.array_equal(there, np.broadcast_to(there[:, :1], there.shape))
        order = (there[0] if turned else there[:, 0]).round().astype(int)
        return cls(rule, sides, order, turned, float(ones.flat[0]))

    @property
    def name(self) -> str:
        """Of the layer there, with `{layer}` in it where it is one of many."""
        return self.rule.theirs[0].removesuffix(".weight")

    def named(self, layer: int) -> str:
        """Its name in that layer, as PEFT has it."""
        return _PREFIX + of_layer(self.name, layer)


def _layers(names: NameMap) -> list[_Layer]:
    return [
        _Layer.of(names, rule)
        for rule in names.rules
        if all(fits(name, names.specs[name]) for name in rule.ours) and len(rule.theirs) == 1
    ]


def is_peft(directory: str | os.PathLike[str]) -> bool:
    """Whether `directory` holds adapters that PEFT wrote, or could have."""
    directory = pathlib.Path(directory)
    return (directory / CONFIG).is_file() and not (directory / "config.json").exists()


# ---- Written ------------------------------------------------------------------------------------


def save_peft(
    directory: str | os.PathLike[str],
    names: NameMap,
    config: AdapterConfig,
    adapters: Mapping[str, Array],
    base: str,
    dtype: str = "float32",
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a directory that `peft.PeftModel.from_pretrained` loads beside its base.

    With several processes, all call this and the first one writes.

    Args:
      directory: must not exist, or be empty.
      names: of the model, in a Hugging Face family.
      adapters: see `lm.models.adapters`.
      base: what is said of the base: `base_model_name_or_path`.
      dtype: of the tensors: float32, bfloat16 or float16.
      files: more files to put into it, name → content.

    Raises:
      ConfigError: DoRA of a part of a layer there; layers that are called as those of experts; the
        directory is not empty.
    """
    adapters = {name: np.asarray(array, np.float32) for name, array in adapters.items()}
    tensors, targets, ranks = {}, [], {}
    turned = False
    experts = {name.split(".")[-2] for name in names.shapes if ".experts." in name}
    for layer in _layers(names):
        adapted = [name + LORA_A in adapters for name in layer.rule.ours]
        if not any(adapted):
            continue
        check(
            all(adapted) or config.kind == "lora",
            f"config.adapter.targets: {layer.rule.ours} are one layer in {names.family.model_type},"
            " and DoRA of a part of it is nothing that PEFT knows",
        )
        # It goes by the last word (`transformers_weight_conversion` of 0.19), and loses these.
        check(
            layer.name.rpartition(".")[2] not in experts,
            f"config.adapter.targets: {layer.rule.ours[0]!r} is {layer.name} in "
            f"{names.family.model_type}, which PEFT takes for a layer of the experts: "
            "write it with to='hf', added in, or adapt with targets='attention'",
        )
        targets.append(layer)
        turned |= layer.turned
        ranks[layer.name] = config.rank * sum(adapted)
        for index in range(names.times(layer.rule)):
            tensors |= _theirs(layer, index, config, adapters)
    whole, saved = {name for name in adapters if not _is_part(name)}, {}
    for rule in names.rules:
        if set(rule.ours) <= whole:
            check(not rule.layered, f"{rule.ours} in layers cannot be saved whole by PEFT")
            for name, array in zip(rule.tensors(0), rule.save([adapters[n] for n in rule.ours])):
                saved[_PREFIX + name] = array
    patterns = {name: rank for name, rank in ranks.items() if rank != config.rank}
    patterns = {_ending(name): rank for name, rank in patterns.items()}
    root = math.sqrt if config.rslora else float
    content = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if names.config.classifier == "sequence" else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": turned,
        "use_rslora": config.rslora,
        "use_dora": config.kind == "dora",
        "target_modules": _targets(targets, names),
        "rank_pattern": patterns,
        "alpha_pattern": {n: config.scale * root(rank) for n, rank in patterns.items()},
        "modules_to_save": sorted({_module(name) for name in saved}) or None,
    }
    if names.config.architecture == "encoder_decoder":
        content["task_type"] = "SEQ_2_SEQ_LM"
    tensors |= saved
    if jax.process_index() != 0:
        return
    with new_directory(pathlib.Path(directory).expanduser().absolute()) as scratch:
        shapes = {name: array.shape for name, array in tensors.items()}
        size = sum(array.nbytes for array in tensors.values()) + 1
        (file,) = safetensors.write(scratch, shapes, dtype, tensors.items(), size)
        file.rename(scratch / WEIGHTS)
        for name, data in (files or {}).items():
            (scratch / name).write_bytes(data)
        (scratch / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _theirs(layer: _Layer, index: int, config: AdapterConfig, adapters) -> dict[str, np.ndarray]:
    """The tensors of one layer there."""
    rows, ranks = [], []
    outputs = sum(side.outputs for side in layer.sides)
    adapted = [name for name in layer.rule.ours if name + LORA_A in adapters]
    b = np.zeros((outputs, config.rank * len(adapted)), np.float32)
    magnitudes, start = [], 0
    for name, side in zip(layer.rule.ours, layer.sides):
        if name in adapted:
            own = [adapters.get(name + part) for part in (LORA_A, LORA_B, MAGNITUDE)]
            own = [x[index] if x is not None and side.stacked else x for x in own]
            rows.append(own[0].T)
            place = slice(sum(ranks), sum(ranks) + config.rank)
            b[start : start + side.outputs, place] = own[1].T
            ranks.append(config.rank)
            magnitudes.append(own[2])
        start += side.outputs
    named = layer.named(index)
    found = {named + _A: np.concatenate(rows), named + _B: layer.factor * b[layer.order]}
    if config.kind == "dora":
        found[named + _MAGNITUDE] = layer.factor * np.concatenate(magnitudes)[layer.order]
    return found


def _is_part(name: str) -> bool:
    return name.endswith((LORA_A, LORA_B, MAGNITUDE))


def _module(tensor: str) -> str:
    return tensor.removeprefix(_PREFIX).rpartition(".")[0]


def _ending(name: str) -> str:
    """What the names of a layer there end in."""
    return re.sub(r".*\{layer[+\d]*\}\.", "", name)


def _targets(layers: list[_Layer], names: NameMap) -> list[str]:
    """`target_modules`: endings of names where no other layer has them, too; else whole names."""
    every = {_module(name) for name in names.shapes}
    meant = {
        layer.named(index).removeprefix(_PREFIX)
        for layer in layers
        for index in range(names.times(layer.rule))
    }
    endings = sorted({_ending(layer.name) for layer in layers})
    matched = {n for n in every if any(n == e or n.endswith(f".{e}") for e in endings)}
    return endings if matched == meant else sorted(meant)


# ---- Read ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Peft:
    """A directory that PEFT wrote: all but the numbers."""

    directory: pathlib.Path
    fields: dict[str, Any]  # of adapter_config.json

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Peft:
        """Raises ConfigError where a field says something that we do not know."""
        directory = pathlib.Path(directory)
        fields = read_json(directory / CONFIG)
        where = str(directory / CONFIG)
        kind = fields.get("peft_type")
        check(kind == "LORA", f"{where}: peft_type={kind!r} is not 'LORA'")
        odd = {n: value for n, value in fields.items() if n not in _KNOWN and value}
        check(not odd, f"{where}: {odd} is not known, and could change what is computed")
        initial = fields.get("init_lora_weights")
        check(
            initial in _INITIAL,
            f"{where}: init_lora_weights={initial!r} changes the base as well: convert it with PEFT"
            " to plain LoRA first",
        )
        bias = fields.get("bias", "none")
        check(bias == "none", f"{where}: bias={bias!r} trains biases of the base: only 'none' can")
        return cls(directory, fields)

    @property
    def base(self) -> str:
        """Where its base is, or what it is called."""
        return self.fields.get("base_model_name_or_path") or ""

    @property
    def labels(self) -> int:
        """How many labels a new head of a decoder has that is saved beside; 0: there is none."""
        stored = safetensors.read_header(self._file).get(f"{_PREFIX}score.weight")
        return stored.shape[0] if stored and self.fields.get("task_type") == "SEQ_CLS" else 0

    @property
    def _file(self) -> pathlib.Path:
        file = self.directory / WEIGHTS
        check(file.is_file(), f"{file} is not there: of the formats of PEFT, safetensors is read")
        return file

    def read(self, names: NameMap) -> tuple[AdapterConfig, dict[str, np.ndarray]]:
        """The adapters as ours, float32, for a base whose names are known.

        Those with a lower rank than others are filled up with zeros, and so are layers that have
        none; a scale of their own is multiplied into B.

        Raises:
          ConfigError: tensors that are missing, or that belong to no layer.
        """
        file = self._file
        tensors = {
            name.replace(_MAGNITUDE + ".weight", _MAGNITUDE): np.asarray(stored.read(), np.float32)
            for name, stored in safetensors.read_header(file).items()
        }
        dora, rslora = (bool(self.fields.get(name)) for name in ("use_dora", "use_rslora"))
        ends = (_A, _B, _MAGNITUDE) if dora else (_A, _B)
        found: dict[_Layer, list[_Part | None]] = {}
        for layer in _layers(names):
            parts = []
            for index in range(names.times(layer.rule)):
                named = layer.named(index)
                arrays = [tensors.pop(named + end, None) for end in ends]
                some = [array for array in arrays if array is not None]
                check(len(some) in (0, len(ends)), f"{file} lacks tensors of {named}")
                parts.append(_Part(*some, scale=self._scale(named, some)) if some else None)
            if any(parts):
                check(not dora or all(parts), f"{file}: not all layers have a {layer.name}")
                found[layer] = parts
        whole = self._whole(names, tensors)
        check(
            not tensors,
            f"{file} has tensors that belong to no layer of a {names.family.model_type} that can "
            f"have adapters: {', '.join(sorted(tensors)[:3])}",
        )
        there = [part for parts in found.values() for part in parts if part]
        check(bool(there), f"{file} adapts nothing")
        rank, scale = max(len(part.a) for part in there), there[0].scale
        config = AdapterConfig(
            kind="dora" if dora else "lora",
            rank=rank,
            alpha=scale * (math.sqrt(rank) if rslora else rank),
            rslora=rslora,
            targets=tuple(name for layer in found for name in layer.rule.ours),
            whole=tuple(whole),
        )
        ours = dict(whole)
        for layer, parts in found.items():
            ours |= _ours(layer, parts, rank, scale)
        return config, ours

    def _scale(self, named: str, arrays: list[np.ndarray]) -> float:
        """What multiplies B·A of one layer there."""
        if not arrays:
            return 0.0
        alpha, rank = self.fields.get("lora_alpha", 8), len(arrays[0])
        for pattern, value in (self.fields.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", named.removeprefix(_PREFIX)):
                alpha = value
                break
        return alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def _whole(self, names: NameMap, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What was trained itself (`modules_to_save`), of which each is taken from `tensors`.

        So are copies of the base's tables, which PEFT saves where the head has an adapter.
        """
        found, saved = {}, self.fields.get("modules_to_save") or []
        for name in list(tensors):
            bare = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
            mine = any(part in bare.split(".") for part in saved)
            if not mine and names.shapes.get(bare, names.copies.get(bare)) is not None:
                same = names.shapes.get(bare, tensors[name].shape) == tensors[name].shape
                check(same, f"{self.directory / WEIGHTS}: {name} has another shape than the base's")
                del tensors[name]
        for rule in names.rules:
            theirs = [_PREFIX + name for name in rule.tensors(0)]
            if not rule.layered and all(name in tensors for name in theirs):
                found |= names.load(rule, 0, lambda name: tensors.pop(_PREFIX + name))
        return found


class _Part(NamedTuple):
    """What PEFT puts beside one linear layer."""

    a: np.ndarray  # [rank, inputs]
    b: np.ndarray  # [outputs, rank]
    magnitude: np.ndarray | None = None  # [outputs]
    scale: float = 1.0


def _ours(
    layer: _Layer, parts: list[_Part | None], rank: int, scale: float
) -> dict[str, np.ndarray]:
    """Our adapters of one layer there, of this rank and scale."""
    found: dict[str, list[np.ndarray]] = {}
    places = np.argsort(layer.order)  # of our outputs, there
    for part in parts:
        start = 0
        for name, side in zip(layer.rule.ours, layer.sides):
            rows = places[start : start + side.outputs]
            start += side.outputs
            a = np.zeros((side.inputs, rank), np.float32)
            b = np.zeros((rank, side.outputs), np.float32)
            if part:
                a[:, : len(part.a)] = part.a.T
                b[: len(part.a)] = (part.scale / scale / layer.factor) * part.b[rows].T
            found.setdefault(name + LORA_A, []).append(a)
            found.setdefault(name + LORA_B, []).append(b)
            if part and part.magnitude is not None:
                magnitude = part.magnitude.reshape(-1)[rows] / layer.factor
                found.setdefault(name + MAGNITUDE, []).append(magnitude)
    stacked = layer.sides[0].stacked
    return {name: np.stack(each) if stacked else each[0] for name, each in found.items()}
