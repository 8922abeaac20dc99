"""The device mesh: its axes, how many devices split each, and which rows of a batch a host reads.

A host reads the rows that its devices hold and no others. Where an axis that does not split rows
(`tensor`, `context`) spans hosts, hosts read the same rows; they need not lie side by side.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm.config import Bounds, ConfigError, Count, Positive, check

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
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # what parameters' gradients travel in
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


def batch_sharding(mesh: Mesh, leading: int = 0, dims: int = 2) -> NamedSharding:
    """Of arrays [rows, …, tokens] of so many dimensions, after `leading` unsplit ones.

    Rows are split over `BATCH_AXES`, tokens over `context`. One dimension is that of rows.
    """
    rest = (*(None,) * (dims - 2), "context")[: dims - 1]
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, BATCH_AXES, *rest))


def batch_ways(mesh: Mesh) -> int:
    """How many shares the rows of a batch are split into."""
    return math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def local_rows(
    sharding: NamedSharding, batch_size: int, devices: Iterable[jax.Device] | None = None
) -> np.ndarray:
    """The rows of a global batch that these devices, or this process's, hold part of.

    Rising, int64 [rows]. `sharding` is that of arrays whose first dimension is the rows.
    """
    by_row = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
    chosen = by_row.addressable_devices if devices is None else set(devices)
    held = np.zeros(batch_size, bool)
    for device, (rows,) in by_row.devices_indices_map((batch_size,)).items():
        if device in chosen:
            held[rows] = True
    return np.flatnonzero(held)


def assemble(
    batch: Mapping[str, np.ndarray],
    mesh: Mesh,
    rows: np.ndarray,
    batch_size: int,
    leading: int = 0,
) -> dict[str, jax.Array]:
    """Global arrays on their devices, from this host's rows of each; see `batch_sharding`.

    The transfers are started, not waited for. `batch` holds arrays [..., rows of this host, ...]
    with `leading` dimensions before the rows; `rows`, from `local_rows`, says which they are.
    """
    shardings = {name: batch_sharding(mesh, leading, x.ndim - leading) for name, x in batch.items()}
    if len(rows) == batch_size and batch_sharding(mesh).is_fully_addressable:
        return jax.device_put(dict(batch), shardings)

    def whole(name: str) -> jax.Array:
        local = batch[name]
        shape = (*local.shape[:leading], batch_size, *local.shape[leading + 1 :])

        def part(index: tuple[slice, ...]) -> Any:
            wanted = index[leading]
            first, last = np.searchsorted(rows, wanted.indices(batch_size)[:2])
            return local[*index[:leading], first:last, *index[leading + 1 :]]

        return jax.make_array_from_callback(shape, shardings[name], part)

    return {name: whole(name) for name in batch}
