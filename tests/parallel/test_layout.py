"""A strategy's name stands for a mesh and a ZeRO stage, and the config has the last word."""

import math

import pytest

from lm.config import ConfigError
from lm.parallel.layout import STRATEGIES, Layout, current_layout, resolve
from lm.parallel.mesh import MeshConfig, make_mesh, mesh_sizes


def sizes(strategy, mesh, zero=-1, devices=8):
    mesh, zero = resolve(strategy, MeshConfig(**mesh), zero)
    return {axis: n for axis, n in mesh_sizes(mesh, devices).items() if n > 1}, zero


@pytest.mark.parametrize("devices", [4, 8, 64])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_uses_all_devices(name, devices):
    assert math.prod(sizes(name, {}, devices=devices)[0].values()) == devices


@pytest.mark.parametrize(
    ("strategy", "mesh", "zero", "split"),
    [
        # What the field means by the names,
        ("data_parallel", {}, 0, {"data": 8}),
        ("zero1", {}, 1, {"fsdp": 8}),
        ("zero2", {}, 2, {"fsdp": 8}),
        ("zero3", {}, 3, {"fsdp": 8}),
        ("tensor", {}, 0, {"tensor": 8}),
        ("megatron_3d", {}, 1, {"stage": 2, "fsdp": 2, "tensor": 2}),
        ("context", {}, 3, {"context": 8}),
        ("expert", {}, 3, {"expert": 8}),
        # and what the config sets stays.
        ("zero3", {"data": 2}, 3, {"data": 2, "fsdp": 4}),
        ("tensor", {"data": 4}, 0, {"data": 4, "tensor": 2}),
        ("megatron_3d", {"tensor": 4, "stage": -1}, 1, {"stage": 2, "tensor": 4}),
        ("", {"data": 1, "fsdp": -1}, 3, {"fsdp": 8}),
    ],
)
def test_a_strategy_is_a_mesh_and_a_stage(strategy, mesh, zero, split):
    assert sizes(strategy, mesh) == (split, zero)
    assert sizes(strategy, mesh, zero=1) == (split, 1)


def test_unknown_names_and_stages_are_refused():
    with pytest.raises(ConfigError, match=r"config.strategy='zero4'.*zero3"):
        resolve("zero4", MeshConfig(), -1)
    with pytest.raises(ConfigError, match=r"config.zero=4 must be 0, 1, 2, 3"):
        resolve("", MeshConfig(), 4)


def test_a_layout_holds_within_its_block():
    layout = Layout(make_mesh(MeshConfig()), zero=1, microbatches=8, rounds=2)
    with layout.active():
        assert current_layout() == layout and layout.whole_axes == ("data", "fsdp")
    assert current_layout().mesh is None and current_layout().whole_axes == ("data",)
