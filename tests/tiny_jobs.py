"""Training jobs that take a second: as a config file, in this process, or as `python main.py`."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from unittest import mock

import jax
import numpy as np

import lm
from lm.config import ConfigError, defaults
from lm.jobs import align, finish, train
from lm.parallel.layout import lay_out

REPOSITORY = pathlib.Path(__file__).parent.parent


def get_config():
    """A job of 24 steps on four stories, three epochs and a bit; any job here starts from it."""
    config = defaults(train.TrainJob)
    config.tokenizer.kind = "byte"
    config.data.num_documents = 4
    config.data.validation_fraction = 0.0
    config.data.packing = "best_fit"
    config.data.block_size = 32
    config.data.batch_size = 8
    config.model.num_layers = 1
    config.model.num_heads = 2
    config.model.width = 16
    config.model.mlp_width = 32
    config.model.compute_dtype = "float32"
    config.optimizer.learning_rate = 1e-2
    config.train.steps = 24
    config.train.steps_per_dispatch = 2
    config.train.log_every = 2
    config.checkpoint.every = 8
    return config


def config(tmp_path: pathlib.Path, **fields):
    """The tiny config with `section__field=value` changed and every cache below `tmp_path`."""
    result = get_config()
    caches = {"data__cache_dir": "tokens", "train__compilation_cache": "xla"}
    fields = {**{name: str(tmp_path / folder) for name, folder in caches.items()}, **fields}
    result.update_from_flattened_dict({n.replace("__", "."): v for n, v in fields.items()})
    return result


@contextlib.contextmanager
def devices(count: int) -> Iterator[None]:
    """Jobs run in this process see `count` of its fake devices."""
    some = functools.partial(lay_out, devices=jax.devices()[:count])
    with mock.patch.object(train, "lay_out", some), mock.patch.object(align, "lay_out", some):
        yield


def undrawn() -> contextlib.AbstractContextManager:
    """Jobs end without the picture of their losses: a fifth of a tiny job's time draws it."""
    return mock.patch.object(finish, "plot_losses", side_effect=ConfigError)


def run(
    tmp_path: pathlib.Path, name: str, num_devices: int = 1, *, drawn: bool = False, **fields
) -> pathlib.Path:
    """Trains in this process; the run directory `tmp_path / name`."""
    with devices(num_devices), contextlib.nullcontext() if drawn else undrawn():
        train.run(config(tmp_path, **fields), str(tmp_path / name))
    return tmp_path / name


def command(tmp_path: pathlib.Path, name: str, **fields) -> list[str]:
    """The same as a command line."""
    fields = {
        "data__cache_dir": tmp_path / "tokens",
        "train__compilation_cache": tmp_path / "xla",
        **fields,
    }
    return [
        sys.executable,
        "main.py",
        "--config=tests/tiny_jobs.py",
        f"--workdir={tmp_path / name}",
        *(f"--config.{field.replace('__', '.')}={value}" for field, value in fields.items()),
    ]


def start(arguments: list[str], computes: bool = False) -> subprocess.Popen[str]:
    """Starts `python main.py …` on one device, as a user would, its output to be read.

    It compiles fast, or where it `computes` for longer than that, programs that run fast.
    """
    import quick  # not above: where main.py reads this file as a config, it is not found

    environment = {**os.environ, "XLA_FLAGS": "" if computes else quick.FLAGS}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(arguments, cwd=REPOSITORY, env=environment, **pipes)


def losses(directory: pathlib.Path, field: str = "loss") -> list[tuple[int, float]]:
    """(step, value) of every record that has `field`, as they stand in metrics.jsonl."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(record["step"], record[field]) for record in records if field in record]


def parameters(directory: pathlib.Path, step: int | None = None) -> dict[str, np.ndarray]:
    """The parameters of a checkpoint, the latest by default."""
    loaded = lm.load(directory, step).params
    return {name: np.asarray(value) for name, value in loaded.items()}


def assert_same_run(one: pathlib.Path, other: pathlib.Path) -> None:
    """The same losses were logged and the same parameters reached, to the last bit."""
    assert losses(one) == losses(other)
    assert checkpoint_steps(one)[-1] == checkpoint_steps(other)[-1]
    a, b = parameters(one), parameters(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), f"{name} differs"


def checkpoint_steps(directory: pathlib.Path) -> list[int]:
    """Steps of the checkpoints on disk."""
    return sorted(int(p.name) for p in (directory / "checkpoints").iterdir() if p.name.isdigit())
