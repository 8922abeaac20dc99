"""A chip's figures are its data sheet's; what has none is measured."""

import jax
import pytest

from lm.parallel.chips import chip_of, peak_flops, published_peak, total_peak_flops
from lm.parallel.mesh import MeshConfig, make_mesh


@pytest.mark.parametrize(
    ("kind", "dtype", "teraflops"),
    [
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5", "bfloat16", 459),
        ("TPU v5p", "bfloat16", 459),
        ("TPU v6 lite", "float32", 918),
        ("TPU7x", "bfloat16", 1153.5),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100-SXM4-80GB", "float32", 156),
        ("NVIDIA H100 PCIe", "bfloat16", 756.5),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", 362),
        ("Tesla T4", "float16", 65),
        ("NVIDIA GB200", "float8_e4m3fn", 5000),
        ("NVIDIA L4", "float8_e5m2", 242.5),
    ],
)
def test_published_peaks_are_found_by_device_kind(kind, dtype, teraflops):
    assert published_peak(kind, dtype) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize("kind", ["cpu", "Pentium", "NVIDIA L40", "NVIDIA A1000", "Tesla T40", ""])
def test_a_chip_that_is_not_listed_has_no_published_peak(kind):
    assert published_peak(kind, "bfloat16") is None


def test_bandwidth_is_that_of_the_chip_and_its_memory():
    kinds = ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB", "NVIDIA H200", "NVIDIA GH200 480GB")
    assert [chip_of(kind).bandwidth / 1e9 for kind in kinds] == [2039, 1555, 4800, 4000]
    assert published_peak("NVIDIA A100-SXM4-80GB", "float8_e4m3fn") is None  # has no fp8


def test_the_peak_of_a_cpu_is_measured_and_shared_by_its_devices():
    with jax.set_mesh(make_mesh(MeshConfig())):  # as in training
        peak = peak_flops(jax.devices()[0], "float32")
        total = total_peak_flops("float32")
    assert peak.source == "measured"
    assert 1e9 < peak.flops * 8 == total < 1e15
