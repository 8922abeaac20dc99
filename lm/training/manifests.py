"""What a checkpoint should hold: sizes and checksums, written last and compared later."""

from __future__ import annotations

import json
import os
import pathlib
import zlib

MANIFEST = "manifest.json"


def damage(path: str | os.PathLike[str], checksums: bool = True) -> str | None:
    """Why the checkpoint at `path` cannot be trusted, in a few words, or None when it is intact.

    Compares the size, and with `checksums` the CRC-32, of every file with the manifest.
    """
    path = pathlib.Path(path)
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"].items()
        for name, (size, crc) in files:
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if checksums and crc is not None and _crc32(path / name) != crc:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{pathlib.Path(error.filename).relative_to(path)} is missing"
    except OSError as error:
        return f"{error.filename or path} cannot be read: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"
    return None


def write_manifest(
    path: pathlib.Path, step: int, metrics: dict[str, float], checksums: bool
) -> None:
    """Records the size, and with `checksums` the CRC-32, of every file below `path`."""
    files = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            crc = _crc32(file) if checksums else None
            files[file.relative_to(path).as_posix()] = (file.stat().st_size, crc)
    manifest = {"step": step, "metrics": metrics, "files": files}
    write_durably(path / MANIFEST, json.dumps(manifest, indent=1))


def write_durably(path: pathlib.Path, text: str) -> None:
    """Writes and reaches the disk: a rename may not overtake what it makes visible."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: pathlib.Path) -> None:
    """Makes the names in a directory reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _crc32(path: pathlib.Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return crc
