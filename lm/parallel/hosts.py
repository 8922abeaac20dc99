"""Several processes as one: start, agreement, and an orderly end whatever happens.

    with together(job.hosts):       # before anything touches a device
        ...                         # the whole job

On one machine alone this does nothing. With several processes `jax.distributed` connects them; then
a process that dies or fails makes all others stop within `hosts.heartbeat_timeout` seconds and a
few more, each with one line that names it and exit code `TRY_AGAIN` (75): the same command, started
again on all hosts, goes on from the last checkpoint. Only process 0 writes what is shared.

What processes tell each other beside their arrays goes through JAX's coordination service, which
process 0 runs. Its heartbeats are sent by threads of their own in C++, so a process that computes
for minutes without letting Python breathe still counts as alive. The service's client is private to
JAX, and imported where there are several processes alone. Not used is what JAX has against SIGTERM,
`multihost_utils.reached_preemption_sync_point`: it takes the signal from Python for good, so that a
process which reads a corpus, compiles or waits could be stopped no more.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools
import logging
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
from jax.extend.backend import register_backend_factory

from lm.config import ConfigError
from lm.parallel import TRY_AGAIN
from lm.parallel.cluster import Cluster, HostsConfig, detect

_FOREVER = 7 * 24 * 3600 * 1000  # milliseconds; whoever dies meanwhile ends the wait
# Of an error of a collective whose partner has gone.
_BROKEN = ("gloo", "nccl", "connection", "unavailable", "coordination", "barrier", "aborted")

_watch: Watch | None = None


def index() -> int:
    """Which process this is, from 0; 0 where there is one. Touches no device."""
    return _watch.index if _watch else 0


def count() -> int:
    """How many processes there are. Touches no device."""
    return _watch.count if _watch else 1


def agree(flag: bool) -> bool:
    """True on all processes at the same call, soon after one of them said True: `Watch.agree`."""
    return _watch.agree(flag) if _watch else flag


def barrier() -> None:
    """Returns when all processes have made this call."""
    if _watch:
        _watch.barrier()


def from_first(make: Callable[[], str]) -> str:
    """What `make` returns on process 0; it is called there alone."""
    return _watch.from_first(make) if _watch else make()


def blind(directory: str | os.PathLike[str]) -> list[str]:
    """Names of the processes that do not see what process 0 writes to `directory`.

    Process 0 creates the directory if need be.

    Raises:
      OSError: on process 0, if it cannot write there.
    """
    if _watch is None:
        return []
    directory = pathlib.Path(directory)

    def write() -> str:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".probe-{uuid.uuid4().hex}"
        probe.touch()
        return probe.name

    probe = directory / _watch.from_first(write)
    for _ in range(20):  # a network file system may take its time
        if seen := probe.exists():
            break
        time.sleep(0.25)
    answers = _watch.gather(str(int(seen)))
    if _watch.index == 0:
        probe.unlink()
    return [_watch.name(process) for process, answer in enumerate(answers) if answer == "0"]


@contextlib.contextmanager
def first_alone(
    directory: str | os.PathLike[str], notify: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Process 0 runs the body first, the others when it is done and `directory` holds the result.

    Where they do not see the directory of process 0, all run it at once, each for itself; `notify`
    is told of that, on process 0.
    """
    without = blind(directory)
    if without and notify and index() == 0:
        notify(f"{directory} is not shared: {', '.join(without)} must fill it again")
    if index() and not without:
        barrier()
    yield
    if not index() and not without:
        barrier()


# ---- Start and end --------------------------------------------------------------------------


@contextlib.contextmanager
def together(config: HostsConfig) -> Iterator[None]:
    """Runs its body as one of the processes that `config` or the environment names.

    Must come before anything touches a device. All leave it together. If the body raises on one,
    the others stop and say which and why.

    Raises:
      ConfigError: see `lm.parallel.cluster.detect`; or the others did not come.
    """
    global _watch
    if config.local_devices:
        jax.config.update("jax_num_cpu_devices", config.local_devices)
    cluster = None
    if not jax.distributed.is_initialized():  # by somebody who knows better
        cluster = detect(config)
        if cluster is None:
            yield
            return
    state = _private("distributed").global_state
    if cluster is not None:
        _connect(config, cluster)
    _mend_address(state)
    _watch = Watch(
        state.client,
        state.process_id,
        state.num_processes,
        state.coordinator_address,
        config.heartbeat_timeout,
    )
    _watch.start()
    for handler in logging.root.handlers:
        line = f"%(levelname)s: [process {index()}] %(message)s"
        handler.setFormatter(logging.Formatter(line))
    try:
        yield
        _watch.finish()
        _watch.serve()
    except BaseException as error:
        _watch.fail(error)
        raise
    jax.distributed.shutdown()
    _watch = None


def _private(name: str):
    """The module `jax._src.NAME`, or a ConfigError where this version of JAX has none."""
    try:
        return importlib.import_module(f"jax._src.{name}")
    except ImportError as error:
        raise ConfigError(
            f"config.hosts: several processes need jax._src.{name}, which jax {jax.__version__} "
            "does not have: install a version that setup.cfg names"
        ) from error


