"""Real processes on this machine: what they do when all is well, and when one of them is gone."""

import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import uuid

import numpy as np
import pytest
import tiny_jobs

from lm import files

LAUNCH = tiny_jobs.REPOSITORY / "launch" / "local.py"
launcher = runpy.run_path(str(LAUNCH))


# ---- Commands, without starting any -----------------------------------------------------------


def dry_run(*flags, environment=None):
    arguments = [sys.executable, str(LAUNCH), *flags, "--dry-run", "--", "--config=x.py", "--a=b c"]
    clean = {n: v for n, v in os.environ.items() if n not in ("XLA_FLAGS", "CUDA_VISIBLE_DEVICES")}
    result = subprocess.run(
        arguments, capture_output=True, text=True, check=True, env={**clean, **(environment or {})}
    )
    commands = []
    for line in result.stdout.splitlines():
        words = shlex.split(line)
        settings = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
        commands.append((settings, words))
    return commands


def test_every_process_learns_its_number_and_where_the_first_is():
    commands = dry_run("--processes=3", "--devices=2")
    assert [settings["LM_PROCESS_ID"] for settings, _ in commands] == ["0", "1", "2"]
    assert {settings["LM_NUM_PROCESSES"] for settings, _ in commands} == {"3"}
    [address] = {settings["LM_COORDINATOR"] for settings, _ in commands}
    assert re.fullmatch(r"127\.0\.0\.1:\d+", address)
    for settings, words in commands:
        assert settings["JAX_NUM_CPU_DEVICES"] == "2" and settings["JAX_PLATFORMS"] == "cpu"
        assert words[-3:] == [str(tiny_jobs.REPOSITORY / "main.py"), "--config=x.py", "--a=b c"]


def test_some_of_the_processes_may_be_elsewhere():
    commands = dry_run("--processes=2", "--first=2", "--total=4", "--address=10.0.0.1:77")
    assert [settings["LM_PROCESS_ID"] for settings, _ in commands] == ["2", "3"]
    assert all(s["LM_NUM_PROCESSES"] == "4" for s, _ in commands)
    assert all(s["LM_COORDINATOR"] == "10.0.0.1:77" for s, _ in commands)


def test_another_command_may_start_each():
    [_, (settings, words)] = dry_run("--via=ip netns exec host{process}", "--devices=1")
    assert words[:5] == ["ip", "netns", "exec", "host1", "env"]
    assert settings["LM_PROCESS_ID"] == "1"


