"""How a run uses its mesh, as far as code that is traced must know: what the mesh does not say."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp

REDUCE_DTYPES = ("float32", "bfloat16")


class Schedule(NamedTuple):
    """What `config.zero` and `config.mesh` say of gradients and pipelines."""

    microbatches: int = 0  # of a pipeline; 0: `lm.parallel.pipeline.choose_microbatches`
    rounds: int = 1  # through a pipeline
    zero: int = 3  # ZeRO's stage
    reduce_dtype: str = "float32"  # in which a device's share of a gradient travels

    @property
    def whole_axes(self) -> tuple[str, ...]:
        """The mesh axes that split rows and never layers."""
        return ("data",) if self.zero == 3 else ("data", "fsdp")


_current: contextvars.ContextVar[Schedule | None] = contextvars.ContextVar("schedule", default=None)


def current_schedule() -> Schedule:
    """The schedule that the code being traced follows."""
    return _current.get() or Schedule()


@contextlib.contextmanager
def following(schedule: Schedule) -> Iterator[None]:
    """Within it, `current_schedule()` is `schedule`."""
    token = _current.set(schedule)
    try:
        yield
    finally:
        _current.reset(token)


def reduce_dtype() -> jnp.dtype:
    """The dtype of a device's share of a parameter's gradient, in what is traced here."""
    return jnp.dtype(current_schedule().reduce_dtype)
