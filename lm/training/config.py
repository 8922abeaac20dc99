"""How a run trains: its length, its rhythm, and what it does when something goes wrong."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from lm.config import (
    AboveZero,
    Bounds,
    Count,
    NotNegative,
    Path,
    Positive,
    Share,
    ShareBelowOne,
    Size,
    SizeOrZero,
    check,
)

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "sgd")
SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt", "wsd")  # see schedules.py
DECAYED = ("matrices", "no_embeddings", "all")


class TrainingStopped(RuntimeError):
    """Training cannot go on: one line that says at which step, on which data, and why.

    `main.py` prints it and exits with code 1; what was saved before is intact.
    """


class TrainingInterrupted(TrainingStopped):
    """Somebody asked a run to leave before its last step, and it saved: the same command goes on.

    `main.py` exits with code 75, which tells launch scripts to start it again.
    """


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    steps: Positive = 1000  # optimizer steps
    accumulation: Size = 1  # micro-batches whose gradients make one step
    offload_optimizer: bool = False  # keep the optimizer's state in the host's memory
    steps_per_dispatch: Count = 0  # steps the device runs per call from the host; 0 chooses
    log_every: Count = 10  # steps between records of the loss; 0 never
    eval_every: Count = 0  # steps between evaluations on all validation data; 0: at the end alone
    eval_batch_size: SizeOrZero = 0  # sequences a validation batch; 0: data.batch_size
    # When a step's loss or gradient is not finite, or its loss exceeds the running mean by
    # `spike_nats`: skip leaves that step out; rollback returns to the last checkpoint and leaves
    # out the data since; stop ends the run. The step's update is never applied.
    on_spike: Literal["skip", "rollback", "stop"] = "skip"
    spike_nats: NotNegative = 0.0  # 0: only values that are not finite count
    max_spikes: Positive = 20  # in a run, before it stops whatever `on_spike` says
    profile_start: Count = 0  # first step of the profiler's window
    profile_steps: Count = 0  # its length; the trace goes to WORKDIR/profile; 0: no profile
    # tuned: TPUs' compiler with `lm.parallel.compiler.options`, which no TPU has run yet.
    compiler: Literal["default", "tuned"] = "default"
    compilation_cache: Path = "~/.cache/lm/xla"  # compiled programs, kept across runs; "" for none


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer, its learning-rate schedule, and its numbers."""

    name: Literal[OPTIMIZERS] = "adamw"  # of the update
    learning_rate: NotNegative = 1e-3  # at the peak of the schedule
    schedule: Literal[SCHEDULES] = "cosine"  # of the learning rate
    warmup_steps: Count = 0  # steps of linear warm-up to the peak; beyond the run: a tenth of it
    decay_steps: Count = 0  # step at which the decay ends; 0 is the end of the run
    final_fraction: Share = 0.1  # learning rate after the decay, as a fraction of the peak
    decay_fraction: Share = 0.2  # wsd: share of the steps spent decaying
    b1: ShareBelowOne = 0.9  # decay of the first moment (adamw, lion) or of the momentum (sgd)
    b2: ShareBelowOne = 0.95  # decay of the second moment (adamw) or of the momentum (lion)
    eps: AboveZero = 1e-8  # adamw: added to the root of the second moment
    weight_decay: NotNegative = 0.1  # times the learning rate, taken off the decayed parameters
    decay: Literal[DECAYED] = "matrices"  # what decays; no_embeddings: matrices but no tables
    clip_norm: NotNegative = 1.0  # largest global norm of the gradient; 0 does not clip
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"  # of the stored first moment
    muon_momentum: ShareBelowOne = 0.95  # muon: decay of the momentum of its matrices
    # muon: Newton-Schulz iterations; what is no layer's matrix gets adamw
    muon_steps: Annotated[int, Bounds(1, 100)] = 5
    # muon: RMS of an update, so that adamw's rates fit; 0: Jordan's scaling
    muon_rms: NotNegative = 0.2


def check_dispatch(asked: int, cadences: tuple[int, ...]) -> None:
    """Raises ConfigError unless dispatches of `asked` steps (0: any) end at every cadence."""
    for cadence in cadences if asked else ():
        check(
            cadence % asked == 0,
            f"config.train.steps_per_dispatch={asked} must divide steps, log_every, eval_every, "
            f"checkpoint.every and the step resumed from, and does not divide {cadence}",
        )
