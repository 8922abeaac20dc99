"""In which precision gradients of parameters travel between devices.

They are sums over tokens, of which each device has its own. In float32 nothing is lost; in bfloat16
half as much travels, and each device's sum is rounded before all are added up.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax.numpy as jnp

REDUCE_DTYPES = ("float32", "bfloat16")

_dtype: contextvars.ContextVar[str] = contextvars.ContextVar("reduce_dtype", default="float32")


def reduce_dtype() -> jnp.dtype:
    """The dtype of a device's share of a parameter's gradient, in what is traced here."""
    return jnp.dtype(_dtype.get())


@contextlib.contextmanager
def reducing_in(name: str) -> Iterator[None]:
    """Within it, `reduce_dtype` is `name`: one of `REDUCE_DTYPES`."""
    token = _dtype.set(name)
    try:
        yield
    finally:
        _dtype.reset(token)
