"""Which platform a program is being made for.

That is JAX's default backend, unless a plan compiles for hardware that this machine has not.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
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


def device_memory() -> int | None:
    """Bytes that one device of this process has, where that is known."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
