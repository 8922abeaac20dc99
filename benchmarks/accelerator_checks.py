"""What `benchmarks/accelerator.py` checks; each section is given its `Run`."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lm.inference import Framing, Generator, SamplingConfig
from lm.models import ModelConfig, bind, init, param_specs, skeleton
from lm.models.attention import kernels
from lm.models.attention.attention import attend
from lm.models.attention.context import Context
from lm.models.attention.ring import ring_attention
from lm.models.positions import alibi_bias, alibi_slopes
from lm.models.presets import preset
from lm.models.text import Text, visible
from lm.objectives import ObjectiveConfig, token_loss
from lm.parallel.platform import compiling_for, platform

SMALL = dict(num_layers=2, num_heads=4, width=256, mlp_width=512, vocab_size=1000, max_length=256)
TINY = dict(num_layers=1, width=64, mlp_width=128, max_length=64)
FAMILIES = {  # small models of each kind, heads as wide as the published ones
    "gpt2": ("gpt2_small", {}),
    "llama": ("llama3_2_1b", {"num_kv_heads": 2}),
    "gemma2": ("gemma2_2b", {"num_kv_heads": 2, "head_dim": 64, "window": 100}),
    "bloom": ("bloom_560m", {}),
    "mixtral": ("mixtral_8x7b", {"num_kv_heads": 2, "num_experts": 4}),
    "bert": ("bert_base", {}),
}


def small_models(run):
    names = ("llama",) if run.tiny else FAMILIES
    for name in names:
        known, fields = FAMILIES[name]
        sizes = SMALL | fields | (TINY if run.tiny else {})
        yield name, preset(known, **{"dropout": 0.0, **sizes})


def random_batch(config, rows, length, seed=0):
    """Random tokens and their successors; two documents and some padding in every row."""
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length + 1))
    place = np.arange(length)
    segments = np.where(place < length // 3, 1, np.where(place < length - 7, 2, 0))
    starts = np.where(segments == 2, length // 3, 0)
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.tile(segments, (rows, 1)),
        "positions": np.tile(place - starts, (rows, 1)),
    }
    batch = {key: value.astype(np.int32) for key, value in batch.items()}
    return batch | {"weights": (batch["segment_ids"] > 0).astype(np.float32)}


def loss_and_gradient(config, params, batch, device=None, precision="default"):
    """Mean loss and gradient of a model, computed on `device` with its own kernels."""
    model = skeleton(config)

    def loss(params, batch):
        total, metrics = token_loss(bind(model, params), batch, ObjectiveConfig())
        return total / metrics["weight"]

    here = device.platform if device else platform()
    with compiling_for(here), jax.default_matmul_precision(precision):
        result = jax.jit(jax.value_and_grad(loss))(*jax.device_put((params, batch), device))
    return jax.tree.map(np.asarray, result)


def gradient_error(got, want):
    """The largest relative error of a parameter's gradient, and the name of that parameter.

    Relative to the parameter's own norm, but at least to a hundredth of the whole gradient's: that
    of a key's bias, for one, is zero but for rounding.
    """
    whole = math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in want.values()))
    errors = {
        name: float(np.linalg.norm(got[name] - g)) / max(float(np.linalg.norm(g)), 0.01 * whole)
        for name, g in want.items()
    }
    worst = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
    return errors[worst], worst


# Of the loss, and of a parameter's gradient: three times what rounding makes of them on a CPU.
LIMITS = {"float32": (1e-5, 1e-3), "bfloat16": (1e-3, 0.04), "fp8": (5e-3, 0.4)}
EXPERTS = 4  # times that, where a token near a tie may visit another expert


def arithmetic(run):
    """Loss and gradient against float32 on the host's CPU."""
    try:
        host = jax.devices("cpu")[0]
    except RuntimeError:
        run.note("JAX has no CPU backend here: float32 on the device itself is the reference")
        host = jax.devices()[0]
    for name, config in small_models(run):
        wide = dataclasses.replace(config, compute_dtype="float32", attention="xla")
        narrow = dataclasses.replace(config, compute_dtype="bfloat16")
        kinds = {"float32": (wide, "highest"), "bfloat16": (narrow, "default")}
        if name == "llama":
            kinds["fp8"] = dataclasses.replace(narrow, quantization="fp8"), "default"
        params = jax.jit(functools.partial(init, param_specs(skeleton(config))))(jax.random.key(0))
        params = jax.tree.map(np.asarray, params)
        batch = random_batch(config, 2, 64 if run.tiny else 256)
        with run.guarded(f"{name} on the host"):
            want_loss, want = loss_and_gradient(wide, params, batch, host, "highest")
        for kind, (config, precision) in kinds.items():
            with run.guarded(f"{name} {kind}"):
                loss, got = loss_and_gradient(config, params, batch, None, precision)
                factor = EXPERTS if config.num_experts else 1
                loss_limit, limit = (factor * limit for limit in LIMITS[kind])
                run.check(f"{name} {kind}: loss", abs(loss - want_loss), loss_limit)
                error, worst = gradient_error(got, want)
                run.check(f"{name} {kind}: gradient, worst of {worst}", error, limit)


