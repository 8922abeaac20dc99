"""Who talks to whom: device numbers to mesh axes, and what each strategy needs to say."""

import functools
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tpu_compiler import needs_libtpu

from lm.models import ModelConfig
from lm.parallel.layout import lay_out, resolve
from lm.parallel.mesh import MeshConfig
from lm.planning import collectives
from lm.planning.collectives import axes_of_groups, axes_of_pairs, replica_groups
from lm.planning.programs import train_program
from lm.planning.topology import open_topology
from lm.training.config import TrainConfig
from lm.training.optimizer import OptimizerConfig
from lm.training.workload import Workload

NAMES = ("stage", "data", "fsdp", "tensor")
MESHES = st.tuples(*[st.sampled_from((1, 2, 3, 4)) for _ in NAMES])


def groups_along(shape, axes):
    """The groups that XLA makes for a collective along `axes`, in all its forms."""
    chosen = [NAMES.index(axis) for axis in axes]
    rest = [i for i in range(len(NAMES)) if i not in chosen]
    order = rest + chosen
    numbers = np.arange(math.prod(shape)).reshape(shape).transpose(order)
    groups = numbers.reshape(-1, math.prod(shape[i] for i in chosen))
    listed = "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in groups) + "}"
    sizes, places = ",".join(map(str, shape)), ",".join(map(str, order))
    mesh = ",".join(f"'{name}'={size}" for name, size in zip(NAMES, shape))
    named = f"mesh[{mesh}] {{{','.join(repr(axis) for axis in axes)}}}"
    return listed, named, f"[{groups.shape[0]},{groups.shape[1]}]<=[{sizes}]T({places})"


@given(MESHES, st.sets(st.sampled_from(NAMES), min_size=1))
def test_groups_are_traced_to_the_axes_they_extend_along(shape, axes):
    mesh = dict(zip(NAMES, shape))
    expected = tuple(axis for axis in NAMES if axis in axes and mesh[axis] > 1)
    for printed in groups_along(shape, sorted(axes, key=NAMES.index)):
        groups = replica_groups(printed, math.prod(shape))
        assert axes_of_groups(groups, mesh) == (expected, True)


@given(MESHES, st.sampled_from(NAMES), st.integers(1, 3))
def test_neighbours_are_traced_to_the_axis_they_are_neighbours_on(shape, axis, step):
    mesh = dict(zip(NAMES, shape))
    numbers = np.arange(math.prod(shape)).reshape(shape)
    sent = np.roll(numbers, -step, NAMES.index(axis))
    pairs = np.stack([numbers.ravel(), sent.ravel()], 1)
    moves = step % mesh[axis] != 0
    assert axes_of_pairs(pairs, mesh) == ((axis,) if moves else ())


def test_a_part_of_an_axis_is_named_as_one():
    groups = replica_groups("{{0,1},{2,3},{4,5},{6,7}}", 8)
    assert axes_of_groups(groups, {"fsdp": 8}) == (("fsdp",), False)


def test_a_part_of_an_axis_of_a_mesh_is_understood():
    inner = replica_groups("mesh['a'=4,'b'=2] {'a':(2)2}", 8)
    assert inner.tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    outer = replica_groups("mesh['a'=4,'b'=2] {'a':(1)2,'b'}", 8)
    assert outer.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_no_groups_are_all_devices():
    assert replica_groups("{}", 6).tolist() == [[0, 1, 2, 3, 4, 5]]


# ---- Strategies ------------------------------------------------------------------------------

LAYERS = 3
MODEL = ModelConfig(
    num_layers=LAYERS, num_heads=8, width=64, mlp_width=192, vocab_size=256, max_length=16,
    compute_dtype="float32", scan_layers=True, tie_embeddings=False,
)  # fmt: skip
SMALL = 2048  # bytes; below are losses, norms and counts
BLOCK_MATRICES = 6  # query, key, value, output, up, down


