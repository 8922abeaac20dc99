"""Chips, and arrangements of them by name: what a program can be compiled for without having it.

`v5p:4x4x4` is 64 chips of TPU v5p in a cube. Its devices come from the compiler (libtpu), so a mesh
over them and everything compiled for it are those of the real machine; nothing can run on them.
`cpu:8` is eight fake devices of this machine's CPU, for trying things out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lm.config import ConfigError, check, nearest

# ---- Chips -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device of a kind can do at best, by its maker's data sheet. Rates are a second."""

    kind: str  # what `device_kind` contains, lower case
    sixteen_bit: float  # dense bfloat16 FLOPs (float16 before Ampere)
    thirty_two_bit: float  # of float32 products at JAX's default precision
    eight_bit: float = 0.0  # int8 of TPUs, fp8 of GPUs; 0: no faster than 16 bits, or not known
    bandwidth: float = 0.0  # bytes to or from its memory; 0: not known
    # What only planning needs, so only chips that can be planned for have it:
    name: str = ""  # of a topology: `v5p`
    memory: float = 0.0  # bytes of HBM the compiler leaves to a program
    link: float = 0.0  # bytes over one link to a neighbour, each way
    dimensions: int = 0  # of the torus: each chip has two links in each
    clock: float = 0.0  # cycles, in which the compiler states its estimates
    network: float = 0.0  # bytes each way between slices, through the data centre; 0: not published


_TERA, _GIGA, _GIB = 1e12, 1e9, 2.0**30

# The first entry contained in `device_kind` counts, so longer names come first.
#
# TPUs: cloud.google.com/tpu/docs/v2 … /tpu7x, per chip: "Peak compute" (bf16, int8), "HBM
# bandwidth", "Bidirectional inter-chip interconnect bandwidth" (v4 300, there one way; v5e 400, v5p
# 1200, v6e 800, 7x 1200 GB/s), here divided by its links and, where both ways are counted, by two;
# "Data center network bandwidth". A device of v2, v3 and 7x is one of the chip's two cores, and has
# half of it; every other device is a whole chip. HBM is what libtpu 0.0.50 calls available when it
# refuses a program: a little less than the chip has. The clock is the peak over the products that
# the matrix units finish in a cycle (v6e and 7x: four of 256×256; the others: 128×128).
# float32 products run by default as one bfloat16 pass on TPUs and as TF32 on GPUs since Ampere.
#
# GPU data sheets often print the rate with 2:4 sparsity; these are the dense rates, with float32
# accumulation: sixteen bits, TF32 (float32 before Ampere), bandwidth in GB/s, fp8 since Ada.
# nvidia.com data sheets: Blackwell (HGX B200 and B300, GB200 and GB300 NVL72), H200, H100, GH200,
# A100, A30, A40, L4, L40S, V100, T4; NVIDIA's architecture papers: Blackwell RTX and Ada (appendix
# A) and Ampere GA102 (table 3).


def _tpu(kind: str, teraflops: float, **rest: Any) -> Chip:
    return Chip(kind, teraflops * _TERA, teraflops * _TERA, **rest)


def _gpu(kind: str, sixteen: float, thirty_two: float, bandwidth: float, eight: float = 0) -> Chip:
    return Chip(kind, sixteen * _TERA, thirty_two * _TERA, eight * _TERA, bandwidth * _GIGA)


_V4 = dict(
    eight_bit=275 * _TERA, name="v4", memory=30.75 * _GIB, bandwidth=1228 * _GIGA,
    link=50 * _GIGA, dimensions=3, clock=1.05e9,
)  # fmt: skip
_V5E = dict(
    eight_bit=393 * _TERA, name="v5e", memory=15.75 * _GIB, bandwidth=819 * _GIGA,
    link=50 * _GIGA, dimensions=2, clock=1.5e9, network=3.125 * _GIGA,
)  # fmt: skip
_V5P = dict(
    eight_bit=918 * _TERA, name="v5p", memory=95.73 * _GIB, bandwidth=2765 * _GIGA,
    link=100 * _GIGA, dimensions=3, clock=1.75e9, network=6.25 * _GIGA,
)  # fmt: skip
_V6E = dict(
    eight_bit=1836 * _TERA, name="v6e", memory=31.24 * _GIB, bandwidth=1638 * _GIGA,
    link=100 * _GIGA, dimensions=2, clock=1.75e9, network=12.5 * _GIGA,
)  # fmt: skip

