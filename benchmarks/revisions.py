"""Speed and memory of two checkouts, side by side: what a change to the code cost or won.

    git worktree add ../before REVISION
    python benchmarks/revisions.py ../before .
    python benchmarks/revisions.py ../before . --shapes=small --rounds=7

Only what users type is measured, so that checkouts of any age compare: `import lm`, training
through `main.py`, and `lm.load(…).generate`. The checkouts take turns, so that a machine whose
speed drifts slows both; each has its own run directory. Quote the ratio of medians, the second
checkout to the first, beside the spread of its rounds. Before the timed rounds each checkout runs
once, for its token cache.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

SHAPES = {  # shape → what its training run says besides configs/shakespeare_char.py, and its steps
    "small": ({}, 400),
    "experts": (
        {
            "model.num_experts": 8,
            "model.experts_per_token": 2,
            "model.activation": "swiglu",
            "model.positions": "rotary",
            "model.norm": "rmsnorm",
        },
        100,
    ),
    "gpt2": (
        {
            "model.num_layers": 12,
            "model.num_heads": 12,
            "model.width": 768,
            "model.vocab_size": 50304,
            "data.block_size": 256,
            "data.batch_size": 4,
        },
        6,
    ),
}
DECODE = """
import json, sys, time, lm
run = lm.load(sys.argv[1])
run.generate("the", max_new_tokens=200, seed=1)
began = time.perf_counter()
for seed in range(8):
    run.generate("the", max_new_tokens=200, seed=seed)
print(json.dumps({"decoding s": time.perf_counter() - began}))
"""


def ran(checkout, *command):
    """(standard output, seconds, peak gigabytes of all of its processes) of one Python process."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{checkout}: {' '.join(map(str, command))}\n{output[-3000:]}")
    return output, time.perf_counter() - began, usage.ru_maxrss / 2**20


def trained(checkout, shape, corpus, folder):
    """Figures of one training run; the last records, of whole intervals, say the speed."""
    fields, steps = SHAPES[shape]
    workdir = tempfile.mkdtemp(dir=folder)
    fields = {
        "data.path": corpus,
        "data.cache_dir": folder / f"cache {checkout.name}",
        "train.steps": steps,
        "train.log_every": max(1, steps // 10),
        "data.validation_fraction": 0.002,  # the evaluation at the end is of all of it
        "train.eval_every": 0,
        "checkpoint.every": 0,
        "train.compilation_cache": "",
        "sample.max_new_tokens": 1,
        **fields,
    }
    _, seconds, memory = ran(
        checkout,
        "main.py",
        "--config=configs/shakespeare_char.py",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    )
    lines = pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    rates = [r["tokens_per_second"] for r in records if r.get("tokens_per_second")]
    rate = statistics.median(rates[-6:])
    losses = [r["loss"] for r in records if "loss" in r]
    tokens = next(r["tokens"] for r in reversed(records) if "tokens" in r)
    return (
        workdir,
        losses,
        {
            f"{shape}: step ms": 1000 * tokens / steps / rate,
            f"{shape}: rest of the run s": seconds - tokens / rate,  # start-up, compiling, saving
            f"{shape}: memory GB": memory,
        },
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs=2, type=lambda p: pathlib.Path(p).resolve())
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    figures = {}  # name → one list of values for each checkout
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        corpus = folder / "corpus.txt"
        lines = (
            f"{i} cats sat on mat {i * 7 % 13} and saw {i * i % 101} birds" for i in range(40000)
        )
        corpus.write_text("\n".join(lines))
        for turn in range(args.rounds + 1):
            losses = {}
            for which, checkout in list(enumerate(args.checkouts))[:: 1 if turn % 2 else -1]:
                found = {"import lm s": ran(checkout, "-c", "import lm")[1]}
                for shape in args.shapes:
                    workdir, losses[shape, which], more = trained(checkout, shape, corpus, folder)
                    found |= more
                    if shape == args.shapes[0]:
                        found |= json.loads(
                            ran(checkout, "-c", DECODE, workdir)[0].splitlines()[-1]
                        )
                if turn:
                    for name, value in found.items():
                        figures.setdefault(name, ([], []))[which].append(value)
            for shape in args.shapes:
                same = losses[shape, 0] == losses[shape, 1]
                if not turn:
                    print(
                        f"{shape}: losses are " + ("bitwise the same" if same else "not the same")
                    )
    for name, (before, after) in figures.items():
        ratios = sorted(b / a for a, b in zip(before, after))
        medians = statistics.median(before), statistics.median(after)
        print(
            f"{name:32s} {medians[0]:9.4g} → {medians[1]:9.4g}   {medians[1] / medians[0]:.3f}×   "
            f"rounds {ratios[0]:.2f} … {ratios[-1]:.2f}"
        )


if __name__ == "__main__":
    main()
