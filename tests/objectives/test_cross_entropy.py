"""The chunked loss is the plain one, and sums do not know how a batch was cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from lm.config import ConfigError
from lm.models import Transformer, bind
from lm.objectives import ObjectiveConfig, token_loss
from lm.objectives.cross_entropy import CHUNK_ELEMENTS, chunk_length, linear_cross_entropy

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


# ---- Whole models ----------------------------------------------------------------------------


@functools.partial(tiny_models.compiled, static_argnums=0)
def loss_and_gradient(config, values, batch):
    """((summed loss, metrics), gradient) of a batch."""
    return jax.value_and_grad(
        lambda p: token_loss(bind(Transformer(config), p), batch, ObjectiveConfig(z_loss=1e-3)),
        has_aux=True,
    )(values)


def padded(documents, length=12):
    """One document a row."""
    batch = {name: np.zeros((len(documents), length), np.int32) for name in ("inputs", "targets")}
    segments, weights = np.zeros_like(batch["inputs"]), np.zeros_like(batch["inputs"], np.float32)
    for row, document in enumerate(documents):
        n = len(document) - 1
        batch["inputs"][row, :n], batch["targets"][row, :n] = document[:-1], document[1:]
        segments[row, :n], weights[row, :n] = 1, 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), segments.shape)
    return {**batch, "segment_ids": segments, "weights": weights, "positions": positions}


def packed(documents, length=12):
    """All documents in one row."""
    fields = {name: [] for name in ("inputs", "targets", "segment_ids", "positions")}
    for number, document in enumerate(documents, 1):
        n = len(document) - 1
        fields["inputs"] += document[:-1]
        fields["targets"] += document[1:]
        fields["segment_ids"] += [number] * n
        fields["positions"] += range(n)
    used = len(fields["inputs"])
    batch = {
        name: np.array([value + [0] * (length - used)], np.int32) for name, value in fields.items()
    }
    weights = np.array([[1.0] * used + [0.0] * (length - used)], np.float32)
    return {**batch, "weights": weights}


DOCUMENTS = [[5, 9, 2, 31], [7, 7, 1, 0, 22, 13, 4]]


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), a, b)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary", "none"])
def test_loss_and_gradient_of_packed_documents_are_sums_over_the_documents(positions):
    config = tiny_models.config(positions=positions)
    values = tiny_models.params(config)
    one = loss_and_gradient(config, values, packed(DOCUMENTS))
    apart = [loss_and_gradient(config, values, packed([document])) for document in DOCUMENTS]
    assert_close(one, jax.tree.map(jnp.add, *apart))
    assert one[0][1]["weight"] == sum(len(document) - 1 for document in DOCUMENTS)


def test_accumulating_rows_of_unequal_length_gives_the_full_batch():
    config = tiny_models.config()
    values = tiny_models.params(config)
    documents = [[1, 2, 3], *DOCUMENTS, list(range(10, 21))]
    whole = loss_and_gradient(config, values, padded(documents))
    parts = [loss_and_gradient(config, values, padded(documents[i : i + 1])) for i in range(4)]
    assert_close(whole, functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts))
    # The mean of the parts' means, the usual mistake, is something else.
    (_, metrics), _ = whole
    means = [part[0][1]["nats"] / part[0][1]["weight"] for part in parts]
    assert abs(np.mean(means) - metrics["nats"] / metrics["weight"]) > 1e-3


def test_what_stands_in_padding_does_not_matter():
    config = tiny_models.config()
    values = tiny_models.params(config)
    batch = packed(DOCUMENTS)
    junk = {name: value.copy() for name, value in batch.items()}
    junk["inputs"][0, 9:], junk["targets"][0, 9:] = 3, 38
    a, b = (loss_and_gradient(config, values, each) for each in (batch, junk))
    assert_close(a, b)
