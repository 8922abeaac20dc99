"""One row a size: how the tables of known models are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Preset(NamedTuple):
    """A known model: where it was published, and the fields of `ModelConfig` that make it."""

    source: str
    fields: Mapping[str, Any]


def table(
    source: str, shared: Mapping[str, Any], columns: str, **sizes: tuple[Any, ...]
) -> dict[str, Preset]:
    """The presets of one table, by name.

    Args:
      source: the paper's table, or the configuration its authors published.
      shared: fields that all sizes have.
      columns: names of the fields that differ, separated by spaces.
      **sizes: name → the values of `columns`, and after them, where a size is out of line with the
        others, a dict of further fields.
    """
    names = columns.split()
    presets = {}
    for name, values in sizes.items():
        own = dict(zip(names, values, strict=False))
        extra = values[len(names)] if len(values) > len(names) else {}
        presets[name] = Preset(source, {**shared, **own, **extra})
    return presets
