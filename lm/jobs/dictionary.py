"""A trained model → a sparse dictionary of its activations: transcoders or sparse autoencoders."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
import signal
from collections.abc import Iterator
from typing import Annotated, Any

import jax
import ml_collections
from rich.console import Console

from lm.config import (
    Bounds,
    Count,
    Path,
    Positive,
    Seed,
    Size,
    SizeOrZero,
    changed,
    check,
    fields_set,
    to_dict,
    view,
)
from lm.data import DataConfig, evaluation_batches, prepare, train_batches
from lm.evaluation.page import made_by
from lm.files import read_json, write_json
from lm.interpretability import dictionaries, dictionary_page
from lm.interpretability.dictionary_evaluation import make_measure
from lm.interpretability.dictionary_loss import DictionaryConfig
from lm.interpretability.dictionary_training import (
    DictionaryWorkload,
    base_shardings,
    create_state,
    dictionary_of,
    reading_of,
    set_up,
)
from lm.parallel import hosts
from lm.parallel.cluster import HostsConfig
from lm.parallel.layout import lay_out
from lm.parallel.mesh import MeshConfig, batch_sharding, local_rows, replicated
from lm.parallel.platform import keep_buffers, keep_programs
from lm.runs.directory import CHECKPOINTS, CONFIG, check_place
from lm.runs.sources import open_source
from lm.training.checkpoints import CheckpointConfig, Checkpointer
from lm.training.config import OptimizerConfig, TrainConfig, TrainingInterrupted
from lm.training.loop import Loop
from lm.training.metrics import MetricsWriter
from lm.training.progress import Progress
from lm.training.workload import check_workload

CALIBRATION = 8  # batches that scales and means are measured on
# What may be otherwise when a run goes on.
FREE = ("data.cache_dir", "data.prefetch", "data.num_threads", "train.", "checkpoint.", "mesh.",
        "hosts.", "strategy", "zero", "eval_batches", "dashboards")  # fmt: skip
FIXED = ("train.accumulation",)  # of these


@dataclasses.dataclass(frozen=True)
class DictionaryJob:
    """Which model's activations are learned, on what text, and by what dictionary."""

    job: str = "dictionary"
    seed: Seed = 0  # of the dictionary's parameters, the order of rows, and the tokens taken
    init_from: Path = ""  # the directory of a run, or a Hugging Face directory
    step: int | None = None  # of the checkpoint; None: the last one
    ignore: str | tuple[str, ...] = ()  # of a Hugging Face directory; see TrainJob
    rows: Size = 32  # sequences a step; in place of data.batch_size
    tokens_per_row: SizeOrZero = 64  # of each, that are learned from, anew each step; 0: all
    data: DataConfig = dataclasses.field(default_factory=DataConfig)  # what is not set: the run's
    dictionary: DictionaryConfig = dataclasses.field(default_factory=DictionaryConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval_batches: Positive = 2  # of `rows` held-out sequences, that faithfulness is measured on
    dashboards: Count = 8  # features of each layer that the page shows
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    hosts: HostsConfig = dataclasses.field(default_factory=HostsConfig)
    strategy: str = ""  # as of TrainJob
    zero: Annotated[int, Bounds(-1, 3)] = -1

    def validate(self, prefix: str = "config") -> None:
        """Raises `ConfigError` naming the first field that makes no sense."""
        check(bool(self.init_from), f"{prefix}.init_from='' must name the directory of a run")
        check(not self.train.offload_optimizer, f"{prefix}.train.offload_optimizer is not for this")


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, float]:
    """Trains a dictionary into `workdir`, or goes on; writes dictionary.safetensors and a page.

    Returns:
      `lm.interpretability.dictionary_evaluation.Faithfulness.summary` of the whole.

    Raises:
      ConfigError, TrainingStopped, TrainingInterrupted, KeyboardInterrupt: as of `lm.jobs.train`.
    """
    job, directory = view(DictionaryJob, config), pathlib.Path(workdir).expanduser()
    own = fields_set(DataConfig, config, "data")
    with hosts.together(job.hosts):
        results, left_by = _run(job, own, directory)
    if left_by == signal.SIGINT:
        raise KeyboardInterrupt
    if left_by:
        raise TrainingInterrupted("training was asked to leave; the same command goes on")
    return results


