"""`contract` is einsum, with gradients of the compute dtype's cost."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from lm.models.matmul import compute_dtype, contract, fast_bfloat16
from lm.parallel.platform import compiling_for

SPECS = {
    "btd,dhc->bthc": ((2, 3, 8), (8, 2, 4)),
    "bthc,hcd->btd": ((2, 3, 2, 4), (2, 4, 8)),
    "btkgc,bskc->bkgts": ((2, 3, 2, 2, 4), (2, 5, 2, 4)),
    "btd,vd->btv": ((2, 3, 8), (7, 8)),
}


def operands(spec):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in SPECS[spec]]


@pytest.mark.parametrize("spec", SPECS)
def test_values_and_gradients_are_those_of_einsum_in_float32(spec):
    x, w = operands(spec)

    def loss(product):
        return lambda x, w: jnp.sum(jnp.sin(product(spec, x, w)))

    ours, einsums = (
        tiny_models.compiled(jax.value_and_grad(loss(product), (0, 1)))(x, w)
        for product in (contract, jnp.einsum)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), ours, einsums)


@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_bfloat16_activations_give_bfloat16_gradients_and_parameters_float32_ones(dtype):
    x, w = operands("btd,dhc->bthc")
    product, backward = jax.vjp(
        lambda x, w: contract("btd,dhc->bthc", x, w, dtype), x.astype(jnp.bfloat16), w
    )
    assert product.dtype == (dtype or jnp.bfloat16)
    dx, dw = backward(jnp.ones_like(product))
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(product, jnp.einsum("btd,dhc->bthc", x, w), atol=0.1)


def test_no_product_of_the_backward_pass_has_float32_operands_in_bfloat16():
    x, w = operands("btd,vd->btv")

    def loss(x, w):
        return jnp.sum(contract("btd,vd->btv", x, w, jnp.float32) ** 2)

    lowered = jax.jit(jax.grad(loss, (0, 1))).lower(x.astype(jnp.bfloat16), w).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line]
    assert len(products) == 3
    for line in products:
        operand_types = line.split(" : (")[1].split(") ->")[0]
        assert "f32" not in operand_types.replace("bf16", ""), line


@pytest.mark.parametrize("platform, leaves", [("cpu", "f32"), ("tpu", "bf16"), ("gpu", "bf16")])
def test_accelerators_sum_activations_over_devices_in_bfloat16_and_weights_in_float32(
    platform, leaves
):
    x, w = operands("btd,vd->btv")

    def loss(x, w):
        return jnp.sum(contract("btd,vd->btv", x, w).astype(jnp.float32) ** 2)

    with compiling_for(platform):
        lowered = jax.jit(jax.grad(loss, (0, 1))).lower(x.astype(jnp.bfloat16), w).as_text()
    results = re.findall(r"dot_general .* -> tensor<([\dx]*)x(\w+)>", lowered)
    assert dict(results) == {"2x3x7": leaves, "2x3x8": leaves, "7x8": "f32"}


def test_auto_is_bfloat16_exactly_where_it_is_fast():
    fast = fast_bfloat16(jax.default_backend())
    assert compute_dtype("auto") == (jnp.bfloat16 if fast else jnp.float32)
    assert compute_dtype("float32") == jnp.float32
