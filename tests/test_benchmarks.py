"""Benchmarks run, in small."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest
import quick
from tiny_run import write_tiny_run

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"
TRAINED = {"tokens_per_second", "milliseconds", "mfu", "mfu_published", "memory_gb", "batch"}
WRITTEN = {"prefill_tokens_per_second", "decode_tokens_per_second", "of_bandwidth"}
FIELDS = {
    "device": {"kind", "platform", "memory_gb", "jax"},
    "matmul bfloat16": {"tflops", "published"},
    "bandwidth": {"gb_s", "copy_gb_s", "read_gb_s", "published"},
    "train gpt2": TRAINED,
    "train llama": TRAINED,
    "train llama fp8": TRAINED,
    "generate gpt2, 2 row(s)": WRITTEN,
    "generate llama, 2 row(s)": WRITTEN,
}
# One section that fails a check, one that breaks off, one that dies, one that hangs, one too late.
BROKEN = """
import os, sys, time
import accelerator

def fails(run):
    run.check("off", 2.0, 1.0)
    with run.guarded("missing"):
        raise ValueError("no such kernel\\nand more")

def breaks(run):
    run.figure("first", tokens_per_second=float("nan"))
    raise MemoryError("full")

sections = {"fails": fails, "breaks": breaks, "dies": lambda run: os._exit(7)}
sections["hangs"] = lambda run: (run.note("begun"), time.sleep(60))
sections["late"] = breaks
accelerator.SECTIONS = {name: (function, 0.5) for name, function in sections.items()}
sys.argv = ["accelerator.py", "--budget=4"]
sys.exit(accelerator.main())
"""


def run(*command):
    path = f"{FOLDER}:{FOLDER.parent}"
    environment = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": quick.FLAGS}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600
    )
    lines = done.stdout.splitlines()
    assert lines, done.stderr[-3000:]
    return done, json.loads(lines[-1])


@pytest.mark.slow
def test_accelerator_checks_and_measures_everything():
    done, found = run(FOLDER / "accelerator.py", "--tiny")
    assert done.returncode == 0 and found["passed"], done.stdout[-3000:] + done.stderr[-3000:]
    assert found["failures"] == [] and 0 < found["seconds"] < 480
    assert len(found["checks"]) > 15
    assert all(check["passed"] and check["value"] <= check["limit"] for check in found["checks"])
    figures = {figure["name"]: figure for figure in found["figures"]}
    assert FIELDS.items() <= {name: FIELDS.get(name) for name in figures}.items()
    for name, fields in FIELDS.items():
        assert fields <= figures[name].keys(), name
    if importlib.util.find_spec("transformers"):
        assert {"torch gpt2, eager", "torch llama, eager"} <= figures.keys(), found["notes"]
    assert "train llama fp8" in done.stdout.split("tokens/s")[-1]  # in the table


@pytest.mark.slow
def test_decoding_is_measured_and_compared_in_small(tmp_path):
    small = ("--rows", "2", "--tokens", "2", "--rounds", "1")
    if importlib.util.find_spec("transformers"):
        _, found = run(FOLDER / "decode_cpu.py", "--shape=small", *small)
        assert {"ours", "ours int8", "transformers float32"} <= found["2 rows"].keys()
    write_tiny_run(tmp_path)
    model = (f"--model={tmp_path}", "--prompt=4", "--weights=int8")
    _, found = run(FOLDER / "infer.py", *model, *small)
    assert found["prefill_tokens_per_second"] > 0 and found["share_of_bandwidth"] >= 0
    _, found = run(FOLDER / "infer.py", *model[:2], *small, "--samples=2")
    assert found["times_as_long"] > 0


def test_accelerator_loses_nothing_to_a_section_that_fails():
    done, found = run("-c", BROKEN)
    assert done.returncode == 1 and not found["passed"]
    off, missing = found["checks"]
    assert off == {"name": "off", "value": 2.0, "limit": 1.0, "passed": False}
    assert missing["name"] == "missing (ValueError: no such kernel)" and not missing["passed"]
    assert found["figures"] == [{"name": "first", "tokens_per_second": None}]
    assert found["failures"] == [
        "breaks: MemoryError: full",
        "dies: its process ended with exit code 7",
    ]
    begun, stopped, late = found["notes"]
    assert begun == "begun" and stopped == "hangs: stopped, as the budget was used up"
    assert late.startswith("late: left out")
    assert "FAIL  off: 2.00e+00 (limit 1.00e+00)" in done.stdout
