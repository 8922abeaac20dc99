"""Who waits for whom in a compiled program, and what the compiler makes of a collective."""

import jax
import numpy as np
import pytest

from lm.config import ConfigError
from lm.models import ModelConfig
from lm.parallel import compiler
from lm.parallel.mesh import AXES, MeshConfig, make_mesh
from lm.planning import hlo
from lm.planning.collectives import Collective, collectives
from lm.planning.collectives import made as made_of
from lm.planning.hlo_runs import runs
from lm.planning.roofline import Network, estimate
from lm.planning.search import over
from lm.planning.sketch import sketch
from lm.planning.topology import Topology, parse
from lm.training.config import TrainConfig
from lm.training.workload import Workload

CHIP, SHAPE = parse("v5p:4x4x4")


class Place:
    """A device, as far as a network asks."""

    def __init__(self, index):
        self.id, self.slice_index = index, 0
        self.coords = tuple(int(n) for n in np.unravel_index(index, SHAPE))


PLACES = [Place(i) for i in range(64)]
TOPOLOGY = Topology("v5p:4x4x4", CHIP, SHAPE, PLACES)


class Grid:
    """A mesh over the 64 places in their order, z fastest."""

    def __init__(self, **sizes):
        self.shape = {axis: sizes.get(axis, 1) for axis in AXES}
        self.devices = np.array(PLACES, dtype=object).reshape(tuple(self.shape.values()))
        self.size = len(PLACES)


GRID = Grid(fsdp=64)
NETWORK = Network.of(TOPOLOGY, GRID)
SIZE = 2 * 4096 * 8192  # bytes of what is gathered
COLOURS = '"phase_rings":[],' * 6


def program(*body: str) -> str:
    """A loop of three trips, whose body is these lines; two gathers may run on the SparseCores."""
    gather = f"""
%gather.N (own: bf16[64,8192]) -> bf16[4096,8192] {{
  %own = bf16[64,8192]{{1,0}} parameter(0)
  ROOT %all-gather.N = bf16[4096,8192]{{1,0}} all-gather(%own), channel_id=1, replica_groups=[1,64]<=[64], dimensions={{0}}, backend_config={{"device_type":"DEVICE_TYPE_SPARSECORE",{COLOURS}"end":1}}
}}, execution_thread="sparsecore"
"""  # noqa: E501
    fused = """
%NAME (share: bf16[64,8192]) -> bf16[4096,8192] {
  %share = bf16[64,8192]{1,0} parameter(0)
  ROOT %gathered.NAME = bf16[4096,8192]{1,0} all-gather(%share), channel_id=7, replica_groups=[1,64]<=[64], dimensions={0}
}
"""  # noqa: E501
    names = ("first", "async_collective_fusion.1", "last")
    called = "".join(gather.replace("N", str(n)) for n in (1, 2))
    called += "".join(fused.replace("NAME", name) for name in names)
    lines = "\n  ".join(body)
    return f"""HloModule step, is_scheduled=true
{called}
%body (all: (s32[], bf16[64,8192])) -> (s32[], bf16[64,8192]) {{
  %all = (s32[], bf16[64,8192]{{1,0}}) parameter(0)
  %count = s32[] get-tuple-element(%all), index=0
  %own = bf16[64,8192]{{1,0}} get-tuple-element(%all), index=1
  {lines}
  %one = s32[] constant(1)
  %next = s32[] add(%count, %one)
  ROOT %out = (s32[], bf16[64,8192]{{1,0}}) tuple(%next, %own)
}}

%condition (all.1: (s32[], bf16[64,8192])) -> pred[] {{
  %all.1 = (s32[], bf16[64,8192]{{1,0}}) parameter(0)
  %count.1 = s32[] get-tuple-element(%all.1), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%count.1, %three), direction=LT
}}

ENTRY %main (given: bf16[64,8192]) -> bf16[64,8192] {{
  %given = bf16[64,8192]{{1,0}} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[64,8192]{{1,0}}) tuple(%zero, %given)
  %loop = (s32[], bf16[64,8192]{{1,0}}) while(%start), condition=%condition, body=%body
  ROOT %result = bf16[64,8192]{{1,0}} get-tuple-element(%loop), index=1
}}
"""


