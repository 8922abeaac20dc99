"""The worked example of alignment, as its benchmark runs it, from stories to the table."""

import subprocess
import sys

import pytest
import tiny_jobs

LITTLE = ("train.steps=2", "checkpoint.every=2", "train.log_every=1", "train.eval_every=2")
FEW = ("data.num_documents=120", "data.batch_size=8", "train.compilation_cache=")


def benchmark(tmp_path, *words):
    command = ["benchmarks/align_example.py", "--seeds=1", f"--workdir={tmp_path}", *words]
    done = subprocess.run(
        [sys.executable, *command, f"--pictures={tmp_path}"],
        cwd=tiny_jobs.REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_walks_are_learnt_from_examples_and_rewards(tmp_path):
    out = benchmark(tmp_path, "--task=walks", "--set", *LITTLE)
    assert "| PPO |" in out and "| GRPO |" in out
    assert (tmp_path / "align_walks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_step_of_the_example_leads_to_the_next(tmp_path):
    out = benchmark(tmp_path, "--questions=8", "--set", *LITTLE, *FEW)
    for name in ("base", "SFT", "PPO", "PPO, β = 0", "DPO", "GRPO"):
        assert f"| {name} |" in out
    assert (tmp_path / "align.png").read_bytes().startswith(b"\x89PNG")
