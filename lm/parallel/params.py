"""One declaration of each parameter, from which everything else about it is derived.

A model lists its parameters once, as a flat dict from dotted name to `ParamSpec`. Abstract shapes,
shardings, initial values, optimizer masks, counts and checkpoint layout all come from that dict.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """A parameter's shape, its logical axes (one name per dimension) and how it starts.

    Logical axes: `vocab`, `embed`, `mlp`, `heads`, `kv_heads`, `head_dim`, `layers`, `length`,
    `expert`, `distance`, `type`, or None for a dimension that is never sharded.
    `initializer(key, shape, dtype)` gives the initial value of the whole array, stacked layers
    included.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    initializer: Callable[..., Any]

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")

    @property
    def size(self) -> int:
        """How many numbers the parameter holds."""
        return math.prod(self.shape)
