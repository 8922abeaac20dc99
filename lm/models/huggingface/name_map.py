"""Tensors ⇄ parameters: rules made of a family's table of names, applied in memory or as a stream.

A table goes from our layers to theirs, `{"blocks.mlp.up": "h.{layer}.mlp.dense_h_to_4h"}`:

- a linear layer (`_INPUTS`) or a module (a norm, a projection): what stands before `.weight` and
  `.bias` of their tensors;
- another parameter (`embedding.tokens`, `head`): the whole name of a tensor. After it, separated by
  spaces, those of its copies: they may be in a file or not, or stand in for it, are compared when
  both are there, and not written. A tied head is such a copy, too;
- queries, keys and values that share a layer there: all of their names → `Linear`;
- anything else: a `Rule`.

Entries of parameters that a model does not have (a norm's bias, a head that is tied) are skipped.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from lm.parallel.sharding import ParamSpec

Arrays = list[np.ndarray]
Shape = tuple[int, ...]
Specs = Mapping[str, ParamSpec]

# Our linear layers → how many leading dimensions are inputs (of attention's output: H, C).
_INPUTS = {
    "query": 1, "key": 1, "value": 1, "output": 2, "up": 1, "gate": 1, "down": 1, "router": 1,
    "query_latent": 1, "latent": 1, "key_up": 1, "value_up": 1,
}  # fmt: skip
_STRIP = 64  # numbers side by side in memory that are copied together
QKV = tuple(f"blocks.attention.{part}" for part in ("query", "key", "value"))


@dataclasses.dataclass(frozen=True)
class Rule:
    """Some of our parameters, and the tensors that hold the same numbers.

    With `{layer}` in the tensors' names the rule is applied once a layer, and `load` and `save` see
    one layer's arrays. `{layer+3}` is the layer three further on.

    Attributes:
      ours: parameter names.
      theirs: tensor names, or templates of them.
      load: (tensors, shapes of ours) → ours.
      save: ours → tensors.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    load: Callable[[Arrays, Sequence[Shape]], Arrays]
    save: Callable[[Arrays], Arrays]

    @property
    def layered(self) -> bool:
        """Whether it is applied once a layer."""
        return "{layer" in self.theirs[0]

    def tensors(self, layer: int) -> list[str]:
        """The names of its tensors in one layer."""
        return [of_layer(name, layer) for name in self.theirs]


