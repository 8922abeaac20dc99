"""Tensors ⇄ parameters: the rules of a family applied, in memory or as a stream."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from lm.models import param_specs, skeleton
from lm.models.config import ModelConfig
from lm.models.huggingface.family import Family, Rule
from lm.parallel.sharding import ParamSpec

Shape = tuple[int, ...]
Array = np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a model of one family holds on either side, and what belongs to what.

    Attributes:
      family: whose rules these are.
      config: the model's.
      specs: our parameters.
      shapes: the tensors' names → shapes.
    """

    family: Family
    config: ModelConfig
    specs: dict[str, ParamSpec]

    @functools.cached_property
    def rules(self) -> list[Rule]:
        """Rules that make every one of our parameters once."""
        rules = self.family.rules(self.config)
        made = [name for rule in rules for name in rule.ours]
        if sorted(made) != sorted(self.specs):
            wrong = sorted({n for n in made if made.count(n) > 1} ^ set(self.specs) ^ set(made))
            raise ValueError(f"{self.family.model_type}: rules do not make {wrong} exactly once")
        return rules

    @functools.cached_property
    def shapes(self) -> dict[str, Shape]:
        """Every tensor that holds parameters: name → shape, in the order of the rules."""
        shapes = {}
        for rule in self.rules:
            # Numbers of one byte that all lie in one place: shapes are what is asked for.
            arrays = [np.broadcast_to(np.int8(0), shape) for shape in self.own_shapes(rule)]
            tensors = rule.save(arrays)
            for layer in range(self.times(rule)):
                for name, tensor in zip(names(rule, layer), tensors, strict=True):
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
        tensors = [tensor(name) for name in names(rule, layer)]
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
                yield from zip(names(rule, layer), tensors, strict=True)
            del whole, parts, tensors  # before the next are read


def _on_host(array: Array) -> np.ndarray:
    """All of an array, also of one that several processes share."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def layout(family: Family, config: ModelConfig) -> Layout:
    """The layout of the model that `config` describes."""
    return Layout(family, config, param_specs(skeleton(config)))


def names(rule: Rule, layer: int) -> list[str]:
    """The tensors of a rule in one layer."""
    number = str(rule.first_layer + layer)
    return [name.replace("{layer}", number) for name in rule.theirs]


def from_tensors(
    family: Family, config: ModelConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Our parameters of the tensors of a whole model, in their dtype.

    Args:
      family, config: what model they are of.
      tensors: under their full names; others than the family's are not looked at.
    """
    plan = layout(family, config)
    params = {}
    for rule in plan.rules:
        layers = [plan.load(rule, i, tensors.__getitem__) for i in range(plan.times(rule))]
        for name in rule.ours:
            arrays = [layer[name] for layer in layers]
            params[name] = np.stack(arrays) if rule.layered else np.ascontiguousarray(arrays[0])
    return params


def to_tensors(
    family: Family, config: ModelConfig, params: Mapping[str, Array]
) -> dict[str, np.ndarray]:
    """The tensors of a whole model, under their full names; the inverse of `from_tensors`."""

    return dict(layout(family, config).stream(params))
