"""Parameters on devices to a Hugging Face directory, tensor by tensor."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax

from lm.config import ConfigError, check, check_choice
from lm.models.config import ModelConfig
from lm.models.huggingface import tensors
from lm.models.huggingface.family import Family
from lm.models.huggingface.layout import layout
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
      dtype: of the tensors: float32, bfloat16 or float16.
      files: more files to put into it (a tokenizer's), name → content.
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
    plan = layout(family, config)
    text = _config_json(family, config, dtype, fields or {})

    stream = plan.stream(params)
    if jax.process_index() != 0:
        for _ in stream:  # every process takes part in gathering
            pass
        return []
    scratch = directory.with_name(f".{directory.name}.writing")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        written = tensors.write(scratch, plan.shapes, dtype, stream, shard_bytes)
        for name, data in {**(files or {}), CONFIG: text}.items():
            (scratch / name).write_bytes(data)
        if directory.exists():
            directory.rmdir()
        scratch.rename(directory)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return [directory / file.name for file in written]


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


def _config_json(family: Family, config: ModelConfig, dtype: str, fields) -> bytes:
    content = {
        "architectures": [family.architectures[0]],
        "model_type": family.model_type,
        **family.write_config(config),
        **fields,
        # transformers 5 calls it dtype; before, it was torch_dtype, which all still read.
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    return (json.dumps(content, indent=2) + "\n").encode()
