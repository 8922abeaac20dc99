"""How a run trains: its length, its rhythm, and what it does when something goes wrong."""

from __future__ import annotations

import dataclasses
import math

from lm.config import check, check_choice


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

    steps: int = 1000  # optimizer steps
    accumulation: int = 1  # micro-batches whose gradients make one step
    offload_optimizer: bool = False  # keep the optimizer's state in the host's memory
    steps_per_dispatch: int = 0  # steps the device runs per call from the host; 0 chooses
    log_every: int = 10  # steps between records of the loss; 0 never
    eval_every: int = 0  # steps between evaluations on all validation data; 0: at the end alone
    eval_batch_size: int = 0  # sequences a validation batch; 0: data.batch_size
    # When a step's loss or gradient is not finite, or its loss exceeds the running mean by
    # `spike_nats`: skip leaves that step out; rollback returns to the last checkpoint and leaves
    # out the data since; stop ends the run. The step's update is never applied.
    on_spike: str = "skip"
    spike_nats: float = 0.0  # 0: only values that are not finite count
    max_spikes: int = 20  # in a run, before it stops whatever `on_spike` says
    profile_start: int = 0  # first step of the profiler's window
    profile_steps: int = 0  # its length; the trace goes to WORKDIR/profile; 0: no profile
    # default | tuned: TPUs' compiler with `lm.parallel.compiler.options`, which no TPU has run yet.
    compiler: str = "default"
    compilation_cache: str = "~/.cache/lm/xla"  # compiled programs, kept across runs; "" for none

    def validate(self, prefix: str = "config.train") -> None:
        """Raises ConfigError on the first impossible field."""
        for name in ("steps", "accumulation", "max_spikes"):
            value = getattr(self, name)
            check(value >= 1, f"{prefix}.{name}={value} must be at least 1")
        for name in (
            "steps_per_dispatch",
            "log_every",
            "eval_every",
            "eval_batch_size",
            "profile_start",
            "profile_steps",
            "spike_nats",
        ):
            value = getattr(self, name)
            check(value >= 0, f"{prefix}.{name}={value} must not be negative")
        check_choice(f"{prefix}.compiler", self.compiler, ("default", "tuned"))
        check_choice(f"{prefix}.on_spike", self.on_spike, ("skip", "rollback", "stop"))


def check_dispatch(asked: int, cadences: tuple[int, ...]) -> None:
    """Raises ConfigError unless dispatches of `asked` steps (0: any) end at every cadence."""
    for cadence in cadences if asked else ():
        check(
            cadence % asked == 0,
            f"config.train.steps_per_dispatch={asked} must divide steps, log_every, eval_every, "
            f"checkpoint.every and the step resumed from, and does not divide {cadence}",
        )


def dispatch_steps(
    asked: int, cadences: tuple[int, ...], flops_per_step: float, peak: float
) -> int:
    """How many optimizer steps one dispatch runs.

    As asked, or where 0 is asked enough to make a dispatch last about a quarter of a second, at
    most 10 steps. Always a divisor of every nonzero cadence (steps, log, eval, checkpoint), so that
    the dispatches of a resumed run are those of an uninterrupted one.

    Args:
      asked: train.steps_per_dispatch.
      cadences: step counts at which the host must have the state in hand.
      flops_per_step: model FLOPs of one step.
      peak: FLOPs a second of all devices together.

    Raises:
      ConfigError: the number asked for does not divide a cadence.
    """
    common = math.gcd(*cadences)
    if asked:
        check_dispatch(asked, cadences)
        return asked
    seconds = flops_per_step / (0.4 * peak)
    most = max(1, min(10, int(0.25 / max(seconds, 1e-9))))
    return max(k for k in range(1, most + 1) if common % k == 0)
