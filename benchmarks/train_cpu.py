"""Training speed on the CPU, side by side with PyTorch in one run.

    pip install -e '.[parity]'
    python benchmarks/train_cpu.py                # 4 layers × 128, batch 12×64: nanoGPT's CPU shape
    python benchmarks/train_cpu.py --shape=gpt2   # GPT-2 124M, batch 4×256

One process each for this repository and for Hugging Face's GPT2LMHeadModel in float32, in bfloat16
autocast, and in the latter with torch.compile (which needs a C++ compiler), and with malloc tuned
as `lm.parallel.platform` tunes ours. They take turns of a few seconds, so that a machine whose
speed drifts slows all of them; the ratio of medians is what to quote. A step is forward, backward,
clipping and AdamW. The last column is model FLOPs (`lm.models.costs`) over the matmul peak
measured in the same run.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch_peer

SHAPES = {
    "small": dict(layers=4, heads=4, width=128, vocab=65, length=64, batch=12, steps=60, stride=10),
    "gpt2": dict(
        layers=12, heads=12, width=768, vocab=50257, length=256, batch=4, steps=2, stride=1
    ),
}
TUNED = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
PEERS = {  # name → what is set in the process's environment
    "lm": {},
    "torch float32": {},
    "torch bfloat16": {},
    "torch bfloat16, tuned malloc": TUNED,
    "torch.compile bfloat16": {},
    "torch.compile bfloat16, tuned malloc": TUNED,
}


def lm_stepper(shape):
    """A function that runs `steps` optimizer steps of ours."""
    import jax
    import jax.numpy as jnp

    from lm.models import ModelConfig
    from lm.models.matmul import compute_dtype
    from lm.parallel.chips import total_peak_flops
    from lm.parallel.layout import lay_out
    from lm.parallel.mesh import MeshConfig
    from lm.parallel.platform import keep_buffers
    from lm.training.config import TrainConfig
    from lm.training.optimizer import OptimizerConfig
    from lm.training.setup import set_up
    from lm.training.workload import Workload

    keep_buffers()
    config = ModelConfig(
        num_layers=shape["layers"],
        num_heads=shape["heads"],
        width=shape["width"],
        vocab_size=shape["vocab"],
        max_length=shape["length"],
        positions="learned",
        norm="layernorm",
        bias=True,  # as GPT2LMHeadModel
    )
    workload = Workload(
        config,
        shape["length"],
        shape["batch"],
        optimizer=OptimizerConfig(learning_rate=1e-3, b2=0.99),
        train=TrainConfig(steps=10_000),
        layout=lay_out("", MeshConfig(), -1),
    )
    training = set_up(workload)
    state = training.create_state()
    dims = (shape["stride"], shape["batch"], shape["length"] + 1)
    tokens = jax.random.randint(jax.random.key(1), dims, 0, shape["vocab"])
    batch = {
        "inputs": tokens[..., :-1],
        "targets": tokens[..., 1:],
        "weights": jnp.ones(tokens[..., 1:].shape),
    }
    print(total_peak_flops(compute_dtype("auto")), workload.flops_per_token, flush=True)

    def run(steps):
        nonlocal state
        with workload.layout.active():
            for _ in range(steps // shape["stride"]):
                state, metrics = training.step(state, batch)
            jax.block_until_ready((state, metrics))

    return run


def work(name, shape):
    """A worker: for every line on its input, runs that many steps and prints the seconds a step."""
    if name == "lm":
        stepper = lm_stepper(shape)
    else:
        compiled = name.startswith("torch.compile")
        stepper = torch_peer.stepper(shape, bfloat16="bfloat16" in name, compiled=compiled)
        print(0, 0, flush=True)
    stepper(shape["stride"])
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        stepper(int(line))
        print((time.perf_counter() - began) / int(line), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", default=";".join(PEERS), help="which, separated by ;")
    parser.add_argument("--worker", choices=PEERS)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    peers = {name: PEERS[name] for name in dict.fromkeys(["lm", *arguments.peers.split(";")])}
    if arguments.worker:
        return work(arguments.worker, shape)

    workers, facts = {}, {}
    for name, environment in peers.items():
        workers[name] = subprocess.Popen(
            [sys.executable, __file__, f"--shape={arguments.shape}", f"--worker={name}"],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        facts[name] = [float(word) for word in workers[name].stdout.readline().split()]
        assert workers[name].stdout.readline().strip() == "ready", f"{name} did not start"
    seconds = {name: [] for name in peers}
    for _ in range(arguments.rounds):
        for name, worker in workers.items():
            worker.stdin.write(f"{shape['steps']}\n")
            worker.stdin.flush()
            seconds[name].append(float(worker.stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()

    tokens = shape["batch"] * shape["length"]
    peak, flops_per_token = facts["lm"]
    ours = statistics.median(seconds["lm"])
    print(f"{arguments.shape}: {tokens} tokens a step, matmul peak {peak / 1e9:.0f} GFLOP/s")
    for name, times in seconds.items():
        median = statistics.median(times)
        mfu = flops_per_token * tokens / median / peak
        print(
            f"{name:36s} {1e3 * median:9.1f} ms a step (min {1e3 * min(times):.1f})"
            f"{tokens / median:10.0f} tokens/s   lm is {median / ours:.2f}×   {mfu:6.1%} of peak"
        )


if __name__ == "__main__":
    main()
