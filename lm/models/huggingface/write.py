"""Parameters on devices to a Hugging Face directory, tensor by tensor."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from lm.config import ConfigError, check, check_choice
from lm.models.config import ModelConfig
from lm.models.huggingface import safetensors
from lm.models.huggingface.family import Family, NameMap
from lm.models.huggingface.read import CONFIG, PARAMETER_DTYPES

SHARD_BYTES = 5 * 10**9


def save_pretrained(
    directory: str | os.PathLike[str],
    family: Family,
    config: ModelConfig,
    params: Mapping[str, jax.Array],
    dtype: str = "float32",
    files: Mapping[str, bytes] | None = None,
    fields: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[pathlib.Path]:
    """Writes a directory that `transformers` loads, with one tensor in memory at a time.

    The directory appears under its name when it is complete. With several processes, all call this
    and the first one writes.

    Args:
      directory: must not exist, or be empty.
      family: what to write it as; see `families.family_for`.
      config: the model's.
      params: its parameters; a mapping may read each when it is asked for.
      dtype: of the tensors, but for the family's `exact`: float32, bfloat16 or float16.
      files: more files to put into it (a tokenizer's), name, or path in it → content.
      fields: of config.json, beside those that the family writes or in their place, such as
        `eos_token_id`.
      shard_bytes: the most that one file may hold before there are several and an index.

    Returns:
      The files with tensors in them.

    Raises:
      ConfigError: the family cannot say all that the config does, the directory is not empty or
        cannot be written, or numbers are too large for the dtype.
    """
    directory = pathlib.Path(directory).expanduser().absolute()
    check_choice("dtype", dtype, PARAMETER_DTYPES)
    check_new(directory)
    names = NameMap(family, config)
    content = {
        "architectures": [family.architectures[0]],
        "model_type": family.model_type,
        **family.write_config(config),
        **(fields or {}),
        # transformers 5 calls it dtype; before, it was torch_dtype, which all still read.
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    stream = names.stream(params)
    if jax.process_index() != 0:
        for _ in stream:  # every process takes part in gathering
            pass
        return []
    with new_directory(directory) as scratch:
        dtypes = {n: "float32" if n.endswith(family.exact) else dtype for n in names.shapes}
        written = safetensors.write(scratch, names.shapes, dtypes, stream, shard_bytes)
        write_files(scratch, files or {})
        (scratch / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [directory / file.name for file in written]


def write_files(directory: pathlib.Path, files: Mapping[str, bytes]) -> None:
    """Writes files into a directory: name, or path in it → content."""
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)


def check_new(directory: pathlib.Path) -> None:
    """Raises ConfigError where there is something already, or nothing can be made."""
    check(
        not directory.exists() or (directory.is_dir() and not any(directory.iterdir())),
        f"--workdir={directory} exists already and is not empty: choose another",
    )
    there = next(p for p in directory.absolute().parents if p.exists())
    check(
        there.is_dir() and os.access(there, os.W_OK),
        f"--workdir={directory} cannot be made: {there} is "
        + ("not writable" if there.is_dir() else "not a directory"),
    )


@contextlib.contextmanager
def new_directory(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """What to write into instead of `directory`: it has that name once the block has ended well.

    After an error nothing is left. Of several processes the first one makes and renames it.

    Raises:
      ConfigError: it cannot be written.
    """
    first = jax.process_index() == 0
    scratch = directory.with_name(f".{directory.name}.writing")
    try:
        if first:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        yield scratch
        if first:
            if directory.exists():
                directory.rmdir()
            scratch.rename(directory)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--workdir={directory} cannot be written: {reason}") from None
    finally:
        if first:
            shutil.rmtree(scratch, ignore_errors=True)
