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
import dataclasses
import functools
import math
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
from lm.models.matmul import compute_dtype
from lm.parallel import hosts
from lm.parallel.chips import total_peak_flops
from lm.training.checkpoints import Checkpointer
from lm.training.config import TrainConfig, TrainingStopped, check_dispatch
from lm.training.metrics import MetricsWriter
from lm.training.progress import Progress
from lm.training.setup import Training
from lm.training.step import OF_A_STEP, Frozen, State
from lm.training.workload import Workload


@dataclasses.dataclass(eq=False)
class Loop:
    """One run's training loop; see `run`."""

    training: Training
    batches: BatchIterator  # at the position of the state
    evaluate: Callable[[State], dict[str, float]] | None  # None: there is nothing to evaluate on
    checkpointer: Checkpointer
    checkpoint_every: int
    writer: MetricsWriter
    progress: Progress
    directory: pathlib.Path  # for the profile
    frozen: Frozen = dataclasses.field(default_factory=dict)  # what steps read beside the state
    clock: Callable[[], float] = time.perf_counter

    left_by: int = 0  # the signal that ended the run before its last step
    last_eval: dict[str, float] = dataclasses.field(default_factory=dict)

    def run(self, state: State, start: int, extra: dict[str, Any]) -> tuple[State, int]:
        """Trains from step `start` to the last one, or until SIGTERM or Ctrl-C on any host.

        Args:
          state: the training state after `start` steps; donated.
          start: steps already done.
          extra: what the checkpoint of that step held beside the state.

        Returns:
          The final state and the steps done.

        Raises:
          TrainingStopped: the loss diverged and the config says stop, or too often.
        """
        workload, train = self.training.workload, self._train
        self._peak = total_peak_flops(compute_dtype(workload.model.compute_dtype))
        cadences = (train.steps, train.log_every, train.eval_every, self.checkpoint_every, start)
        self._stride = choose_stride(workload, cadences, extra.get("stride", 0), self._peak)
        self._step = self._saved = start
        self._tokens, self._spikes = extra.get("tokens", 0.0), extra.get("spikes", 0)
        self._ahead = extra.get("ahead", 0)  # batches left out by roll-backs: batch = step + ahead
        self._interval = Interval(extra.get("interval"))
        self._under_way: list[Dispatch] = []
        self._compiled = self._profiling = leaving = False
        self._since = self.clock()  # when the device began with what is under way
        results: dict[str, float] = {}
        put = functools.partial(self.training.put, batches=self.batches, leading=1)
        stacked = prefetch_to_device(Stack(self.batches, self._stride), put)
        with termination_flag() as received:
            while self._step < train.steps and not (leaving := hosts.agree(bool(received))):
                self._profile(self._step)
                state, results = self._dispatch(state, self._next(stacked)), {}
                evaluating = due(self._step, train.eval_every) or self._step == train.steps
                saving = due(self._step, self.checkpoint_every)
                if self._read(leave=0 if evaluating or saving else 1):
                    state = self._roll_back()
                    continue
                if evaluating and self.evaluate is not None:
                    results = self._evaluate(state)
                if saving:
                    self._save(state, stacked.get_state(), results)
            if self._read():
                state = self._roll_back()
            elif self._step != self._saved:
                self._save(state, stacked.get_state(), results, wait=True)
            if leaving:
                self._leave(received)
        self.checkpointer.wait()
        self._profile(train.profile_start + train.profile_steps)
        return state, self._step

    @property
    def _train(self) -> TrainConfig:
        return self.training.workload.train

    def _next(self, stacked: Iterator[Any]) -> Any:
        began = self.clock()
        batch = next(stacked, None)
        if batch is None:
            raise TrainingStopped(
                f"step {self._step}: the data of config.data.epochs is used up, for rolling back "
                "leaves some out; raise data.epochs, or set train.on_spike='skip'"
            )
        if self._compiled:
            self._interval.waited += self.clock() - began
        return batch

    def _dispatch(self, state: State, batch: Any) -> State:
        """Starts the next steps; the first time of a process, which compiles, waits for them."""
        for dispatch in self._under_way:
            dispatch.look(self.clock())
        if not self._compiled:
            self.progress.compiling(True)
        state, metrics = self.training.step(state, batch, self.frozen)
        self._step += self._stride
        if not self._compiled:
            jax.block_until_ready(metrics)
            self.progress.compiling(False)
        self._under_way.append(Dispatch(self._step, metrics, self._compiled))
        self._under_way[-1].look(self.clock())
        self._compiled = True
        return state

    def _read(self, leave: int = 0) -> bool:
        """Waits for all dispatches but `leave`, and reports them; whether to roll back."""
        count = len(self._under_way) - leave
        done, self._under_way = self._under_way[:count], self._under_way[count:]
        jax.block_until_ready([dispatch.metrics for dispatch in done])
        now, rollback = self.clock(), False
        for left, dispatch in zip(range(len(done), 0, -1), done):
            if dispatch.ended is None:  # of two at once, each took half of the time
                dispatch.ended = self._since + (now - self._since) / left
            rollback |= self._report(dispatch)
        return rollback

    def _report(self, dispatch: Dispatch) -> bool:
        """Adds up what one dispatch measured, and records it where due; whether to roll back."""
        step, interval = dispatch.step, self._interval
        values = {name: np.asarray(value) for name, value in dispatch.metrics.items()}
        good = values["skipped"] == 0
        sums = {
            name: float(np.sum(value, where=good))
            for name, value in values.items()
            if name not in OF_A_STEP
        }
        interval.sums.update(sums)
        self._tokens += sums["tokens"]
        if dispatch.timed:
            interval.tokens += sums["tokens"]
            interval.seconds += dispatch.ended - self._since
        self._since = dispatch.ended
        rollback = False
        for index in np.flatnonzero(~good):
            rollback |= self._spike(step - self._stride + int(index), values, int(index))
        workload = self.training.workload
        for index in np.flatnonzero(good & (values["weight"] == 0)):
            where = step - self._stride + int(index) + 1
            self.progress.print(f"step {where}: nothing to learn in this batch: its loss is 0")
        if due(step, workload.train.log_every) and interval.sums["tokens"]:
            means = interval.means()
            record = {
                "loss": means.pop("nats"),
                "grad_norm": float(values["grad_norm"][-1]),
                "learning_rate": float(values["learning_rate"][-1]),
                "tokens": self._tokens,
                **interval.rates(workload.flops_per_token, self._peak),
                **means,
            }
            self.writer.write(step, record)
            self.progress.update(step, record)
            self._interval = Interval()
        return rollback

    def _spike(self, step: int, values: dict[str, np.ndarray], index: int) -> bool:
        """Reports one bad step; whether to roll back."""
        self._spikes += 1
        train = self._train
        loss = float(values["nats"][index]) / max(1.0, float(values["weight"][index]))
        epoch, row = self.batches.position(step + self._ahead)
        where = f"step {step + 1}, data epoch {epoch} row {row}"
        what = f"loss {loss:.4g}, gradient norm {float(values['grad_norm'][index]):.4g}"
        self.writer.write(step + 1, {"spike_loss": loss, "spikes": self._spikes})
        if train.on_spike == "stop" or self._spikes > train.max_spikes:
            often = f" (more than {train.max_spikes} spikes)" if train.on_spike != "stop" else ""
            raise TrainingStopped(
                f"{where}: {what}; stopped{often}, the last checkpoint is intact: lower "
                "optimizer.learning_rate, raise warmup_steps, or set train.on_spike='skip'"
            )
        rollback = train.on_spike == "rollback"
        done = "rolling back, leaving this data out" if rollback else "update skipped"
        self.progress.print(f"{where}: {what}; {done}")
        return rollback

    def _roll_back(self) -> State:
        """The last checkpoint's state; the data goes on after the batches of the present step."""
        step, found = self._step, self.checkpointer.restore_latest(self.training.abstract)
        if found is None:
            raise TrainingStopped(
                f"step {step}: nothing to roll back to yet: lower checkpoint.every, or set "
                "train.on_spike='skip'"
            )
        self._step = found.step
        self._ahead += step - found.step
        self._under_way = []
        self.checkpointer.discard_after(found.step)  # damaged ones, if any
        self.writer.rewind(found.step)
        self.writer.write(found.step, {"rolled_back_from": step, "spikes": self._spikes})
        self.progress.print(f"rolled back to step {found.step}; the data goes on from here")
        self._interval = Interval(found.extra.get("interval"))
        self._since = self.clock()
        return found.state

    def _evaluate(self, state: State) -> dict[str, float]:
        self.last_eval = results = self.evaluate(state)
        self.writer.write(self._step, results)
        self.progress.update(self._step, results)
        self._since = self.clock()
        return results

    def _save(self, state: State, position: dict[str, Any], results, wait: bool = False) -> None:
        extra = {
            "data": position,
            "tokens": self._tokens,
            "spikes": self._spikes,
            "ahead": self._ahead,
            "interval": dict(self._interval.sums),
            "stride": self._stride,
        }
        self.checkpointer.save(self._step, state, extra, results, wait=wait)
        self._saved = self._step
        self._since = self.clock()

    def _leave(self, received: list[int]) -> None:
        self.left_by = received[0] if received else signal.SIGTERM
        name = "Ctrl-C" if self.left_by == signal.SIGINT else "SIGTERM"
        done = f"saved step {self._step}; the same command goes on there"
        self.progress.print(f"{name}: {done if self._step else 'no step was done yet'}")

    def _profile(self, step: int) -> None:
        """Starts and stops the profiler at the edges of its window."""
        train = self._train
        if not train.profile_steps or hosts.index():
            return
        first = train.profile_start - train.profile_start % self._stride
        if step == first and not self._profiling:
            jax.profiler.start_trace(str(self.directory / "profile"))
            self._profiling = True
        elif step >= first + train.profile_steps and self._profiling:
            jax.profiler.stop_trace()
            self._profiling = False


