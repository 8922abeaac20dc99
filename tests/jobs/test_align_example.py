"""The worked example of alignment, as its benchmark runs it, from stories to the table."""

import os
import subprocess
import sys

import pytest
import tiny_jobs

LITTLE = ("train.steps=2", "checkpoint.every=2", "train.log_every=1", "train.eval_every=2")
FEW = ("data.num_documents=120", "data.batch_size=8")


def benchmark(tmp_path, *words, more=()):
    command = ["benchmarks/align_example.py", "--seeds=1", f"--workdir={tmp_path}"]
    command += [f"--pictures={tmp_path}", *words]
    command += ["--set", *LITTLE, f"train.compilation_cache={tmp_path / 'xla'}", *more]
    one_device = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tiny_jobs.REPOSITORY,
        env=one_device,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_walks_are_learnt_from_examples_and_rewards(tmp_path):
    out = benchmark(tmp_path, "--task=walks")
    assert "| PPO |" in out and "| GRPO |" in out
    assert (tmp_path / "align_walks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_step_of_the_example_leads_to_the_next(tmp_path):
    out = benchmark(tmp_path, "--questions=8", more=FEW)
    for name in ("base", "SFT", "PPO", "PPO, β = 0", "DPO", "GRPO"):
        assert f"| {name} |" in out
    assert (tmp_path / "align.png").read_bytes().startswith(b"\x89PNG")