def _connect(config: HostsConfig, cluster: Cluster) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Else JAX aborts every process when one dies, without a word on which; `Watch` is told instead.
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)
    address = cluster.arguments.get("coordinator_address", "")
    where = f"config.hosts (cluster {cluster.kind}{address and ', coordinator ' + address})"
    timeout = config.initialization_timeout

    def late() -> None:
        # JAX would wait as long again, and abort.
        what = "not all processes came"
        if address and _refusal(address):
            what = "process 0 cannot be reached there"
        end_process(f"{where}: {what} within initialization_timeout={timeout} s")

    timer = threading.Timer(timeout, late)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **cluster.arguments,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
            initialization_timeout=timeout,
            shutdown_timeout_seconds=30,
        )
    except (RuntimeError, ValueError) as error:  # JAX's own kind is now one, now the other
        raise ConfigError(f"{where}: {' '.join(str(error).split())[:300]}") from error
    finally:
        timer.cancel()


def _mend_address(state) -> None:
    """Gives a CPU's collectives an address that other hosts can reach.

    Gloo takes what this machine's own name stands for. Where that is the loopback address, as in
    Debian's /etc/hosts, but process 0 is elsewhere, it must be the address that leads there.
    """
    try:
        family, kind, _, _, target = socket.getaddrinfo(
            *_host_and_port(state.coordinator_address), type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing
            mine = probe.getsockname()[0]
        named = socket.gethostbyname(socket.gethostname())
    except OSError:
        return
    if not named.startswith("127.") or mine.startswith("127.") or mine == "::1":
        return

    def make():
        made = _private("lib")._jax.make_gloo_tcp_collectives
        gloo = made(distributed_client=state.client, hostname=mine)
        return _private("xla_bridge").make_cpu_client(collectives=gloo)

    register_backend_factory("cpu", make, priority=0, fail_quietly=False)


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


# ---- What processes tell each other ---------------------------------------------------------


class Watch:
    """One process's view of the others.

    All keep one list of notes: a failure, a wish to stop, how far each is, that it is done. One
    thread reads it, another asks who is alive. A collective whose partner is dead may wait forever,
    so the answer to a death is to end the process, from a thread, with a line that names the dead.

    `client` and `address`, host:port, are those of JAX's coordination service.
    """

    def __init__(self, client: Any, index: int, count: int, address: str, heartbeat_timeout: float):
        self.index, self.count = index, count
        self._client, self._address, self._timeout = client, address, heartbeat_timeout
        # Process 0 answers everybody, so many processes ask less often.
        self._tick = max(min(1.0, heartbeat_timeout / 10), count / 1000)
        self._grace = 1 + 3 * self._tick  # seconds in which every process hears what is known
        self._hosts = ["of unknown host"] * count
        self._calls_together = itertools.count()
        self._changed = threading.Condition()
        self._calls = self._passed = 0
        self._asked = False
        self._leave_at: int | None = None
        self._ended = threading.Event()
        self._dying = threading.Lock()
        self._listener = threading.Thread(target=self._listen, daemon=True)

    def start(self) -> None:
        """Learns who the others are and starts to watch them."""
        if self.index:
            _on_abort(self._aborted)
        self._hosts = self.gather(socket.gethostname())
        self._listener.start()
        threading.Thread(target=self._count, daemon=True).start()

    def name(self, index: int) -> str:
        """`process 2 (host-b)`."""
        return f"process {index} ({self._hosts[index]})"

    def barrier(self) -> None:
        """Returns when all processes have made this call."""
        self._client.wait_at_barrier(f"lm/barrier/{next(self._calls_together)}", _FOREVER)

    def from_first(self, make: Callable[[], str]) -> str:
        """What `make` returns on process 0, on all processes."""
        key = f"lm/said/{next(self._calls_together)}"
        if self.index == 0:
            self._client.key_value_set(key, make())
        return self._client.blocking_key_value_get(key, _FOREVER)

    def gather(self, value: str) -> list[str]:
        """What every process says, in order."""
        folder = f"lm/gathered/{next(self._calls_together)}/"
        self._client.key_value_set(f"{folder}{self.index:07}", value, allow_overwrite=True)
        self.barrier()
        return [said for _, said in sorted(self._client.key_value_dir_get(folder))]

    def agree(self, flag: bool) -> bool:
        """True on all processes at the same call, soon after one of them said True.

        All processes must make the same calls in the same order. Costs a lock until somebody says
        True; then each waits, once, until it is known how many calls the furthest has made, which
        no process's devices need to wait for.
        """
        with self._changed:
            self._calls += 1
            if flag and not self._asked:
                self._stop()
            if self._asked:
                self._changed.wait_for(lambda: self._leave_at is not None)
                if self._calls >= self._leave_at:
                    return True
            self._passed = self._calls
            return False

    def _stop(self) -> None:
        """Tells how far this process is, and with it the wish to stop; `_changed` is held."""
        self._asked = True
        self._tell("passed", str(self._passed))

    def finish(self) -> None:
        """Returns when all processes have called this; then nobody watches any more."""
        self._tell("done")
        self._listener.join()
        self._end()

    def serve(self) -> None:
        """On process 0, after `finish`: returns when the others need its service no more."""
        with contextlib.suppress(Exception):
            while self.index == 0 and len(self._alive()) > 1:
                pass

    def fail(self, error: BaseException) -> None:
        """Tells the others that this process has failed, and why, before it leaves.

        If the reason may be that one of them is dead, waits for the other threads to say so, which
        ends the process.
        """
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, Exception) and any(word in text.lower() for word in _BROKEN):
            self._ended.wait(self._timeout + 3 * self._grace)
        text = str(error) if isinstance(error, ValueError) else text
        with contextlib.suppress(Exception):
            self._tell("failed", " ".join(text.split())[:500])
        self._end()
        if self.index == 0:
            time.sleep(self._grace)  # the others read the note from this process

    def _end(self) -> None:
        self._ended.set()
        _on_abort(None)

    def _die(self, line: str) -> NoReturn:
        """Ends this process from whatever thread noticed, while the main one waits somewhere."""
        if not self._dying.acquire(blocking=False) or self._ended.is_set():
            threading.Event().wait()  # another thread is at it
        end_process(
            f"{line}; so {self.name(self.index)} stops: run the same command again on all hosts, "
            "and it goes on from the last checkpoint",
            self._grace if self.index == 0 else 0,
        )

    def _tell(self, kind: str, text: str = "") -> None:
        number = self._client.key_value_increment("lm/notes", 1)
        self._client.key_value_set(f"lm/note/{number}", f"{kind} {self.index} {text}")

    def _listen(self) -> None:
        """Reads the notes as they come, until all processes are done."""
        passed: dict[str, int] = {}
        done = 0
        for number in itertools.count(1):
            try:
                note = self._client.blocking_key_value_get(f"lm/note/{number}", _FOREVER)
            except Exception:  # process 0 is gone, and JAX aborts this one
                self._ended.wait()
                return
            kind, process, text = note.split(" ", 2)
            if kind == "failed" and int(process) != self.index:
                # What all processes find wrong, each has the time to say itself.
                self._ended.wait(self._grace)
                self._die(f"{self.name(int(process))} has failed ({text})")
            elif kind == "done":
                done += 1
                if done == self.count:
                    return
            elif kind == "passed":
                passed[process] = int(text)
                with self._changed:
                    if not self._asked:
                        self._stop()
                    if len(passed) == self.count:
                        self._leave_at = max(passed.values()) + 1
                        self._changed.notify_all()

    def _alive(self) -> Mapping[int, int]:
        """Processes → their incarnations; all that are alive must ask, and get the same answer."""
        return self._client.get_live_nodes(list(range(self.count)))

    def _count(self) -> None:
        """Looks for processes that are dead, or have started anew, until the end."""
        first: Mapping[int, int] | None = None
        while not self._ended.wait(self._tick):
            try:
                alive = self._alive()
            except Exception:
                continue  # process 0 does not answer: JAX aborts this one
            first = first or alive
            for process in range(self.count):
                if process not in alive:
                    self._ended.wait(2 * self._grace)  # if it left a note why, that is said
                    self._die(f"{self.name(process)} has died: no heartbeat for {self._timeout} s")
                if alive[process] != first.get(process):
                    self._die(f"{self.name(process)} has died and started again")

    def _aborted(self) -> None:
        """JAX aborts a process whom process 0 does not answer; this says what happened."""
        if refusal := _refusal(self._address):
            silence = f"no answer for {self._timeout} s"
            what = silence if refusal == "silent" else "its connection broke"
            self._die(f"{self.name(0)} has died: {what}")