# ---- What the loop is made of -----------------------------------------------------------------


def choose_stride(workload: Workload, cadences: tuple[int, ...], before: int, peak: float) -> int:
    """How many optimizer steps one dispatch runs.

    `train.steps_per_dispatch`, or where that is 0 as many as the run chose `before`, or else enough
    to make a dispatch last about a quarter of a second, at most 10. Always a divisor of every
    nonzero cadence, so that the dispatches of a resumed run are those of an uninterrupted one.

    Args:
      cadences: step counts at which the host must have the state in hand.
      peak: FLOPs a second of all devices together, as this host knows it; the first one's counts.

    Raises:
      ConfigError: the number asked for does not divide a cadence.
    """
    asked, common = workload.train.steps_per_dispatch, math.gcd(*cadences)
    check_dispatch(asked, cadences)
    if asked:
        return asked

    def chosen() -> int:
        if before and common % before == 0:
            return before
        seconds = workload.flops_per_token * workload.tokens / (0.4 * peak)
        most = max(1, min(10, int(0.25 / max(seconds, 1e-9))))
        return max(k for k in range(1, most + 1) if common % k == 0)

    return int(hosts.from_first(lambda: str(chosen())))


class Stack:
    """Groups of `count` consecutive batches, stacked on a leading axis."""

    def __init__(self, batches: BatchIterator, count: int):
        self._batches, self._count = batches, count
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self) -> dict[str, np.ndarray]:
        group = [next(self._batches) for _ in range(self._count)]
        return {name: np.stack([batch[name] for batch in group]) for name in group[0]}


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


