"""Sums of gradients over devices: whole, in pieces, and each device's share of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lm.parallel import reduce
from lm.parallel.layout import Layout
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.parallel.reduce import after, shared, summed_over

ROWS, WIDTH = 12, 16
MESH = make_mesh(MeshConfig(data=2, fsdp=4), jax.devices()[:8])


def summed(spec: PartitionSpec, parts: np.ndarray, axes=("data", "fsdp")) -> np.ndarray:
    """`summed_over` of parts [8, V, D], of which each of eight devices has one."""
    local = jax.shard_map(
        lambda part: summed_over(axes, part[0], spec),
        mesh=MESH,
        in_specs=PartitionSpec(("data", "fsdp")),
        out_specs=shared(spec, axes),
        check_vma=False,
    )
    return np.asarray(jax.jit(local)(parts))


@pytest.fixture
def parts():
    return np.random.default_rng(0).normal(size=(8, ROWS, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("piece", [2**25, 3 * WIDTH, 1])
@pytest.mark.parametrize("spec", [(None, "fsdp"), (None, ("data", "fsdp")), ("fsdp",), ()])
def test_the_sum_is_that_of_all_devices_in_however_many_pieces(parts, piece, spec, monkeypatch):
    monkeypatch.setattr(reduce, "PIECE", piece)
    found = summed(PartitionSpec(*spec, *[None] * (2 - len(spec))), parts)
    np.testing.assert_allclose(found, parts.sum(0), atol=1e-5)


def test_a_dimension_split_by_an_axis_that_is_not_summed_over_stays_as_it_is(parts):
    spec = PartitionSpec("tensor", ("context", "fsdp"))
    assert shared(spec, ("data", "fsdp")) == PartitionSpec(None, ("fsdp",))
    np.testing.assert_allclose(summed(spec, parts), parts.sum(0), atol=1e-5)


def test_bfloat16_rounds_every_part_before_the_sum(parts):
    with Layout(MESH, reduce_dtype="bfloat16").active():
        found = summed(PartitionSpec(None, "fsdp"), parts)
    np.testing.assert_allclose(found, parts.sum(0), atol=0.1)
    assert np.abs(found.astype(np.float32) - parts.sum(0)).max() > 1e-4


def test_what_comes_after_is_what_it_was():
    x = jnp.arange(6, dtype=jnp.bfloat16)
    for first in (jnp.float32([-3.5, 1]), jnp.float32([[jnp.inf]])):
        np.testing.assert_array_equal(jax.jit(after)(first, x), x)
