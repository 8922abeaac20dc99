"""A model whose matrices are read in eight bits writes nearly as it would in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from tiny_run import tiny_model, write_tiny_run

import lm
from lm.config import ConfigError
from lm.inference import prepare
from lm.inference.engine import Engine, EngineConfig, Request
from lm.inference.prompts import Framing
from lm.inference.sampling import SamplingConfig
from lm.models import bind, param_specs
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.parallel.sharding import parameter_shardings

TEXT = np.frombuffer(b"the cat sat on the mat. a dog ran to the red barn. " * 16, np.uint8)

UNTIED = {"tie_embeddings": False, "activation": "swiglu", "scan_layers": True, "num_layers": 25}


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
    [{}, UNTIED],
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


SPLIT = {"width": 64, "num_heads": 8, "num_kv_heads": 4, "vocab_size": 264}


@pytest.mark.parametrize("tensor, fields", [(8, {}), (2, UNTIED)], ids=["tied", "untied"])
def test_eight_devices_draw_in_eight_bits_what_one_draws(tensor, fields):
    model, params = tiny_model(**SPLIT, **fields)
    mesh = make_mesh(MeshConfig(data=-1, tensor=tensor), jax.devices()[:8])
    _, shared = prepare.spread(model, {n: jnp.copy(x) for n, x in params.items()}, mesh)
    sizes = EngineConfig(max_slots=2, page_size=4, prefill_chunk=8, weights="int8")
    drawn = []
    for given in (params, shared):
        engine = Engine(model, given, Framing(), config=sizes)
        sampling = SamplingConfig(temperature=0, max_new_tokens=9)
        for ids in ((9, 8), tuple(range(8, 25))):
            engine.submit(Request(ids, sampling))
        tokens = {}
        while not engine.idle:
            for event in engine.step():
                tokens.setdefault(event.number, []).extend(step.id for step in event.steps)
        drawn.append(tokens)
    assert drawn[0] == drawn[1] and all(len(ids) == 9 for ids in drawn[0].values())


@pytest.mark.parametrize("scanned", [True, False])
def test_a_scale_is_split_as_its_outputs_and_a_plan_knows_it(scanned):
    model, params = tiny_model(**SPLIT, activation="swiglu", scan_layers=scanned)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4), jax.devices()[:8])
    shardings = parameter_shardings(param_specs(model), mesh)
    read = prepare.for_reading(model, jax.device_put(params, shardings), "int8")
    layers = (None,) * scanned
    for name, values, scale in (
        ("blocks.attention.query", ("tensor", "fsdp"), ("tensor",)),
        ("blocks.attention.output", ("fsdp", "tensor"), ("fsdp",)),
        ("blocks.mlp.down", ("fsdp", "tensor"), ("fsdp",)),
    ):
        kept = read[name] if scanned else read[name][0]
        assert kept.values.sharding.spec == PartitionSpec(*layers, *values), name
        assert kept.scale.sharding.spec == PartitionSpec(*layers, *scale), name
    planned = prepare.abstract_params(model, shardings, "int8")
    assert jax.tree.structure(planned) == jax.tree.structure(read)
    for plan, x in zip(jax.tree.leaves(planned), jax.tree.leaves(read)):
        assert (plan.shape, plan.dtype) == (x.shape, x.dtype)
        assert plan.sharding.is_equivalent_to(x.sharding, x.ndim)


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
