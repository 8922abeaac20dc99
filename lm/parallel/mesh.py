"""The device mesh: which axes there are, and how many devices split each."""

from __future__ import annotations

import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm.config import ConfigError, check

AXES = ("data", "fsdp", "tensor", "context", "expert", "stage")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many ways each axis splits; one axis may be -1, meaning all devices that remain."""

    data: int = -1  # copies of the model, each with its share of the batch
    fsdp: int = 1  # the batch again, and parameters and optimizer state with it
    tensor: int = 1  # heads, MLP and vocabulary
    context: int = 1
    expert: int = 1
    stage: int = 1

    def validate(self, prefix: str = "config.mesh") -> None:
        """Raises ConfigError unless sizes are positive and at most one is -1."""
        for axis in AXES:
            size = getattr(self, axis)
            check(size >= 1 or size == -1, f"{prefix}.{axis}={size} must be positive, or -1")
        rest = [axis for axis in AXES if getattr(self, axis) == -1]
        check(len(rest) <= 1, f"{prefix}: only one axis may be -1, not {' and '.join(rest)}")
        for axis in ("context", "expert", "stage"):
            check(
                getattr(self, axis) == 1,
                f"{prefix}.{axis}={getattr(self, axis)}: this axis has no schedule yet; use "
                "data, fsdp and tensor",
            )


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """The mesh of `config` over all devices (or those given), with Auto axes.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed or (-1 not in sizes.values() and fixed != len(devices)):
        asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
        needed = f"a multiple of {fixed}" if -1 in sizes.values() else str(fixed)
        raise ConfigError(
            f"config.mesh ({asked or 'all 1'}) needs {needed} devices, and there are "
            f"{len(devices)}: the sizes must multiply to {len(devices)}, and one of them may be -1"
        )
    sizes = {axis: len(devices) // fixed if n == -1 else n for axis, n in sizes.items()}
    return jax.make_mesh(
        tuple(sizes.values()),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=devices,
    )


def describe(mesh: Mesh) -> str:
    """`data=4 × tensor=2`, or `one device`."""
    split = [f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1]
    return " × ".join(split) or "one device"


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Rows split over `data` and `fsdp`, after `leading` unsplit dimensions."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, ("data", "fsdp")))


def batch_ways(mesh: Mesh) -> int:
    """How many shares the batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