def test_gpus_are_shared_evenly():
    commands = dry_run("--processes=2", environment={"CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    assert [settings["CUDA_VISIBLE_DEVICES"] for settings, _ in commands] == ["0,1", "2,3"]
    [(settings, _)] = dry_run("--processes=1", environment={"CUDA_VISIBLE_DEVICES": "0,1"})
    assert "CUDA_VISIBLE_DEVICES" not in settings


def test_another_number_of_fake_devices_is_forgotten():
    flags = "--xla_dump_to=here --xla_force_host_platform_device_count=8"
    [(settings, _), _] = dry_run("--devices=2", environment={"XLA_FLAGS": flags})
    assert settings["XLA_FLAGS"] == "--xla_dump_to=here"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes=0"], "--processes=0 must be at least 1"),
        (["--total=4"], "--total=4 needs --address"),
        (["--total=4", "--first=3", "--address=a:1"], "processes 3 to 4 are not among"),
        (["--address=a"], "--address=a must be host:port"),
        (["--restarts=-1"], "must not be negative"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        launcher["parse"](flags)
    assert message in capsys.readouterr().err


# ---- Processes that do nothing much -----------------------------------------------------------


def run_script(tmp_path, script, *flags):
    """The launcher with `script` in place of main.py: exit code and lines of output."""
    program = tmp_path / "program.py"
    program.write_text("import os, sys, time\nme = int(os.environ['LM_PROCESS_ID'])\n" + script)
    arguments = [sys.executable, str(LAUNCH), f"--program={program}", "--devices=1", *flags]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    return result.returncode, result.stdout.splitlines()


def test_lines_say_whose_they_are(tmp_path):
    code, lines = run_script(tmp_path, "print('hello'); print('oh', file=sys.stderr)")
    assert code == 0
    assert sorted(lines) == ["[0] hello", "[0] oh", "[1] hello", "[1] oh"]


def test_what_stays_when_another_has_gone_is_killed_in_the_end(tmp_path):
    code, lines = run_script(tmp_path, "sys.exit(75) if me else time.sleep(60)", "--grace=0.5")
    assert code == 75
    assert "[launch] process 1 ended with code 75" in lines
    assert "[launch] process 0 ended with signal SIGKILL" in lines


def test_restarts_until_it_works_but_never_a_mistake(tmp_path):
    count = f"file = open({str(tmp_path / 'runs')!r}, 'a+'); file.seek(0); n = len(file.read())\n"
    script = count + "if me: sys.exit()\nfile.write('x'); file.close(); sys.exit({})"
    code, _ = run_script(tmp_path, script.format("0 if n == 2 else 75"), "--restarts=5")
    assert code == 0 and (tmp_path / "runs").read_text() == "xxx"
    (tmp_path / "runs").unlink()
    code, _ = run_script(tmp_path, script.format("2"), "--restarts=5")
    assert code == 2 and (tmp_path / "runs").read_text() == "x"
    (tmp_path / "runs").unlink()
    code, _ = run_script(tmp_path, script.format("75"), "--restarts=1")
    assert code == 75 and (tmp_path / "runs").read_text() == "xx"


# ---- Training ---------------------------------------------------------------------------------

# Plain SGD, as in test_loop: Adam would make much of what is only rounding.
FIELDS = {
    "optimizer__name": "sgd",
    "optimizer__learning_rate": 0.3,
    "train__log_every": 2,
    "checkpoint__every": 8,
    "model__num_heads": 4,
}
STEPS = 24


@contextlib.contextmanager
def namespaces(count):
    """Networks of their own for so many hosts, with one switch between them; their addresses."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the ip command")
    mark = uuid.uuid4().hex[:6]
    switch, names = f"lm{mark}s", [f"lm{mark}h{process}" for process in range(count)]

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, text=True)

    def build():
        yield ip("netns", "add", switch)
        yield ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        yield ip("-n", switch, "link", "set", "bridge", "up")
        for process, name in enumerate(names):
            cable = f"lm{mark}{process}"
            yield ip("netns", "add", name)
            yield ip("link", "add", cable, "type", "veth", "peer", "eth0", "netns", name)
            yield ip("link", "set", cable, "netns", switch)
            yield ip("-n", switch, "link", "set", cable, "master", "bridge", "up")
            yield ip("-n", name, "address", "add", f"10.231.7.{process + 1}/24", "dev", "eth0")
            yield ip("-n", name, "link", "set", "eth0", "up")
            yield ip("-n", name, "link", "set", "lo", "up")

    try:
        for done in build():
            if done.returncode:
                pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
        via = f"--via=ip netns exec lm{mark}h{{process}}"
        yield [via, "--address=10.231.7.1:8476"]
    finally:
        for name in (*names, switch):
            ip("netns", "delete", name)


def launch(tmp_path, name, processes, devices, network=(), environment=None, **fields):
    """Runs main.py in several processes to their end: the exit code and what they printed."""
    job = tiny_jobs.command(tmp_path, name, **{**FIELDS, **fields})[2:]
    arguments = [
        sys.executable,
        str(LAUNCH),
        f"--processes={processes}",
        f"--devices={devices}",
        "--program=tests/launch/odd_main.py",
        "--grace=100",
        *network,
        "--",
        *job,
    ]
    result = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
        cwd=tiny_jobs.REPOSITORY,
        timeout=400,
    )
    output = result.stdout + result.stderr
    print(output)
    return result.returncode, output


def rows_read(folder):
    """Batch number → row number → its tokens, of all processes together."""
    batches = {}
    for path in folder.iterdir():
        for line in path.read_text().splitlines():
            record = json.loads(line)
            rows = batches.setdefault(record["batch"], {})
            for row, inputs in zip(record["rows"], record["inputs"], strict=True):
                assert rows.setdefault(row, inputs) == inputs
    return batches


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing interrupts: one process with eight devices."""
    return tiny_jobs.run(tmp_path_factory.mktemp("whole"), "whole", num_devices=8, **FIELDS)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["one machine", "namespaces"])
def test_four_processes_killed_go_on_as_two_as_if_nothing_had_happened(tmp_path, whole, network):
    with contextlib.ExitStack() as stack:
        where = stack.enter_context(namespaces(4)) if network == "namespaces" else []
        before, after = tmp_path / "before", tmp_path / "after"
        before.mkdir()
        after.mkdir()
        code, output = launch(
            tmp_path,
            "run",
            4,
            2,
            where,
            {"DIE": f"2:11:{int(signal.SIGKILL)}", "ROWS": str(before)},
            mesh__fsdp=2,
            mesh__tensor=4,
            mesh__data=1,
            hosts__heartbeat_timeout=10,
        )
        assert code == 128 + signal.SIGKILL
        assert "process 2 ended with signal SIGKILL" in output
        assert "killing" not in output  # the others left by themselves
        for process in (0, 1, 3):
            [line] = re.findall(rf"^\[{process}\] error: (.*)$", output, re.MULTILINE)
            assert line.startswith("process 2 (") and "no heartbeat for 10 s" in line
            assert f"process {process} ended with code 75" in output
        assert tiny_jobs.checkpoint_steps(tmp_path / "run") == [8, 16]
        saved = tiny_jobs.parameters(tmp_path / "run", 16)
        np.savez(tmp_path / "saved.npz", **saved)

        code, output = launch(
            tmp_path,
            "run",
            2,
            4,
            where,
            {"EXPECT": str(tmp_path / "saved.npz"), "ROWS": str(after)},
            mesh__fsdp=4,
            mesh__data=2,
        )
        assert code == 0
        assert "resuming at step 16" in output
        for process in range(2):
            assert f"[{process}] process {process} restored step 16 to the bit" in output
    for field, tolerance in (("loss", 1e-5), ("tokens", 0)):
        records, expected = (
            np.array(tiny_jobs.losses(directory, field)) for directory in (tmp_path / "run", whole)
        )
        assert records[-1][0] == STEPS
        np.testing.assert_array_equal(records[:, 0], expected[:, 0])
        np.testing.assert_allclose(records[:, 1], expected[:, 1], rtol=tolerance)
    mine, theirs = tiny_jobs.parameters(tmp_path / "run"), tiny_jobs.parameters(whole)
    for name, value in mine.items():
        np.testing.assert_allclose(value, theirs[name], atol=2e-5, err_msg=name)

    first, second = rows_read(before), rows_read(after)
    assert min(second) == 16  # where the checkpoint was taken
    assert max(first) >= 20  # processes read ahead
    for batch in range(16, 21):
        assert first[batch] == second[batch] and set(first[batch]) == set(range(8))


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path):
    strike = {"DIE": f"1:5:{int(signal.SIGTERM)}"}
    code, output = launch(tmp_path, "run", 2, 1, environment=strike, train__steps=4000)
    assert code == 75  # to be started again
    [step] = re.findall(r"SIGTERM: saved step (\d+); the same command goes on", output)
    assert int(step) < 4000
    assert tiny_jobs.checkpoint_steps(tmp_path / "run")[-1] == int(step)
    assert "error" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accident", "line"),
    [
        ("0:5:9", r"\[1\] error: process 0 \(.*\) has died"),
        ("0:5:19", r"\[1\] error: process 0 \(.*\) has died: no answer for"),
        ("1:5:0", r"\[0\] error: process 1 \(.*\) has failed \(RuntimeError: the roof fell in\)"),
    ],
    ids=["first killed", "first hangs", "another fails"],
)
def test_whoever_goes_is_named_and_the_other_asks_to_be_started_again(tmp_path, accident, line):
    fields = {"hosts__heartbeat_timeout": 5, "train__steps": 4000}
    flags = ["--grace=25"] if accident.endswith("19") else []
    code, output = launch(tmp_path, "run", 2, 1, flags, {"DIE": accident}, **fields)
    assert code != 0
    assert len(re.findall(line, output)) == 1
    survivor = 1 - int(accident[0])
    assert f"process {survivor} ended with code 75" in output


