"""Pre-training: text to a trained model.

One linear story: config, devices, tokenizer, data, training step, state, loop, samples.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import signal
import time

import jax
import ml_collections
from rich.console import Console

from lm.config import to_dict, view
from lm.data import corpus_fingerprint, evaluation_batches, prepare, train_batches, training_texts
from lm.jobs.finish import check_prompts, finish
from lm.parallel import hosts
from lm.parallel.layout import lay_out
from lm.parallel.mesh import batch_sharding, local_rows
from lm.parallel.platform import keep_buffers, keep_programs
from lm.runs.config import TrainJob
from lm.runs.conversing import converse
from lm.runs.directory import CHECKPOINTS, Claim, check_place
from lm.runs.inherited import Origin, inherit
from lm.runs.start import begin, open_teacher
from lm.training.checkpoints import Checkpointer
from lm.training.config import TrainingInterrupted
from lm.training.evaluate import make_evaluate
from lm.training.loop import Loop
from lm.training.metrics import MetricsWriter
from lm.training.progress import Progress
from lm.training.report import describe_data, describe_run, resuming, why_not_convertible
from lm.training.setup import set_up
from lm.training.workload import check_workload


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, float]:
    """Trains as `config` says, or goes on where `workdir` left off.

    Returns:
      The last evaluation: `eval_loss`, `eval_bits_per_byte` and, where asked for, `exact_match`.

    Raises:
      TrainingInterrupted: SIGTERM came to a host before the last step, and the run saved.
      KeyboardInterrupt: likewise after Ctrl-C.
      TrainingStopped: training cannot go on.
    """
    directory = pathlib.Path(workdir)
    fields, origin = inherit(config, directory)
    job = view(TrainJob, fields)
    with hosts.together(job.hosts):
        results, left_by = _run(job, directory, origin)
    if left_by == signal.SIGINT:
        raise KeyboardInterrupt
    if left_by:
        raise TrainingInterrupted("training was asked to leave; the same command goes on")
    return results


def _run(job: TrainJob, directory: pathlib.Path, origin: Origin) -> tuple[dict[str, float], int]:
    """The last evaluation, and the signal that ended the run before its last step."""
    console = Console(soft_wrap=False, highlight=False, quiet=hosts.index() > 0)
    say = functools.partial(console.print, markup=False, soft_wrap=True)  # names are names

    # ---- Devices: what they cannot share or hold is said before any work
    if jax.default_backend() == "cpu":
        keep_buffers()
    if job.train.compilation_cache:
        keep_programs(job.train.compilation_cache)
    layout = lay_out(job.strategy, job.mesh, job.zero)
    job, note = job.with_even_batch(layout, origin.saved)
    if note:
        say(f"note: {note}")
    workload = job.workload(layout)
    check_workload(workload)
    check_place(directory)

    # ---- Tokenizer: with it the model is whole, and it is known what may be in the directory
    texts = functools.partial(training_texts, job.data, job.seed, job.objective.name)
    tokenizer = origin.tokenizer(job.tokenizer, texts)
    job = job.with_model_for(tokenizer)
    corpus = functools.partial(corpus_fingerprint, job.data, job.seed)
    tokenizer, template, carried, told = converse(job, tokenizer, origin)
    claim = Claim(directory, to_dict(job), to_dict(TrainJob()), tokenizer, corpus, carried)
    notes = told + claim.check() + why_not_convertible(job.model, tokenizer)
    exactly = "" if tokenizer.lossless else " (does not reproduce every text exactly)"
    say(f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens{exactly}")
    check_prompts(job, tokenizer, carried)
    teacher = open_teacher(job, tokenizer)
    for note in notes:
        say(f"note: {note}")

    # ---- Data
    train_corpora, validation_corpora = prepare(
        job.data, tokenizer, job.seed, say, job.objective.name, template
    )
    rows = local_rows(batch_sharding(layout.mesh), job.data.batch_size)
    reading = {"objective": job.objective.name, "tokenizer": tokenizer}
    batches = train_batches(job.data, train_corpora, seed=job.seed, rows=rows, **reading)
    describe_data(console, batches)
    workload = job.workload(layout, batches, teacher.model if teacher else None)
    validation = None
    if validation_corpora:
        size = job.train.eval_batch_size or job.data.batch_size
        data = dataclasses.replace(job.data, batch_size=size)
        rows = local_rows(batch_sharding(layout.mesh), size)
        validation = evaluation_batches(data, validation_corpora, rows=rows, **reading)

    # ---- Training step: shapes and shardings, and nothing allocated yet
    training = set_up(workload)
    with layout.active():
        describe_run(console, training)
        begun = begin(origin, training, teacher)
        with Checkpointer(directory / CHECKPOINTS, job.checkpoint) as checkpointer:
            # ---- State: the directory is ours from here on, and not before, so that a mistake
            # above can simply be mended
            claim.write(begun.facts)
            found = checkpointer.restore_latest(training.abstract)
            if found is not None:
                start, state, extra = found
                batches.set_state(extra["data"])
                say(resuming(workload, start, origin.saved, directory))
            else:
                start, extra = 0, {}
                state = training.create_state(begun.params())

            # ---- Loop
            frozen = begun.frozen
            evaluate = None if validation is None else make_evaluate(training, validation, frozen)
            saving, steps, began = job.checkpoint.every, job.train.steps, time.perf_counter()
            with MetricsWriter(directory, start) as writer, Progress(steps, start) as progress:
                loop = Loop(
                    training, batches, evaluate, checkpointer, saving, writer, progress, directory,
                    frozen,
                )  # fmt: skip
                state, step = loop.run(state, start, extra)
            if step > start:
                say(f"trained {step - start} steps in {time.perf_counter() - began:.1f} s")
            params = training.whole(state.pop("params"), frozen)
            frozen.clear()  # for this, and the optimizer's state, the samples leave no room
            del state, begun

    # ---- Samples
    results = loop.last_eval
    if not loop.left_by:
        results |= finish(job, directory, console, params, training, validation)
    return results, loop.left_by
