"""What it takes to know a Hugging Face family, and a model of one on either side.

A `Family` is two tables: what each field of its config.json says (`config_fields`), and which
tensors are which of our layers (`name_map`). Both are read in both directions, and everything else
(files, sharding, errors) is the same for all families. The first of `decoders` is a whole one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lm.config import check, view
from lm.models import param_specs, skeleton
from lm.models.config import ModelConfig
from lm.models.huggingface.config_fields import (
    Field,
    Json,
    Together,
    check_same,
    resolved,
    settings,
)
from lm.models.huggingface.name_map import Rule, Shape, Table, copies, rules
from lm.parallel.sharding import ParamSpec

Array = np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture as Hugging Face writes it.

    Attributes:
      model_type: of config.json.
      architectures: classes whose tensors these are, the one that is written first.
      fields: of config.json, by name. All that change what is computed are here or in `together`.
      tensors: our layers → theirs, or what makes that of a model; see `name_map`.
      constants: fields of ModelConfig that all its models have.
      together: fields of config.json that mean something only together.
      inert: fields of config.json, beside those of all families, that change nothing.
      written: ModelConfig → what config.json says besides. Raises ConfigError on a model that
        transformers itself refuses.
      unsaid: fields of ModelConfig that the tensors say and config.json does not.
      settle: (config, tensors) → config with those fields. The names may be asked with or without
        `base_prefix`; the numbers are read when they are asked for.
      base_prefix: may be missing from, or stand before, names in a file (`transformer.`).
      ignored: regular expressions (`re.search`) of tensors that hold no parameters: masks,
        frequencies. Only tensors that the table does not name are asked about.
      old_fields, old_tensors: what other files call fields, and (regular expression, replacement)
        of parts of tensors' names.
      old_types: what other files call the family.
      exact: ends of names of tensors that are written as float32, whatever the others are.
    """

    model_type: str
    architectures: tuple[str, ...]
    fields: Mapping[str, Field]
    tensors: Table | Callable[[ModelConfig], Table]
    constants: Json = dataclasses.field(default_factory=dict)
    together: tuple[Together, ...] = ()
    inert: tuple[str, ...] = ()
    written: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}
    unsaid: tuple[str, ...] = ()
    settle: Callable[[ModelConfig, Mapping[str, np.ndarray]], ModelConfig] = (
        lambda config, tensors: config
    )
    base_prefix: str = ""
    ignored: tuple[str, ...] = ()
    old_fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    old_tensors: tuple[tuple[str, str], ...] = ()
    old_types: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()

    def read_config(self, hf: Json) -> ModelConfig:
        """The model that a config.json describes, but for what is `unsaid`.

        Raises:
          ConfigError: naming the first field that cannot be honoured.
        """
        defaults = {name: field.default for name, field in self.fields.items()}
        for fields in self.together:
            defaults |= fields.defaults
        hf = {self.old_fields.get(name, name): value for name, value in hf.items()}
        values = settings(hf, defaults, self.inert)
        found, said = dict(self.constants), {}
        for theirs, field in self.fields.items():
            value = field.read(theirs, values[theirs])
            for ours in field.ours.split() if value is not None else ():
                first = said.setdefault(ours, theirs)
                check(
                    found.setdefault(ours, value) == value,
                    f"config.json: {first}={values[first]!r} and {theirs}={values[theirs]!r} must "
                    "be the same",
                )
        for fields in self.together:
            found |= fields.read(values)
        if "head_dim" not in found:
            width, heads = found["width"], found["num_heads"]
            check(
                heads > 0 and width % heads == 0,
                f"config.json: {said['width']}={width} is not divisible by {said['num_heads']}="
                f"{heads}",
            )
        config = view(ModelConfig, found, "config.json")
        check(config.feed_forward > 0, f"config.json: {said.get('mlp_width')}=0 must be at least 1")
        return config

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """config.json without `model_type`, `dtype`, and most often `architectures`.

        Raises:
          NotExact: naming the first field that would be lost: what is written must read as the same
            model.
          ConfigError: a model that is not even like the family's.
        """
        ours, hf = resolved(config), {}
        for theirs, field in self.fields.items():
            if field.ours:
                hf[theirs] = field.write(ours[field.ours.split()[0]])
        for fields in self.together:
            hf |= fields.write(config)
        hf |= self.written(config)
        unsaid = {name: getattr(config, name) for name in self.unsaid}
        check_same(config, dataclasses.replace(self.read_config(hf), **unsaid))
        return hf


