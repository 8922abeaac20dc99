"""Pre-training: text to a trained model.

One linear story: config, tokenizer, data, mesh, model, state, step, loop, samples.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
import signal
import time
from typing import Annotated, Any

import jax
import ml_collections
from rich.console import Console

from lm.config import Bounds, ConfigError, Count, Path, Seed, check, to_dict, view
from lm.data import (
    DataConfig,
    corpus_fingerprint,
    documents,
    evaluation_batches,
    prepare,
    train_batches,
)
from lm.inference.config import SamplingConfig
from lm.jobs.finish import check_prompts, finish
from lm.models import ModelConfig
from lm.models.huggingface.families import family_for
from lm.models.matmul import compute_dtype
from lm.objectives import ObjectiveConfig, check_objective
from lm.parallel import hosts
from lm.parallel.chips import total_peak_flops
from lm.parallel.cluster import HostsConfig
from lm.parallel.layout import Layout, lay_out
from lm.parallel.mesh import MeshConfig, assemble, batch_sharding, batch_ways, local_rows
from lm.parallel.platform import keep_buffers
from lm.runs.directory import CHECKPOINTS, Claim, check_place, saved_run
from lm.runs.inherited import inherit, initial_parameters, open_model, run_tokenizer
from lm.tokenizers import TokenizerConfig
from lm.tokenizers.export import huggingface_files
from lm.training.checkpoints import CheckpointConfig, Checkpointer
from lm.training.config import TrainConfig, TrainingInterrupted, check_dispatch, dispatch_steps
from lm.training.evaluate import evaluate
from lm.training.loop import Loop
from lm.training.metrics import MetricsWriter
from lm.training.optimizer import OptimizerConfig, make_schedule, warmup_of
from lm.training.progress import Progress
from lm.training.report import describe_run
from lm.training.setup import Training, set_up
from lm.training.step import make_eval_step
from lm.training.workload import Workload, check_layout, check_memory, check_offload


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """Everything about one training run."""

    job: str = "train"
    seed: Seed = 0  # of the parameters, the data order, dropout and the samples
    # Start from this run or Hugging Face directory: its parameters, tokenizer and whole `model`, of
    # which only what changes nothing of that may be set here; see `lm.runs.inherited`.
    init_from: Path = ""
    # Of a Hugging Face directory: regular expressions of fields of config.json and of tensors that
    # may be left out though they are not known.
    ignore: str | tuple[str, ...] = ()
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    hosts: HostsConfig = dataclasses.field(default_factory=HostsConfig)
    strategy: str = ""  # a name of lm.parallel.layout: sets zero, and mesh axes left alone
    # What data parallelism over fsdp, expert and context splits besides the batch: 0 nothing, 1 the
    # optimizer's state, 2 gradients too, 3 parameters too; -1: what the strategy says, 3 without.
    zero: Annotated[int, Bounds(-1, 3)] = -1
    # When training ends, samples.txt gets continuations of these; or of an encoder's hidden words
    # the likeliest; or of an encoder-decoder's sources the targets.
    prompt: str | tuple[str, ...] = ()
    sample: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    # seq2seq: validation pairs whose targets are then compared word for word
    exact_match: Count = 0

    def validate(self, prefix: str = "config") -> None:
        """Raises ConfigError where sections contradict each other."""
        longest = self.model.max_length
        for name in ("block_size", "source_length"):
            length = getattr(self.data, name)
            check(
                not longest or length <= longest,
                f"{prefix}.data.{name}={length} is longer than {prefix}.model.max_length="
                f"{longest}: set it to {longest}",
            )
        check_objective(self.objective, self.model, prefix)
        check(
            not self.exact_match or self.objective.name == "seq2seq",
            f"{prefix}.exact_match={self.exact_match} needs {prefix}.objective.name='seq2seq', not "
            f"{self.objective.name!r}: only pairs of texts have a right answer",
        )
        make_schedule(self.optimizer, self.train.steps)  # for its errors, before any work
        check_dispatch(self.train.steps_per_dispatch, self.cadences)

    @property
    def cadences(self) -> tuple[int, ...]:
        """Step counts at which the host must have the state in hand; 0 is never."""
        train = self.train
        return train.steps, train.log_every, train.eval_every, self.checkpoint.every


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
    saved = saved_run(directory)
    fields, carried = inherit(config, saved)
    job = view(TrainJob, fields)
    with hosts.together(job.hosts):
        results, left_by = _run(job, directory, saved, carried)
    if left_by == signal.SIGINT:
        raise KeyboardInterrupt
    if left_by:
        raise TrainingInterrupted("training was asked to leave; the same command goes on")
    return results


def _run(
    job: TrainJob, directory: pathlib.Path, saved: dict[str, Any] | None, carried: dict[str, Any]
) -> tuple[dict[str, float], int]:
    """The run: `saved` is its config.json if it has begun, `carried` what its source says."""
    console = Console(soft_wrap=False, highlight=False, quiet=hosts.index() > 0)
    _prepare_process(job)
    layout = lay_out(job.strategy, job.mesh, job.zero)
    job = _even_batch(job, layout, saved, console)
    workload = Workload(
        job.model,
        job.data.block_size,
        job.data.batch_size,
        job.data.source_length,
        objective=job.objective,
        optimizer=job.optimizer,
        train=job.train,
        seed=job.seed,
        layout=layout,
    )
    check_layout(workload)
    check_memory(workload)
    check_offload(workload)
    check_place(directory)
    texts = functools.partial(documents, job.data, "train", job.seed)
    tokenizer = run_tokenizer(directory, saved, job.tokenizer, texts, job.init_from, job.ignore)
    console.print(
        f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens"
        + ("" if tokenizer.lossless else " (does not reproduce every text exactly)")
    )
    model_config = resolve_model(job, tokenizer)
    resolved = dataclasses.replace(job, model=model_config)
    corpus = functools.partial(corpus_fingerprint, job.data, job.seed)
    claim = Claim(directory, to_dict(resolved), to_dict(TrainJob()), tokenizer, corpus, carried)
    notes = claim.check()
    check_prompts(resolved, tokenizer, carried)
    for note in (*notes, *_stays_here(model_config, tokenizer)):
        console.print(f"note: {note}", markup=False, soft_wrap=True)

    say = functools.partial(console.print, markup=False, soft_wrap=True)  # names are names
    train_corpora, validation_corpora = prepare(job.data, tokenizer, job.seed, say)
    reading = {"objective": job.objective.name, "tokenizer": tokenizer}
    rows = local_rows(batch_sharding(layout.mesh), job.data.batch_size)
    batches = train_batches(job.data, train_corpora, seed=job.seed, rows=rows, **reading)
    tokens = sum(corpus.num_tokens for corpus in train_corpora)
    console.print(
        f"data: {tokens:,} training tokens, {batches.batches_per_epoch:,} steps an epoch, "
        f"{batches.padding_fraction:.1%} padding"
        + (f", {batches.num_dropped:,} pairs too long" if batches.num_dropped else "")
    )
    check(
        batches.num_batches is None or batches.num_batches >= job.train.steps,
        f"config.train.steps={job.train.steps} is more than the {batches.num_batches} batches of "
        f"config.data.epochs={job.data.epochs}: lower it, or raise the other",
    )

    warmup = warmup_of(job.optimizer, job.train.steps)
    if warmup != job.optimizer.warmup_steps:
        say(
            f"optimizer.warmup_steps={job.optimizer.warmup_steps} is more than the run's "
            f"{job.train.steps} steps: cut to a tenth of them, {warmup}"
        )
    validation = None
    if validation_corpora:
        batch_size = job.train.eval_batch_size or job.data.batch_size
        data = dataclasses.replace(job.data, batch_size=batch_size)
        eval_rows = local_rows(batch_sharding(layout.mesh), batch_size)
        validation = evaluation_batches(data, validation_corpora, rows=eval_rows, **reading)

    workload = dataclasses.replace(
        workload,
        model=model_config,
        block_size=batches.block_size,
        source_length=batches.source_length,
        packed=not batches.single_segment,
        max_targets=batches.max_targets_per_row,
    )
    training = set_up(workload)
    with layout.active():
        describe_run(console, training)
        with Checkpointer(directory / CHECKPOINTS, job.checkpoint) as checkpointer:
            claim.write()  # last, so that a mistake above can simply be mended
            found = checkpointer.restore_latest(training.abstract)
            if found is None:
                start, extra = 0, {}
                params = None
                if job.init_from:
                    source = open_model(job.init_from, job.ignore)
                    params = initial_parameters(source, training.abstract["params"])
                state = training.create_state(params)
            else:
                start, state, extra = found
                batches.set_state(extra["data"])
                console.print(_going_on(job, start, saved, directory), soft_wrap=True)
            params, results, left_by = _train(
                resolved, training, state, start, extra,
                batches, validation, checkpointer, directory, console,
            )  # fmt: skip
    if not left_by:
        results |= finish(resolved, directory, console, params, layout.mesh)
    return results, left_by


def _train(
    job, training: Training, state, start, extra,
    batches, validation, checkpointer, directory, console,
):  # fmt: skip
    """Runs the loop.

    Returns:
      The parameters, the last evaluation, and the signal that ended it before its last step.
    """
    workload = training.workload
    peak = total_peak_flops(compute_dtype(job.model.compute_dtype))
    cadences = (*job.cadences, start)
    asked = job.train.steps_per_dispatch or extra.get("stride", 0)
    if not job.train.steps_per_dispatch and any(cadence % asked for cadence in cadences if asked):
        asked = 0  # what the run chose before does not fit its new rhythm
    flops_per_step = workload.flops_per_token * workload.tokens
    stride = int(  # every host may have measured another peak
        hosts.from_first(lambda: str(dispatch_steps(asked, cadences, flops_per_step, peak)))
    )

    def put(batch, whose=batches, leading=1):
        if batches.single_segment:  # attention needs no mask of documents, experts one of padding
            filled = batch["segment_ids"] > 0
            batch = {k: v for k, v in batch.items() if k not in ("segment_ids", "positions")}
            batch["filled"] = filled
        sharding = batch_sharding(workload.layout.mesh, leading)
        return assemble(batch, sharding, whose.local_rows, whose.batch_size, leading)

    evaluator = None
    if validation is not None:
        eval_step = jax.jit(make_eval_step(training.model, batches.max_targets_per_row))

        def evaluator(state):
            put_one = functools.partial(put, whose=validation, leading=0)
            return evaluate(eval_step, state["params"], validation, put_one)

    began = time.perf_counter()
    with (
        MetricsWriter(directory, start) as writer,
        Progress(job.train.steps, start) as progress,
    ):
        loop = Loop(
            job.train,
            stride=stride,
            step_fn=training.step,
            batches=batches,
            put=put,
            evaluate=evaluator,
            checkpointer=checkpointer,
            checkpoint_every=job.checkpoint.every,
            abstract_state=training.abstract,
            writer=writer,
            progress=progress,
            flops_per_token=workload.flops_per_token,
            peak=peak,
            workdir=directory,
        )
        state, step = loop.run(state, start, extra)
    if step > start:
        console.print(f"trained {step - start} steps in {time.perf_counter() - began:.1f} s")
    return state["params"], loop.last_eval, loop.left_by


def _prepare_process(job: TrainJob) -> None:
    """Settings of this process that must come before the first array."""
    if jax.default_backend() == "cpu":
        keep_buffers()
    if job.train.compilation_cache:
        path = os.path.expanduser(job.train.compilation_cache)
        jax.config.update("jax_compilation_cache_dir", path)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _even_batch(
    job: TrainJob, layout: Layout, saved: dict[str, Any] | None, console: Console
) -> TrainJob:
    """With the batch that `data.even_batch` makes: of a run that has begun, the one it has."""
    if not job.data.even_batch:
        return job
    asked, shares = job.data.batch_size, batch_ways(layout.mesh) * job.train.accumulation
    rows, why = -(-asked // shares) * shares, f"a multiple of the {shares} shares of the devices"
    began = (saved or {}).get("data", {}).get("batch_size", 0)
    if began >= asked:
        rows, why = began, "as the run began"
    if rows != asked:
        console.print(f"note: config.data.batch_size={asked} is {rows} here, {why}")
    return dataclasses.replace(job, data=dataclasses.replace(job.data, batch_size=rows))


def _going_on(
    job: TrainJob, start: int, saved: dict[str, Any] | None, directory: pathlib.Path
) -> str:
    """What to say of a run that has `start` steps behind it; that its learning rate jumps, too."""
    steps = job.train.steps
    if start >= steps:
        return (
            f"finished: {start} of {steps} steps are done; with a larger config.train.steps it "
            "goes on"
        )
    line = f"resuming at step {start} of {steps}"
    planned = (saved or {}).get("train", {}).get("steps", steps)
    if planned == steps:
        return line
    was, now = (float(make_schedule(job.optimizer, n)(start)) for n in (planned, steps))
    if math.isclose(was, now, rel_tol=1e-3):
        return line
    return (
        f"{line}\nnote: the learning rate goes from {was:.3g} to {now:.3g} here, for its schedule "
        f"now spans {steps} steps, not {planned}; one that warms up anew starts with "
        f"--config.init_from={directory} and another --workdir"
    )


def _stays_here(model: ModelConfig, tokenizer) -> list[str]:
    """Why the model cannot be converted to a Hugging Face directory, if it cannot."""
    try:
        family_for(model)
        huggingface_files(tokenizer)
        return []
    except ConfigError as error:
        return [f"this model will not convert to Hugging Face: {error}"]


def resolve_model(job: TrainJob, tokenizer) -> ModelConfig:
    """The model section with `vocab_size` and `max_length` filled in.

    Raises:
      ConfigError: the vocabulary is smaller than the tokenizer's.
    """
    vocab_size = job.model.vocab_size or tokenizer.vocab_size
    check(
        tokenizer.fits(vocab_size),
        f"config.model.vocab_size={vocab_size} is smaller than the tokenizer's "
        f"{tokenizer.vocab_size}: raise it, or set it to 0",
    )
    longest = max(job.data.block_size, job.data.source_length)
    return dataclasses.replace(
        job.model, vocab_size=vocab_size, max_length=job.model.max_length or longest
    )
