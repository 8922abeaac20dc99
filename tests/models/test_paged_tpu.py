"""Attention over pages by a TPU's kernel: its reference agrees with what other platforms do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as ragged
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

from lm.models import ModelConfig
from lm.models.attention.context import Context
from lm.models.attention.paged import PagedCache, Paging, attend_pages, write
from lm.models.attention.paged_tpu import attend_pairs, paired
from lm.parallel.platform import compiling_for

CONFIG = ModelConfig(num_layers=1, num_heads=8, num_kv_heads=2, width=1024, max_length=64)
PAGE = 8


def reference(query, pool, lengths, table, starts, rows, **options):
    """The kernel's own, without what only its speed depends on."""
    options = {n: x for n, x in options.items() if not n.endswith("per_block")}
    return kernel.ref_ragged_paged_attention(
        query, pool, lengths, table, starts, np.asarray(rows), **options
    )


@pytest.mark.parametrize(
    "fields", [{}, {"window": 6, "attention_pattern": ("local",)}, {"attention_softcap": 2.0}],
    ids=["grouped", "window", "soft cap"],
)  # fmt: skip
@pytest.mark.parametrize(
    "first, tokens", [((0, 5, 33, -1), 1), ((16,), 12)], ids=["rows that draw", "a prompt"]
)
def test_the_kernels_reference_is_attention_over_pages(fields, first, tokens, monkeypatch):
    monkeypatch.setattr(ragged, "ragged_paged_attention", reference)
    config = ModelConfig(**{**vars(CONFIG), **fields})
    B, T, K, C = len(first), tokens, config.kv_heads, config.head_width
    rng = np.random.default_rng(0)
    normal = functools.partial(rng.standard_normal, dtype=np.float32)
    pages = config.max_length // PAGE
    table_BN = 1 + rng.permutation(B * pages).reshape(B, pages).astype(np.int32)
    positions_BT = np.where(np.array(first)[:, None] < 0, -1, np.array(first)[:, None] + range(T))
    positions_BT[:, T - T // 4 :] = -1  # padding
    paging = Paging(jnp.array(table_BN), jnp.array(positions_BT), jnp.zeros(B, int), first=1)
    context = Context.of_pages(config, paging, None).of_layer(config.layer_kind(0))
    query, new = normal((B, T, config.num_heads, C)), (normal((B, T, K, C)), normal((B, T, K, C)))
    keys, values = normal((2, 2 + B * pages, K, PAGE, C))
    pool_PSJC = np.stack([keys, values], 3).transpose(0, 2, 1, 3, 4).reshape(-1, PAGE, 2 * K, C)

    pools = [write(jnp.array(p), jnp.array(x), paging) for p, x in zip((keys, values), new)]
    wanted = attend_pages(config, jnp.array(query), *pools, context)
    with jax.disable_jit():
        got, pool = attend_pairs(
            config, jnp.array(query), tuple(map(jnp.array, new)), jnp.array(pool_PSJC), context
        )
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)
    both = np.stack(pools, 3).transpose(0, 2, 1, 3, 4).reshape(-1, PAGE, 2 * K, C)
    np.testing.assert_array_equal(pool[2:], both[2:])  # before them lies padding


@pytest.mark.parametrize(
    "fields, is_paired",
    [
        ({}, True),
        ({"positions": "alibi"}, False),
        ({"attention": "xla"}, False),
        ({"num_heads": 6, "num_kv_heads": 3, "width": 768}, False),
        ({"num_heads": 16}, False),  # of half the width
    ],
)
def test_pools_are_one_where_the_kernel_can_be_had(fields, is_paired):
    config = ModelConfig(**{**vars(CONFIG), **fields})
    assert not paired(config, False), "on this machine"
    with compiling_for("tpu"):
        cache = jax.eval_shape(lambda: PagedCache.empty(config, 9, PAGE, 1, False))
    assert (cache.pairs_PSJC is not None) == is_paired
    assert sum(x.size for x in jax.tree.leaves(cache)) == 2 * 9 * PAGE * config.kv_heads * (
        config.head_width
    )