@pytest.mark.slow
def test_a_directory_in_use_or_damaged_is_refused_by_each_whatever_its_name(tmp_path):
    checkpoints = tmp_path / r"lr[1e-3]\b" / "checkpoints"
    where = {"TMPDIR": str(tmp_path)}
    code, _ = launch(tmp_path, checkpoints.parent.name, 2, 1, (), where, train__steps=8)
    assert code == 0 and tiny_jobs.checkpoint_steps(checkpoints.parent) == [8]
    with files.lock(checkpoints / "lock"):
        code, output = launch(tmp_path, checkpoints.parent.name, 2, 1, (), where, train__steps=16)
    assert code == 2
    assert output.count(f"is in use by process {os.getpid()} on ") == 2
    newest = checkpoints / "00000008"
    newest.rename(checkpoints / "00000016")
    code, output = launch(tmp_path, checkpoints.parent.name, 2, 1, (), where, train__steps=16)
    assert code == 2
    assert output.count("00000016 is damaged (it is that of step 8, renamed)") == 2


@pytest.mark.slow
def test_a_mistake_is_told_once_by_each_and_leaves_nothing_behind(tmp_path):
    code, output = launch(tmp_path, "run", 2, 1, data__batch_size=3)
    assert code == 2
    assert output.count("error: config.data.batch_size=3 must be a multiple of 2") == 2
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_a_process_that_waits_in_vain_says_for_whom(tmp_path):
    alone = ["--processes=1", "--first=1", "--total=2", "--address=127.0.0.1:9"]
    code, output = launch(tmp_path, "run", 1, 1, alone, hosts__initialization_timeout=3)
    assert code == 75
    assert "coordinator 127.0.0.1:9): process 0 cannot be reached there" in output