def end_process(line: str, grace: float = 0) -> NoReturn:
    """Says `line` as an error and ends the process with `TRY_AGAIN`, from any thread.

    `grace` seconds it stays after saying it, for others who depend on this process.
    """
    # The main thread may hold the lock of a stream that nobody reads.
    flushing = threading.Thread(target=sys.stdout.flush, daemon=True)
    flushing.start()
    flushing.join(1)
    os.write(2, f"error: {line}\n".encode())
    time.sleep(grace)
    os._exit(TRY_AGAIN)


def _refusal(address: str) -> str:
    """How process 0 does not answer at host:port: "refused", "silent", or "" where it does.

    A server of gRPC speaks first; for one that hangs, the kernel would still accept connections.
    """
    try:
        with socket.create_connection(_host_and_port(address), timeout=2) as connection:
            return "" if connection.recv(1) else "refused"
    except TimeoutError:
        return "silent"
    except OSError:
        return "refused"


_handlers: list[Any] = []  # C may call them as long as the process lives


def _on_abort(function: Callable[[], None] | None) -> None:
    """Has C call `function` when it aborts the process, and then go on doing so; None: no more.

    A handler of Python's own `signal` module would run too late: never.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p

    def handle(number: int) -> None:
        libc.signal(number, None)
        function()

    if function is not None:
        _handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(handle))
    handler = ctypes.cast(_handlers[-1], ctypes.c_void_p) if function is not None else None
    libc.signal(signal.SIGABRT, handler)
