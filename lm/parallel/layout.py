"""How a run uses its devices: the mesh, ZeRO's stage and the pipeline's schedule, in one place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from lm.parallel.mesh import MeshConfig, batch_ways, make_mesh
from lm.parallel.pipeline import bubble_fraction, choose_microbatches
from lm.parallel.schedule import Schedule, following
from lm.parallel.strategies import resolve


class Layout(NamedTuple):
    """What `strategy`, `mesh` and `zero` of a config come to on the devices there are."""

    mesh: Mesh
    zero: int
    microbatches: int = 0
    rounds: int = 1
    reduce_dtype: str = "float32"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within it, what is traced is laid out so."""
        schedule = Schedule(self.microbatches, self.rounds, self.zero, self.reduce_dtype)
        with jax.set_mesh(self.mesh), following(schedule):
            yield

    def pipeline(self, rows: int) -> tuple[int, float] | None:
        """Micro-batches of a batch of `rows`, and the share of time a stage idles; None without."""
        stages = self.mesh.shape["stage"]
        if stages == 1:
            return None
        ways = batch_ways(self.mesh) // stages
        number = choose_microbatches(self.microbatches, stages, rows, ways)
        return number, bubble_fraction(stages, number, self.rounds)


def lay_out(strategy: str, mesh: MeshConfig, zero: int, devices=None) -> Layout:
    """The layout that a config asks for, over all devices or those given.

    Raises:
      ConfigError: there is no such strategy, or its sizes do not fit the devices.
    """
    mesh, zero = resolve(strategy, mesh, zero)
    made = make_mesh(mesh, devices)
    return Layout(made, zero, mesh.microbatches, mesh.rounds, mesh.reduce_dtype)