CHIPS = (
    _tpu("tpu v2", 45 / 2),
    _tpu("tpu v3", 123 / 2),
    _tpu("tpu v4 lite", 138),
    _tpu("tpu v4", 275, **_V4),
    _tpu("tpu v5 lite", 197, **_V5E),
    _tpu("tpu v5e", 197, **_V5E),
    _tpu("tpu v5p", 459, **_V5P),
    _tpu("tpu v5", 459, **_V5P),  # the same
    _tpu("tpu v6 lite", 918, **_V6E),
    _tpu("tpu v6e", 918, **_V6E),
    _tpu(
        "tpu7x", 2307 / 2, name="tpu7x", memory=94.74 * _GIB, bandwidth=7380 / 2 * _GIGA,
        link=100 / 2 * _GIGA, dimensions=3, clock=2.2e9, network=6.25 * _GIGA,
    ),
    _gpu("gb300", 2500, 1250, 8000, 5000),
    _gpu("gb200", 2500, 1250, 8000, 5000),
    _gpu("b300", 2250, 1125, 8000, 4500),
    _gpu("b200", 2250, 1125, 7700, 4500),
    _gpu("gh200", 989.4, 494.7, 4000, 1978.9),
    _gpu("h200 nvl", 835.5, 417.5, 4800, 1670.5),
    _gpu("h200", 989.4, 494.7, 4800, 1978.9),
    _gpu("h100 pcie", 756.5, 378, 2000, 1513),
    _gpu("h100 nvl", 835.5, 417.5, 3900, 1670.5),
    _gpu("h100", 989.4, 494.7, 3350, 1978.9),
    _gpu("h20", 148, 74, 4000, 296),
    _gpu("a100-sxm4-80gb", 312, 156, 2039),
    _gpu("a100 80gb", 312, 156, 1935),
    _gpu("a100", 312, 156, 1555),
    _gpu("v100-pcie", 112, 14, 900),
    _gpu("v100", 125, 15.7, 900),
    _gpu("l40s", 362, 183, 864, 733),
    _gpu("l4", 121, 60, 300, 242.5),
    _gpu("a10g", 70, 35, 600),
    _gpu("a10", 125, 62.5, 600),
    _gpu("a30", 165, 82, 933),
    _gpu("a40", 149.7, 74.8, 696),
    _gpu("t4", 65, 8.1, 320),
    _gpu("rtx a6000", 154.8, 77.4, 768),
    _gpu("rtx 6000 ada", 364.2, 182.1, 960, 728.5),
    _gpu("rtx 5090", 209.5, 104.8, 1792, 419),
    _gpu("rtx 4090", 165.2, 82.6, 1008, 330.3),
    _gpu("rtx 3090", 71, 35.6, 936),
)  # fmt: skip

# Of no machine in particular: `cpu:8` is there to try a plan out, and its times mean nothing.
_CPU = Chip(
    "cpu", 1 * _TERA, 1 * _TERA, name="cpu", memory=4 * _GIB, bandwidth=20 * _GIGA,
    link=5 * _GIGA, dimensions=1,
)  # fmt: skip


def chip_of(device_kind: str) -> Chip | None:
    """The `Chip` that a JAX device's `device_kind` names; None if it is not in the table."""
    words = f"{device_kind.lower()} "
    for chip in CHIPS:
        start = words.find(chip.kind)
        # "l4" is no "l40", and "a10" no "a100".
        if start >= 0 and not (chip.kind[-1].isdigit() and words[start + len(chip.kind)].isalnum()):
            return chip
    return None


def published_peak(device_kind: str, dtype: Any) -> float | None:
    """FLOPs a second of a device of this kind by its maker's data sheet; None if not listed."""
    chip, size = chip_of(device_kind), jnp.dtype(dtype).itemsize
    if chip is None:
        return None
    if size == 1:
        return chip.eight_bit or None
    return chip.thirty_two_bit if size > 2 else chip.sixteen_bit


# ---- Topologies ------------------------------------------------------------------------------

# Of a slice; a pod is of one size, and not every size is for sale.
_PODS = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256, "tpu7x": 9216}
_EXAMPLES = {
    "v4": "v4:2x2x4",
    "v5e": "v5e:4x4",
    "v5p": "v5p:4x4x4",
    "v6e": "v6e:16x16",
    "tpu7x": "tpu7x:4x4x4",
    "cpu": "cpu:8",
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

    def coordinates(self, index: int) -> tuple[int, ...]:
        """Where in the torus the device `devices[index]` is."""
        if self.platform == "cpu":
            return (index,)
        return tuple(self.devices[index].coords)[: len(self.shape)]


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
    most = _PODS.get(kind, math.inf)
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
