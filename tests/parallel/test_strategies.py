"""A strategy's name stands for a mesh and a ZeRO stage, and the config has the last word."""

import pytest

from lm.config import ConfigError
from lm.parallel.layout import STRATEGIES, resolve
from lm.parallel.mesh import AXES, MeshConfig, mesh_sizes


def sizes(strategy, mesh=None, zero=-1, devices=8):
    mesh, zero = resolve(strategy, mesh or MeshConfig(), zero)
    split = {axis: n for axis, n in mesh_sizes(mesh, devices).items() if n > 1}
    return split, zero


def test_every_strategy_uses_all_devices():
    for name in STRATEGIES:
        for devices in (4, 8, 64):
            product = 1
            for ways in sizes(name, devices=devices)[0].values():
                product *= ways
            assert product == devices, name


def test_the_names_mean_what_the_field_means_by_them():
    assert sizes("data_parallel") == ({"data": 8}, 0)
    assert sizes("zero1") == ({"fsdp": 8}, 1)
    assert sizes("zero2") == ({"fsdp": 8}, 2)
    assert sizes("zero3") == ({"fsdp": 8}, 3)
    assert sizes("tensor") == ({"tensor": 8}, 0)
    assert sizes("megatron_3d") == ({"stage": 2, "fsdp": 2, "tensor": 2}, 1)
    assert sizes("context")[0] == {"context": 8}
    assert sizes("expert")[0] == {"expert": 8}


def test_what_the_config_sets_stays():
    assert sizes("zero3", MeshConfig(data=2)) == ({"data": 2, "fsdp": 4}, 3)
    assert sizes("zero3", MeshConfig(tensor=2), zero=1) == ({"fsdp": 4, "tensor": 2}, 1)
    assert sizes("tensor", MeshConfig(data=4)) == ({"data": 4, "tensor": 2}, 0)
    assert sizes("megatron_3d", MeshConfig(tensor=4, stage=-1)) == ({"stage": 2, "tensor": 4}, 1)
    assert sizes("", MeshConfig(data=1, fsdp=-1)) == ({"fsdp": 8}, 3)
    assert set(resolve("context", MeshConfig(), -1)[0].__dict__) >= set(AXES)


def test_unknown_names_and_stages_are_refused():
    with pytest.raises(ConfigError, match=r"config.strategy='zero4'.*zero3"):
        resolve("zero4", MeshConfig(), -1)
    with pytest.raises(ConfigError, match=r"config.zero=4 must be 0, 1, 2, 3"):
        resolve("", MeshConfig(), 4)