def begin(n):
    made = "((bf16[64,8192]{1,0}), bf16[4096,8192]{1,0})"
    return (
        f"%g.{n} = ((), (), (s32[1])) call-start(), async_execution_thread="
        f'"sparsecore", to_apply=%gather.{n}',
        f"%u.{n} = {made} call-update(%g.{n}, %own)",
    )


def end(n):
    return f"%d.{n} = bf16[4096,8192]{{1,0}} call-done(%u.{n})"


def busy(name, cycles):
    config = f'backend_config={{"estimated_cycles":"{cycles}"}}'
    return f'%{name} = bf16[8,8]{{1,0}} custom-call(), custom_call_target="work", {config}'


def estimated(*body):
    return estimate(program(*body), TOPOLOGY, GRID)


ONCE = NETWORK.seconds(Collective("all-gather", SIZE, 64, (), links=6, group=tuple(range(64))))


def test_collectives_on_sparse_cores_are_found_with_their_links():
    every = runs(hlo.parse(program(*begin(1), end(1))))
    (found,) = collectives(every, GRID.shape)
    assert (found.kind, found.axes, found.trips) == ("all-gather", ("fsdp",), 3)
    assert found.bytes == SIZE and found.asynchronous and found.links == 6


def test_what_is_begun_is_hidden_as_far_as_there_is_work_until_its_end():
    idle = estimated(*begin(1), end(1))
    assert idle.exposed == pytest.approx(3 * ONCE) == pytest.approx(idle.network_seconds)
    some = estimated(*begin(1), busy("work", 1000), end(1))
    assert some.exposed == pytest.approx(3 * (ONCE - 1000 / CHIP.clock))
    enough = estimated(*begin(1), busy("work", 10**8), end(1))
    assert enough.exposed == 0 and enough.seconds == pytest.approx(3 * 10**8 / CHIP.clock)
    late = estimated(*begin(1), end(1), busy("work", 10**8))
    assert late.exposed == pytest.approx(3 * ONCE)


def test_two_that_are_under_way_share_the_network():
    cycles = int(1.5 * ONCE * CHIP.clock)
    two = estimated(*begin(1), *begin(2), busy("work", cycles), end(1), end(2))
    assert two.exposed == pytest.approx(3 * (2 * ONCE - cycles / CHIP.clock), rel=1e-6)


def test_a_collective_that_nothing_waits_for_separately_stops_everything():
    alone = (
        "%gathered = bf16[4096,8192]{1,0} all-gather(%own), channel_id=1, "
        "replica_groups=[1,64]<=[64], dimensions={0}"
    )
    assert estimated(alone, busy("work", 10**8)).exposed == pytest.approx(3 * ONCE)
    both = estimated(*begin(1), alone, busy("work", 10**8), end(1))
    assert both.exposed == pytest.approx(3 * ONCE)


def test_a_collective_in_pieces_between_products_is_one():
    def piece(name, called, cycles=0):
        return (
            f"%{name} = bf16[4096,8192]{{1,0}} fusion(%own), kind=kCustom, calls=%{called}, "
            f'backend_config={{"estimated_cycles":"{cycles}"}}'
        )

    found = estimated(
        piece("async-collective-start.3", "first"),
        piece("fusion.5", "async_collective_fusion.1", 10**8),
        piece("async-collective-done.4", "last"),
    )
    (gather,) = found.collectives
    assert gather.asynchronous and gather.trips == 3
    assert found.exposed == 0 and found.seconds == pytest.approx(3 * 10**8 / CHIP.clock)


# ---- The network ------------------------------------------------------------------------------


def test_a_collective_over_more_of_the_torus_uses_more_links():
    size, chip = 1e9, CHIP
    line, plane, all_of_it = (
        NETWORK.seconds(Collective("all-gather", size, n, (), group=tuple(range(n))))
        for n in (4, 16, 64)
    )
    ring = 2 * chip.link  # both ways round
    assert line == pytest.approx(size * 3 / 4 / ring, rel=0.01)
    assert plane == pytest.approx(size * 15 / 16 / (2 * ring), rel=0.01)
    assert all_of_it == pytest.approx(size * 63 / 64 / (3 * ring), rel=0.01)
    half = NETWORK.seconds(Collective("all-gather", size, 2, (), group=(0, 1)))
    assert half == pytest.approx(size / 2 / chip.link, rel=0.01)  # a line has one way
    twice = NETWORK.seconds(Collective("all-reduce", size, 4, (), group=(0, 1, 2, 3)))
    assert twice == pytest.approx(2 * line, rel=0.01)


