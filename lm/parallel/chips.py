"""What a device can do at best: by its maker's data sheet, or measured."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh


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


class Peak(NamedTuple):
    """What one device can do at best."""

    flops: float  # a second
    source: str  # "published" or "measured"


def peak_flops(device: jax.Device | None = None, dtype: Any = "float32") -> Peak:
    """The most FLOPs a second that products in `dtype` reach on `device` (the first by default).

    Accelerators have a published figure. For the CPU, and for a chip that is not in the table, it
    is measured: the fastest of several square products, in less than 0.3 s. Devices that share one
    CPU share its peak.
    """
    device = jax.local_devices()[0] if device is None else device
    flops = published_peak(device.device_kind, dtype)
    if flops is not None:
        return Peak(flops, "published")
    shared = jax.local_device_count("cpu") if device.platform == "cpu" else 1
    return Peak(_measured_peak(device, jnp.dtype(dtype)) / shared, "measured")


def total_peak_flops(dtype: Any) -> float:
    """FLOPs a second of all devices of all processes together."""
    return peak_flops(None, dtype).flops * jax.device_count()


@functools.cache
def _measured_peak(device: jax.Device, dtype: jnp.dtype, size: int = 1024) -> float:
    x = jax.device_put(np.full((size, size), 0.5, dtype), device)

    @jax.jit
    def product(x):
        return jax.lax.dot(x, x, preferred_element_type=jnp.float32)

    # A mesh of its own, for the caller may have set one over more devices.
    with jax.set_mesh(Mesh(np.array([device]), ("all",))):
        jax.block_until_ready(product(x))
        best, deadline = math.inf, time.perf_counter() + 0.12
        while time.perf_counter() < deadline:
            start = time.perf_counter()
            jax.block_until_ready(product(x))
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