def of_layer(name: str, layer: int) -> str:
    """A tensor's name in one layer."""
    return re.sub(r"\{layer\+?(\d*)\}", lambda found: str(layer + int(found[1] or 0)), name)


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear layer of theirs that is not plain torch.nn.Linear for one of ours.

    Attributes:
      name: of the layer; with `{expert}` in it there is one for each expert.
      by_head: of several: each key head's queries, its key and its value come together (GPT-NeoX);
        else all queries come first (GPT-2).
      conv1d: whether its weight is [inputs, outputs].
      scale: its numbers are this times ours.
      interleaved: so many of each head's first dimensions (negative: of its last) are turned by
        rotary positions, as pairs of neighbours there (GPT-J) and as two halves here.
    """

    name: str
    by_head: bool = False
    conv1d: bool = False
    scale: float = 1.0
    interleaved: int = 0


Table = Mapping[str | tuple[str, ...], str | Linear | Rule]


def copies(table: Table, specs: Specs) -> dict[str, str]:
    """Tensors that are copies of others by design: their names → what of."""
    found = {}
    for ours, theirs in table.items():
        if isinstance(theirs, str) and ours in specs:
            original, *others = theirs.split()
            found |= dict.fromkeys(others, original)
    if "head" in table and "head" not in specs and "classifier.projection" not in specs:
        found[table["head"]] = table["embedding.tokens"].split()[0]
    return found


def rules(table: Table, specs: Specs) -> list[Rule]:
    """Rules that make every parameter once.

    Raises:
      ValueError: the table has no such rules.
    """
    found = [rule for ours, theirs in table.items() for rule in _rules(ours, theirs, specs)]
    made = [name for rule in found for name in rule.ours]
    if sorted(made) != sorted(specs):
        wrong = sorted({n for n in made if made.count(n) > 1} ^ set(specs) ^ set(made))
        raise ValueError(f"rules do not make {wrong} exactly once")
    return found


def _rules(
    ours: str | tuple[str, ...], theirs: str | Linear | Rule, specs: Specs
) -> Iterator[Rule]:
    if isinstance(theirs, Rule):
        if theirs.ours[0] in specs:
            yield theirs
        return
    parts = (ours,) if isinstance(ours, str) else ours
    inputs = _INPUTS.get(parts[0].rpartition(".")[2])
    if inputs is None and ours in specs:
        yield _unchanged(ours, theirs.split()[0])
        return
    layer = Linear(theirs) if isinstance(theirs, str) else theirs
    endings = [(".projection", "weight", 1), (".scale", "weight", 0), (".bias", "bias", 0)]
    if inputs is not None:
        endings = [("", "weight", inputs), ("_bias", "bias", 0)]
    for end, tensor, rank in endings:
        names = tuple(part + end for part in parts)
        if names[0] not in specs:
            continue
        rule = _linear(names, f"{layer.name}.{tensor}", rank, layer)
        yield _each_expert(rule, specs[names[0]].shape[1]) if "{expert}" in layer.name else rule


def _unchanged(ours: str, theirs: str) -> Rule:
    return Rule((ours,), (theirs,), lambda tensors, shapes: tensors, lambda arrays: arrays)


def _linear(ours: tuple[str, ...], theirs: str, inputs: int, layer: Linear) -> Rule:
    """A weight [outputs, inputs] there, [inputs…, outputs…] here; of no `inputs` a vector there."""

    def load(tensors: Arrays, shapes: Sequence[Shape]) -> Arrays:
        columns = math.prod(shapes[0][:inputs])
        groups = shapes[-1][-2] if layer.by_head else 1
        rows = tensors[0].T if layer.conv1d else tensors[0]
        sizes = [math.prod(shape) // (groups * columns) for shape in shapes]
        parts = np.split(rows.reshape(groups, -1, columns), np.cumsum(sizes)[:-1], axis=1)
        ours = [np.moveaxis(x, -1, 0).reshape(shape) for x, shape in zip(parts, shapes)]
        if layer.interleaved:
            ours = [x[..., _apart(x.shape[-1], layer.interleaved)] for x in ours]
        return ours if layer.scale == 1 else [array / layer.scale for array in ours]

    def save(arrays: Arrays) -> Arrays:
        if layer.interleaved:
            arrays = [x[..., np.argsort(_apart(x.shape[-1], layer.interleaved))] for x in arrays]
        columns = math.prod(arrays[0].shape[:inputs])
        groups = arrays[-1].shape[-2] if layer.by_head else 1
        parts = [np.moveaxis(array.reshape(columns, groups, -1), 0, -1) for array in arrays]
        ends = np.cumsum([0, *(part.shape[1] for part in parts)])
        if layer.conv1d:
            rows = np.empty((columns, groups, ends[-1]), arrays[0].dtype)
            rows = np.moveaxis(rows, 0, -1)
        else:
            rows = np.empty((groups, ends[-1], columns), arrays[0].dtype)
        for part, start, end in zip(parts, ends, ends[1:]):
            copy_into(rows[:, start:end], part if layer.scale == 1 else part * layer.scale)
        tensor = rows.reshape(-1, columns) if inputs else rows.reshape(-1)
        return [tensor.T if layer.conv1d and inputs else tensor]

    return Rule(ours, (theirs,), load, save)


def _apart(width: int, rotated: int) -> np.ndarray:
    """Where the dimensions of a head are there: those of `Linear.interleaved` in halves."""
    order = np.arange(width)
    part = slice(rotated) if rotated > 0 else slice(rotated, None)
    order[part] = order[part].reshape(-1, 2).T.reshape(-1)
    return order


def _each_expert(rule: Rule, experts: int) -> Rule:
    """`rule` for every expert's tensors; ours are stacked [E, …]."""
    names = tuple(rule.theirs[0].replace("{expert}", str(expert)) for expert in range(experts))
    return Rule(
        rule.ours,
        names,
        lambda tensors, shapes: [np.stack([rule.load([t], [shapes[0][1:]])[0] for t in tensors])],
        lambda arrays: [rule.save([matrix])[0] for matrix in arrays[0]],
    )


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`; by strips where `source` lies in memory the other way around.

    Read number by number in the order of `target`, each number of a transposed matrix would be
    alone on its line of cache.
    """
    steps = [abs(step) for step in source.strides]
    axis = steps.index(min(steps)) if steps else 0
    if axis >= source.ndim - 1:
        target[...] = source
    elif axis > 0:
        for part, origin in zip(target, source, strict=True):
            copy_into(part, origin)
    else:
        for start in range(0, len(source), _STRIP):
            target[start : start + _STRIP] = source[start : start + _STRIP].copy(order="K")
