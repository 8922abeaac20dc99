"""Log-probabilities of targets are those of the definition, however their logits are cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from lm.models import bind, skeleton
from lm.objectives import ObjectiveConfig
from lm.objectives.cross_entropy import linear_cross_entropy
from lm.objectives.logprobs import linear_logprobs, token_logprobs
from lm.parallel.layout import lay_out
from lm.parallel.mesh import MeshConfig

B, T, D, V = 4, 12, 8, 50


def problem(seed=0):
    rng = np.random.default_rng(seed)
    arrays = {
        "x": rng.normal(size=(B, T, D)),
        "head": rng.normal(size=(V, D)),
        "bias": rng.normal(size=V),
        "pull": rng.normal(size=(2, B, T)),  # what each value counts in the scalar below
    }
    arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
    weights = np.ones((B, T), np.float32)
    weights[:, [0, 4, 11]] = 0
    kept = rng.random((B, T, V)) < 0.4
    return arrays, rng.integers(0, V, (B, T), np.int32), weights, kept


def words(kept):
    """bool [..., V] as uint32 [..., W]."""
    padded = np.pad(kept, [(0, 0)] * (kept.ndim - 1) + [(0, -kept.shape[-1] % 32)])
    return np.packbits(padded, -1, bitorder="little").view(np.uint32)


def differentiated(function, arrays, targets, weights, **fields):
    """(log-probabilities, entropies), and the gradients of a scalar that depends on all of them."""

    def scalar(x, head, bias):
        found = function(x, head, targets, weights, bias_V=bias, **fields)
        asked = [value for value in found if value is not None]
        return sum(jnp.sum(pull * value) for pull, value in zip(arrays["pull"], asked)), found

    both = jax.value_and_grad(scalar, (0, 1, 2), has_aux=True)
    (_, values), gradients = tiny_models.compiled(both)(*(arrays[n] for n in ("x", "head", "bias")))
    return values, gradients


def by_definition(x, head, targets, weights, *, bias_V, softcap=0, temperature=1, kept=None):
    logits = jnp.einsum("btd,vd->btv", x, head) + bias_V
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    logits /= temperature
    if kept is not None:
        logits = jnp.where(kept | (jnp.arange(V) == targets[..., None]), logits, -1e9)
    log_p = jax.nn.log_softmax(logits)
    logprob = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    return weights * logprob, -weights * jnp.sum(jnp.exp(log_p) * log_p, -1)


def assert_close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected
    )


@pytest.mark.parametrize("chunk", [1, 4, 12])
@pytest.mark.parametrize("bends", [{}, {"softcap": 2.0, "temperature": 0.7}], ids=str)
@pytest.mark.parametrize("supported", [False, True], ids=["all tokens", "a support"])
def test_values_and_gradients_are_those_of_the_definition(chunk, bends, supported):
    arrays, targets, weights, kept = problem()
    kept = kept if supported else None
    support = words(kept) if supported else None
    fields = dict(bends, chunk=chunk, support_BTW=support, entropy=True)
    found = differentiated(linear_logprobs, arrays, targets, weights, **fields)
    assert_close(found, differentiated(by_definition, arrays, targets, weights, kept=kept, **bends))


def test_the_target_is_always_kept_and_alone_has_probability_one():
    arrays, targets, weights, kept = problem()
    none = np.zeros_like(words(kept))
    (logprob, entropy), gradients = differentiated(
        linear_logprobs, arrays, targets, weights, support_BTW=none, entropy=True
    )
    for array in (logprob, entropy, *gradients):
        assert np.all(array == 0)


def test_entropies_that_are_not_asked_for_change_nothing():
    arrays, targets, weights, _ = problem()
    arrays["pull"][1] = 0
    (logprob, entropy), gradients = differentiated(linear_logprobs, arrays, targets, weights)
    assert entropy is None
    (expected, _), others = differentiated(linear_logprobs, arrays, targets, weights, entropy=True)
    np.testing.assert_array_equal(logprob, expected)
    assert_close(gradients, others)


@pytest.mark.parametrize("junk", [np.nan, 100.0], ids=str)
def test_what_stands_in_masked_places_changes_no_bit(junk):
    arrays, targets, weights, kept = problem()
    masked, support = weights == 0, words(kept)

    def found(arrays, targets, support):
        return differentiated(
            linear_logprobs, arrays, targets, weights, support_BTW=support, entropy=True, chunk=4
        )

    clean = found(arrays, targets, support)
    spoilt = {**arrays, "x": np.where(masked[..., None], junk, arrays["x"]).astype(np.float32)}
    spoilt_support = np.where(masked[..., None], 0, support).astype(np.uint32)
    for target in (100, -100):
        again = found(spoilt, np.where(masked, target, targets).astype(np.int32), spoilt_support)
        jax.tree.map(np.testing.assert_array_equal, clean, again)
    (logprob, entropy), (dx, *_) = clean
    assert np.all(logprob[masked] == 0) and np.all(entropy[masked] == 0) and np.all(dx[masked] == 0)


@pytest.mark.parametrize("sizes", [{"fsdp": 4, "tensor": 2}, {"tensor": 2, "context": 2}], ids=str)
def test_a_mesh_that_splits_tokens_and_vocabulary_computes_the_same(sizes):
    arrays, targets, weights, kept = problem()
    fields = dict(support_BTW=words(kept), entropy=True, temperature=0.7)
    one = differentiated(linear_logprobs, arrays, targets, weights, **fields)
    with lay_out("", MeshConfig(data=-1, **sizes), 3).active():
        many = differentiated(linear_logprobs, arrays, targets, weights, **fields)
    assert_close(many, one)


def test_full_logits_are_never_in_memory():
    batch, length, width, vocab = 2, 64, 8, 4096

    def shape(dims, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(dims, dtype)

    shapes = [
        shape((batch, length, width)),
        shape((vocab, width)),
        shape((batch, length), jnp.int32),
        shape((batch, length)),
    ]

    def memory(chunk):
        def scalar(x, head, targets, weights):
            found = linear_logprobs(x, head, targets, weights, entropy=True, chunk=chunk)
            return sum(jnp.sum(jnp.sin(value)) for value in found)

        compiled = tiny_models.compiled(jax.grad(scalar, (0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    full = 4 * batch * length * vocab
    assert memory(length) > full  # the measure sees logits where they are
    assert memory(4) < full / 2


def test_a_frozen_head_has_no_gradient_in_memory():
    shapes = [
        ((2, 8, 64), "float32"),
        ((4096, 64), "float32"),
        ((2, 8), "int32"),
        ((2, 8), "float32"),
    ]
    shapes = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    def of_logprobs(x, head, targets, weights):
        return jnp.sum(linear_logprobs(x, head, targets, weights, chunk=1)[0])

    def of_loss(x, head, targets, weights):
        return linear_cross_entropy(x, head, targets, weights, chunk=1)[0]

    for function in (of_logprobs, of_loss):
        taken = []
        for trained in ((0,), (0, 1)):
            compiled = tiny_models.compiled(jax.grad(function, trained)).lower(*shapes).compile()
            memory = compiled.memory_analysis()
            taken.append(memory.temp_size_in_bytes + memory.output_size_in_bytes)
        assert taken[0] + 4 * 4096 * 64 <= taken[1]


def test_a_model_gives_the_log_probabilities_of_its_own_logits():
    config = tiny_models.config(logits_softcap=3.0, head_bias=True)
    values, tokens = tiny_models.params(config), tiny_models.tokens(2, 13)
    weights = np.ones((2, 12), np.float32)
    weights[1, 7:] = 0
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": weights,
        "segment_ids": np.ones((2, 12), np.int32),
    }

    @tiny_models.compiled
    def found(values):
        model = bind(skeleton(config), values)
        return token_logprobs(model, batch, ObjectiveConfig(), entropy=True)[:2]

    logits = tiny_models.logits(config, values, batch["inputs"])
    log_p = jax.nn.log_softmax(logits)
    expected = jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    logprob, entropy = found(values)
    np.testing.assert_allclose(logprob, weights * expected, atol=1e-5)
    wanted = -weights * jnp.sum(jnp.exp(log_p) * log_p, -1)
    np.testing.assert_allclose(entropy, wanted, atol=1e-5)
