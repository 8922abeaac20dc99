"""What processes agree on and how they notice each other's end, without a network or a process."""

import socket
import sys
import threading
import time

import pytest

from lm.config import ConfigError
from lm.parallel import hosts
from lm.parallel.cluster import HostsConfig
from lm.parallel.hosts import Watch


class Service:
    """What `Watch` needs of JAX's coordination service, for threads instead of processes."""

    def __init__(self, count):
        self.values = {}
        self.alive = {process: 1000 + process for process in range(count)}
        self.barriers = {}
        self.count = count
        self.lock = threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.lock:
            assert allow_overwrite or key not in self.values
            self.values[key] = value
            self.lock.notify_all()

    def key_value_increment(self, key, amount):
        with self.lock:
            self.values[key] = self.values.get(key, 0) + amount
            return self.values[key]

    def key_value_dir_get(self, folder):
        with self.lock:
            return [(key, value) for key, value in self.values.items() if key.startswith(folder)]

    def blocking_key_value_get(self, key, timeout_in_ms):
        with self.lock:
            self.lock.wait_for(lambda: key in self.values, timeout_in_ms / 1000)
            return self.values[key]

    def wait_at_barrier(self, name, timeout_in_ms):
        with self.lock:
            barrier = self.barriers.setdefault(name, threading.Barrier(self.count))
        barrier.wait(10)

    def get_live_nodes(self, processes):
        return {process: self.alive[process] for process in processes if process in self.alive}


class Thread(Watch):
    """A `Watch` that stops watching where the real one would end its process."""

    def _die(self, line):
        self.died = line
        self._ended.set()
        threading.Event().wait()


made_here = []


@pytest.fixture(autouse=True)
def no_signals(monkeypatch):
    monkeypatch.setattr("lm.parallel.hosts._on_abort", lambda function: None)
    yield
    while made_here:
        made_here.pop()._ended.set()


def watches(count, heartbeat_timeout=0.5):
    service = Service(count)
    made = [Thread(service, p, count, "127.0.0.1:1", heartbeat_timeout) for p in range(count)]
    made_here.extend(made)
    run_all([watch.start for watch in made])
    return service, made


def run_all(functions):
    """Calls all at once, each in its thread; what they returned."""
    results = [None] * len(functions)

    def call(place, function):
        results[place] = function()

    threads = [threading.Thread(target=call, args=pair) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return results


def death(watch, seconds=10):
    end = time.monotonic() + seconds
    while not hasattr(watch, "died") and time.monotonic() < end:
        time.sleep(0.01)
    return getattr(watch, "died", None)


def test_one_process_needs_no_network():
    with hosts.together(HostsConfig(cluster="none")):
        assert (hosts.index(), hosts.count()) == (0, 1)
        assert hosts.agree(True) and not hosts.agree(False)
        assert hosts.blind("/nowhere") == []
        assert hosts.from_first(lambda: "this") == "this"
        with hosts.first_alone("/nowhere"):
            hosts.barrier()


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_all_stop_at_the_same_call_wherever_the_wish_arises(slow):
    """One process is behind the others, as far as their collectives let it be."""
    _, made = watches(3)
    calls = [0, 0, 0]

    def train(watch):
        while True:
            calls[watch.index] += 1
            if watch.agree(watch.index == 1 and calls[1] > 40):
                return calls[watch.index]
            # No process gets more than one call ahead of the slowest.
            while calls[watch.index] > min(calls):
                time.sleep(0.0005)
            time.sleep(0.002 if watch.index == slow else 0)

    stopped = run_all([lambda watch=watch: train(watch) for watch in made])
    assert len(set(stopped)) == 1 and stopped[0] > 40
    run_all([watch.finish for watch in made])


def test_nobody_stops_unasked_and_all_leave_together():
    _, made = watches(2)
    assert not any(watch.agree(False) for _ in range(100) for watch in made)
    left = []

    def late():
        time.sleep(0.3)
        left.append("late")
        made[1].finish()

    def early():
        made[0].finish()
        left.append("early")

    run_all([late, early])
    assert left == ["late", "early"]
    assert not any(watch._listener.is_alive() for watch in made)


def test_what_the_first_says_and_what_all_say():
    _, made = watches(3)

    def talk(watch):
        said = watch.from_first(lambda: f"from {watch.index}")
        return said, watch.gather(f"I am {watch.index}"), watch.from_first(lambda: "again")

    expected = ("from 0", ["I am 0", "I am 1", "I am 2"], "again")
    assert run_all([lambda watch=watch: talk(watch) for watch in made]) == [expected] * 3


def test_a_process_without_a_heartbeat_is_named_to_all_others():
    service, made = watches(3)
    del service.alive[2]
    for watch in made[:2]:
        assert death(watch).startswith("process 2 (")
        assert "no heartbeat for 0.5 s" in watch.died


def test_a_process_that_came_back_is_as_good_as_dead():
    service, made = watches(2)
    time.sleep(0.3)
    service.alive[1] = 7
    assert "process 1" in death(made[0]) and "started again" in made[0].died


@pytest.mark.parametrize(
    ("server", "what"), [("gone", "its connection broke"), ("silent", "no answer for 0.5 s")]
)
def test_a_coordinator_that_does_not_answer_is_named(server, what):
    _, [_, watch] = watches(2)
    with socket.create_server(("127.0.0.1", 0)) as listening:  # accepts, and says nothing
        if server == "silent":
            watch._address = f"127.0.0.1:{listening.getsockname()[1]}"
        threading.Thread(target=watch._aborted, daemon=True).start()
        assert death(watch) == f"process 0 ({socket.gethostname()}) has died: {what}"


def test_a_failure_is_told_with_its_reason():
    _, made = watches(2)
    made[1].fail(OSError("no space\nleft"))
    assert "process 1" in death(made[0]) and "failed (OSError: no space left)" in made[0].died


def test_a_broken_collective_waits_for_the_name_of_the_dead():
    service, made = watches(2, heartbeat_timeout=1)
    del service.alive[0]
    began = time.monotonic()
    made[1].fail(RuntimeError("Gloo AllReduce failed: Connection closed by peer"))
    assert time.monotonic() - began > 1
    assert "process 0" in made[1].died


def test_a_jax_without_what_is_private_is_named_in_one_line(monkeypatch):
    """An upgrade of JAX that moves it stops several processes, and nobody else."""
    monkeypatch.setitem(sys.modules, "jax._src.distributed", None)
    monkeypatch.setattr(hosts.jax.distributed, "is_initialized", lambda: True)
    together = hosts.together(HostsConfig())
    with pytest.raises(ConfigError, match=r"config\.hosts: .*jax\._src\.distributed"), together:
        pass