@dataclasses.dataclass(frozen=True)
class NameMap:
    """What a model of one family holds on either side, and which belongs to which."""

    family: Family
    config: ModelConfig

    @functools.cached_property
    def specs(self) -> dict[str, ParamSpec]:
        """Our parameters."""
        return param_specs(skeleton(self.config))

    @functools.cached_property
    def _table(self) -> Table:
        tensors = self.family.tensors
        return tensors(self.config) if callable(tensors) else tensors

    @functools.cached_property
    def rules(self) -> list[Rule]:
        """Rules that make every one of our parameters once."""
        return rules(self._table, self.specs)

    @functools.cached_property
    def copies(self) -> dict[str, str]:
        """Tensors that are copies of others by design: their names → what of."""
        head = () if self.config.output_head else ("head",)  # one there would be no copy
        return copies({n: t for n, t in self._table.items() if n not in head}, self.specs)

    @functools.cached_property
    def shapes(self) -> dict[str, Shape]:
        """Every tensor that holds parameters: name → shape, in the order of the rules."""
        shapes = {}
        for rule in self.rules:
            # Numbers of one byte that all lie in one place: shapes are what is asked for.
            arrays = [np.broadcast_to(np.int8(0), shape) for shape in self.own_shapes(rule)]
            tensors = rule.save(arrays)
            for layer in range(self.times(rule)):
                for name, tensor in zip(rule.tensors(layer), tensors, strict=True):
                    shapes[name] = tensor.shape
        return shapes

    def times(self, rule: Rule) -> int:
        """How often a rule is applied: once, or once a layer."""
        return self.specs[rule.ours[0]].shape[0] if rule.layered else 1

    def own_shapes(self, rule: Rule) -> list[Shape]:
        """The shapes of our parameters that one application makes."""
        shapes = [self.specs[name].shape for name in rule.ours]
        return [shape[1:] for shape in shapes] if rule.layered else shapes

    def load(
        self, rule: Rule, layer: int, tensor: Callable[[str], np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Our parameters (one layer of them) of the tensors that `tensor(name)` gives."""
        tensors = [tensor(name) for name in rule.tensors(layer)]
        return dict(zip(rule.ours, rule.load(tensors, self.own_shapes(rule)), strict=True))

    def stream(self, params: Mapping[str, Array]) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor, one after the other, in the order of `shapes`.

        Args:
          params: our parameters; each is asked for once, and not kept.
        """
        for rule in self.rules:
            whole = {name: params[name] for name in rule.ours}
            for layer in range(self.times(rule)):
                parts = [whole[n][layer] if rule.layered else whole[n] for n in rule.ours]
                tensors = rule.save([_on_host(part) for part in parts])
                yield from zip(rule.tensors(layer), tensors, strict=True)
            del whole, parts, tensors  # before the next are read


def _on_host(array: Array) -> np.ndarray:
    """All of an array, also of one that several processes share."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def from_tensors(
    family: Family, config: ModelConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Our parameters of the tensors of a whole model, in their dtype.

    Args:
      family, config: what model they are of.
      tensors: under their full names; others than the family's are not looked at.
    """
    names, params = NameMap(family, config), {}
    for rule in names.rules:
        layers = [names.load(rule, i, tensors.__getitem__) for i in range(names.times(rule))]
        for name in rule.ours:
            arrays = [layer[name] for layer in layers]
            params[name] = np.stack(arrays) if rule.layered else np.ascontiguousarray(arrays[0])
    return params


def to_tensors(
    family: Family, config: ModelConfig, params: Mapping[str, Array]
) -> dict[str, np.ndarray]:
    """The tensors of a whole model, under their full names; the inverse of `from_tensors`."""
    return dict(NameMap(family, config).stream(params))
