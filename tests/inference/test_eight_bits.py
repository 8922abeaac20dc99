"""A model whose matrices are read in eight bits writes nearly as it would in float32."""

import jax
import numpy as np
import optax
import pytest
from tiny_run import tiny_model, write_tiny_run

import lm
from lm.config import ConfigError
from lm.inference import prepare
from lm.models import bind

TEXT = np.frombuffer(b"the cat sat on the mat. a dog ran to the red barn. " * 16, np.uint8)


def trained(model, params, steps=60):
    """Parameters that have learned `TEXT`, and rows of it."""
    rows = TEXT[: 24 * 32].reshape(24, 32).astype(np.int32)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        def loss(params):
            logits = bind(model, params)(rows)[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, rows


@pytest.mark.parametrize(
    "fields",
    [{}, {"tie_embeddings": False, "activation": "swiglu", "scan_layers": True, "num_layers": 25}],
    ids=["tied", "untied, gated, scanned"],
)
def test_a_trained_models_perplexity_rises_by_less_than_a_hundredth(fields):
    model, params = tiny_model(initializer_std=0.05, **fields)
    model = prepare.for_decoding(model)
    params, rows = trained(model, params)

    @jax.jit
    def log_probabilities(params):
        logits = prepare.bound(model, params)(rows)[:, :-1]
        return jax.nn.log_softmax(logits)

    got, wanted = (
        np.asarray(log_probabilities(prepare.for_reading(model, params, weights)))
        for weights in ("int8", "compute")
    )
    np.testing.assert_allclose(np.exp(got), np.exp(wanted), atol=0.05)
    got, wanted = (-np.take_along_axis(x, rows[:, 1:, None], -1).mean() for x in (got, wanted))
    assert wanted < 2.0  # of log 257 at the start
    assert abs(np.exp(got - wanted) - 1) < 0.01


def test_int8_holds_a_quarter_and_no_matrix_twice():
    model, params = tiny_model(width=64, vocab_size=512)
    model = prepare.for_decoding(model)
    sizes = [
        sum(x.nbytes for x in jax.tree.leaves(prepare.for_reading(model, params, weights)))
        for weights in ("int8", "compute")
    ]
    assert sizes[0] < 0.35 * sizes[1]


def test_a_run_generates_in_eight_bits(tmp_path):
    write_tiny_run(tmp_path)
    run = lm.load(tmp_path)
    text = run.generate("ab", weights="int8", max_new_tokens=4, temperature=0.0)
    assert text.startswith("ab") and text == run.generate(
        "ab", weights="int8", max_new_tokens=4, temperature=0.0
    )
    with pytest.raises(ConfigError, match="weights='int4'"):
        run.generate("ab", weights="int4")


def test_a_recurrent_model_has_no_eight_bits():
    model, params = tiny_model(cell="lstm")
    with pytest.raises(ConfigError, match="int8"):
        prepare.for_reading(model, params, "int8")
