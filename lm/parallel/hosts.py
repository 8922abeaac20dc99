"""Several processes as one: start, agreement, and an orderly end whatever happens.

    with together(job.hosts):       # before anything touches a device
        ...                         # the whole job

On one machine alone this does nothing. With several processes `jax.distributed` connects them; then
a process that dies or fails makes all others stop within `hosts.heartbeat_timeout` seconds and a
few more, each with one line that names it and exit code `TRY_AGAIN` (75): the same command, started
again on all hosts, goes on from the last checkpoint. Only process 0 writes what is shared.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator

import jax
from jax.extend.backend import register_backend_factory

from lm.config import ConfigError
from lm.parallel.cluster import Cluster, HostsConfig, detect
from lm.parallel.watch import TRY_AGAIN, Watch, answers, end_process

__all__ = [
    "TRY_AGAIN",
    "HostsConfig",
    "agree",
    "barrier",
    "blind",
    "count",
    "first_alone",
    "from_first",
    "index",
    "initialize",
    "shutdown",
    "together",
]

_watch: Watch | None = None


def index() -> int:
    """Which process this is, from 0; 0 where there is one. Touches no device."""
    return _watch.index if _watch else 0


def count() -> int:
    """How many processes there are. Touches no device."""
    return _watch.count if _watch else 1


def initialize(config: HostsConfig) -> None:
    """Connects this process to the others of its run, if there are any.

    Must come before anything touches a device. The second call does nothing.

    Raises:
      ConfigError: see `lm.parallel.cluster.detect`; or the others did not come.
    """
    global _watch
    if _watch is not None:
        return
    if config.local_devices:
        jax.config.update("jax_num_cpu_devices", config.local_devices)
    if not jax.distributed.is_initialized():  # by somebody who knows better
        cluster = detect(config)
        if cluster is None:
            return
        _connect(config, cluster)
    state = _private("distributed").global_state
    _mend_address(state)
    watch = Watch(
        state.client,
        state.process_id,
        state.num_processes,
        state.coordinator_address,
        config.heartbeat_timeout,
    )
    watch.start()
    _watch = watch
    _name_process_in_log()


def _private(name: str):
    """The module `jax._src.NAME`: what connects processes is public in no other way.

    Raises:
      ConfigError: this version of JAX has none.
    """
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
    # It would take SIGTERM away from Python; `agree` does what it is for.
    jax.config.update("jax_enable_preemption_service", False)
    address = cluster.arguments.get("coordinator_address", "")
    where = f"config.hosts (cluster {cluster.kind}{address and ', coordinator ' + address})"

    def late() -> None:
        # JAX would wait as long again, and abort.
        what = "not all processes came"
        if address and not answers(address):
            what = "process 0 cannot be reached there"
        end_process(f"{where}: {what} within initialization_timeout={timeout} s")

    timeout = config.initialization_timeout
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
    host, _, port = state.coordinator_address.rpartition(":")
    try:
        family, kind, _, _, target = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_DGRAM
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


def _name_process_in_log() -> None:
    """Every logged line, which is a warning or worse, says which process it comes from."""
    make = logging.getLogRecordFactory()

    def named(*arguments, **fields):
        record = make(*arguments, **fields)
        record.msg = f"[process {index()}] {record.msg}"
        return record

    if count() > 1:
        logging.setLogRecordFactory(named)


def shutdown() -> None:
    """Waits until all processes are done, then disconnects this one. Does nothing for one alone."""
    global _watch
    if _watch is None:
        return
    _watch.finish()
    if _watch.index == 0:
        _watch.left_alone()
    jax.distributed.shutdown()
    _watch = None


@contextlib.contextmanager
def together(config: HostsConfig) -> Iterator[None]:
    """Runs its body as one of the processes that `config` or the environment names.

    All leave it together. If the body raises on one, the others stop and say which and why.

    Raises:
      ConfigError: as `initialize`.
    """
    initialize(config)
    try:
        yield
    except BaseException as error:
        if _watch is not None:
            _watch.fail(error)
        raise
    shutdown()


def agree(flag: bool) -> bool:
    """True on all processes at the same call, soon after one of them said True.

    All must make the same calls. Until then it costs a lock; see `lm.parallel.watch.Watch.agree`.
    """
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
        seen = probe.exists()
        if seen:
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

    Where they do not see the directory of process 0, all run it at once, each for itself.

    Args:
      directory: where the body writes.
      notify: told of that, on process 0.
    """
    without = blind(directory)
    if without and notify and index() == 0:
        notify(f"{directory} is not shared: {', '.join(without)} must fill it again")
    if index() and not without:
        barrier()
    yield
    if not index() and not without:
        barrier()
