"""Adapters are the model that their matrices add up to, and cost none of its gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from lm.config import ConfigError
from lm.models import bind, param_specs, skeleton
from lm.models.adapted import Adapted, Rounded
from lm.models.adapters import (
    AdapterConfig,
    adapter_specs,
    applied,
    begun,
    freeze,
    merged,
)

LLAMA = dict(activation="swiglu", norm="rmsnorm", positions="rotary", num_kv_heads=2, bias=False)
KINDS = {
    "gpt": {},
    "unrolled": dict(scan_layers=False),
    "llama": dict(LLAMA, tie_embeddings=False),
    "remat": dict(remat="dots"),
    "both": dict(architecture="encoder_decoder"),
    "experts": dict(LLAMA, num_experts=4, dense_layers=1, shared_experts=1, num_layers=3),
}


def setting(adapter, dtype=jnp.float32, **fields):
    """A model, its parameters, the base and adapters in general position (B is not zero)."""
    model = skeleton(tiny_models.config(**fields))
    specs, params = param_specs(model), tiny_models.params(model.config)
    params = jax.tree.map(jnp.asarray, params)
    base = freeze(adapter, specs, params, dtype)
    adapters = begun(adapter, specs, params, base, jax.random.key(0))
    return model, params, base, adapters


def moved(adapters, size=0.3):
    rng = np.random.default_rng(1)
    return {
        n: x + np.asarray(rng.normal(0, size, x.shape), np.float32) for n, x in adapters.items()
    }


def score(model, params, tokens_BT):
    """A scalar that depends on every logit."""
    both = model.config.architecture == "encoder_decoder"
    logits = bind(model, params)(tokens_BT, tokens_BT) if both else bind(model, params)(tokens_BT)
    return jnp.sum(jnp.sin(jnp.arange(logits.size)) * logits.ravel())


@pytest.mark.parametrize(
    "name, kind, base_kind",
    [
        *((name, "lora", "compute") for name in KINDS),
        ("gpt", "lora", "int8"),
        pytest.param("unrolled", "dora", "nf4", marks=pytest.mark.slow),
        pytest.param("both", "dora", "int8", marks=pytest.mark.slow),
        ("llama", "dora", "compute"),
    ],
)
def test_values_and_gradients_are_those_of_the_merged_matrices(name, kind, base_kind):
    adapter = AdapterConfig(kind=kind, rank=3, alpha=5.0, base=base_kind)
    model, _, base, adapters = setting(adapter, **KINDS[name])
    adapters, tokens_BT = moved(adapters), tiny_models.tokens()

    def beside(adapters):
        return score(model, applied(adapters, base), tokens_BT)

    def through(adapters):
        return score(model, merged(adapters, base), tokens_BT)

    ours, chained = (
        tiny_models.compiled(jax.value_and_grad(each))(adapters) for each in (beside, through)
    )
    np.testing.assert_allclose(ours[0], chained[0], rtol=1e-4)
    for n, gradient in ours[1].items():
        size = np.abs(chained[1][n]).max()
        np.testing.assert_allclose(gradient, chained[1][n], atol=1e-4 * size, err_msg=n)
        assert size > 0, n


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_before_training_the_logits_are_the_bases_to_the_bit(dtype, scan_layers):
    fields = dict(compute_dtype=dtype, scan_layers=scan_layers)
    model, params, base, adapters = setting(AdapterConfig(kind="lora"), jnp.dtype(dtype), **fields)
    tokens_BT = np.tile(tiny_models.tokens(), (16, 1))  # products are joined
    before = tiny_models.logits(model.config, params, tokens_BT)
    after = tiny_models.compiled(lambda a, b: bind(model, applied(a, b))(tokens_BT))(adapters, base)
    np.testing.assert_array_equal(after, before)


def test_before_training_dora_is_the_base_to_rounding():
    model, params, base, adapters = setting(AdapterConfig(kind="dora"), **KINDS["llama"])
    tokens_BT = tiny_models.tokens()
    before = tiny_models.logits(model.config, params, tokens_BT)
    np.testing.assert_allclose(bind(model, applied(adapters, base))(tokens_BT), before, atol=1e-5)


def test_dora_is_its_papers_equation():
    adapter = AdapterConfig(kind="dora", rank=2, alpha=3.0, targets="mlp.up")
    _, params, base, adapters = setting(adapter)
    adapters = moved(adapters)
    whole = merged(adapters, base)["blocks.mlp.up"]
    name = "blocks.mlp.up"
    for layer in range(2):
        a, b, m = (adapters[f"{name}.{part}"][layer] for part in ("lora_a", "lora_b", "magnitude"))
        v = params[name][layer] + 1.5 * a @ b
        expected = m * v / np.linalg.norm(v, axis=0)
        np.testing.assert_allclose(whole[layer], expected, rtol=1e-5, atol=1e-6)


def test_length_counts_as_a_constant():
    adapter = AdapterConfig(kind="dora", rank=2)
    _, _, base, adapters = setting(adapter, num_layers=1)
    part = applied(moved(adapters), base)["blocks.mlp.up"]
    gradient = jax.grad(lambda b: jnp.sum(Adapted(part.weight, part.a, b, part.magnitude).factor()))
    assert not np.any(gradient(part.b))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_no_gradient_of_a_frozen_matrix_is_made(scan_layers):
    fields = dict(LLAMA, mlp_width=56, vocab_size=40, scan_layers=scan_layers)
    adapter = AdapterConfig(kind="lora", rank=3, targets=("query", "down"))
    model, _, base, adapters = setting(adapter, **fields)
    tokens_BT = tiny_models.tokens(1, 5)

    def gradient(adapters, base):
        return jax.grad(lambda a: score(model, applied(a, base), tokens_BT))(adapters)

    text = jax.jit(gradient).lower(adapters, base).as_text()
    products = re.findall(r"dot_general.*-> tensor<([\dx]+)xf32>", text)
    assert products
    matrices = {"32x4x8", "32x2x8", "4x8x32", "32x56", "56x32"}  # and turned
    matrices |= {"x".join(reversed(shape.split("x"))) for shape in matrices}
    assert not matrices & set(products), products


@pytest.mark.parametrize("kind, error", [("int8", 0.005), ("nf4", 0.08)])
def test_a_rounded_matrix_is_the_matrix_to_its_bits(kind, error):
    w = np.random.default_rng(0).normal(size=(2, 96, 4, 8)).astype(np.float32)
    rounded = Rounded.of(jnp.asarray(w), kind, 1, stacked=True)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(rounded))
    assert size < w.nbytes * (0.27 if kind == "int8" else 0.16)
    back = rounded.widened(jnp.float32)
    assert back.shape == w.shape
    assert np.sqrt(np.mean((back - w) ** 2)) < error * np.abs(w).max()
    again = Rounded.of(back, kind, 1, stacked=True).widened(jnp.float32)
    np.testing.assert_allclose(again, back, rtol=1e-6)
    one = jax.tree.map(lambda x: x[1], rounded)
    np.testing.assert_array_equal(one.widened(jnp.float32), back[1])


def test_beside_products_of_eight_bits_too():
    model, _, base, adapters = setting(AdapterConfig(kind="lora"), quantization="int8")
    plain, *_ = setting(AdapterConfig(kind="lora"))
    adapters, tokens_BT = moved(adapters, 0.02), tiny_models.tokens()
    rounded, exact = (
        jax.grad(lambda a, m=m: score(m, applied(a, base), tokens_BT))(adapters)
        for m in (model, plain)
    )
    for name, value in exact.items():
        assert np.linalg.norm(rounded[name] - value) < 0.2 * np.linalg.norm(value), name


def test_a_column_of_zeros_has_a_length_and_a_gradient():
    zeros = jnp.zeros((4, 3))
    a, b, m = jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.zeros(3)

    def total(a, b, m):
        return jnp.sum(Adapted(zeros, a, b, m).whole())

    assert all(np.all(np.isfinite(g)) for g in jax.grad(total, (0, 1, 2))(a, b, m))


def test_what_is_trained_whole_is_a_parameter_as_ever():
    adapter = AdapterConfig(kind="lora")
    fields = dict(architecture="encoder", classifier="sequence", num_labels=3)
    model, params, base, adapters = setting(adapter, **fields)
    assert "classifier.projection" in adapters and "classifier.projection" not in base
    np.testing.assert_array_equal(adapters["classifier.bias"], params["classifier.bias"])
    bind(model, applied(adapters, base))


def test_targets_are_parts_of_names():
    specs = param_specs(skeleton(tiny_models.config(**KINDS["llama"])))
    of = lambda *targets: {  # noqa: E731
        name.rpartition(".")[0]
        for name in adapter_specs(AdapterConfig(kind="lora", targets=targets), specs)
    }
    assert of("query") == {"blocks.attention.query"}
    assert of("mlp", "attention.value") == {
        "blocks.mlp.up", "blocks.mlp.gate", "blocks.mlp.down", "blocks.attention.value"
    }  # fmt: skip
    assert len(of()) == 7 and of("head") == {"head"}


def test_a_target_that_is_nothing_is_named_with_the_nearest():
    specs = param_specs(skeleton(tiny_models.config()))
    for target, words in (("quer", "did you mean 'query'"), ("head", "token embedding")):
        with pytest.raises(ConfigError, match=words):
            adapter_specs(AdapterConfig(kind="lora", targets=target), specs)
    experts = param_specs(skeleton(tiny_models.config(**KINDS["experts"])))
    with pytest.raises(ConfigError, match="no adapters of experts"):
        adapter_specs(AdapterConfig(kind="lora", targets="mlp"), experts)
    with pytest.raises(ConfigError, match="are not rounded"):
        AdapterConfig(base="int8").validate()


def test_the_heads_adapter_is_added_in():
    adapter = AdapterConfig(kind="dora", rank=2, targets="head")
    model, _, base, adapters = setting(adapter, **KINDS["llama"])
    adapters, tokens_BT = moved(adapters), tiny_models.tokens()
    ours = bind(model, applied(adapters, base))(tokens_BT)
    whole = tiny_models.logits(model.config, merged(adapters, base), tokens_BT)
    np.testing.assert_allclose(ours, whole, rtol=1e-4, atol=1e-4)
    assert np.abs(ours - tiny_models.logits(model.config, merged({}, base), tokens_BT)).max() > 0.1
