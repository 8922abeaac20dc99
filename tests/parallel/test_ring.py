"""Attention around a ring of devices is attention; and what it costs each device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import ConfigError
from lm.models.attention import flash
from lm.models.attention.attention import attend
from lm.models.attention.context import Context, ScoreBias
from lm.models.attention.ring import ring_attention
from lm.models.config import ModelConfig
from lm.models.positions import alibi_slopes, relative_bias
from lm.models.text import Text, visible
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.parallel.ring import from_zigzag, to_zigzag, zigzag_slots

B, T, H, C = 4, 32, 4, 8
SEGMENTS = jnp.array(
    [
        [1] * 10 + [2] * 15 + [0] * 7,
        [1] * 32,
        [1] * 3 + [2] * 3 + [3] * 20 + [4] * 6,
        [1] * 31 + [0],
    ]
)
RELATIVE = ModelConfig(num_heads=H, positions="relative", relative_buckets=8, relative_distance=12)


def relative(table, distance):
    return relative_bias(table, distance, RELATIVE, True)


def alibi(slopes, distance):
    return slopes[:, None, None] * distance[:, None]


@dataclasses.dataclass(frozen=True)
class Case:
    mesh: tuple[tuple[str, int], ...]
    kv_heads: int = 2
    zigzag: bool = True
    causal: bool = True
    packed: bool = True
    prefix: bool = False
    window: int = 0
    softcap: float = 0.0
    dropout: float = 0.0
    bias: str = ""
    sinks: bool = False
    keys: int = T  # cross-attention, unless as many as queries
    batch: int = B


def mesh_of(**sizes):
    config = MeshConfig(**{"data": 1, **sizes})
    devices = int(np.prod([abs(n) for n in sizes.values()]))
    return make_mesh(config, jax.devices()[:devices])


def inputs(case):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = ((T, H), (case.keys, case.kv_heads), (case.keys, case.kv_heads), (T, H))
    query, key, value, weights = (
        jax.random.normal(k, (case.batch, n, heads, C)) for k, (n, heads) in zip(keys, shapes)
    )
    table = jax.random.normal(keys[4], (RELATIVE.relative_buckets, H))
    if case.bias == "alibi":
        table = jnp.asarray(alibi_slopes(H))
    prefix = (jnp.arange(T) % 10 < 4)[None].repeat(case.batch, 0) if case.prefix else None
    segments = SEGMENTS[: case.batch] if case.packed else None
    rows = jnp.arange(case.batch) + 3
    text = Text.of(query[..., 0, 0], segments_BT=segments, prefix_BT=prefix, rows_B=rows)
    key_text = text
    if case.keys != T:
        of_keys = None if segments is None else segments[:, 1::2]
        key_text = Text.of(key[..., 0, 0], segments_BT=of_keys, rows_B=rows)
    sinks = jnp.linspace(-1, 2, H)
    return (query, key, value, table, sinks), weights, text, key_text


def config_of(case):
    fields = {"attention_softcap": case.softcap, "dropout": case.dropout}
    return ModelConfig(attention_scale=0.3, **fields)


def reference(case, query, key, value, table, sinks, text, key_text):
    bias = None
    if case.bias:
        distance = key_text.slots_1T[:, None, :] - text.slots_1T[:, :, None]
        bias = globals()[case.bias](table, distance)
    causal = case.causal and case.keys == T
    mask = visible(text, key_text, causal=causal, window=case.window)
    sinks = sinks if case.sinks else None
    context = Context(mask, text, key_text, bias_BHTS=bias, sinks_H=sinks)
    return attend(config_of(case), query, key, value, context, jax.random.key(7))


def reordered(text, reorder):
    length = text.slots_1T.shape[1]
    return text._replace(
        tokens_BT=None,
        slots_1T=zigzag_slots(length) if reorder is to_zigzag else text.slots_1T,
        positions_BT=reorder(text.positions_BT),
        segments_BT=None if text.segments_BT is None else reorder(text.segments_BT),
        prefix_BT=None if text.prefix_BT is None else reorder(text.prefix_BT),
    )


def ring(case, query, key, value, table, sinks, *texts, window=None):
    reorder = to_zigzag if case.zigzag else lambda x: x
    context = Context(
        None,
        *(reordered(text, reorder) for text in texts),
        causal=case.causal and case.keys == T,
        window=case.window if window is None else window,
        bias=ScoreBias(table, globals()[case.bias]) if case.bias else None,
        sinks_H=sinks if case.sinks else None,
    )
    arrays = (reorder(x) for x in (query, key, value))
    heads = ring_attention(config_of(case), *arrays, context, jax.random.key(7))
    return from_zigzag(heads) if case.zigzag else heads


def outputs_and_gradients(attention, case, weights, *texts):
    def loss(arrays):
        heads = attention(case, *arrays, *texts)
        return jnp.sum(heads * weights) + jnp.sum(heads**2), heads

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def check(case):
    arrays, weights, *texts = inputs(case)
    (_, want), want_gradients = outputs_and_gradients(reference, case, weights, *texts)(arrays)
    with jax.set_mesh(mesh_of(**dict(case.mesh))):
        (_, got), gradients = outputs_and_gradients(ring, case, weights, *texts)(arrays)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for name, a, b in zip(["query", "key", "value", "table", "sinks"], gradients, want_gradients):
        if name != "table" or case.bias == "relative":
            np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5, err_msg=name)


CASES = {
    "causal": Case((("context", 4),), packed=False),
    "packed, natural order": Case((("context", 2),), zigzag=False, kv_heads=4),
    "everything, with tensor and batch": Case(
        (("context", 2), ("tensor", 2), ("data", 2)),
        kv_heads=1, window=9, softcap=2.0, dropout=0.3, bias="relative", sinks=True,
    ),
}  # fmt: skip

SLOW_CASES = {
    "eight devices": Case((("context", 8),)),
    "fewer rows than batch axes": Case((("context", 2), ("fsdp", 4)), batch=1),
    "heads split": Case((("context", 2), ("tensor", 4)), kv_heads=2),
    "heads that tensor does not divide": Case((("context", 2), ("tensor", 3)), kv_heads=2),
    "window": Case((("context", 4),), window=5, zigzag=False, packed=False),
    "prefix and window": Case((("context", 4), ("tensor", 2)), prefix=True, window=12),
    "sinks": Case((("context", 2), ("tensor", 2), ("data", 2)), sinks=True),
    "alibi": Case((("context", 2), ("tensor", 2)), bias="alibi", softcap=1.5),
    "relative": Case((("context", 4),), bias="relative", packed=False),
    "encoder": Case((("context", 4),), causal=False, bias="relative"),
    "encoder with a window": Case((("context", 4),), causal=False, window=5),
    "across to a shorter text": Case((("context", 4),), keys=16),
    "across, with dropout": Case((("context", 2), ("tensor", 2)), keys=16, dropout=0.2),
    "one device": Case((), zigzag=False, bias="relative", dropout=0.1, window=7),
}


@pytest.mark.parametrize("name", CASES)
def test_ring_is_attention(name):
    check(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_CASES)
def test_ring_is_attention_in_every_case(name):
    check(SLOW_CASES[name])


@pytest.mark.slow
def test_window_may_differ_between_layers_of_one_program():
    case = Case((("context", 4),), window=5)
    arrays, _, *texts = inputs(case)
    with jax.set_mesh(mesh_of(context=4)):
        traced = jax.jit(lambda window: ring(case, *arrays, *texts, window=window))
        for window in (5, 0):
            case = dataclasses.replace(case, window=window)
            want = reference(case, *arrays, *texts)
            np.testing.assert_allclose(traced(jnp.int32(window)), want, atol=1e-5)


@pytest.mark.parametrize("ways", [3, 4])
def test_zigzag_gives_each_device_a_chunk_from_either_end(ways):
    tokens = jnp.arange(4 * ways)[None] + jnp.zeros((2, 1), jnp.int32)
    with jax.set_mesh(mesh_of(context=ways)):
        zigzag = jax.jit(to_zigzag)(tokens)
        back = jax.jit(from_zigzag)(zigzag)
        slots = jax.jit(lambda: zigzag_slots(4 * ways))()
    for device, share in enumerate(np.split(np.asarray(zigzag[1]), ways)):
        first, last = 2 * device, 2 * (2 * ways - 1 - device)
        assert share.tolist() == [first, first + 1, last, last + 1]
    np.testing.assert_array_equal(back, tokens)
    np.testing.assert_array_equal(slots, zigzag[:1])


def test_gradients_return_from_zigzag_to_their_tokens():
    x = jax.random.normal(jax.random.key(0), (2, 3, 16, 2))
    weights = jnp.arange(16.0)[:, None]
    with jax.set_mesh(mesh_of(context=4)):
        order = jax.jit(lambda x: to_zigzag(x, 2))(jnp.broadcast_to(weights, x.shape))
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(to_zigzag(x, 2) * order)))(x)
    np.testing.assert_array_equal(gradient, jnp.broadcast_to(weights, x.shape))


def test_lengths_that_do_not_divide_are_said_so():
    with jax.set_mesh(mesh_of(context=4)):
        with pytest.raises(ConfigError, match=r"context=4 .* 12 tokens are not a multiple of 8"):
            jax.eval_shape(to_zigzag, jnp.zeros((1, 12), jnp.int32))
        x = jnp.zeros((1, 6, 2, 4))
        text = Text.of(x[..., 0, 0])
        with pytest.raises(ConfigError, match=r"config.mesh.context=4 must divide .* 6"):
            ring_attention(ModelConfig(), x, x, x, Context(None, text, text))


def compiled(context, length):
    """The compiled gradient of a ring of a sequence of `length` over `context` devices."""
    shape = jax.ShapeDtypeStruct((1, length, 4, 16), jnp.float32)
    sharding = jax.NamedSharding(
        mesh_of(context=context), jax.sharding.PartitionSpec(None, "context")
    )
    shape = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    def attention(query, key, value):
        text = Text.of(query[..., 0, 0])
        context = Context(None, text, text, causal=True)
        return ring_attention(ModelConfig(), query, key, value, context)

    def gradients(query, key, value):
        return jax.grad(lambda *a: jnp.sum(attention(*a) ** 2), (0, 1, 2))(query, key, value)

    with jax.set_mesh(sharding.mesh):
        return jax.jit(gradients).lower(shape, shape, shape).compile()


@pytest.mark.slow
def test_memory_a_device_falls_as_one_over_context(monkeypatch):
    monkeypatch.setattr(flash, "BLOCK", 128)  # a block's scores take the same in every ring

    def held(context):
        memory = compiled(context, 16384).memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    assert held(8) < 0.3 * held(2)
    # And in a given ring it grows as the length, not as its square.
    twice = compiled(4, 32768).memory_analysis().temp_size_in_bytes
    assert twice < 2.2 * compiled(4, 16384).memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_only_neighbours_talk():
    text = compiled(4, 64).as_text()
    assert "collective-permute" in text
    for other in ("all-gather", "all-reduce", "all-to-all", "reduce-scatter"):
        assert other not in text


@pytest.mark.slow
def test_a_ring_turns_inside_a_pipelines_stage():
    case = Case((), batch=2, dropout=0.2, bias="relative", zigzag=False)
    arrays, weights, *texts = inputs(case)

    def staged(case, *arrays_and_texts):
        return jax.shard_map(
            lambda *a: ring(case, *a)[None],
            in_specs=jax.sharding.PartitionSpec(),
            out_specs=jax.sharding.PartitionSpec("stage"),
            axis_names={"stage"},
            check_vma=False,
        )(*arrays_and_texts).mean(0)

    (_, want), want_gradients = outputs_and_gradients(reference, case, weights, *texts)(arrays)
    with jax.set_mesh(mesh_of(stage=2, context=2, tensor=2)):
        (_, got), gradients = outputs_and_gradients(staged, case, weights, *texts)(arrays)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for a, b in zip(gradients, want_gradients):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)
