"""The training loop: dispatch step n, then read what step n−1 measured.

The host never waits for the device except where it must have the state in hand: evaluations,
checkpoints, the end. Dispatches lie on a fixed grid of steps, so a resumed run makes exactly the
calls that an uninterrupted one would, and its parameters are bitwise the same.

Speed is that of the device: a dispatch takes from the end of the one before, or of the evaluation
or checkpoint after that, until its own results are there. The first of a process compiles, and
counts in no rate.
"""

from __future__ import annotations

import contextlib
import pathlib
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from lm.data.batches import BatchIterator
from lm.data.prefetch import prefetch_to_device
from lm.parallel import hosts
from lm.training.checkpoints import Checkpointer
from lm.training.config import TrainConfig, TrainingStopped
from lm.training.metrics import MetricsWriter
from lm.training.progress import Progress

_OF_A_STEP = ("grad_norm", "skipped", "learning_rate")  # metrics that are no sums


class Stack:
    """Groups of `count` consecutive batches stacked on a leading axis, with their position."""

    def __init__(self, batches: BatchIterator, count: int):
        self._batches, self._count = batches, count

    def __next__(self) -> dict[str, np.ndarray]:
        group = [next(self._batches) for _ in range(self._count)]
        return {name: np.stack([batch[name] for batch in group]) for name in group[0]}

    def get_state(self) -> dict[str, Any]:
        """The position of the underlying batches."""
        return self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves the underlying batches."""
        self._batches.set_state(state)


@contextlib.contextmanager
def termination_flag() -> Iterator[list[int]]:
    """A list that SIGTERM and Ctrl-C fill, so that the loop can save and leave in good order.

    A second Ctrl-C ends the process.
    """
    received: list[int] = []
    previous = {}

    def receive(number, frame):
        received.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with contextlib.suppress(ValueError):  # not in the main thread: nobody will send us the signal
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Dispatch:
    """The steps up to `step`, under way on the device.

    Attributes:
      metrics: of each step.
      timed: whether its tokens count in a rate.
      ended: when the device was first seen to be done; None before. It is looked at before and
        after each call of the next dispatch, which may do all of its work within the call.
    """

    def __init__(self, step: int, metrics: dict[str, jax.Array], timed: bool):
        self.step, self.metrics, self.timed, self.ended = step, metrics, timed, None

    def look(self, now: float) -> None:
        """Notes the time if the device is done."""
        if self.ended is None and self.metrics["weight"].is_ready():
            self.ended = now


class Loop:
    """One run's training loop; see `run`.

    Args:
      config: the `train` section.
      stride: optimizer steps a dispatch; divides every cadence.
      step_fn: (state, batches [stride, B, T]) → (state, metrics [stride]), compiled.
      batches: the training batches, at the position of `state`.
      put: host arrays → device arrays.
      evaluate: state → evaluation metrics, or None where there is nothing to evaluate on.
      checkpointer: where the state is saved.
      abstract_state: shapes and shardings of the state, to restore into.
      writer: where metrics go.
      progress: where they are shown.
      flops_per_token: training FLOPs a token.
      peak: FLOPs a second of all devices.
      workdir: for the profile.
      clock: seconds, increasing; replaced in tests.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        stride: int,
        step_fn: Callable[[Any, Any], tuple[Any, Any]],
        batches: BatchIterator,
        put: Callable[[Any], Any],
        evaluate: Callable[[Any], dict[str, float]] | None,
        checkpointer: Checkpointer,
        checkpoint_every: int,
        abstract_state: Any,
        writer: MetricsWriter,
        progress: Progress,
        flops_per_token: float,
        peak: float,
        workdir: pathlib.Path,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.config, self.stride, self.step_fn = config, stride, step_fn
        self.batches, self.put, self.evaluate = batches, put, evaluate
        self.checkpointer, self.checkpoint_every = checkpointer, checkpoint_every
        self.abstract_state, self.writer, self.progress = abstract_state, writer, progress
        self.flops_per_token, self.peak, self.workdir = flops_per_token, peak, workdir
        self.spikes = 0
        self.tokens = 0.0
        self.last_eval: dict[str, float] = {}
        self.left_by = 0  # the signal that ended the run before its last step
        self._saved = -1
        self._ahead = 0  # batches that roll-backs left out: batch = step + _ahead
        self._profiling = False
        self._clock, self._compiled = clock, False
        self._reset_interval()

    def run(self, state: Any, start: int, extra: dict[str, Any]) -> tuple[Any, int]:
        """Trains from step `start` to the last one, or until SIGTERM or Ctrl-C on any host.

        Args:
          state: the training state after `start` steps.
          start: steps already done.
          extra: what the checkpoint of that step held beside the state.

        Returns:
          The final state and the steps done.

        Raises:
          TrainingStopped: the loss diverged and the config says stop, or too often.
        """
        config, step = self.config, start
        self.tokens, self.spikes = extra.get("tokens", 0.0), extra.get("spikes", 0)
        self._ahead = extra.get("ahead", 0)
        stacked = prefetch_to_device(Stack(self.batches, self.stride), self.put)
        pending: list[Dispatch] = []
        self._saved = start if start else -1
        results: dict[str, float] = {}
        self._reset_interval(extra)
        self._since = self._clock()
        leaving = False
        with termination_flag() as terminated:
            while step < config.steps:
                leaving = hosts.agree(bool(terminated))
                if leaving:
                    break
                self._profile(step)
                waited = self._clock()
                batch = next(stacked, None)
                if batch is None:
                    raise TrainingStopped(
                        f"step {step}: the data of config.data.epochs is used up, for rolling back "
                        "leaves some out; raise data.epochs, or set train.on_spike='skip'"
                    )
                if self._compiled:
                    self._waited += self._clock() - waited
                data_state = stacked.get_state()
                for dispatch in pending:
                    dispatch.look(self._clock())
                if not self._compiled:
                    self.progress.compiling(True)
                state, metrics = self.step_fn(state, batch)
                step += self.stride
                if not self._compiled:
                    jax.block_until_ready(metrics)
                    self.progress.compiling(False)
                pending.append(Dispatch(step, metrics, self._compiled))
                pending[-1].look(self._clock())
                self._compiled = True
                results = {}
                evaluating = self._due(step, config.eval_every) or step == config.steps
                saving = self._due(step, self.checkpoint_every)
                waiting = evaluating or saving or step == config.steps
                due = len(pending) if waiting else len(pending) - 1
                if self._read(pending[:due]):
                    state, step, pending = self._roll_back(step), self._restored, []
                    continue
                pending = pending[due:]
                if evaluating and self.evaluate is not None:
                    results = self._evaluate(state, step)
                if saving:
                    self._save(state, step, data_state, results)
            if self._read(pending):
                state, step = self._roll_back(step), self._restored
            elif step != self._saved and step > start:
                self._save(state, step, stacked.get_state(), results, wait=True)
            if leaving:
                self.left_by = terminated[0] if terminated else signal.SIGTERM
                name = "Ctrl-C" if self.left_by == signal.SIGINT else "SIGTERM"
                done = f"saved step {step}; the same command goes on there"
                self.progress.print(f"{name}: {done if step else 'no step was done yet'}")
        self.checkpointer.wait()
        self._profile(config.profile_start + config.profile_steps)
        return state, step

    @staticmethod
    def _due(step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def _reset_interval(self, extra: dict[str, Any] | None = None) -> None:
        """Starts the sums behind the next loss record, where the checkpoint left them."""
        saved = (extra or {}).get("interval")
        self._sums = Counter(saved if isinstance(saved, dict) else {})
        self._timed = self._seconds = self._waited = 0.0  # tokens of dispatches, and their time

    def _read(self, dispatches: list[Dispatch]) -> bool:
        """Waits for dispatches and reports them; whether to roll back."""
        jax.block_until_ready([dispatch.metrics for dispatch in dispatches])
        now, rollback = self._clock(), False
        for left, dispatch in zip(range(len(dispatches), 0, -1), dispatches):
            if dispatch.ended is None:  # of two at once, each took half of the time
                dispatch.ended = self._since + (now - self._since) / left
            rollback |= self._report(dispatch)
        return rollback

    def _report(self, dispatch: Dispatch) -> bool:
        """Adds up what one dispatch measured, and records it where due; whether to roll back."""
        step = dispatch.step
        values = {name: np.asarray(value) for name, value in dispatch.metrics.items()}
        good = values["skipped"] == 0
        sums = {
            name: float(np.sum(value, where=good))
            for name, value in values.items()
            if name not in _OF_A_STEP
        }
        self._sums.update(sums)
        self.tokens += sums["tokens"]
        if dispatch.timed:
            self._timed += sums["tokens"]
            self._seconds += dispatch.ended - self._since
        self._since = dispatch.ended
        rollback = False
        for index in np.flatnonzero(~good):
            rollback |= self._spike(step - self.stride + int(index), values, int(index))
        if self._due(step, self.config.log_every) and self._sums["weight"]:
            means = {name: total / self._sums["weight"] for name, total in self._sums.items()}
            record = {
                "loss": means.pop("nats"),
                "grad_norm": float(values["grad_norm"][-1]),
                "learning_rate": float(values["learning_rate"][-1]),
                "tokens": self.tokens,
                **self._speed(),
                **{name: mean for name, mean in means.items() if name not in ("weight", "tokens")},
            }
            self.writer.write(step, record)
            self.progress.update(step, record)
            self._reset_interval()
        return rollback

    def _speed(self) -> dict[str, float]:
        """Rates of the dispatches since the last record; none of one that compiled alone."""
        if not self._seconds:
            return {}
        rate = self._timed / self._seconds
        return {
            "tokens_per_second": rate,
            "mfu": rate * self.flops_per_token / self.peak,
            "data_wait": min(1.0, self._waited / self._seconds),
        }

    def _spike(self, step: int, values: dict[str, np.ndarray], index: int) -> bool:
        """Reports one bad step; whether to roll back."""
        self.spikes += 1
        loss = float(values["nats"][index]) / max(1.0, float(values["weight"][index]))
        epoch, row = self.batches.position(step + self._ahead)
        where = f"step {step + 1}, data epoch {epoch} row {row}"
        what = f"loss {loss:.4g}, gradient norm {float(values['grad_norm'][index]):.4g}"
        action = self.config.on_spike
        self.writer.write(step + 1, {"spike_loss": loss, "spikes": self.spikes})
        if action == "stop" or self.spikes > self.config.max_spikes:
            reason = "" if action == "stop" else f" (more than {self.config.max_spikes} spikes)"
            raise TrainingStopped(
                f"{where}: {what}; stopped{reason}, the last checkpoint is intact: lower "
                "optimizer.learning_rate, raise warmup_steps, or set train.on_spike='skip'"
            )
        done = "update skipped" if action == "skip" else "rolling back, leaving this data out"
        self.progress.print(f"{where}: {what}; {done}")
        return action == "rollback"

    def _roll_back(self, step: int) -> Any:
        """The last checkpoint's state; the data goes on after the batches of step `step`."""
        found = self.checkpointer.restore_latest(self.abstract_state)
        if found is None:
            raise TrainingStopped(
                f"step {step}: nothing to roll back to yet: lower checkpoint.every, or set "
                "train.on_spike='skip'"
            )
        self._restored = found.step
        self._ahead += step - found.step
        self.checkpointer.discard_after(found.step)  # damaged ones, if any
        self.writer.rewind(found.step)
        self.writer.write(found.step, {"rolled_back_from": step, "spikes": self.spikes})
        self.progress.print(f"rolled back to step {found.step}; the data goes on from here")
        self._reset_interval(found.extra)
        self._since = self._clock()
        return found.state

    def _evaluate(self, state: Any, step: int) -> dict[str, float]:
        results = self.evaluate(state)
        self.last_eval = results
        self.writer.write(step, results)
        self.progress.update(step, results)
        self._since = self._clock()
        return results

    def _save(self, state, step, data_state, results, wait: bool = False) -> None:
        extra = {
            "data": data_state,
            "tokens": self.tokens,
            "spikes": self.spikes,
            "ahead": self._ahead,
            "interval": dict(self._sums),
            "stride": self.stride,
        }
        self.checkpointer.save(step, state, extra, results, wait=wait)
        self._saved = step
        self._since = self._clock()

    def _profile(self, step: int) -> None:
        """Starts and stops the profiler at the edges of its window."""
        config = self.config
        if not config.profile_steps or hosts.index():
            return
        first = config.profile_start - config.profile_start % self.stride
        if step == first and not self._profiling:
            jax.profiler.start_trace(str(self.workdir / "profile"))
            self._profiling = True
        elif step >= first + config.profile_steps and self._profiling:
            jax.profiler.stop_trace()
            self._profiling = False
