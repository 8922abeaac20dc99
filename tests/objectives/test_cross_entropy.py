"""The chunked loss is the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from lm.config import ConfigError
from lm.objectives.chunked import CHUNK_ELEMENTS, chunk_length
from lm.objectives.cross_entropy import linear_cross_entropy

B, T, D, V = 2, 12, 8, 30


def problem(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    head = rng.normal(size=(V, D)).astype(np.float32)
    targets = rng.integers(0, V, (B, T), np.int32)
    weights = rng.uniform(0, 2, (B, T)).astype(np.float32)
    weights[:, [3, 4, 11]] = 0
    return x, head, targets, weights


BENDS = [{}, {"z_loss": 0.01}, {"label_smoothing": 0.1}, {"softcap": 2.0}]


@pytest.mark.parametrize("bends", BENDS, ids=str)
@pytest.mark.parametrize("chunk", [1, 4, 12, 0])
def test_every_chunk_length_gives_the_loss_of_the_definition_and_its_gradients(chunk, bends):
    x, head, targets, weights = problem()
    bias = np.random.default_rng(5).normal(size=V).astype(np.float32) if bends else None

    def ours(x, head, bias):
        return linear_cross_entropy(x, head, targets, weights, bias_V=bias, chunk=chunk, **bends)

    def plain(x, head, bias):
        logits = jnp.einsum("btd,vd->btv", x, head) + (0 if bias is None else bias)
        if "softcap" in bends:
            logits = bends["softcap"] * jnp.tanh(logits / bends["softcap"])
        smooth = bends.get("label_smoothing", 0.0)
        wanted = (1 - smooth) * jax.nn.one_hot(targets, V) + smooth / V
        log_p = jax.nn.log_softmax(logits)
        loss = -jnp.sum(wanted * log_p, -1)
        loss += bends.get("z_loss", 0.0) * jax.nn.logsumexp(logits, -1) ** 2
        nats = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
        return jnp.sum(weights * loss), jnp.sum(weights * nats)

    def differentiate(function):
        def scaled(*arrays):  # the backward pass scales what the forward pass made
            loss, nats = function(*arrays)
            return 3 * loss, nats

        scaled = jax.value_and_grad(scaled, (0, 1, 2), has_aux=True)
        return tiny_models.compiled(scaled)(x, head, bias)

    results = differentiate(ours), differentiate(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), *results)
    (_, nats), (dx, *_) = results[0]
    without_gradient = tiny_models.compiled(ours)(x, head, bias)
    np.testing.assert_allclose(without_gradient[1], nats, rtol=1e-6)
    assert np.all(dx[:, [3, 4, 11]] == 0)  # positions without weight


def test_loss_stays_finite_for_huge_logits():
    x, head, targets, weights = problem()
    loss, gradient = jax.value_and_grad(
        lambda x: linear_cross_entropy(x, head, targets, weights, chunk=4)[0]
    )(1e4 * x)
    assert jnp.isfinite(loss) and jnp.all(jnp.isfinite(gradient))


def test_full_logits_are_never_in_memory():
    batch, length, width, vocab, chunk = 2, 64, 8, 4096, 8
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((batch, length, width), jnp.float32),
            ((vocab, width), jnp.float32),
            ((batch, length), jnp.int32),
            ((batch, length), jnp.float32),
        )
    ]

    def gradient(chunk):
        def loss(x, head, targets, weights):
            return linear_cross_entropy(x, head, targets, weights, chunk=chunk)[0]

        return jax.grad(loss, (0, 1))

    def memory(chunk):
        compiled = tiny_models.compiled(gradient(chunk)).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    full = 4 * batch * length * vocab
    assert memory(length) > full  # the measure sees logits where they are
    assert memory(chunk) < full / 2


def test_chosen_chunks_divide_the_length_and_stay_within_the_limit():
    for batch, length, vocab in ((4, 1024, 50_257), (1, 96, 100), (8, 60, 2**21), (2, 17, 2**22)):
        chunk = chunk_length(batch, length, vocab)
        assert length % chunk == 0
        assert chunk == 1 or batch * chunk * vocab <= CHUNK_ELEMENTS["cpu"]


def test_a_chunk_that_does_not_divide_the_length_is_refused_with_one_that_does():
    with pytest.raises(ConfigError, match=r"config.objective.chunk=5 .* 12: use 4"):
        linear_cross_entropy(*problem(), chunk=5)
