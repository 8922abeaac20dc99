"""How a run trains: its length, its rhythm, and what it does when something goes wrong."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lm.config import Count, NotNegative, Path, Positive, Size, SizeOrZero, check


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


def check_dispatch(asked: int, cadences: tuple[int, ...]) -> None:
    """Raises ConfigError unless dispatches of `asked` steps (0: any) end at every cadence."""
    for cadence in cadences if asked else ():
        check(
            cadence % asked == 0,
            f"config.train.steps_per_dispatch={asked} must divide steps, log_every, eval_every, "
            f"checkpoint.every and the step resumed from, and does not divide {cadence}",
        )
