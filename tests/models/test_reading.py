"""Weights kept for reading: rows that know no companions, and eight bits that are near."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.models import reading
from lm.models.matmul import contract


@functools.partial(jax.jit, static_argnums=0)
def product(spec, x, w):
    return contract(spec, x, w, jnp.float32)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("inputs, outputs", [(768, 300), (60, 100), (200, 64), (33, 17), (8, 1)])
def test_a_row_is_bitwise_the_same_in_a_tile_of_any_company_and_at_any_place(
    inputs, outputs, eight_bits
):
    w = reading.kept(jnp.asarray(normal(0, inputs, outputs)), (0,), eight_bits)
    rows = normal(1, 8, inputs)
    wanted = np.asarray(product("nd,df->nf", rows, w))[3]
    for count in (2, 3, 4, 7, 8, 9, 15, reading.TILE):
        for place in {0, count // 2, count - 1}:
            company = normal(count, count, inputs)
            company[place] = rows[3]
            got = np.asarray(product("nd,df->nf", company, w))[place]
            np.testing.assert_array_equal(got, wanted, f"row {place} of {count}")


@pytest.mark.parametrize(
    "spec, x, w, inputs",
    [
        ("btd,dhc->bthc", (2, 3, 24), (24, 4, 5), (0,)),
        ("bthc,hcd->btd", (2, 3, 4, 6), (4, 6, 10), (0, 1)),
        ("btd,vd->btv", (2, 1, 24), (40, 24), (1,)),
        ("btd,df->btf", (1, 1, 24), (24, 10), (0,)),
    ],
)
def test_products_are_those_of_the_weight_as_it_was(spec, x, w, inputs):
    x, w = normal(0, *x), normal(1, *w)
    wanted = np.einsum(spec, x.astype(np.float64), w.astype(np.float64))
    got = product(spec, x, reading.kept(jnp.asarray(w), inputs, False))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    # An eight-bit weight is at most half a step from what it was; a step is a 127th of the
    # largest of its output's.
    step = np.abs(w).max(inputs, keepdims=True) / 127
    bound = np.einsum(spec, np.abs(x), np.broadcast_to(step / 2, w.shape))
    got = product(spec, x, reading.kept(jnp.asarray(w), inputs, True))
    assert (np.abs(got - wanted) <= bound * 1.001 + 1e-4).all()


def test_a_table_of_eight_bits_is_looked_up_in_its_scales():
    table = normal(0, 12, 16)
    kept = reading.kept(jnp.asarray(table), (1,), True)
    ids = np.array([[3, 11], [0, 3]])
    step = np.abs(table).max(1)[ids][..., None] / 127
    assert (np.abs(kept.rows(ids, jnp.float32) - table[ids]) <= step * 0.501).all()
