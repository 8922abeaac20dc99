"""What processes tell each other beside their arrays: that they live, fail, must stop, are done.

All of it goes through JAX's coordination service, which process 0 runs. Its heartbeats are sent by
threads of their own in C++, so a process that computes for minutes without letting Python breathe
still counts as alive. Three threads of ours use it:

    counting    asks who is alive; one that is not, or has started anew, is dead
    listening   reads the notes that the others left: a failure, a wish to stop, the end
    timing      notices when process 0 has not answered for too long

A collective whose partner is dead may wait forever, so the answer to a death is to end the process,
from a thread, with one line that names the dead one and the exit code `TRY_AGAIN`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: start the same command again, on every host
_NAMES, _NOTES = "lm/name/", "lm/note/"
_FOREVER = 7 * 24 * 3600 * 1000  # milliseconds; whoever dies meanwhile ends the wait


class Watch:
    """One process's view of the others.

    Args:
      client: of JAX's coordination service.
      index: of this process.
      count: of all processes.
      address: host:port of the coordination service.
      heartbeat_timeout: seconds of silence after which a process is dead.
    """

    def __init__(self, client: Any, index: int, count: int, address: str, heartbeat_timeout: float):
        self.index, self.count = index, count
        self._client, self._address, self._timeout = client, address, heartbeat_timeout
        # Process 0 answers everybody, so many processes ask less often.
        self._tick = max(min(1.0, heartbeat_timeout / 10), count / 1000)
        self._names: dict[int, str] = {}
        self._changed = threading.Condition()
        self._notes: dict[str, dict[int, str]] = {}
        self._unanswered = 0.0
        self._calls = self._passed = 0
        self._asked = False
        self._leave_at: int | None = None
        self._ended = threading.Event()
        self._hurry = threading.Event()
        self._dying = threading.Lock()
        self._barriers = 0
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Learns who the others are and starts to watch them."""
        if self.index:
            _on_abort(self._aborted)
        key = f"{_NAMES}{self.index}"
        self._client.key_value_set(key, socket.gethostname(), allow_overwrite=True)
        self.barrier()
        names = self._client.key_value_dir_get(_NAMES)
        self._names = {int(key.rpartition("/")[2]): name for key, name in names}
        for work in (self._counting, self._listening, self._timing):
            thread = threading.Thread(target=work, name=work.__name__, daemon=True)
            self._threads.append(thread)
            thread.start()

    def name(self, index: int) -> str:
        """`process 2 (host-b)`."""
        return f"process {index} ({self._names.get(index, 'of unknown host')})"

    # ---- What processes agree on ------------------------------------------------------------

    def agree(self, flag: bool) -> bool:
        """True on all processes at the same call, soon after one of them said True.

        All processes must make the same calls in the same order. Costs a lock until somebody says
        True; then each waits, once, until it is known how many calls the furthest has made, which
        no process's devices need to wait for.
        """
        with self._changed:
            self._calls += 1
            if flag and not self._asked:
                self._asked = True
                self._hurry.set()
            if self._asked:
                self._changed.wait_for(lambda: self._leave_at is not None)
                if self._calls >= self._leave_at:
                    return True
            self._passed = self._calls
            return False

    def barrier(self) -> None:
        """Returns when all processes have made this call."""
        self._barriers += 1
        self._client.wait_at_barrier(f"lm/barrier/{self._barriers}", _FOREVER)

    def from_first(self, make: Callable[[], str]) -> str:
        """What `make` returns on process 0, on all processes."""
        self._barriers += 1
        key = f"lm/said/{self._barriers}"
        if self.index == 0:
            self._client.key_value_set(key, make())
        return self._client.blocking_key_value_get(key, _FOREVER)

    def gather(self, value: str) -> list[str]:
        """What every process says, in order."""
        self._barriers += 1
        key = f"lm/gathered/{self._barriers}/"
        self._client.key_value_set(f"{key}{self.index}", value)
        self.barrier()
        said = self._client.key_value_dir_get(key)
        return [value for _, value in sorted((int(k.rpartition("/")[2]), v) for k, v in said)]

    # ---- Ends -------------------------------------------------------------------------------

    def finish(self) -> None:
        """Returns when all processes have called this; then nobody watches any more."""
        self._note("done", "")
        with self._changed:
            self._changed.wait_for(lambda: len(self._notes.get("done", ())) == self.count)
        self._end()

    def left_alone(self) -> None:
        """For process 0, after `finish`: returns when the others need its service no more."""
        everybody = list(range(self.count))
        with contextlib.suppress(Exception):
            while set(self._client.get_live_nodes(everybody)) != {self.index}:
                pass

    def fail(self, error: BaseException) -> None:
        """Tells the others that this process has failed, and why, before it leaves.

        If the reason may be that one of them is dead, waits for the other threads to say so, which
        ends the process.
        """
        if _lost_somebody(error):
            self._ended.wait(self._timeout + 5 * self._tick)
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(Exception):
            self._note("failed", " ".join(text.split())[:500])
        self._end()
        if self.index == 0:
            time.sleep(self._grace)  # the others read the note from this process

    @property
    def _grace(self) -> float:
        """Seconds in which every process hears what is known."""
        return 1 + 3 * self._tick

    def _end(self) -> None:
        self._ended.set()
        _on_abort(None)
        for thread in self._threads:
            thread.join(self._grace)

    def _die(self, line: str) -> NoReturn:
        """Ends this process from whatever thread noticed, while the main one waits somewhere."""
        if not self._dying.acquire(blocking=False) or self._ended.is_set():
            threading.Event().wait()  # another thread is at it
        end_process(
            f"{line}; so {self.name(self.index)} stops: run the same command again on all hosts, "
            "and it goes on from the last checkpoint",
            self._grace if self.index == 0 else 0,
        )

    # ---- Threads ----------------------------------------------------------------------------

    def _counting(self) -> None:
        everybody = list(range(self.count))
        first: Mapping[int, int] | None = None
        while not self._ended.wait(self._tick):
            try:
                # Answered when all that are alive have asked, so all get the same answer.
                alive = self._client.get_live_nodes(everybody)
            except Exception:
                continue  # process 0 does not answer: `_timing` decides
            if self._ended.is_set():
                return
            first = alive if first is None else first
            for process in everybody:
                if process not in alive:
                    if self._said_why(process):
                        continue  # `_listening` repeats it
                    self._die(f"{self.name(process)} has died: no heartbeat for {self._timeout} s")
                if alive[process] != first.get(process):
                    self._die(f"{self.name(process)} has died and started again")

    def _said_why(self, process: int) -> bool:
        """Whether a process left a note that it failed before it went."""
        with contextlib.suppress(Exception):
            notes = self._client.key_value_dir_get(f"{_NOTES}failed/")
            return f"{_NOTES}failed/{process}" in dict(notes)
        return False

    def _listening(self) -> None:
        failures: dict[int, float] = {}
        while not self._ended.is_set():
            self._hurry.wait(self._tick)
            self._hurry.clear()
            try:
                pairs = self._client.key_value_dir_get(_NOTES)
            except Exception:
                self._ended.wait(self._tick)
                continue
            notes: dict[str, dict[int, str]] = {}
            for key, value in pairs:
                kind, process = key.removeprefix(_NOTES).split("/")
                notes.setdefault(kind, {})[int(process)] = value
            with self._changed:
                self._unanswered = 0.0
                self._notes = notes
                self._answer_stop()
                self._changed.notify_all()
            for process, reason in notes.get("failed", {}).items():
                # What all processes find wrong, each has the time to say itself.
                heard = failures.setdefault(process, time.monotonic())
                if process != self.index and time.monotonic() > heard + self._grace:
                    self._die(f"{self.name(process)} has failed ({reason})")

    def _answer_stop(self) -> None:
        """Tells, once somebody wants to stop, how far this process is; `_changed` is held."""
        counts = self._notes.get("stop", {})
        if self.index not in counts and (counts or self._asked):
            self._asked = True
            self._note("stop", str(self._passed))
            self._hurry.set()
        elif len(counts) == self.count:
            self._leave_at = max(map(int, counts.values())) + 1

    def _timing(self) -> None:
        step = min(1.0, self._tick)
        while not self._ended.wait(step):
            # Steps are counted and not seconds: if nothing at all ran here meanwhile, this process
            # is the one that was silent.
            self._unanswered += step
            if self._unanswered > self._timeout:
                self._die(f"{self.name(0)} has died: no answer for {self._timeout} s")

    def _note(self, kind: str, value: str) -> None:
        self._client.key_value_set(f"{_NOTES}{kind}/{self.index}", value, allow_overwrite=True)

    def _aborted(self) -> None:
        """JAX aborts a process whose connection to process 0 breaks; this says what happened."""
        if self._unanswered > self._timeout / 2:
            self._die(f"{self.name(0)} has died: no answer for {self._unanswered:.0f} s")
        if not answers(self._address):
            self._die(f"{self.name(0)} has died: its connection broke")


