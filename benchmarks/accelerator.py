"""What one GPU or TPU chip computes, and how fast: every check and figure in one command.

    pip install -e '.[cuda]'              # or '.[tpu]'
    python benchmarks/accelerator.py      # under eight minutes; more chips stand by
    python benchmarks/accelerator.py --only=peak,attention
    python benchmarks/accelerator.py --tiny      # on a CPU, to see that it runs

Checked, each against a limit: loss and gradient of several families against float32 on the host's
CPU, in float32, bfloat16 and fp8; the attention kernels (cuDNN, Pallas splash, the ring's blocks)
against the reference, forward and backward; decoding with a cache against the full forward pass;
that training starts at ln V and learns. Measured: the matmul peak and the memory's bandwidth, and
beside these training of GPT-2 124M and of a Llama of 1.2B parameters (tokens/s, MFU, memory; batch
as large as fits), prefill and decoding (tokens/s, share of the bandwidth that reading weights and
cache once a token would take), and Hugging Face's models in PyTorch (SDPA, bfloat16 autocast, fused
AdamW, with and without torch.compile) where a PyTorch that sees the device is installed.

Each section runs in a process of its own, so that running out of memory, a crash or a hang loses
its own figures alone, and is left out where `--budget` has no time for it. The last line printed
is one JSON object with everything; the exit code is 1 if a check or a section failed.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch_peer
from accelerator_checks import SMALL, TINY, arithmetic, attention, decoding
from accelerator_sections import add, reason, run_section, table

from lm.inference import Framing, Generator, SamplingConfig
from lm.models import ModelConfig, init, param_specs, skeleton
from lm.models.attention import kernels
from lm.models.attention.attention import attend
from lm.models.attention.context import Context
from lm.models.costs import cache_bytes, prefill_flops_per_token, training_flops_per_token
from lm.models.presets import preset
from lm.models.text import Text, visible
from lm.parallel.chips import chip_of, published_peak
from lm.parallel.layout import lay_out
from lm.parallel.mesh import MeshConfig
from lm.parallel.platform import platform
from lm.training.config import TrainConfig
from lm.training.memory import expected_memory
from lm.training.optimizer import OptimizerConfig
from lm.training.setup import set_up
from lm.training.workload import Workload

# name → (preset, tokens a row)
TRAINED = {"gpt2": ("gpt2_small", 1024), "llama": ("llama3_2_1b", 2048)}


def fp8_is_fast():
    """Whether the device multiplies fp8: NVIDIA's since Ada, TPU v7."""
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", "")).replace(".", "", 1)
    return device.device_kind.startswith("TPU7") or (capability.isdigit() and int(capability) >= 89)


def seconds_each(function, least=1.0, most=50):
    """Seconds of one call, of as many as take about `least` seconds; the best of three times."""
    jax.block_until_ready(function())
    began = time.perf_counter()
    jax.block_until_ready(function())
    calls = min(most, max(1, int(least / 3 / (time.perf_counter() - began))))
    times = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(calls):
            result = function()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - began) / calls)
    return min(times)


# ---- The device ------------------------------------------------------------------------------


def peak(run):
    """What products and copies reach here, beside what the data sheet says."""
    device = jax.devices()[0]
    stats, chip = device.memory_stats() or {}, chip_of(device.device_kind)
    run.figure(
        "device",
        kind=device.device_kind,
        platform=device.platform,
        capability=str(getattr(device, "compute_capability", "")),
        memory_gb=stats.get("bytes_limit", 0) / 1e9,
        jax=jax.__version__,
    )
    size = 256 if run.tiny else 8192
    kinds = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
    if fp8_is_fast():
        kinds["fp8"] = jnp.float8_e4m3fn
    for name, dtype in kinds.items():
        # Random numbers: on zeros a chip draws less power and runs faster.
        x, w = (
            jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16).astype(dtype)
            for i in range(2)
        )
        out = jnp.float32 if dtype == jnp.float32 else jnp.bfloat16
        product = jax.jit(functools.partial(jax.lax.dot, preferred_element_type=out))
        with run.guarded(f"a product of {name}"):
            measured = 2 * size**3 / seconds_each(functools.partial(product, x, w))
            published = published_peak(device.device_kind, dtype) or 0
            run.figure(f"matmul {name}", tflops=measured / 1e12, published=published / 1e12)
    count = 2**22 if run.tiny else 2**28  # of four bytes each
    x = jnp.ones(count)
    copied = 8 * count / seconds_each(functools.partial(jax.jit(lambda x: x + 1), x))
    read = 4 * count / seconds_each(functools.partial(jax.jit(jnp.sum), x))
    run.figure(
        "bandwidth",
        gb_s=max(copied, read) / 1e9,
        copy_gb_s=copied / 1e9,
        read_gb_s=read / 1e9,
        published=chip.bandwidth / 1e9 if chip else 0,
    )


