"""Adapters: a few trained numbers beside the frozen matrices of a model (LoRA, DoRA, QLoRA).

The parameters that are trained are then the adapters alone, a flat dict as any other, of

    blocks.attention.query.lora_a     A [inputs, rank]: uniform, as wide as 1/√inputs
    blocks.attention.query.lora_b     B [rank, outputs]: zero, so that training starts from the base
    blocks.attention.query.magnitude  DoRA's [outputs]: the lengths of the base's columns

each with its layers first, and of those of the model's own that are trained `whole`. Beside them
lies the base, which no gradient is made of: `freeze` makes it from a model's parameters, and
`applied` puts both together into what `lm.models.bind` takes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lm.config import AboveZero, ConfigError, Size, check, nearest
from lm.models.adapted import Adapted, Rounded
from lm.models.params import init
from lm.parallel.sharding import ParamSpec, Rules, partition

# Last names of the matrices that `lm.models.matmul.contract` multiplies by.
_LINEAR = (
    "query", "key", "value", "output", "query_latent", "latent", "up", "gate", "down",
    "projection",
)  # fmt: skip
LORA_A, LORA_B, MAGNITUDE = ".lora_a", ".lora_b", ".magnitude"


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What is trained in a model's place."""

    # none: the model's own parameters; lora: Hu et al. 2021; dora: Liu et al. 2024
    kind: Literal["none", "lora", "dora"] = "none"
    rank: Size = 16  # of what is added to a matrix
    alpha: AboveZero = 32.0  # what is added counts alpha / rank times
    rslora: bool = False  # alpha / √rank times (Kalajdzievski 2023)
    # Which matrices, by parts of their names: attention, attention.query, mlp, down, head, …;
    # (): those of all layers
    targets: str | tuple[str, ...] = ()
    # Parameters that are trained themselves and not frozen, by parts of their names
    whole: str | tuple[str, ...] = ("classifier",)
    # How the frozen matrices of layers lie in memory: in the dtype they are multiplied in, in
    # eight bits, or in four (QLoRA: Dettmers et al. 2023)
    base: Literal["compute", "int8", "nf4"] = "compute"

    def validate(self, prefix: str = "config.adapter") -> None:
        """Raises ConfigError where fields contradict each other."""
        check(
            self.kind != "none" or self.base == "compute",
            f"{prefix}.base={self.base!r} needs {prefix}.kind='lora' or 'dora': parameters that "
            "are trained are not rounded",
        )

    @property
    def scale(self) -> float:
        """What multiplies A·B."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


# ---- Which --------------------------------------------------------------------------------------


def adapted_names(config: AdapterConfig, specs: Mapping[str, ParamSpec]) -> list[str]:
    """The matrices of a model that get an adapter.

    Raises:
      ConfigError: a target that is in no name, or none but of experts, which get none.
    """
    fitting = [name for name, spec in specs.items() if fits(name, spec)]
    if not config.targets:
        chosen = [name for name in fitting if "layers" in specs[name].axes]
    else:
        chosen = []
        for target in _several(config.targets):
            found = [name for name in fitting if _part_of(name, target)]
            experts = [n for n, s in specs.items() if "expert" in s.axes and _part_of(n, target)]
            field = f"config.adapter.targets={target!r}"
            check(not experts, f"{field}: there are no adapters of experts ({experts})")
            if not found:
                parts = {part for name in fitting for part in (name, *name.split("."))}
                hint = " (the head is the token embedding)" if target == "head" else ""
                raise ConfigError(
                    f"{field} is no part of the name of a matrix that can have an adapter{hint}: "
                    f"{', '.join(fitting)}{nearest(target, parts)}"
                )
            chosen += [name for name in found if name not in chosen]
    check(bool(chosen), "config.adapter: only transformers have matrices for adapters")
    return chosen


def whole_names(config: AdapterConfig, specs: Mapping[str, ParamSpec]) -> list[str]:
    """The model's own parameters that are trained beside the adapters."""
    patterns = _several(config.whole)
    return [name for name in specs if any(_part_of(name, pattern) for pattern in patterns)]