def test_a_permutation_takes_the_shorter_way_round():
    near, far, around = (
        NETWORK.seconds(Collective("collective-permute", 1e9, 4, (), group=pair))
        for pair in ((0, 1), (0, 2), (0, 3))
    )
    assert near == pytest.approx(1e9 / CHIP.link, rel=0.01) == around
    assert far == pytest.approx(2 * near)


# ---- What the compiler makes -----------------------------------------------------------------


def made(kind, group, tuned=True):
    collective = Collective(kind, 1e9, len(group), (), group=tuple(group))
    return made_of(collective, *NETWORK.spans(group), tuned)


LINE, PLANE, CUBE, PART = range(4), range(16), range(64), range(32)


def test_with_sparse_cores_gathers_use_all_links_and_run_beside_compute():
    assert [made("all-gather", g).links for g in (LINE, PLANE, CUBE)] == [2, 4, 6]
    assert [made("reduce-scatter", g).links for g in (LINE, PLANE, CUBE)] == [2, 4, 2]
    assert made("all-gather", PART).links == 2  # half a dimension: one ring through all
    # Two axes that split a dimension between them are such a ring, too.
    assert NETWORK.spans(PART) == (3, False) and NETWORK.spans(PLANE) == (2, True)
    assert made("all-reduce", PLANE).asynchronous
    assert not made("all-to-all", PLANE).asynchronous


def test_without_them_a_gather_over_three_dimensions_is_an_all_reduce():
    gathered, line = made("all-gather", CUBE, False), made("all-gather", LINE, False)
    assert (gathered.kind, gathered.links) == ("all-reduce", 6)
    assert gathered.received == 2 * line.received * (63 / 64) / (3 / 4)
    assert (line.kind, line.links) == ("all-gather", 2) and not line.asynchronous


def test_what_a_sketch_has_beside_compute_costs_little_of_it():
    model = ModelConfig(
        num_layers=8, num_heads=16, width=2048, mlp_width=8192, vocab_size=32000, max_length=4096,
        positions="rotary", norm="rmsnorm", compute_dtype="bfloat16", scan_layers=True,
    )  # fmt: skip
    workload = Workload(model, 4096, 64, train=TrainConfig(compiler="tuned"))

    def split(**sizes):
        """(Estimate, seconds of the collectives along an axis)."""
        mesh = MeshConfig(data=1, **sizes)
        found = sketch(over(workload, mesh, 3, 64), TOPOLOGY).estimate
        return found, {
            axis: sum(c.seconds for c in found.collectives if axis in c.axes) for axis in sizes
        }

    found, seconds = split(fsdp=64)
    assert 0 < found.exposed < 0.2 * seconds["fsdp"]
    assert found.seconds == found.operation_seconds + found.exposed
    found, seconds = split(fsdp=16, tensor=4)
    assert found.exposed >= seconds["tensor"]


def test_options_are_for_chips_with_sparse_cores_alone():
    asked = compiler.options("TPU v5p")
    assert asked["xla_tpu_enable_sparse_core_collective_offload_3d_all_gather"] == "true"
    assert asked == compiler.options("TPU v5") == compiler.options("TPU v6 lite")
    assert all(compiler.options(kind) is None for kind in ("TPU v4", "TPU v5 lite", "cpu", "H200"))


def test_a_compiler_too_old_for_the_options_is_an_error_that_names_the_way_out(monkeypatch):
    with jax.set_mesh(make_mesh(MeshConfig(data=8), jax.devices()[:8])):
        compiler.check_options(jax.devices()[0])
        monkeypatch.setattr(compiler, "options", lambda kind: {"xla_tpu_of_the_future": "true"})
        with pytest.raises(ConfigError, match=r"compiler='tuned'.*of_the_future.*'default'"):
            compiler.check_options(jax.devices()[0])
