"""Compile time of the training step against depth.

    python benchmarks/compile_time.py

Layers beyond `lm.models.stack.UNROLLED_LAYERS` (on accelerators, all of them) are scanned, so
compile time should not grow with depth: the ratio of 48 layers to 12 is what to quote.
"""

import time

import jax
import jax.numpy as jnp

from lm.models import ModelConfig
from lm.parallel.layout import lay_out
from lm.parallel.mesh import MeshConfig
from lm.training.setup import set_up
from lm.training.workload import Workload


def seconds(num_layers, scan_layers):
    config = ModelConfig(
        num_layers=num_layers,
        width=256,
        vocab_size=1024,
        max_length=128,
        scan_layers=scan_layers,
    )
    layout = lay_out("", MeshConfig(), -1)
    training = set_up(Workload(config, 128, 8, layout=layout))
    ids = jax.ShapeDtypeStruct((1, 8, 128), jnp.int32)
    batch = dict(inputs=ids, targets=ids, weights=jax.ShapeDtypeStruct((1, 8, 128), jnp.float32))
    with layout.active():
        lowered = training.step.lower(training.abstract, batch)
    began = time.perf_counter()
    lowered.compile()
    return time.perf_counter() - began


def main():
    seconds(2, True)  # what the compiler loads once
    for scan_layers, name in ((None, "by default"), (True, "scanned")):
        times = {n: min(seconds(n, scan_layers) for _ in range(2)) for n in (12, 24, 48)}
        figures = "  ".join(f"{n} layers {t:.2f} s" for n, t in times.items())
        print(f"{name:11s} {figures}  48 against 12: {times[48] / times[12]:.2f}×")


if __name__ == "__main__":
    main()