def _several(patterns: str | tuple[str, ...]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else patterns


def _part_of(name: str, pattern: str) -> bool:
    return f".{pattern}." in f".{name}."


def fits(name: str, spec: ParamSpec) -> bool:
    """Whether a parameter is a matrix that can have an adapter."""
    own, axes = name.rpartition(".")[2], spec.axes
    matrix = own in _LINEAR and len(axes) - ("layers" in axes) >= 2
    recurrent = name.partition(".")[0] in ("attention", "cells")
    return name == "head" or (matrix and "expert" not in axes and not recurrent)


class Sides:
    """A matrix's inputs and outputs: how many, and the first logical axis of each."""

    def __init__(self, name: str, spec: ParamSpec):
        self.stacked = spec.axes[:1] == ("layers",)
        self.layers, self.layer_axis = spec.shape[: self.stacked], ("layers",) * self.stacked
        shape, axes = spec.shape[self.stacked :], spec.axes[self.stacked :]
        self.turned = name == "head"  # (outputs, inputs)
        # How many axes come first, which are inputs unless it is turned.
        self.input_axes = cut = len(shape) - 1 if axes[-1] == "embed" and not self.turned else 1
        sides = [(math.prod(shape[:cut]), axes[0]), (math.prod(shape[cut:]), axes[cut])]
        (self.inputs, self.input_axis), (self.outputs, self.output_axis) = (
            reversed(sides) if self.turned else sides
        )


# ---- Declared and begun -------------------------------------------------------------------------


def adapter_specs(config: AdapterConfig, specs: Mapping[str, ParamSpec]) -> dict[str, ParamSpec]:
    """What is trained of a model with these parameters: its adapters, and what is trained whole.

    Raises:
      ConfigError: see `adapted_names`.
    """
    trained = {}
    for name in adapted_names(config, specs):
        sides = Sides(name, specs[name])
        bound = 1 / math.sqrt(sides.inputs)

        def uniform(key, shape, dtype, bound=bound):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        def spec(shape, axes, initializer, sides=sides):
            return ParamSpec((*sides.layers, *shape), (*sides.layer_axis, *axes), initializer)

        zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
        a, b = (sides.inputs, config.rank), (config.rank, sides.outputs)
        trained[name + LORA_A] = spec(a, (sides.input_axis, None), uniform)
        trained[name + LORA_B] = spec(b, (None, sides.output_axis), zeros)
        if config.kind == "dora":  # begins as `begun` says
            trained[name + MAGNITUDE] = spec((sides.outputs,), (sides.output_axis,), ones)
    return trained | {name: specs[name] for name in whole_names(config, specs)}


def freeze(
    config: AdapterConfig,
    specs: Mapping[str, ParamSpec],
    params: Mapping[str, jax.Array],
    dtype: jnp.dtype,
) -> dict[str, Any]:
    """The base of a model with parameters `params`: all that is not trained, as it lies in memory.

    Matrices are in `dtype`, the compute dtype, or rounded as the config says; what is added or
    looked up, or multiplied in float32, is in float32.
    """
    base, adapted = {}, adapted_names(config, specs)
    for name in sorted(set(specs) - set(whole_names(config, specs))):
        x, spec = params[name], specs[name]
        if not fits(name, spec):
            experts = "expert" in spec.axes  # whose products are in the compute dtype, too
            base[name] = x.astype(dtype) if experts else x
            continue
        sides = Sides(name, spec)
        if sides.turned or config.base == "compute" or not sides.stacked:
            x = x.astype(dtype)
        else:
            check(
                config.base != "nf4" or sides.inputs % 2 == 0,
                f"config.adapter.base='nf4' needs an even number of inputs, and {name} has "
                f"{sides.inputs}: use 'int8'",
            )
            x = Rounded.of(x, config.base, sides.input_axes, sides.stacked)
        plain = sides.turned and name not in adapted
        base[name] = x if plain else Adapted(x, scale=config.scale, turned=sides.turned)
    return base


def base_shardings(
    base: Mapping[str, Any], specs: Mapping[str, ParamSpec], mesh, rules: Rules
) -> dict[str, Any]:
    """How a mesh shares what `freeze` makes, leaf by leaf: as the parameters it is made of.

    Args:
      base: its arrays, or their shapes.
    """

    def split(name: str):
        spec = specs[name]

        def sharding(leaf):
            axes = spec.axes
            if leaf.shape != spec.shape:  # rounded, as a matrix
                sides = Sides(name, spec)
                axes = (*sides.layer_axis, sides.input_axis, sides.output_axis)
            return jax.sharding.NamedSharding(mesh, partition(axes, leaf.shape, mesh, rules))

        return jax.tree.map(sharding, base[name])

    return {name: split(name) for name in base}


def begun(
    config: AdapterConfig,
    specs: Mapping[str, ParamSpec],
    params: Mapping[str, jax.Array],
    base: Mapping[str, Any],
    key: jax.Array,
) -> dict[str, jax.Array]:
    """The adapters before the first step, with which the model computes what `params` do.

    What is trained whole and is not in `params`, as a new head, is left out.
    """
    whole = whole_names(config, specs)
    declared = adapter_specs(config, specs)
    trained = init({name: spec for name, spec in declared.items() if name not in whole}, key)
    trained |= {name: params[name] for name in whole if name in params}
    for name in adapted_names(config, specs) if config.kind == "dora" else ():
        trained[name + MAGNITUDE] = _with(name, trained, base).lengths()
    return trained


# ---- Put together -------------------------------------------------------------------------------


def applied(adapters: Mapping[str, jax.Array], base: Mapping[str, Any]) -> dict[str, Any]:
    """All of a model's parameters for `lm.models.bind`, adapters beside the matrices of `base`.

    Gradients are to be taken with respect to `adapters` alone.
    """
    ends = (LORA_A, LORA_B, MAGNITUDE)
    whole = {name: x for name, x in adapters.items() if not name.endswith(ends)}
    names = [name.removesuffix(LORA_A) for name in adapters if name.endswith(LORA_A)]
    return {**base, **whole, **{name: _with(name, adapters, base) for name in names}}


def merged(adapters: Mapping[str, jax.Array], base: Mapping[str, Any]) -> dict[str, jax.Array]:
    """A model's parameters, float32, with the adapters added in: what knows of none reads these."""
    return {
        name: x.whole() if isinstance(x, Adapted) else x.astype(jnp.float32)
        for name, x in applied(adapters, base).items()
    }


def _with(name: str, adapters, base) -> Adapted:
    a, b = adapters[name + LORA_A], adapters[name + LORA_B]
    return dataclasses.replace(base[name], a=a, b=b, magnitude=adapters.get(name + MAGNITUDE))
