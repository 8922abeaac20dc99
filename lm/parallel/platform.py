"""The platform a program is made for, and its memory.

The platform is JAX's default backend, unless a plan compiles for hardware this machine has not.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import os
import sys
from collections.abc import Iterator

import jax

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h
_MADV_HUGEPAGE = 14  # mman.h
_HUGE_PAGE = 2**21
PROGRAMS = "~/.cache/lm/xla"  # compiled ones

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


def keep_programs(directory: str = "") -> None:
    """Keeps compiled programs that took half a second or more for the next processes.

    In `directory`; "": where JAX was told to, or in `PROGRAMS`.
    """
    directory = directory or jax.config.jax_compilation_cache_dir or PROGRAMS
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@functools.cache
def keep_buffers() -> bool:
    """Keeps XLA's CPU buffers in memory the process already has; call before the first large array.

    XLA asks malloc for its temporary buffers anew at every step. By default glibc maps large blocks
    from the kernel and returns them when freed, so each step pays a page fault for every 4 KiB it
    touches; at GPT-2's size that was a third of a step. Here large blocks come from one heap that
    is never trimmed and is backed by huge pages. It reserves address space, not memory: three
    quarters of what the machine has. Returns whether it was done: only on Linux with glibc.
    """
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if not all(
        libc.mallopt(parameter, value)
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))
    ):
        return False
    size = 3 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    while size > 2**28:
        address = libc.malloc(size)
        if address:
            start = -(-address // _HUGE_PAGE) * _HUGE_PAGE
            libc.madvise(start, (address + size - start) // _HUGE_PAGE * _HUGE_PAGE, _MADV_HUGEPAGE)
            libc.free(address)
            break
        size //= 2
    return True
