"""Digests of files, remembered."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from lm.data import storage


def content_hashes(paths: Sequence[str], sidecar: str | None = None) -> list[str]:
    """BLAKE2 digests of the bytes of files.

    With `sidecar`, a JSON file, digests are remembered by path, size and modification time, so an
    unchanged corpus is not read again just to recognise it. Of a file that cannot be read it is "".
    """
    known = remembered(sidecar)
    names = [path if storage.is_url(path) else os.path.abspath(path) for path in paths]
    made: dict[str, list[Any]] = {}
    for name in names:
        try:
            stamp = storage.stamp(name)
            if known.get(name, made.get(name, []))[: len(stamp)] != stamp:
                made[name] = [*stamp, digest(name)]
        except OSError:  # reading it for its text says why
            known[name] = [""]
    remember(made, sidecar)
    known |= made
    return [known[name][-1] for name in names]


def digest(path: str) -> str:
    """The BLAKE2 digest of a file's bytes."""
    result = hashlib.blake2b(digest_size=16)
    with storage.open_file(path) as file:
        while block := file.read(1 << 20):
            result.update(block)
    return result.hexdigest()


def remembered(sidecar: str | None) -> dict[str, list[Any]]:
    """What `remember` wrote: {path: [size, modification, digest]}."""
    try:
        known = json.loads(storage.read_bytes(sidecar)) if sidecar else {}
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        return {}


def remember(made: dict[str, list[Any]], sidecar: str | None) -> None:
    """Adds digests to the file `sidecar`."""
    if sidecar is None or not made:
        return
    # Read again: another process may have added entries meanwhile. Losing one only costs time.
    with contextlib.suppress(OSError):  # a cache that can only be read still serves
        storage.write_bytes(sidecar, json.dumps(remembered(sidecar) | made).encode())