def time_attention(run):
    """The platform's kernel against plain XLA, at a size of training."""
    chosen = {"gpu": "cudnn", "tpu": "splash"}.get(platform())
    if chosen is None:
        return run.note(f"no attention kernel is made for a {platform().upper()}")
    B, T, H, C = 4, 2048, 16, 128
    arrays = [jax.random.normal(jax.random.key(i), (B, T, H, C), jnp.bfloat16) for i in range(3)]
    text = Text.of(jnp.zeros((B, T)))
    mask = jnp.broadcast_to(visible(text, text, causal=True), (B, T, T))
    context = Context(mask, text, text, causal=True)
    config = ModelConfig(num_heads=H, head_dim=C)

    def timed(function):
        def score(arrays):
            return jnp.sum(function(*arrays).astype(jnp.float32))

        return seconds_each(functools.partial(jax.jit(jax.grad(score)), arrays))

    kernel = timed(lambda *arrays: kernels.compute(chosen, config, *arrays, context))
    flops = 3 * 2 * B * H * T * T * C  # forward, and twice that backward; half of all pairs
    run.figure(
        f"attention {chosen}, forward and backward",
        milliseconds=1e3 * kernel,
        tflops=flops / kernel / 1e12,
    )
    plain = timed(lambda *arrays: attend(config, *arrays, context))
    run.figure(
        "attention xla, forward and backward",
        milliseconds=1e3 * plain,
        tflops=flops / plain / 1e12,
    )


# ---- Training --------------------------------------------------------------------------------


def measured(run, name, **fields):
    """(configuration, tokens a row) of a model that is measured."""
    known, length = TRAINED[name]
    if run.tiny:
        length, sizes = 32, SMALL | TINY
        fields = sizes | ({"num_kv_heads": 2} if name == "llama" else {}) | fields
    return preset(known, **{"max_length": length, "dropout": 0.0, **fields}), length


def batch_plans(run, config, length, set_up_for):
    """(remat policy, rows) in the order to try them: whole activations first, if enough fit."""
    if run.tiny:
        return [("none", 2)]
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 16e9)
    plans = []
    for remat in ("none", "full"):
        here = dataclasses.replace(config, remat=remat)
        training, _ = set_up_for(here)

        def fits(rows, workload=training.workload):
            held = expected_memory(dataclasses.replace(workload, batch_size=rows))
            return sum(held.values()) < 0.85 * limit

        rows = max((n for n in (1, 2, 4, 8, 16, 32) if n * length <= 2**16 and fits(n)), default=1)
        # Below 8,192 tokens products are too small to be fast: recompute instead.
        plans += [(remat, n) for n in (32, 16, 8, 4, 2, 1) if n <= rows]
    plans.sort(key=lambda plan: (plan[1] * length < 8192, plan[0] == "full", -plan[1]))
    return plans


