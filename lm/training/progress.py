"""How a run is going: a live bar in a terminal, one plain line a report everywhere else.

    step 1200/2000  loss 1.8734  eval 1.9021  52.1k tokens/s  mfu 41.3%  data 0.2%  0:00:43 left

The fields keep this order; one that was not measured is left out, and beside the bar those that the
terminal has no room for. Of several processes only the first shows anything.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from lm.parallel import hosts

WIDEST, NARROWEST = 24, 6  # columns of the bar


class Progress:
    """Shows steps done, loss, speed and time left; a context manager.

    Args:
      total_steps: steps of the whole run.
      start_step: the step it resumes from.
      file: where to write; standard output by default. A bar is drawn if it is a terminal.
      clock: seconds, increasing; replaced in tests.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._start, self._clock = total_steps, start_step, clock
        self._file = file or sys.stdout
        self._silent = hosts.index() > 0
        self._first: tuple[int, float] | None = None
        self._fields: dict[str, str] = {}
        self._bar: Bar | None = None
        if self._file.isatty() and not self._silent:
            # Drawn by rich's own thread, four times a second, whatever the rate of updates.
            self._drawn = BarColumn(WIDEST, complete_style="cyan", finished_style="green")
            self._bar = Bar(
                self._drawn,
                TextColumn("{task.description}", style="default", markup=False),
                console=Console(file=self._file, highlight=False),
                refresh_per_second=4,
            )
            self._task = self._bar.add_task(
                self._line(start_step), total=max(total_steps, 1), completed=start_step
            )

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Reports that `step` steps are done.

        `metrics` may hold `loss`, `accuracy`, `eval_accuracy`, `reward`, `eval_reward`, `kl`,
        `eval_loss`, `eval_bits_per_byte`, `tokens_per_second`, `mfu` and `data_wait` (shares
        between 0 and 1), as numbers or arrays already on the host; others are ignored, and one not
        given keeps its last value in the bar.
        """
        if self._silent:
            return
        now = self._clock()
        if self._first is None:
            self._first = (step, now)  # what came before includes compilation
        fields = {key: show(metrics[key]) for key, show in _FIELDS.items() if key in metrics}
        if self._bar is not None:
            self._fields.update(fields)
            room = self._bar.console.width - 1
            lines = (
                self._line(step, now, without=_LEAST_WANTED[:count])
                for count in range(len(_LEAST_WANTED) + 1)
            )
            for line in lines:
                if len(line) <= room - NARROWEST:
                    break
            self._drawn.bar_width = max(1, min(WIDEST, room - len(line)))
            self._bar.update(self._task, completed=step, description=line)
        else:
            self._fields = fields
            self.print(self._line(step, now))

    def compiling(self, now: bool) -> None:
        """Says while the step compiles, `now`, why there is nothing to report yet."""
        if self._bar is not None:
            line = self._line(self._start)
            self._bar.update(self._task, description=f"{line}  compiling" if now else line)
        elif now:
            self.print("compiling")

    def print(self, text: str) -> None:
        """Prints lines of text, above the bar if there is one."""
        if self._silent:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._file.write(text + "\n")
            self._file.flush()

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _line(self, step: int, now: float | None = None, without: Collection[str] = ()) -> str:
        names = [key for key in _FIELDS if key in self._fields and key not in without]
        fields = [self._fields[key] for key in names]
        left = self._time_left(step, now)
        count = f"step {step:{len(str(self._total))}d}/{self._total}"
        return "  ".join([count, *fields, *([f"{left} left"] if left else [])])

    def _time_left(self, step: int, now: float | None) -> str:
        if self._first is None or now is None or step <= self._first[0] or step >= self._total:
            return ""
        first_step, first_time = self._first
        seconds = (now - first_time) / (step - first_step) * (self._total - step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}"


def _rate(value: Any) -> str:
    value = float(value)
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.{1 if value >= 10 * size else 2}f}{unit} tokens/s"
    return f"{value:.0f} tokens/s"


_FIELDS: dict[str, Callable[[Any], str]] = {
    "loss": lambda value: f"loss {float(value):.4f}",
    "accuracy": lambda value: f"right {float(value):.1%}",
    "eval_accuracy": lambda value: f"eval right {float(value):.1%}",
    "reward": lambda value: f"reward {float(value):.4f}",
    "eval_reward": lambda value: f"eval reward {float(value):.4f}",
    "kl": lambda value: f"kl {float(value):.4f}",
    "eval_loss": lambda value: f"eval {float(value):.4f}",
    "eval_bits_per_byte": lambda value: f"{float(value):.4f} bits/byte",
    "tokens_per_second": _rate,
    "mfu": lambda value: f"mfu {100 * float(value):.1f}%",
    "data_wait": lambda value: f"data {100 * float(value):.1f}%",
}
_LEAST_WANTED = ("data_wait", "eval_bits_per_byte", "eval_loss", "tokens_per_second")
