"""Which platform a program is being made for.

That is JAX's default backend, unless a plan compiles for hardware that this machine has not.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_assumed: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: whose kernels and habits the code being traced should choose."""
    return _assumed.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """Within it, `platform()` is `name`: what is traced here is compiled elsewhere."""
    token = _assumed.set(name)
    try:
        yield
    finally:
        _assumed.reset(token)
