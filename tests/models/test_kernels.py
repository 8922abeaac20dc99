"""Kernels give what the reference gives, and each is chosen where it can."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import ConfigError
from lm.models.attention import flash_tpu, kernels
from lm.models.attention.attention import attend
from lm.models.attention.context import Context, ScoreBias
from lm.models.attention.ring import ring_attention
from lm.models.attention.splash import splash
from lm.models.config import ModelConfig
from lm.models.text import Text, visible
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.parallel.platform import compiling_for

B, H, K, C = 2, 4, 2, 16


def inputs(T, S=None, packed=False, prefix=False, **fields):
    """Queries, keys and values, weights of the heads' outputs, and what decides who sees whom."""
    S = T if S is None else S
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((T, H), (S, K), (S, K), (T, H))
    *arrays, weights = (jax.random.normal(k, (B, n, h, C)) for k, (n, h) in zip(keys, shapes))
    segments = of_keys = prefixes = None
    if packed:
        segments = jnp.stack([jnp.arange(T) // (T // 3) + 1, jnp.arange(T) < T - 9])
        segments = segments.astype(jnp.int32)
        # Of every document, so that no query is without a key.
        of_keys = segments[:, jnp.linspace(0, T - 1, S).astype(int)]
    if prefix:
        prefixes = (jnp.arange(T) % 70 < 20)[None].repeat(B, 0)
    text = key_text = Text.of(jnp.zeros((B, T)), segments_BT=segments, prefix_BT=prefixes)
    if S != T:
        key_text = Text.of(jnp.zeros((B, S)), segments_BT=of_keys)
    known = {"causal": True, "window": 0, **fields}
    return arrays, weights, Context(visible(text, key_text, **known), text, key_text, **known)


def check(attention, arrays, weights, context, softcap=0.0, reference=attend):
    config = ModelConfig(attention_softcap=softcap, attention_scale=0.3)

    def both(attention):
        def loss(arrays, sinks_H):
            heads = attention(config, *arrays, context._replace(sinks_H=sinks_H))
            return jnp.sum(heads * weights) + jnp.sum(heads**2), heads

        run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        outputs, (gradients, of_sinks) = run(arrays, context.sinks_H)
        return outputs, (*gradients, *([] if of_sinks is None else [of_sinks]))

    (_, want), want_gradients = both(reference)
    (_, got), gradients = both(attention)
    np.testing.assert_allclose(got, want, atol=2e-6)
    for name, a, b in zip(["query", "key", "value", "sinks"], gradients, want_gradients):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4, err_msg=name)


interpreted = functools.partial(splash, interpret=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packed": True, "softcap": 2.0, "T": 200},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {"packed": True, "window": 60, "softcap": 2.0},
                {"window": 130, "T": 300},
                {"causal": False, "T": 200},
                {"causal": False, "packed": True},
                {"causal": False, "S": 140, "packed": True},
                {"causal": False, "S": 128},
                {"causal": False, "packed": True, "window": 60},
            )
        ),
    ],
    ids=str,
)
def test_splash_is_attention(options):
    options = {"T": 256, "softcap": 0.0, **options}
    softcap = options.pop("softcap")
    check(interpreted, *inputs(**options), softcap)


@pytest.mark.slow
def test_splash_on_every_devices_rows_and_heads():
    arrays, _, context = inputs(128, packed=True)
    want = attend(ModelConfig(), *arrays, context)
    mesh = make_mesh(MeshConfig(data=2, tensor=4), jax.devices()[:8])
    with jax.set_mesh(mesh):  # and two heads of keys, copied for four devices
        got = jax.jit(lambda *arrays: interpreted(ModelConfig(), *arrays, context))(*arrays)
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.slow
def test_splash_in_a_layer_that_may_be_local():
    config = ModelConfig(window=40)
    arrays, _, context = inputs(128)

    @jax.jit
    def traced(window):
        return interpreted(config, *arrays, context._replace(window=window))

    for window in (40, 0):
        want = attend(config, *arrays, inputs(128, window=window)[-1])
        np.testing.assert_allclose(traced(jnp.int32(window)), want, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"packed": True, "prefix": True, "window": 150, "softcap": 2.0},
        {"packed": True},
        {"causal": False},
        {"causal": False, "window": 150},
        {},
    ],
    ids=str,
)
def test_kernels_of_the_ring_are_attention(options, monkeypatch):
    for name in ("QUERY_BLOCK", "KEY_BLOCK", "BACKWARD_BLOCK"):
        monkeypatch.setattr(flash_tpu, name, 128)
    options = {"softcap": 0.0, **options}
    softcap = options.pop("softcap")
    attention = functools.partial(ring_attention, kernel="pallas")
    check(attention, *inputs(512, **options), softcap)


