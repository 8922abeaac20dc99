"""Kernels give what the reference gives, and each is chosen where it can."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import ConfigError
from lm.models.attention import kernels
from lm.models.attention import splash as splash_kernels
from lm.models.attention.attention import attend, attention_mask
from lm.models.attention.ring import ScoreBias, ring_attention
from lm.models.config import ModelConfig
from lm.models.stack import Context
from lm.models.text import Text, same_document
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.parallel.platform import compiling_for

B, H, K, C = 2, 4, 2, 16


def inputs(T, S=None, packed=False, prefix=False):
    S = T if S is None else S
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((T, H), (S, K), (S, K), (T, H))
    *arrays, weights = (jax.random.normal(k, (B, n, h, C)) for k, (n, h) in zip(keys, shapes))
    segments = None
    if packed:
        segments = jnp.stack([jnp.arange(T) // (T // 3) + 1, jnp.arange(T) < T - 9])
        segments = segments.astype(jnp.int32)
    prefixes = (jnp.arange(T) % 70 < 20)[None].repeat(B, 0) if prefix else None
    text = Text.of(jnp.zeros((B, T)), None, segments, prefixes)
    if S == T:
        return arrays, weights, text, text
    # Of every document, so that no query is without a key.
    of_keys = None if segments is None else segments[:, jnp.linspace(0, T - 1, S).astype(int)]
    return arrays, weights, text, Text.of(jnp.zeros((B, S)), None, of_keys)


def reference(query, key, value, text, key_text, *, causal=True, window=0, softcap=0.0):
    if text is not key_text:
        mask = same_document(text, key_text)
    else:
        slots, segments = text.slots_1T, text.segments_BT
        mask = attention_mask(
            slots, slots, segments, segments,
            causal=causal, window=window, prefix_BS=text.prefix_BT,
        )  # fmt: skip
    return attend(query, key, value, mask, softcap=softcap, scale=0.3)


def check(attention, arrays, weights, texts, **options):
    def both(attention):
        def loss(arrays):
            heads = attention(*arrays, *texts, **options)
            return jnp.sum(heads * weights) + jnp.sum(heads**2), heads

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)

    (_, want), want_gradients = both(reference)
    (_, got), gradients = both(attention)
    np.testing.assert_allclose(got, want, atol=2e-6)
    for name, a, b in zip(["query", "key", "value"], gradients, want_gradients):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4, err_msg=name)


splash = functools.partial(kernels.splash, scale=0.3, interpret=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packed": True, "softcap": 2.0, "length": 200},
    ],
    ids=str,
)
def test_splash_is_attention(options):
    check_splash(**options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"packed": True, "window": 60, "softcap": 2.0},
        {"window": 130, "length": 300},
        {"causal": False, "length": 200},
        {"causal": False, "packed": True},
        {"causal": False, "keys": 140, "packed": True},
        {"causal": False, "keys": 128},
    ],
    ids=str,
)
def test_splash_is_attention_in_every_case(options):
    check_splash(**options)


def check_splash(length=256, keys=None, packed=False, **options):
    arrays, weights, *texts = inputs(length, keys, packed)
    check(splash, arrays, weights, texts, **options)


@pytest.mark.slow
def test_splash_on_every_devices_rows_and_heads():
    arrays, _, *texts = inputs(128, packed=True)
    want = reference(*arrays, *texts)
    mesh = make_mesh(MeshConfig(data=2, tensor=4), jax.devices()[:8])
    with jax.set_mesh(mesh):  # and two heads of keys, copied for four devices
        got = jax.jit(lambda *arrays: splash(*arrays, *texts))(*arrays)
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.slow
def test_splash_in_a_layer_that_may_be_local():
    arrays, _, *texts = inputs(128)
    traced = jax.jit(lambda window: splash(*arrays, *texts, window=window, reach=40))
    for window in (40, 0):
        want = reference(*arrays, *texts, window=window)
        np.testing.assert_allclose(traced(jnp.int32(window)), want, atol=2e-6)


RING_OPTIONS = [
    {"packed": True, "prefix": True, "window": 150, "softcap": 2.0},
    {"packed": True},
    {"causal": False},
    {},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", RING_OPTIONS, ids=str)
def test_kernels_of_the_ring_are_attention(options, monkeypatch):
    for name in ("QUERY_BLOCK", "KEY_BLOCK", "BACKWARD_BLOCK"):
        monkeypatch.setattr(splash_kernels, name, 128)
    options = dict(options)
    marking = {name: options.pop(name, False) for name in ("packed", "prefix")}
    arrays, weights, *texts = inputs(512, **marking)
    attention = functools.partial(ring_attention, scale=0.3, kernel="pallas")
    check(attention, arrays, weights, texts, **options)


def choice(context, config=None, dtype=jnp.bfloat16, dropped=False, tapped=False, length=256):
    query = jax.ShapeDtypeStruct((B, length, H, 64), dtype)
    config = config or ModelConfig()
    return kernels.choose(config, query, query, context, dropped=dropped, tapped=tapped)


def context_of(text=None, **fields):
    text = text or Text.of(jnp.zeros((B, 256)))
    return Context(None, text, text, **{"causal": True, **fields})


def test_each_platform_has_its_kernel():
    packed = Text.of(jnp.zeros((B, 256)), None, jnp.ones((B, 256), jnp.int32))
    prefix = Text.of(jnp.zeros((B, 256)), prefix_BT=jnp.ones((B, 256)))
    table = ScoreBias(jnp.zeros(H), None)
    biased = context_of(bias_BHTS=jnp.zeros((1, H, 256, 256)), bias=table)
    capped = ModelConfig(attention_softcap=50.0)
    assert choice(context_of()) == "xla"
    with compiling_for("tpu"):
        assert choice(context_of()) == "splash"
        assert choice(context_of(packed), capped, jnp.float32) == "splash"
        assert choice(context_of(prefix)) == "xla"
        assert choice(biased) == "xla"
        assert choice(context_of(), dropped=True) == "xla"
        assert choice(context_of(), tapped=True) == "xla"
        assert choice(context_of(), length=64) == "xla"
        assert choice(Context(None)) == "xla"  # a cache
        assert choice(context_of(), ModelConfig(attention="xla")) == "xla"
    with compiling_for("gpu"):
        assert choice(context_of()) == "cudnn"
        assert choice(Context(None)) == "cudnn"
        assert choice(biased) == "cudnn"
        assert choice(context_of(), capped) == "xla"
        assert choice(context_of(), dtype=jnp.float32) == "xla"
        assert choice(context_of(), dropped=True) == "xla"


def test_a_shared_sequence_is_a_ring():
    biased = context_of(bias_BHTS=jnp.zeros((1, H, 256, 256)))
    with jax.set_mesh(make_mesh(MeshConfig(data=2, context=4), jax.devices()[:8])):
        assert choice(context_of(), dropped=True) == "ring"
        assert choice(biased._replace(bias=ScoreBias(jnp.zeros(H), None))) == "ring"
        assert choice(biased) == "xla"
        assert choice(context_of(), tapped=True) == "xla"
        assert choice(context_of(), length=255) == "xla"
        assert choice(Context(None)) == "xla"


def test_another_platforms_kernel_is_refused():
    for name, wanted in (("splash", "TPU"), ("cudnn", "GPU")):
        with pytest.raises(
            ConfigError, match=rf"config.model.attention='{name}' needs a {wanted}, .* CPU: use"
        ):
            choice(context_of(), ModelConfig(attention=name))


def test_cudnn_needs_no_mask_where_places_say_it_all():
    def traced(context):
        x = jax.ShapeDtypeStruct((B, 256, H, 64), jnp.bfloat16)
        calls = []

        def record(*arguments, **options):
            calls.append((arguments, options))
            return arguments[0]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.nn, "dot_product_attention", record)
            jax.eval_shape(lambda q, k, v: kernels.cudnn(q, k, v, context), x, x, x)
        (_, _, _, _, mask), options = calls[0]
        return mask, options["is_causal"], options["local_window_size"]

    mask = jnp.ones((B, 256, 256), bool)
    packed = Text.of(jnp.zeros((B, 256)), None, jnp.ones((B, 256), jnp.int32))
    assert traced(context_of()._replace(mask_BTS=mask)) == (None, True, None)
    assert traced(context_of(window=8)) == (None, True, (7, 0))
    assert traced(context_of(causal=False)) == (None, False, None)
    for masked in (context_of(packed), context_of(window=jnp.int32(8)), Context(None)):
        found, causal, window = traced(masked._replace(mask_BTS=mask))
        assert found.shape == (B, 1, 256, 256) and not causal and window is None
