"""The device mesh: which axes there are, and how many devices split each."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm.config import Bounds, ConfigError, Count, Positive, check
from lm.parallel.schedule import REDUCE_DTYPES

# From those that talk least, which may lie across hosts and slices, to those that talk most.
AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")
BATCH_AXES = ("stage", "data", "fsdp", "expert")  # rows of a batch are split over these

Ways = Annotated[int, Bounds(-1)]  # -1: all devices that remain


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many ways each axis splits; one axis may be -1, meaning all devices that remain."""

    data: Ways = -1  # copies of the model, each with its share of the batch
    fsdp: Ways = 1  # the batch again, and what config.zero says with it
    tensor: Ways = 1  # heads, MLP and vocabulary
    context: Ways = 1  # each sequence, its attention by a ring
    expert: Ways = 1  # experts, and the batch again
    stage: Ways = 1  # layers, in a pipeline
    microbatches: Count = 0  # of a pipeline, a multiple of stage; 0: four a stage, or what divides
    reduce_dtype: Literal[REDUCE_DTYPES] = "float32"  # what parameters' gradients travel in
    rounds: Positive = 1  # times a micro-batch passes through a pipeline; 1: GPipe, more: circular

    def validate(self, prefix: str = "config.mesh") -> None:
        """Raises ConfigError unless sizes are positive and at most one is -1."""
        for axis in AXES:
            check(getattr(self, axis) != 0, f"{prefix}.{axis}=0 must be positive, or -1")
        rest = [axis for axis in AXES if getattr(self, axis) == -1]
        check(len(rest) <= 1, f"{prefix}: only one axis may be -1, not {' and '.join(rest)}")
        check(
            self.stage != 1 or (self.rounds == 1 and self.microbatches == 0),
            f"{prefix}.microbatches={self.microbatches} and rounds={self.rounds} are for a "
            f"pipeline, and {prefix}.stage is 1",
        )
        stages = self.stage if self.stage > 0 else 1
        check(
            self.microbatches % stages == 0,
            f"{prefix}.microbatches={self.microbatches} must be a multiple of stage={stages}",
        )


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """The size of every axis, outermost first, over so many devices.

    Raises:
      ConfigError: the sizes do not multiply to that number.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if devices % fixed or (-1 not in sizes.values() and fixed != devices):
        asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
        needed = f"a multiple of {fixed}" if -1 in sizes.values() else str(fixed)
        raise ConfigError(
            f"config.mesh ({asked or 'all 1'}) needs {needed} devices, and there are "
            f"{devices}: the sizes must multiply to {devices}, and one of them may be -1"
        )
    return {axis: devices // fixed if n == -1 else n for axis, n in sizes.items()}


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """The mesh of `config` over all devices (or those given), with Auto axes.

    Neighbours on an axis are neighbours in the network where it is known. Across slices (of TPUs)
    or nodes (of GPUs) lie the outermost axes that their number divides.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(config, len(devices))
    across = _across(sizes, len({getattr(device, "slice_index", 0) for device in devices}))
    if across is None:
        grid = mesh_utils.create_device_mesh(
            tuple(sizes.values()), devices, allow_split_physical_axes=True
        )
    else:
        within = tuple(size // ways for size, ways in zip(sizes.values(), across))
        grid = mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )
    return Mesh(np.asarray(grid), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _across(sizes: dict[str, int], slices: int) -> tuple[int, ...] | None:
    """How many slices each axis spans, or None where there is one slice, or they do not fit."""
    left, across = slices, []
    for size in sizes.values():
        across.append(math.gcd(size, left))
        left //= across[-1]
    return tuple(across) if slices > 1 and left == 1 else None


def describe(mesh: Mesh) -> str:
    """`data=4 × tensor=2`, or `one device`."""
    split = [f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1]
    return " × ".join(split) or "one device"


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Of arrays [rows, tokens], after `leading` unsplit dimensions: both are split.

    Rows over `BATCH_AXES`, tokens over `context`.
    """
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, BATCH_AXES, "context"))


def batch_ways(mesh: Mesh) -> int:
    """How many shares the rows of a batch are split into."""
    return math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)
