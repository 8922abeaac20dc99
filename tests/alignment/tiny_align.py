"""Runs of learning from rewards that take seconds: a byte model is paid for letters."""

from __future__ import annotations

import json
import pathlib

import jax
import letters
import tiny_jobs
from tiny_run import write_tiny_run

from lm.jobs import align

PROMPTS = ("Say a: ", "And now? ", "More, please: ", "a?")

COMPILED: dict[pathlib.Path, set[int]] = {}  # of each run: after how many records it compiled


def write_source(directory: pathlib.Path, **fields) -> pathlib.Path:
    """A policy to start from, and prompts beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    write_tiny_run(directory, **{"max_length": 48, "initializer_std": 0.1, **fields})
    lines = [json.dumps({"prompt": prompt, "number": i}) for i, prompt in enumerate(PROMPTS)]
    (directory / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return directory


PPO = {
    "objective__policy__loss": "ppo",
    "advantage__name": "gae",
    "advantage__kl_coefficient": 0.01,
    "learning__epochs": 2,
}


def config(source: pathlib.Path, **fields):
    """The tiny config with `section__field=value` changed."""
    result = letters.get_config()
    own = {"init_from": str(source), "data__path": str(source / "prompts.jsonl")}
    fields = {**own, "train__compilation_cache": "", **fields}
    result.update_from_flattened_dict({n.replace("__", "."): v for n, v in fields.items()})
    return result


def run(source: pathlib.Path, name: str, num_devices: int = 1, **fields) -> pathlib.Path:
    """Learns in this process; the run directory beside the source."""
    directory = source.parent / name
    compiled, records = COMPILED.setdefault(directory, set()), directory / "metrics.jsonl"

    def count(event: str, *_: object, **__: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.add(len(records.read_text().splitlines()) if records.exists() else 0)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        with tiny_jobs.devices(num_devices):
            align.run(config(source, **fields), str(directory))
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    return directory


def command(source: pathlib.Path, name: str, **fields) -> list[str]:
    """The same as a command line."""
    fields = {
        "init_from": source,
        "data__path": source / "prompts.jsonl",
        "train__compilation_cache": source.parent / "xla",
        **fields,
    }
    words = [f"--config.{field.replace('__', '.')}={value}" for field, value in fields.items()]
    place = ["--config=tests/alignment/letters.py", f"--workdir={source.parent / name}"]
    return [*tiny_jobs.command(source.parent, name)[:2], *place, *words]


def measured(directory: pathlib.Path, field: str) -> list[float]:
    """A metric of every record that has it."""
    return [value for _, value in tiny_jobs.losses(directory, field)]