SINKS = jnp.linspace(-1, 2, H)


def beside_a_key_of_no_value(config, query, key, value, context):
    """Attention with sinks as attention without, to a last key that all see and that says 0."""
    key, value = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (key, value))
    mask = jnp.pad(context.mask_BTS, ((0, 0), (0, 0), (0, 1)), constant_values=True)
    bias = jnp.zeros((1, H, *mask.shape[1:])).at[..., -1].set(context.sinks_H[:, None])
    context = context._replace(mask_BTS=mask, bias_BHTS=bias, sinks_H=None)
    return attend(config, query, key, value, context)


@pytest.mark.parametrize(
    "attention",
    [
        attend,
        ring_attention,
        pytest.param(functools.partial(ring_attention, kernel="pallas"), marks=pytest.mark.slow),
    ],
    ids=["xla", "ring", "pallas"],
)
def test_a_sink_is_a_key_of_no_value(attention):
    arrays, weights, context = inputs(128, window=60)
    context = context._replace(sinks_H=SINKS)
    check(attention, arrays, weights, context, reference=beside_a_key_of_no_value)


def choice(context, config=None, dtype=jnp.bfloat16, dropped=False, tapped=False, length=256):
    arrays = [jax.ShapeDtypeStruct((B, length, H, 64), dtype)] * 3
    key = jax.random.key(0) if dropped else None
    return kernels.choose(config or ModelConfig(), *arrays, context, key, tapped=tapped)


def context_of(text=None, **fields):
    text = text or Text.of(jnp.zeros((B, 256)))
    return Context(None, text, text, **{"causal": True, **fields})


def test_each_platform_has_its_kernel():
    packed = Text.of(jnp.zeros((B, 256)), segments_BT=jnp.ones((B, 256), jnp.int32))
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
        assert choice(context_of(sinks_H=SINKS)) == "ring"  # of one device
        assert choice(context_of(sinks_H=SINKS), dropped=True) == "xla"
        assert choice(context_of(sinks_H=SINKS), length=200) == "xla"
        assert choice(Context(None)) == "xla"  # a cache
        assert choice(context_of(), ModelConfig(attention="xla")) == "xla"
    with compiling_for("gpu"):
        assert choice(context_of()) == "cudnn"
        assert choice(Context(None)) == "cudnn"
        assert choice(biased) == "cudnn"
        assert choice(context_of(sinks_H=SINKS)) == "xla"
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
            jax.eval_shape(lambda *x: kernels.cudnn(ModelConfig(), *x, context), x, x, x)
        (_, _, _, _, mask), options = calls[0]
        return mask, options["is_causal"], options["local_window_size"]

    mask = jnp.ones((B, 256, 256), bool)
    packed = Text.of(jnp.zeros((B, 256)), segments_BT=jnp.ones((B, 256), jnp.int32))
    assert traced(context_of()._replace(mask_BTS=mask)) == (None, True, None)
    assert traced(context_of(window=8)) == (None, True, (7, 0))
    assert traced(context_of(causal=False)) == (None, False, None)
    both_sides = context_of(causal=False, window=8)
    for masked in (context_of(packed), context_of(window=jnp.int32(8)), both_sides, Context(None)):
        found, causal, window = traced(masked._replace(mask_BTS=mask))
        assert found.shape == (B, 1, 256, 256) and not causal and window is None