@dataclasses.dataclass(eq=False)
class Dispatch:
    """The steps up to `step`, under way on the device."""

    step: int
    metrics: dict[str, jax.Array]  # of each step
    timed: bool  # whether its tokens count in a rate
    # When the device was first seen to be done. It is looked at before and after each call of the
    # next dispatch, which may do all of its work within the call.
    ended: float | None = None

    def look(self, now: float) -> None:
        """Notes the time if the device is done."""
        if self.ended is None and self.metrics["weight"].is_ready():
            self.ended = now


def due(step: int, every: int) -> bool:
    """Whether what happens every so many steps, 0 for never, happens after `step`."""
    return every > 0 and step % every == 0


class Interval:
    """What was measured since the last record of a loss."""

    def __init__(self, sums: Any = None):
        # Of every metric that is a sum, over the steps that were not skipped.
        self.sums = Counter(sums if isinstance(sums, dict) else {})
        self.tokens = 0.0  # of the dispatches that count in rates,
        self.seconds = 0.0  # which took the device so long,
        self.waited = 0.0  # while the host waited so long for data

    def means(self) -> dict[str, float]:
        """Of each metric, for a target token."""
        weight = self.sums["weight"] or 1.0
        means = {name: total / weight for name, total in self.sums.items()}
        return {name: mean for name, mean in means.items() if name not in ("weight", "tokens")}

    def rates(self, flops_per_token: float, peak: float) -> dict[str, float]:
        """Of the dispatches that count; nothing where there are none."""
        if not self.seconds:
            return {}
        rate = self.tokens / self.seconds
        return {
            "tokens_per_second": rate,
            "mfu": rate * flops_per_token / peak,
            "data_wait": min(1.0, self.waited / self.seconds),
        }