def _run(job: DictionaryJob, own: dict[str, Any], directory: pathlib.Path):
    console = Console(soft_wrap=True, highlight=False, quiet=hosts.index() > 0)
    say = functools.partial(console.print, markup=False)
    if jax.default_backend() == "cpu":
        keep_buffers()
    if job.train.compilation_cache:
        keep_programs(job.train.compilation_cache)

    # ---- The model, and its text
    layout = lay_out(job.strategy, job.mesh, job.zero)
    source = open_source(job.init_from, job.ignore)
    check(
        source.tokenizer is not None and source.model.architecture == "decoder",
        f"config.init_from={job.init_from!r} must be a decoder with a tokenizer",
    )
    theirs = source.config.get("data", {})
    data = view(DataConfig, {**theirs, **own, "batch_size": job.rows}, "config.data")
    check(
        data.block_size <= source.model.max_length,
        f"config.data.block_size={data.block_size} is longer than the model's max_length="
        f"{source.model.max_length}: lower it",
    )
    job = dataclasses.replace(job, data=data)
    _check_directory(directory, job)
    seed = source.config.get("seed", job.seed)  # of generated text: that which it has learned
    corpora, held_out = prepare(data, source.tokenizer, seed, say)
    check(bool(held_out), "config.data.validation_fraction=0 leaves no text to measure on")
    sharded = local_rows(batch_sharding(layout.mesh), job.rows)
    batches = train_batches(data, corpora, seed=job.seed, rows=sharded, tokenizer=source.tokenizer)
    validation = evaluation_batches(data, held_out, rows=sharded, tokenizer=source.tokenizer)
    workload = DictionaryWorkload(
        source.model, batches.block_size, job.rows, packed=not batches.single_segment,
        optimizer=job.optimizer, train=job.train, seed=job.seed, layout=layout,
        dictionary=job.dictionary, tokens_per_row=job.tokens_per_row,
    )  # fmt: skip
    check_workload(workload)
    reading = reading_of(workload)
    training, measure = set_up(workload, reading), make_measure(reading.model, layout.mesh)

    def held() -> Iterator[Any]:
        for batch in itertools.islice(validation, job.eval_batches):
            yield training.put(batch, validation)

    folded = functools.partial(dictionary_of, training)
    whole = jax.jit(folded, out_shardings=replicated(layout.mesh))

    # ---- Training, as a language model's
    with layout.active(), Checkpointer(directory / CHECKPOINTS, job.checkpoint) as checkpointer:
        step, base = source.parameters(job.step, base_shardings(workload))
        if hosts.index() == 0:
            write_json(directory / CONFIG, to_dict(job) | {"of": {"step": step}})
        found = checkpointer.restore_latest(training.abstract)
        if found is not None:
            start, state, extra = found
            batches.set_state(extra["data"])
            say(f"resuming from step {start}")
        else:
            start, extra = 0, {}
            first = (training.put(batches.batch(n), batches) for n in range(CALIBRATION))
            state = create_state(training, reading, base, first)
        for name, value in _facts(job).items():
            say(f"{name}: {value}")
        frozen, steps, measured = {"base": base}, job.train.steps, {}

        def evaluate(state):
            measured["last"] = measure(whole(state), base, held())
            return measured["last"].summary()

        with MetricsWriter(directory, start) as writer, Progress(steps, start) as progress:
            loop = Loop(
                training, batches, evaluate, checkpointer, job.checkpoint.every, writer, progress,
                directory, frozen,
            )  # fmt: skip
            state, _ = loop.run(state, start, extra)
        if loop.left_by:
            return loop.last_eval, loop.left_by

        # ---- What came of it
        dictionary = whole(state)
        faithful = measured.get("last") or measure(dictionary, base, held())
        seen = dictionary_page.collect(
            reading.model, dictionary, base, held(), faithful, job.dashboards, layout.mesh
        )
        if hosts.index() == 0:
            say(f"dictionary: {dictionaries.save(dictionary, directory)}")
            facts = {"model": f"{job.init_from}, step {step}", **_facts(job)}
            page = dictionary_page.write(
                directory / "features.html", facts, source.tokenizer,
                dictionary, faithful, seen, made_by("configs/interpret/transcoder.py", job),
            )  # fmt: skip
            say(dictionary_page.lines(dictionary, faithful))
            say(f"page: {page}")
    return faithful.summary(), 0


def _facts(job: DictionaryJob) -> dict[str, str]:
    chosen = job.dictionary
    rows = f"{job.tokens_per_row or 'all'} tokens of each of {job.rows} rows"
    return {
        "dictionary": f"{chosen.kind}, {chosen.activation}, {chosen.features:,} features a layer",
        "trained": f"{job.train.steps:,} steps on {rows}",
    }


def _check_directory(directory: pathlib.Path, job: DictionaryJob) -> None:
    """Raises ConfigError where the directory holds another run, or cannot be written."""
    check_place(directory)
    if not (directory / CONFIG).exists():
        return
    saved, now = read_json(directory / CONFIG), json.loads(json.dumps(to_dict(job)))
    for name, value in changed({k: saved.get(k) for k in now}, now):
        field = name.removeprefix("config.")
        free = field.startswith(FREE) and field not in FIXED
        check(
            free,
            f"--workdir={directory} holds another run: its {name} is {value!r}; choose another "
            "--workdir, or set that back",
        )
