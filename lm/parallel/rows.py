"""Which rows of a batch a host reads, and the global array that all hosts make of theirs.

A host reads the rows that its devices hold and no others. Where an axis that does not split rows
(`tensor`, `context`) spans hosts, hosts read the same rows; they need not lie side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def local_rows(
    sharding: NamedSharding, batch_size: int, devices: Iterable[jax.Device] | None = None
) -> np.ndarray:
    """The rows of a global batch that these devices hold part of, rising; int64 [rows].

    Args:
      sharding: of arrays whose first dimension is the rows.
      batch_size: rows of the whole batch.
      devices: those of this process by default.
    """
    by_row = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
    chosen = by_row.addressable_devices if devices is None else set(devices)
    held = np.zeros(batch_size, bool)
    for device, (rows,) in by_row.devices_indices_map((batch_size,)).items():
        if device in chosen:
            held[rows] = True
    return np.flatnonzero(held)


def assemble(
    batch: Mapping[str, np.ndarray],
    sharding: NamedSharding,
    rows: np.ndarray,
    batch_size: int,
    leading: int = 0,
) -> dict[str, jax.Array]:
    """Global arrays on their devices, from this host's rows of each.

    The transfers are started, not waited for.

    Args:
      batch: name → array [..., rows of this host, tokens], with `leading` dimensions before rows.
      sharding: of the global arrays.
      rows: from `local_rows`; the global rows that the batch's stand for, in order.
      batch_size: rows of the whole batch.
      leading: dimensions before the rows.
    """
    if len(rows) == batch_size and sharding.is_fully_addressable:
        return jax.device_put(dict(batch), sharding)

    def whole(local: np.ndarray) -> jax.Array:
        shape = (*local.shape[:leading], batch_size, *local.shape[leading + 1 :])

        def part(index: tuple[slice, ...]) -> Any:
            wanted = index[leading]
            first, last = np.searchsorted(rows, wanted.indices(batch_size)[:2])
            return local[*index[:leading], first:last, *index[leading + 1 :]]

        return jax.make_array_from_callback(shape, sharding, part)

    return {name: whole(local) for name, local in batch.items()}
