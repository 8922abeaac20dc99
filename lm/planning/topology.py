"""Arrangements of chips by name: what a program can be compiled for without having it.

`v5p:4x4x4` is 64 chips of TPU v5p in a cube. Its devices come from the compiler (libtpu), so a mesh
over them and everything compiled for it are those of the real machine; nothing can run on them.
`cpu:8` is eight fake devices of this machine's CPU, for trying things out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Sequence

import jax
import numpy as np

from lm.config import ConfigError, check, nearest
from lm.parallel.chips import CHIPS, Chip

# Of no machine in particular: `cpu:8` is there to try a plan out, and its times mean nothing.
_CPU = Chip(
    "cpu", 1e12, 1e12, name="cpu", memory=4.0 * 2**30, bandwidth=20e9, link=5e9, dimensions=1
)

# Of a slice; a pod is of one size, and not every size is for sale.
_PODS = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256, "tpu7x": 9216, "cpu": math.inf}
_EXAMPLES = {
    **{"v4": "v4:2x2x4", "v5e": "v5e:4x4", "v5p": "v5p:4x4x4"},
    **{"v6e": "v6e:16x16", "tpu7x": "tpu7x:4x4x4", "cpu": "cpu:8"},
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that a program can be compiled for, and what they are."""

    name: str
    chip: Chip
    shape: tuple[int, ...]  # chips along each dimension of the torus
    devices: Sequence[jax.Device]
    slices: int = 1

    @property
    def platform(self) -> str:
        """`tpu` or `cpu`."""
        return "cpu" if self.chip is _CPU else "tpu"

    def wraps(self, dimension: int) -> bool:
        """Whether the last chip along a dimension is linked to the first.

        In three dimensions where it is a multiple of four (slices are made of cubes of 4×4×4), in
        two where it is the whole pod's 16.
        """
        size = self.shape[dimension]
        return size % 4 == 0 if self.chip.dimensions == 3 else size == 16

    @functools.cached_property
    def coordinates(self) -> np.ndarray:
        """Where in the torus each device is [devices, dimensions]."""
        if self.platform == "cpu":
            return np.arange(len(self.devices))[:, None]
        return np.array([device.coords for device in self.devices])[:, : len(self.shape)]

    @functools.cached_property
    def slice_of(self) -> np.ndarray:
        """Which slice each device belongs to [devices]."""
        return np.array([getattr(device, "slice_index", None) or 0 for device in self.devices])

    @functools.cached_property
    def orders(self) -> list[np.ndarray]:
        """Devices slice by slice, in every order of running through the torus's dimensions."""
        ways = itertools.permutations(self.coordinates.T)
        return [np.lexsort((*dimensions, self.slice_of)) for dimensions in ways]


def parse(name: str) -> tuple[Chip, tuple[int, ...]]:
    """The chip and the shape that `v5p:4x4x4` names.

    Raises:
      ConfigError: a name that is not of this form, an unknown chip, or a shape it cannot have.
    """
    kind, _, sizes = name.partition(":")
    check(
        kind in _EXAMPLES,
        f"config.topology={name!r}: {kind!r} is not one of {', '.join(_EXAMPLES)}"
        f"{nearest(kind, _EXAMPLES)}; a topology reads like {_EXAMPLES['v5p']}",
    )
    chip = _CPU if kind == "cpu" else next(chip for chip in CHIPS if chip.name == kind)
    example = _EXAMPLES[kind]
    check(
        re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) is not None
        and sizes.count("x") == chip.dimensions - 1,
        f"config.topology={name!r} must give {chip.dimensions} size(s) of {kind}, like {example}",
    )
    shape = tuple(map(int, sizes.split("x")))
    most = _PODS[kind]
    check(
        math.prod(shape) <= most,
        f"config.topology={name!r} has {math.prod(shape):,} chips, more than the {most:,} of a "
        f"pod of {kind}",
    )
    whole = math.prod(shape) == 1 or all(size % 2 == 0 or size == 1 for size in shape)
    check(
        chip is _CPU or whole,
        f"config.topology={name!r}: each size must be even, or 1, as hosts have 2×2 chips; "
        f"{kind}:{'x'.join(str(s + s % 2 if s > 1 else s) for s in shape)} is the next",
    )
    return chip, shape


def open_topology(name: str, slices: int = 1) -> Topology:
    """The devices of a topology, to make a mesh of and compile for.

    Call it before anything else has loaded libtpu; JAX's default backend stays what it is.

    Args:
      name: `v5p:4x4x4`, `v5e:4x4`, `cpu:8`.
      slices: so many of them, connected by the data centre's network.

    Raises:
      ConfigError: as `parse`; or libtpu is missing; or this process has too few CPU devices.
    """
    chip, shape = parse(name)
    if chip is _CPU:
        check(slices == 1, f"config.slices={slices} must be 1 for {name}")
        return Topology(name, chip, shape, _cpu_devices(name, shape[0]))
    check(slices >= 1, f"config.slices={slices} must be at least 1")
    check(
        slices == 1 or chip.network > 0,
        f"config.slices={slices}: the network between slices of {chip.name} is not published",
    )
    return Topology(name, chip, shape, _tpu_devices(name, chip, slices), slices)


def _cpu_devices(name: str, count: int) -> list[jax.Device]:
    with contextlib.suppress(RuntimeError):  # raised where devices have been used before
        if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    check(
        len(devices) >= count,
        f"config.topology={name!r} needs {count} CPU devices and this process has {len(devices)}: "
        f"set XLA_FLAGS=--xla_force_host_platform_device_count={count}",
    )
    return devices[:count]


def _tpu_devices(name: str, chip: Chip, slices: int) -> list[jax.Device]:
    check(
        importlib.util.find_spec("libtpu") is not None,
        f"config.topology={name!r} needs the TPU compiler: pip install 'jax[tpu]' (no TPU needed); "
        "without it, try config.topology='cpu:8'",
    )
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
        "TPU_ACCELERATOR_TYPE": "v5p-8",  # only read when a host is described; any known name
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling takes no device that others could need
    }
    for variable, value in settings.items():
        os.environ.setdefault(variable, value)
    if not jax.config.jax_platforms:  # or JAX would look for a TPU to run on
        jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies  # loads libtpu

    options = {"num_slices": slices} if slices > 1 else {}
    if chip.name == "v4":
        options["chip_config_name"] = "megacore"  # a device is the chip, not one of its cores
    try:
        return list(topologies.get_topology_desc(name, "tpu", **options).devices)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"config.topology={name!r} is not one the compiler knows ({reason}); "
            f"{_EXAMPLES[chip.name]} is"
        ) from None
