"""Stubs of the programs that launch scripts call."""

import os
import pathlib
import sys

import pytest
from scripts import STUBS, Stubs

# What the scripts read from the environment.
OPTIONS = (
    "NAME", "ZONE", "TYPE", "VERSION", "PROJECT", "SPOT", "RESERVED", "MOUNT", "DRY_RUN", "IMAGE",
    "ACCELERATOR", "TOPOLOGY", "CHIPS", "BUCKET", "CLAIM", "NAMESPACE", "SERVICE_ACCOUNT",
    "MAX_RESTARTS", "CONTAINER", "PYTHON", "SLURM_JOB_ID",
)  # fmt: skip
STUB = (pathlib.Path(__file__).parent / "stub.py").read_text()


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """A folder of stubs that come before any real program."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in STUBS:
        stub = programs / name
        stub.write_text(f"#!{sys.executable} -SE\n{STUB}")
        stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("STUBS", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for name in OPTIONS:
        monkeypatch.delenv(name, raising=False)
    return Stubs(tmp_path)
