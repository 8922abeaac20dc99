"""Runs launch scripts against stubs, and reads what they printed and called."""

import json
import os
import pathlib
import shlex
import subprocess

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = REPOSITORY / "launch"
STUBS = ("gcloud", "kubectl", "docker", "srun", "scontrol", "scancel", "sleep")
CONFIG = "configs/quickstart.py"


class Stubs:
    def __init__(self, folder):
        self.folder = folder
        self.answer([])

    def answer(self, answers):
        (self.folder / "answers").write_text(json.dumps(answers))
        (self.folder / "calls").write_text("")

    def calls(self):
        """Every call since `answer`, as lists of words; tar's are left out, for it is no stub."""
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]


def script(name, *arguments, code=0, **environment):
    """What a script prints; it must end with `code`."""
    found = subprocess.run(
        ["bash", str(LAUNCH / name), *arguments],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        timeout=120,
    )
    assert found.returncode == code, found
    return found.stderr if code else found.stdout


def commands(printed):
    """The commands that a dry run printed, as lists of words."""
    lines = [shlex.split(line) for line in printed.splitlines()]
    return [line for line in lines if line[0] in (*STUBS, "tar")]
