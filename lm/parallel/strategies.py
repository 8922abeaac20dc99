"""Ways to use many devices, by name.

A strategy fills in the mesh axes that the config leaves alone, and `config.zero`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from lm.config import check, check_choice, view
from lm.parallel.mesh import AXES, MeshConfig


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


def resolve(strategy: str, mesh: MeshConfig, zero: int) -> tuple[MeshConfig, int]:
    """The mesh and ZeRO stage of a run: the strategy's, where the config says nothing else.

    A mesh axis that the config sets stays as it is, so `zero3` with `mesh.data=2` is two copies of
    a model each split over half of the devices.

    Args:
      strategy: a name of `STRATEGIES`, or "" for `mesh` and `zero` as they are.
      mesh: of the config.
      zero: of the config; -1: the strategy's, 3 without one.

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
