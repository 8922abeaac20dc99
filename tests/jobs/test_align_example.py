"""The worked example of alignment, as its benchmark runs it; the README's test runs the stories."""

import os
import subprocess
import sys

import pytest
import tiny_jobs

LITTLE = ("train.steps=2", "checkpoint.every=2", "train.log_every=1", "train.eval_every=2")


@pytest.mark.slow
def test_walks_are_learnt_from_examples_and_rewards(tmp_path):
    command = ["benchmarks/align_example.py", "--task=walks", "--seeds=1", f"--workdir={tmp_path}"]
    command += [f"--pictures={tmp_path}", "--set", *LITTLE]
    command += [f"train.compilation_cache={tmp_path / 'xla'}"]
    one_device = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tiny_jobs.REPOSITORY,
        env=one_device,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| PPO |" in done.stdout and "| GRPO |" in done.stdout
    assert (tmp_path / "align_walks.png").read_bytes().startswith(b"\x89PNG")
