"""Small files that others may have written: read whole, within bounds, and as plain JSON alone."""

from __future__ import annotations

import json
import math
import os
import pathlib
from typing import Any

from lm.config import ConfigError, check

LARGEST = 256 * 2**20  # bytes of a file of JSON; the largest vocabularies take 40 MiB


def read_bytes(path: str | os.PathLike[str], largest: int = LARGEST) -> bytes:
    """The content of a regular file.

    Raises:
      ConfigError: a file that is missing, cannot be read, is larger than `largest` bytes, or is
        none, such as a pipe, that would never end.
    """
    path = pathlib.Path(path)
    try:
        check(not path.exists() or path.is_file(), f"{path} is not a file")
        size = path.stat().st_size
        check(size <= largest, f"{path} has {size:,} bytes, where at most {largest:,} make sense")
        with path.open("rb") as file:
            return file.read(largest)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read: {reason}") from None


def parse_json(data: bytes | str, name: str) -> Any:
    """The value of a JSON text.

    Raises:
      ConfigError: no UTF-8, no JSON, one nested too deeply, a number that is not finite, or an
        object that has a name twice, of which readers would take either; it begins with `name`.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        return json.loads(
            text, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_object
        )
    except RecursionError:
        raise ConfigError(f"{name} is damaged: nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{name} is damaged: {error}") from None


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a file of JSON.

    Raises:
      ConfigError: as `read_bytes` and `parse_json` do; or something other than an object.
    """
    value = parse_json(read_bytes(path), str(path))
    check(isinstance(value, dict), f"{path} is damaged: not a JSON object")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice!r} twice")
    return result