@functools.cache
def said(strategy, topology="cpu:8", model=MODEL, **mesh):
    """The collectives of a training step, without those of single numbers."""
    config, zero = resolve(strategy, MeshConfig(**mesh), -1)
    topology = open_topology(topology)
    workload = Workload(
        model,
        model.max_length,
        16,
        optimizer=OptimizerConfig(name="sgd", weight_decay=0.0),
        train=TrainConfig(compiler="tuned"),
        layout=lay_out("", config, zero, topology.devices),
    )
    program = train_program(workload, topology)
    return [c for c in program.estimate.collectives if c.bytes > SMALL]


def axes_of(found):
    return {axis for c in found for axis in c.axes}


def parameters_bytes(model=MODEL):
    block = 4 * model.width**2 + 2 * model.width * model.mlp_width
    return 4 * (model.num_layers * block + 2 * model.vocab_size * model.width)


def test_plain_data_parallelism_reduces_gradients_and_says_nothing_else():
    found = said("data_parallel")
    assert {c.kind for c in found} == {"all-reduce"} and axes_of(found) == {"data"}
    reduced = sum(c.trips * c.bytes for c in found)
    assert reduced == pytest.approx(parameters_bytes(), rel=0.05)


def test_zero3_gathers_parameters_and_scatters_gradients():
    found = said("zero3")
    assert axes_of(found) == {"fsdp"}
    gathered = sum(c.trips * c.bytes for c in found if c.kind == "all-gather")
    # Every parameter for the forward pass, every one again for the backward pass. (Embeddings are
    # looked up and not gathered.)
    assert gathered >= 1.5 * (parameters_bytes() - 2 * 4 * MODEL.vocab_size * MODEL.width)
    # XLA's CPU compiler leaves an all-reduce, of which a device then takes its share, where a TPU's
    # has a reduce-scatter.
    summed = [c for c in found if c.kind in ("reduce-scatter", "all-reduce")]
    assert sum(c.trips * c.bytes for c in summed) >= 0.9 * parameters_bytes()


def test_zero1_keeps_gradients_whole_and_gathers_updated_parameters():
    found = said("zero1")
    gathered = sum(c.trips * c.bytes for c in found if c.kind == "all-gather")
    assert axes_of(found) == {"fsdp"}
    assert gathered <= 1.2 * parameters_bytes()  # and what the loss gathers


def test_tensor_parallelism_speaks_twice_a_block_and_direction():
    found = [c for c in said("tensor") if c.trips == LAYERS]
    assert axes_of(said("tensor")) == {"tensor"}
    activation = 4 * 16 * MODEL.max_length * MODEL.width  # the batch's residual stream
    whole = [c for c in found if c.bytes == pytest.approx(activation, rel=0.01)]
    # An all-reduce is a reduce-scatter and an all-gather: four, or four pairs, or a mix.
    halves = sum(2 if c.kind == "all-reduce" else 1 for c in whole)
    assert 8 <= halves <= 10, [(c.kind, c.source) for c in found]


@pytest.mark.slow
def test_context_parallelism_sends_keys_and_values_around_a_ring():
    model = MODEL.__class__(**{**vars(MODEL), "max_length": 64})
    found = said("", model=model, data=1, fsdp=2, context=4)
    ring = [c for c in found if c.kind == "collective-permute" and c.axes == ("context",)]
    assert sum(c.trips for c in ring) >= LAYERS * 3  # three steps around four devices, each layer


@needs_libtpu
@pytest.mark.slow
def test_on_a_tpu_zero3_scatters_gradients_truly():
    model = MODEL.__class__(
        **{**vars(MODEL), "width": 512, "mlp_width": 1024, "compute_dtype": "bfloat16"}
    )
    found = said("zero3", "v5e:2x4", model)
    kinds = {c.kind for c in found}
    scattered = {"reduce-scatter"} | {c.part for c in found}
    assert "all-gather" in kinds | scattered and "reduce-scatter" in kinds | scattered
    assert axes_of(found) == {"fsdp"}


def test_what_is_summed_up_is_all_that_was_said():
    found = said("zero3")
    merged = collectives.summed(found)
    assert sum(c.total for c in merged) == pytest.approx(sum(c.total for c in found))
    keys = [(c.kind, c.axes, c.size, c.whole, c.part) for c in merged]
    assert len(keys) == len(set(keys)) <= len(found)
    for one, other in itertools.pairwise(merged):
        assert one.total >= other.total
