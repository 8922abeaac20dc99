"""What tpu_vm.sh and queued_resource.sh do on a worker."""

import os
import signal
import time

import pytest
from scripts import script


@pytest.fixture
def worker(tmp_path, stubs, monkeypatch):
    """A home with a Python that ends with the codes in a file, one after the other."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DELAY", "0")
    monkeypatch.setenv("MOUNTED", str(tmp_path / "mnt"))
    python = tmp_path / "lm-env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/usr/bin/env bash\necho "run $*"\ntrap "exit 75" TERM\n'
        "code=$(head -n 1 ~/codes); sed -i 1d ~/codes\n"
        "[[ $code == forever ]] && while true; do read -r -t 0.1 <> <(:) || :; done\nexit $code\n"
    )
    python.chmod(0o755)

    def start(*codes):
        (tmp_path / "codes").write_text("\n".join(codes) + "\n")
        script("worker.sh", "start", "--config=x", "--config.prompt=a b")

    return start


def until(state, seconds=60):
    deadline = time.monotonic() + seconds
    while (found := script("worker.sh", "status").strip()) != f"lm-run: {state}":
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def test_a_worker_starts_again_when_it_is_asked_to_and_only_then(worker, tmp_path):
    until("none")
    worker("75", "75", "0")
    until("done")
    log = (tmp_path / "lm-run" / "log").read_text()
    assert log.count("run main.py --config=x --config.prompt=a b") == 3
    worker("75", "2", "0")
    until("failed 2")


def test_stop_lets_the_run_leave_and_not_come_back(worker, tmp_path):
    worker("forever", "0")
    until("running")
    assert "under way" in script("worker.sh", "start", "--config=x", code=2)
    script("worker.sh", "ensure", "--config=x")
    while "run main.py" not in (tmp_path / "lm-run" / "log").read_text():
        time.sleep(0.05)
    script("worker.sh", "stop")
    until("stopped")
    assert (tmp_path / "lm-run" / "log").read_text().count("run main.py") == 1


def test_a_worker_that_lost_power_says_that_nothing_runs(worker, tmp_path):
    worker("forever")
    until("running")
    os.killpg(int((tmp_path / "lm-run" / "pid").read_text()), signal.SIGKILL)
    until("none")