def end_process(line: str, grace: float = 0) -> NoReturn:
    """Says `line` as an error and ends the process with `TRY_AGAIN`, from any thread.

    Args:
      line: without a newline.
      grace: seconds to stay after saying it, for others who depend on this process.
    """
    # The main thread may hold the lock of a stream that nobody reads.
    flushing = threading.Thread(target=sys.stdout.flush, daemon=True)
    flushing.start()
    flushing.join(1)
    os.write(2, f"error: {line}\n".encode())
    time.sleep(grace)
    os._exit(TRY_AGAIN)


def answers(address: str) -> bool:
    """Whether somebody listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True


_handlers: list[Any] = []  # C may call them as long as the process lives


def _on_abort(function: Callable[[], None] | None) -> None:
    """Has C call `function` when it aborts the process, and then go on doing so; None: no more.

    A handler of Python's own `signal` module would run too late: never.
    """
    libc = ctypes.CDLL(None)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p

    def handle(number: int) -> None:
        libc.signal(number, None)
        function()

    handler = None
    if function is not None:
        handler = ctypes.cast(_keep(kind(handle)), ctypes.c_void_p)
    libc.signal(signal.SIGABRT, handler)


def _keep(handler: Any) -> Any:
    _handlers.append(handler)
    return handler


_BROKEN = ("gloo", "nccl", "connection", "unavailable", "coordination", "barrier", "aborted")


def _lost_somebody(error: BaseException) -> bool:
    """Whether an error looks like that of a collective whose partner has gone."""
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, Exception) and any(word in text for word in _BROKEN)
