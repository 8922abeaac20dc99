"""How a run uses its devices: the mesh, ZeRO's stage and the pipeline's schedule, in one value.

`config.strategy` names a way to use many devices: it fills in the mesh axes that the config leaves
alone, and `config.zero`. Where a layout is active, code that is traced asks `current_layout` for
what the mesh does not say.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from lm.config import check, check_choice, view
from lm.parallel.mesh import AXES, MeshConfig, batch_ways, make_mesh
from lm.parallel.pipeline import bubble_fraction, choose_microbatches


class Strategy(NamedTuple):
    """Sizes of mesh axes (all others 1), and the ZeRO stage."""

    axes: dict[str, int]
    zero: int


STRATEGIES = {
    "data_parallel": Strategy({"data": -1}, 0),
    "zero1": Strategy({"fsdp": -1}, 1),  # Rajbhandari et al. 2020: optimizer state split,
    "zero2": Strategy({"fsdp": -1}, 2),  # gradients too,
    "zero3": Strategy({"fsdp": -1}, 3),  # parameters too
    "tensor": Strategy({"tensor": -1}, 0),  # Shoeybi et al. 2019
    "megatron_3d": Strategy({"fsdp": -1, "tensor": 2, "stage": 2}, 1),  # Narayanan et al. 2021
    "context": Strategy({"context": -1}, 3),  # Liu et al. 2023
    "expert": Strategy({"expert": -1}, 3),  # Lepikhin et al. 2021
}


class Layout(NamedTuple):
    """What `strategy`, `mesh` and `zero` of a config come to on the devices there are."""

    mesh: Mesh | None  # None: of `current_layout`, where nothing is laid out
    zero: int = 3  # ZeRO's stage
    microbatches: int = 0  # of a pipeline; 0: `lm.parallel.pipeline.choose_microbatches`
    rounds: int = 1  # through a pipeline
    reduce_dtype: str = "float32"  # in which a device's share of a gradient travels

    @property
    def whole_axes(self) -> tuple[str, ...]:
        """The mesh axes that split rows and never layers."""
        return ("data",) if self.zero == 3 else ("data", "fsdp")

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within it, what is traced is laid out so."""
        token = _current.set(self)
        try:
            with jax.set_mesh(self.mesh):
                yield
        finally:
            _current.reset(token)

    def pipeline(self, rows: int) -> tuple[int, float] | None:
        """Micro-batches of a batch of `rows`, and the share of time a stage idles; None without."""
        stages = self.mesh.shape["stage"]
        if stages == 1:
            return None
        ways = batch_ways(self.mesh) // stages
        number = choose_microbatches(self.microbatches, stages, rows, ways)
        return number, bubble_fraction(stages, number, self.rounds)


_current: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


def current_layout() -> Layout:
    """The layout that the code being traced is for."""
    return _current.get() or Layout(None)


def resolve(strategy: str, mesh: MeshConfig, zero: int) -> tuple[MeshConfig, int]:
    """The mesh and ZeRO stage of a run: the strategy's, where the config says nothing else.

    A mesh axis that the config sets stays as it is, so `zero3` with `mesh.data=2` is two copies of
    a model each split over half of the devices. Strategy "" leaves both as they are, and `zero` -1
    is the strategy's, 3 without one.

    Raises:
      ConfigError: no such strategy or ZeRO stage, or two axes would take all that remains.
    """
    check(-1 <= zero <= 3, f"config.zero={zero} must be 0, 1, 2, 3, or -1 to choose it")
    if not strategy:
        return mesh, 3 if zero < 0 else zero
    check_choice("config.strategy", strategy, STRATEGIES)
    default, chosen = MeshConfig(), STRATEGIES[strategy]
    sizes = {axis: chosen.axes.get(axis, 1) for axis in AXES}
    given = {a: getattr(mesh, a) for a in AXES if getattr(mesh, a) != getattr(default, a)}
    if -1 in given.values():
        sizes = {axis: 1 if size == -1 else size for axis, size in sizes.items()}
    resolved = dataclasses.replace(mesh, **{**sizes, **given})
    resolved = view(MeshConfig, resolved, "config.mesh")
    return resolved, chosen.zero if zero < 0 else zero


def lay_out(strategy: str, mesh: MeshConfig, zero: int, devices=None) -> Layout:
    """The layout that a config asks for, over all devices or those given.

    Raises:
      ConfigError: as `resolve`; or the sizes do not fit the devices.
    """
    mesh, zero = resolve(strategy, mesh, zero)
    made = make_mesh(mesh, devices)
    return Layout(made, zero, mesh.microbatches, mesh.rounds, mesh.reduce_dtype)