def attention_cases(run):
    """(name, width of a head, whether packed, whether ALiBi is added, fields of `Context`)."""
    yield "causal", 64, False, False, {"causal": True}
    yield "packed", 64, True, False, {"causal": True}
    if run.tiny:
        return
    yield "heads of 128", 128, False, False, {"causal": True}
    yield "heads of 256", 256, False, False, {"causal": True}
    yield "both ways", 64, False, False, {"causal": False}
    yield "window", 64, False, False, {"causal": True, "window": 100}
    yield "packed, window", 128, True, False, {"causal": True, "window": 100}
    yield "alibi", 64, False, True, {"causal": True}


def attention(run):
    """Each kernel that is here against the reference in float32, forward and backward."""
    chosen = {"gpu": "cudnn", "tpu": "splash"}.get(platform())
    for name, *case in attention_cases(run):
        with run.guarded(f"attention, {name}"):
            check_attention(run, name, chosen, *case)


def check_attention(run, name, chosen, C, packed, alibi, fields):
    B, T, H, K = (1, 128, 2, 1) if run.tiny else (2, 512, 8, 2)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((B, T, H, C), (B, T, K, C), (B, T, K, C), (B, T, H, C))
    *arrays, weights = (jax.random.normal(k, n, jnp.bfloat16) for k, n in zip(keys, shapes))
    segments = jnp.tile((jnp.arange(T) > T // 3).astype(jnp.int32) + 1, (B, 1))
    text = Text.of(jnp.zeros((B, T)), segments_BT=segments if packed else None)
    slots, bias = text.slots_1T, None
    if alibi:
        distance = slots[:, None, :] - slots[:, :, None]
        bias = alibi_bias(jnp.asarray(alibi_slopes(H)), distance)
    mask = jnp.broadcast_to(visible(text, text, **fields), (B, T, T))
    context = Context(mask, text, text, bias_BHTS=bias, **fields)
    config = ModelConfig(num_heads=H, num_kv_heads=K, head_dim=C, window=fields.get("window", 0))

    def gradients_and_heads(function, arrays):
        def score(arrays):
            heads = function(config, *arrays, context)
            return jnp.sum(heads.astype(jnp.float32) * weights), heads

        gradients, heads = jax.jit(jax.grad(score, has_aux=True))(arrays)
        return dict(zip(("heads", "dquery", "dkey", "dvalue"), (heads, *gradients)))

    with jax.default_matmul_precision("highest"):
        want = gradients_and_heads(attend, [array.astype(jnp.float32) for array in arrays])
    rounded = gradients_and_heads(attend, arrays)
    contestants = {}
    if not alibi:  # the ring's bias is a function, not a table
        contestants["ring"] = ring_attention
    if chosen:
        found = kernels.choose(config, *arrays, context)
        if found == chosen:
            contestants[chosen] = functools.partial(kernels.compute, chosen)
        else:
            run.note(f"attention, {name}: {chosen} leaves it to {found}")
    for kernel, function in contestants.items():
        with run.guarded(f"attention, {name}: {kernel}"):
            got = gradients_and_heads(function, arrays)
            for what in want:
                # Rounding alone costs the reference that much in bfloat16.
                limit = 2 * relative(rounded[what], want[what]) + 2e-3
                error = relative(got[what], want[what])
                run.check(f"attention, {name}: {kernel}, {what}", error, limit)


def relative(got, want):
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def decoding(run):
    """Prefill and single steps through a cache against the full forward pass."""
    for name, config in small_models(run):
        kinds = {"float32": ("highest", 1e-4), "bfloat16": ("default", 0.05)}
        for dtype, (precision, limit) in kinds.items():
            if config.architecture == "decoder":
                here = dataclasses.replace(config, compute_dtype=dtype, initializer_std=0.05)
                precise = jax.default_matmul_precision(precision)
                with run.guarded(f"decoding, {name} {dtype}"), precise:
                    check_decoding(run, f"{name} {dtype}", here, limit)


def check_decoding(run, name, config, limit):
    length, steps = (24, 2) if run.tiny else (192, 4)
    model = skeleton(config)
    params = jax.jit(functools.partial(init, param_specs(model)))(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, length + steps), 0, config.vocab_size)
    places = jnp.tile(jnp.arange(length + steps), (2, 1))

    @jax.jit
    def full(params, tokens):
        return bind(model, params)(tokens)

    @jax.jit
    def extend(params, tokens, positions, cache):
        bound = bind(model, params)
        x_BTD, cache = bound.extend(tokens, positions, cache)
        return bound.unembed(x_BTD), cache

    cache = model.new_cache(2, length + steps)
    got = []
    for begin, end in [(0, length), *((at, at + 1) for at in range(length, length + steps))]:
        logits, cache = extend(params, tokens[:, begin:end], places[:, begin:end], cache)
        got.append(logits)
    error = relative(jnp.concatenate(got, 1), full(params, tokens))
    run.check(f"decoding, {name}: cached logits", error, limit)
    if config.compute_dtype == "float32":  # where no two logits are as good as equal
        generator = Generator(model, params, Framing(end_of_text=(0,)))
        greedy = SamplingConfig(0, max_new_tokens=steps, stop_at_end_of_text=False)
        prompts = np.asarray(tokens[:, :length]).tolist()
        drawn = np.concatenate(list(generator.generate(prompts, greedy)), 1)[:, :steps]
        texts = np.concatenate([np.asarray(tokens[:, :length]), drawn], 1)
        want = np.asarray(full(params, texts).argmax(-1))[:, length - 1 : -1]
        run.check(f"decoding, {name}: greedy tokens that differ", (drawn != want).sum(), 0.0)
