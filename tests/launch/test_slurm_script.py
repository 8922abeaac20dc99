"""SLURM: what srun is given, and when the job goes back into the queue."""

import os
import signal
import subprocess
import time

import pytest
from scripts import CONFIG, LAUNCH, REPOSITORY, commands, script

TASK = [".venv/bin/python", "main.py", f"--config={CONFIG}", "--config.prompt=a b"]
SRUN = ["srun", "--kill-on-bad-exit=0"]
REQUEUE = ["scontrol", "requeue", "17"]


def slurm(code=0, **environment):
    environment = {"SLURM_JOB_ID": "17", **environment}
    return script("slurm.sbatch", CONFIG, "--config.prompt=a b", code=code, **environment)


def test_the_batch_file_asks_for_what_the_script_relies_on():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    asked = [line.split()[1] for line in lines if line.startswith("#SBATCH")]
    assert {"--signal=B:TERM@120", "--requeue", "--open-mode=append"} <= set(asked)
    assert "--ntasks-per-node=1" in asked  # one process has all GPUs of a node
    last = max(n for n, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[:last])  # sbatch stops at the first command


@pytest.mark.parametrize("code", [0, 1, 2, 75, 137, 143])
def test_a_lost_run_goes_back_into_the_queue_and_no_other(stubs, code):
    stubs.answer([["srun", [["", code]]]])
    slurm(code)
    again = [REQUEUE] if code in (75, 137, 143) else []
    assert stubs.calls() == [[*SRUN, *TASK], *again]


def test_there_is_an_end_to_going_back(stubs):
    stubs.answer([["srun", [["", 75]]]])
    error = slurm(2, SLURM_RESTART_COUNT="3", MAX_RESTARTS="3")
    assert "ended with code 75 after MAX_RESTARTS='3' restarts" in error
    assert REQUEUE not in stubs.calls()


def test_when_time_is_up_the_run_saves_and_goes_back(stubs, tmp_path):
    real = tmp_path / "bin" / "srun"
    real.unlink()
    real.write_text(
        '#!/usr/bin/env bash\ntrap "exit 0" USR1\necho $$ >"$STUBS/child"\n'
        "while true; do read -r -t 0.1 <> <(:) || :; done\n"
    )
    real.chmod(0o755)
    environment = {**os.environ, "SLURM_JOB_ID": "17"}
    command = ["bash", str(LAUNCH / "slurm.sbatch"), CONFIG]
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment) as batch:
        while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
            time.sleep(0.05)
        batch.terminate()
        while not stubs.calls():
            time.sleep(0.05)
        assert stubs.calls() == [["scancel", "--signal=TERM", "17"]]
        os.kill(int((tmp_path / "child").read_text()), signal.SIGUSR1)  # it has saved
        assert batch.wait(30) == 0
    assert stubs.calls()[1:] == [REQUEUE]


def test_the_dry_run_of_slurm_prints_every_command(stubs):
    printed = script("slurm.sbatch", "--dry-run", CONFIG, "--config.prompt=a b", CONTAINER="x/y")
    there = f"{REPOSITORY}"
    container = ["--container-image=x/y", f"--container-mounts={there}:{there}"]
    assert commands(printed) == [
        [*SRUN, *container, f"--container-workdir={there}", *TASK],
        ["scancel", "--signal=TERM", "JOB"],
        ["scontrol", "requeue", "JOB"],
    ]
    assert not stubs.calls()


@pytest.mark.parametrize(
    "arguments, environment, message",
    [
        ([], {}, "needs a config"),
        (["--config=x"], {}, "'--config=x' must be a config"),
        (["x.py"], {}, "config 'x.py' is not a file"),
        ([CONFIG, "x"], {}, "'x' is not a flag"),
        ([CONFIG], {"MAX_RESTARTS": "many"}, "MAX_RESTARTS='many' must be a whole number"),
        ([CONFIG], {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID='' must be a job's"),
    ],
)
def test_mistakes_in_slurm_are_one_line(stubs, arguments, environment, message):
    environment = {"SLURM_JOB_ID": "17", **environment}
    error = script("slurm.sbatch", *arguments, code=2, **environment)
    assert message in error and error.count("\n") == 1
    assert not stubs.calls()
