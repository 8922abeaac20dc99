"""Speed of a mixture of experts, side by side with a dense MLP of the same active width.

    python benchmarks/experts.py                      # 8 experts of 1024, two a token
    python benchmarks/experts.py --experts=64 --chosen=6 --hidden=256
    python benchmarks/experts.py --batch=1 --length=1          # decoding

One layer, forward and backward, on random tokens and an untrained (so nearly balanced) router. The
contestants take turns, so that a machine whose speed drifts slows all of them; the ratio of medians
is what to quote. The dense MLP multiplies as much as a token's chosen experts do together.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from lm.models import ModelConfig, bind, init, param_specs
from lm.models.hooks import no_tap
from lm.models.layers import MLP
from lm.models.matmul import compute_dtype
from lm.models.moe.experts import Experts


def layer(config, args):
    """(forward, forward and backward), each a jitted function of parameters and input."""
    module = Experts(config) if config.num_experts else MLP(config)
    params = init(param_specs(module), jax.random.key(0))

    def forward(params, x_BTD):
        out = bind(module, params)(x_BTD, no_tap)
        return out[0] if config.num_experts else out

    def score(params, x_BTD):
        out_BTD = forward(params, x_BTD).astype(jnp.float32)
        return jnp.sum(out_BTD * out_BTD)

    functions = (jax.jit(forward), jax.jit(jax.grad(score, (0, 1))))
    shape = (args.batch, args.length, args.width)
    x_BTD = jax.random.normal(jax.random.key(1), shape, compute_dtype(config.compute_dtype))
    return [lambda f=f: jax.block_until_ready(f(params, x_BTD)) for f in functions]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in dict(
        batch=16, length=256, width=512, hidden=1024, experts=8, chosen=2, turns=9
    ).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    args = parser.parse_args()
    common = dict(width=args.width, activation="swiglu", compute_dtype=args.dtype)
    mixture = dict(
        num_experts=args.experts, experts_per_token=args.chosen, expert_width=args.hidden, **common
    )
    contestants = {
        "dense": ModelConfig(mlp_width=args.hidden * args.chosen, **common),
        "dropless": ModelConfig(**mixture),
        "capacity 1.0": ModelConfig(capacity_factor=1.0, **mixture),
        "capacity 1.25": ModelConfig(capacity_factor=1.25, **mixture),
    }
    layers = {name: layer(config, args) for name, config in contestants.items()}
    times = {name: ([], []) for name in layers}
    for turn in range(args.turns + 1):
        for name, functions in layers.items():
            for function, record in zip(functions, times[name]):
                began = time.perf_counter()
                function()
                if turn:  # the first compiles
                    record.append(time.perf_counter() - began)
    tokens = args.batch * args.length
    base = [statistics.median(record) for record in times["dense"]]
    print(f"{jax.default_backend()}, {compute_dtype(args.dtype)}, tokens/s (against dense)")
    for name, records in times.items():
        medians = [statistics.median(record) for record in records]
        figures = [f"{tokens / m:10,.0f} ({b / m:.2f}×)" for m, b in zip(medians, base)]
        print(f"{name:14s} forward {figures[0]}   forward and backward {figures[1]}")


if __name__ == "__main__":
    main()