def train(run, name, quantization="none"):
    """The real training step on the largest batch that fits."""
    config, length = measured(run, name, quantization=quantization)
    train_config = TrainConfig(steps=1000)
    layout = lay_out("", MeshConfig(), -1, jax.devices()[:1])

    def set_up_for(config):
        optimizer = OptimizerConfig(learning_rate=3e-4, schedule="constant")
        workload = Workload(  # its step takes any number of rows
            config, length, 1, optimizer=optimizer, train=train_config, layout=layout
        )
        return set_up(workload), layout

    before = run.of(f"train {name}") if quantization != "none" else None
    if before:
        plans = [(before["remat"], max(before["batch"] // n, 1)) for n in (1, 2, 4)]
    else:
        plans = batch_plans(run, config, length, set_up_for)
    for remat, rows in plans:
        here = dataclasses.replace(config, remat=remat)
        training, _ = set_up_for(here)
        try:
            return train_with(run, name, here, training, layout, rows, length)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "memory" not in str(error).lower():
                raise
            run.note(f"train {name}: {rows} rows with remat={remat} are too many for the memory")
    run.note(f"train {name}: this device is too small for it")


def train_with(run, name, config, training, layout, rows, length):
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, rows, length + 1))
    tokens = jnp.asarray(tokens, jnp.int32)
    batch = {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}
    batch["weights"] = jnp.ones(batch["targets"].shape)
    with layout.active():
        began = time.perf_counter()
        compiled = training.step.lower(training.abstract, batch).compile()
        compile_seconds = time.perf_counter() - began
        state = training.create_state()
        losses = []

        def steps(count):
            nonlocal state
            began = time.perf_counter()
            for _ in range(count):
                state, metrics = compiled(state, batch)
                losses.append(metrics)
            jax.block_until_ready((state, metrics))
            return (time.perf_counter() - began) / count

        steps(2)
        estimate = steps(2)
        times = [steps(max(1, min(15, int(2.0 / estimate)))) for _ in range(1 if run.tiny else 4)]
    each = statistics.median(times)
    nats = [float(np.mean(m["nats"]) / np.mean(m["weight"])) for m in losses]
    label = f"{name} {config.quantization}".removesuffix(" none")
    surprise = abs(nats[0] - math.log(config.vocab_size))
    run.check(f"train {label}: first loss less ln V", surprise, 1.0)
    run.check(f"train {label}: last loss less the first", nats[-1] - nats[0], -0.01)
    tokens_per_second = rows * length / each
    flops = tokens_per_second * training_flops_per_token(config, length)
    stats, sizes = jax.devices()[0].memory_stats() or {}, compiled.memory_analysis()
    step_bytes = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
    step_bytes += sizes.temp_size_in_bytes - sizes.alias_size_in_bytes
    reached = run.of("matmul bfloat16").get("tflops", math.nan)
    published = (published_peak(jax.devices()[0].device_kind, jnp.bfloat16) or math.nan) / 1e12
    run.figure(
        f"train {label}",
        tokens_per_second=tokens_per_second,
        milliseconds=1e3 * each,
        mfu=flops / 1e12 / reached,  # of the peak measured here
        mfu_published=flops / 1e12 / published,
        tflops=flops / 1e12,
        memory_gb=step_bytes / 1e9,  # as compiled, and what was used in all:
        peak_gb=stats.get("peak_bytes_in_use", 0) / 1e9,
        batch=rows,
        length=length,
        remat=config.remat,
        compile_seconds=compile_seconds,
        loss=nats[-1],
    )


def torch_train(run, name):
    """The same training in PyTorch, on the same batch or the largest that fits."""
    config, length = measured(run, name)
    device = torch_peer.accelerator()
    if device is None and not run.tiny:
        return run.note(f"torch {name}: no PyTorch that sees an accelerator, with transformers")
    for compiled in (False, True)[: 1 if run.tiny else 2]:  # on a CPU its compiler takes a minute
        label = f"torch {name}, " + ("torch.compile" if compiled else "eager")
        try:
            torch_train_with(run, name, label, config, length, device or "cpu", compiled)
        except Exception as error:  # not ours to answer for
            run.note(f"{label}: {reason(error)}")


def torch_train_with(run, name, label, config, length, device, compiled):
    ours = run.of(f"train {name}")
    rows, each = ours.get("batch", 8), None
    while each is None:
        try:
            sizes = torch_peer.sizes(config, length, rows)
            each, memory = torch_peer.measure(sizes, device, compiled)
        except RuntimeError as error:  # of which running out of memory is one
            if "memory" not in str(error).lower() or rows == 1:
                raise
            rows //= 2
    rate = rows * length / each
    run.figure(
        label,
        tokens_per_second=rate,
        milliseconds=1e3 * each,
        memory_gb=memory / 1e9,
        batch=rows,
        length=length,
        lm_is=ours.get("tokens_per_second", math.nan) / rate,
    )


# ---- Generation ------------------------------------------------------------------------------


def generate(run, name):
    """Prefill and decoding, greedy, as `Generator` does them for a user."""
    context, prompt, new = (32, 8, 9) if run.tiny else (1024, 512, 257)
    config, _ = measured(run, name, max_length=context)
    if not run.tiny:
        config = dataclasses.replace(config, compute_dtype="bfloat16")
    model = skeleton(config)
    params = jax.jit(functools.partial(init, param_specs(model)))(jax.random.key(0))
    chunk = 8 if run.tiny else 64
    generator = Generator(model, params, Framing(end_of_text=(0,)), chunk=chunk)
    del params
    # What every token reads of the weights: all but the rows of a table that are only looked up.
    looked_up = ("embedding.positions",) + ("embedding.tokens",) * (not config.tie_embeddings)
    weights = sum(
        leaf.nbytes
        for key, value in generator.params.items()
        for leaf in jax.tree.leaves(value)
        if key not in looked_up
    )
    dtype = jax.tree.leaves(generator.params["blocks.attention.query"])[0].dtype
    bandwidth = run.of("bandwidth").get("gb_s", math.nan) * 1e9
    peak = run.of("matmul bfloat16").get("tflops", math.nan) * 1e12
    greedy = SamplingConfig(0, max_new_tokens=new, stop_at_end_of_text=False)
    for rows in (2,) if run.tiny else (1, 8, 64):
        rng = np.random.default_rng(0)
        for _ in range(2):  # the first one compiles; what it reads is not read again
            prompts = rng.integers(1, config.vocab_size, (rows, prompt)).tolist()
            generation = generator.generate(prompts, greedy)
            for _ in generation:
                pass
        timing = generation.timing
        step = statistics.median(timing.token_seconds)
        moved = weights + rows * cache_bytes(config, prompt + new // 2, dtype)
        flops = rows * prompt * prefill_flops_per_token(config, prompt)
        run.figure(
            f"generate {name}, {rows} row(s)",
            prefill_tokens_per_second=rows * prompt / timing.first_token_seconds,
            prefill_mfu=flops / timing.first_token_seconds / peak,
            decode_tokens_per_second=rows / step,
            milliseconds=1e3 * step,
            of_bandwidth=moved / step / bandwidth,
        )


# ---- All of it -------------------------------------------------------------------------------

# name → (function, seconds below which it is not begun); in the order of what one would miss most.
SECTIONS = {
    "peak": (peak, 20),
    "arithmetic": (arithmetic, 30),
    "attention": (attention, 20),
    "decoding": (decoding, 20),
    "attention speed": (time_attention, 20),
    "train gpt2": (functools.partial(train, name="gpt2"), 30),
    "train llama": (functools.partial(train, name="llama"), 40),
    "generate llama": (functools.partial(generate, name="llama"), 40),
    "torch gpt2": (functools.partial(torch_train, name="gpt2"), 40),
    "torch llama": (functools.partial(torch_train, name="llama"), 40),
    "train llama fp8": (functools.partial(train, name="llama", quantization="fp8"), 40),
    "generate gpt2": (functools.partial(generate, name="gpt2"), 30),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=480, help="seconds for all of it")
    parser.add_argument("--only", default="", help=f"sections of {', '.join(SECTIONS)}")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    arguments = parser.parse_args()
    chosen = [name.strip() for name in arguments.only.split(",") if name.strip()] or [*SECTIONS]
    for name in chosen:
        if name not in SECTIONS:
            parser.error(f"--only: {name!r} is not one of {', '.join(SECTIONS)}")
    # All but a little of the memory, in one piece, for what comes after; PyTorch has none of it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    began = time.monotonic()
    found = dict(checks=[], figures=[], notes=[], failures=[])
    for name in chosen:
        function, least = SECTIONS[name]
        left = arguments.budget - (time.monotonic() - began)
        if left < least * (0.1 if arguments.tiny else 1):
            add(found, "notes", f"{name}: left out, as {left:.0f} s are not enough for it")
            continue
        run_section(name, function, arguments.tiny, found, began + arguments.budget)
    passed = not found["failures"] and all(check["passed"] for check in found["checks"])
    print()
    table(found)
    seconds = time.monotonic() - began
    good = sum(check["passed"] for check in found["checks"])
    print(f"{good} of {len(found['checks'])} checks passed, {seconds:.0f} s")
    print(json.dumps({"passed": passed, "seconds": seconds, **found}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
