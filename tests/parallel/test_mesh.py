"""A mesh uses all devices, and what a host reads is what its devices hold."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh

from lm.config import ConfigError, view
from lm.parallel.mesh import (
    AXES,
    BATCH_AXES,
    MeshConfig,
    assemble,
    batch_sharding,
    describe,
    local_rows,
    make_mesh,
)

SHAPES = [
    shape
    for shape in itertools.product((1, 2, 4, 8), repeat=len(AXES))
    if np.prod(shape) == 8 and sum(size > 1 for size in shape) <= 3
]


def mesh_of(shape, order=range(8)):
    devices = np.array([jax.devices()[i] for i in order]).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def hosts_of(count):
    """Eight devices dealt to so many hosts, in order."""
    return np.array_split(np.array(jax.devices()[:8]), count)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    order=st.permutations(range(8)),
    count=st.sampled_from([1, 2, 4, 8]),
    times=st.integers(1, 3),
)
def test_hosts_read_what_their_devices_hold_and_together_everything(shape, order, count, times):
    mesh = mesh_of(shape, order)
    ways = np.prod([mesh.shape[axis] for axis in BATCH_AXES])
    size = int(ways * times)
    sharding = batch_sharding(mesh)
    held = {
        device: set(range(size)[rows])
        for device, (rows, _) in sharding.devices_indices_map((size, 8)).items()
    }
    shares = [local_rows(sharding, size, devices) for devices in hosts_of(count)]
    for devices, rows in zip(hosts_of(count), shares):
        assert (np.diff(rows) > 0).all()
        assert set(rows) == set.union(*(held[device] for device in devices))
    assert set(np.concatenate(shares)) == set(range(size))


@pytest.mark.parametrize("leading", [0, 1])
@pytest.mark.parametrize(
    "sizes", [{"data": 8}, {"data": 2, "tensor": 4}, {"fsdp": 2, "context": 2, "tensor": 2}]
)
def test_the_global_array_is_the_batch(sizes, leading):
    mesh = mesh_of([sizes.get(axis, 1) for axis in AXES], order=[3, 1, 7, 5, 0, 2, 6, 4])
    rows = local_rows(batch_sharding(mesh), 16)
    inner = {"inputs": (4,), "pairs": (2, 4), "label": ()}
    batch = {
        name: np.arange(3**leading * 16 * np.prod(shape, dtype=int)).reshape(
            (3,) * leading + (16, *shape)
        )
        for name, shape in inner.items()
    }
    placed = assemble(batch, mesh, rows, 16, leading)
    for name, whole in batch.items():
        np.testing.assert_array_equal(placed[name], whole)
        assert placed[name].sharding == batch_sharding(mesh, leading, 1 + len(inner[name]))
    assert placed["pairs"].sharding.spec[leading:] == (BATCH_AXES, None, "context")
    assert placed["label"].sharding.spec[leading:] == (BATCH_AXES,)


def test_a_host_needs_no_other_rows_than_its_own(monkeypatch):
    """What JAX asks this host for, it finds at the right place among its scattered rows."""
    mesh = mesh_of([4 if axis == "data" else 2 if axis == "tensor" else 1 for axis in AXES])
    sharding = batch_sharding(mesh)
    mine = [mesh.devices.flat[i] for i in (0, 1, 4, 5)]  # rows 0, 1 and 4, 5 of 8
    rows = local_rows(sharding, 8, mine)
    assert rows.tolist() == [0, 1, 4, 5]
    whole = np.arange(32).reshape(8, 4)
    seen = {}

    def make(shape, sharding, part):
        assert shape == whole.shape
        for device, index in sharding.devices_indices_map(shape).items():
            if device in mine:
                seen[device] = (part(index), whole[index])

    monkeypatch.setattr(jax, "make_array_from_callback", make)
    assemble({"inputs": whole[rows]}, mesh, rows, 8)
    assert len(seen) == 4
    for placed, wanted in seen.values():
        np.testing.assert_array_equal(placed, wanted)


def test_a_mesh_uses_all_devices_and_minus_one_means_the_rest():
    mesh = make_mesh(MeshConfig(data=-1, tensor=2))
    assert mesh.shape["data"] == 4 and mesh.size == 8
    assert describe(mesh) == "data=4 × tensor=2"
    assert describe(make_mesh(MeshConfig(), jax.devices()[:1])) == "one device"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, r"config.mesh \(data=3\) needs 3 devices, and there are 8"),
        ({"data": 2}, r"config.mesh \(data=2\) needs 2 devices, and there are 8"),
        ({"fsdp": 16}, r"fsdp=16\) needs a multiple of 16 devices, and there are 8"),
        ({"tensor": 0}, r"config.mesh.tensor=0 must be positive"),
        ({"data": -1, "fsdp": -1}, r"only one axis may be -1, not data and fsdp"),
        ({"rounds": 2}, r"config.mesh.*rounds=2.*for a pipeline, and config.mesh.stage is 1"),
        ({"stage": 4, "microbatches": 6}, r"microbatches=6 must be a multiple of stage=4"),
    ],
)
def test_impossible_mesh_sizes_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(view(MeshConfig, sizes, "config.mesh"))
