"""A model of which matrices, or keys and values, have eight bits writes nearly as in float32."""

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
from lm.models.attention.paged import Paging
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.parallel.sharding import parameter_shardings

TEXT = np.frombuffer(b"the cat sat on the mat. a dog ran to the red barn. " * 16, np.uint8)

UNTIED = {"tie_embeddings": False, "activation": "swiglu", "scan_layers": True, "num_layers": 3}


@pytest.fixture
def fields(request, monkeypatch):
    """Of a config; where they ask for scanned layers, few are enough to be scanned."""
    if request.param.get("scan_layers"):
        monkeypatch.setattr("lm.inference.prepare.UNROLLED_LAYERS", 1)
    return request.param


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
    "fields", [{}, UNTIED], ids=["tied", "untied, gated, scanned"], indirect=True
)
def test_a_trained_models_perplexity_rises_by_less_than_a_hundredth(fields):
    model, params = tiny_model(initializer_std=0.05, **fields)
    model = prepare.for_decoding(model)
    assert model.config.scan_layers == bool(fields)
    params, rows = trained(model, params)

    @jax.jit
    def log_probabilities(params):
        return jax.nn.log_softmax(prepare.bound(model, params)(rows)[:, :-1])

    @jax.jit
    def from_pages(params):
        bound, (B, T) = prepare.bound(model, params), rows.shape
        cache = bound.new_pages(1 + B * T // 8, 8, 1, eight_bits=True)
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
        table_BN = jnp.arange(1, 1 + B * T // 8).reshape(B, -1)
        x_BTD, _ = bound.extend_pages(
            rows, Paging(table_BN, positions_BT, jnp.zeros(B, int)), cache
        )
        return jax.nn.log_softmax(bound.unembed(x_BTD)[:, :-1])

    def loss(logprobs_BTV):
        return -np.take_along_axis(logprobs_BTV, rows[:, 1:, None], -1).mean()

    plain = prepare.for_reading(model, params)
    wanted = np.asarray(log_probabilities(plain))
    assert loss(wanted) < 2.0  # of log 257 at the start
    weights = log_probabilities(prepare.for_reading(model, params, "int8"))
    for name, got in {"weights": weights, "cache": from_pages(plain)}.items():
        got = np.asarray(got)
        assert abs(np.exp(loss(got) - loss(wanted)) - 1) < 0.01, name
        np.testing.assert_allclose(np.exp(got), np.exp(wanted), atol=0.1, err_msg=name)
        assert np.abs(got - wanted).max() > 1e-4, f"{name} are not rounded"


def test_int8_holds_a_quarter_and_no_matrix_twice():
    model, params = tiny_model(width=64, vocab_size=512)
    model = prepare.for_decoding(model)
    sizes = [
        sum(x.nbytes for x in jax.tree.leaves(prepare.for_reading(model, params, weights)))
        for weights in ("int8", "compute")
    ]
    assert sizes[0] < 0.35 * sizes[1]


SPLIT = {"width": 64, "num_heads": 8, "num_kv_heads": 4, "vocab_size": 264}


@pytest.mark.parametrize(
    "tensor, fields",
    # Of eight devices, two share each key/value head.
    [
        pytest.param(8, {}, marks=pytest.mark.slow),
        pytest.param(8, {"qk_norm": True, "qk_norm_joint": True}, marks=pytest.mark.slow),
        (2, UNTIED),
    ],
    ids=["tied", "a norm over all heads", "untied"],
    indirect=["fields"],
)
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


def test_pages_of_eight_bits_hold_nearly_four_times_the_tokens(monkeypatch):
    monkeypatch.setattr("lm.inference.engine.device_memory", lambda: 2**20)
    tiny = tiny_model(width=128, max_length=64)  # a scale for each head's 64 numbers
    fitting = {}
    for cache in ("compute", "int8"):
        engine = Engine(*tiny, Framing(), config=EngineConfig(page_size=16, cache=cache))
        held = sum(x.nbytes for x in jax.tree.leaves(engine._device.cache))
        fitting[cache] = engine.fitting
        assert engine.fitting == 2**20 // (held // (engine.stats.pages + 1))
    assert fitting == {"compute": 32, "int8": 4 * 32 * 64 // 68}


def test_a_run_generates_in_eight_bits(tmp_path):
    write_tiny_run(tmp_path)
    run = lm.load(tmp_path)
    fields = {"weights": "int8", "cache": "int8", "max_new_tokens": 4, "temperature": 0.0}
    text = run.generate("ab", **fields)
    assert text.startswith("ab") and text == run.generate("ab", **fields)
    with pytest.raises(ConfigError, match="num_beams=2 does not go with cache='int8'"):
        run.generate("ab", **fields, num_beams=2)
    for field in ("weights", "cache"):
        with pytest.raises(ConfigError, match=f"{field}='int4'"):
            run.generate("ab", **{field: "int4"})


def test_a_recurrent_model_has_no_eight_bits():
    model, params = tiny_model(cell="lstm")
    with pytest.raises(ConfigError, match="weights='int8'"):
        prepare.for_reading(model, params, "int8")
    with pytest.raises(ConfigError, match="cache='int8' is for Transformers"):
        Engine(model, params, Framing(), config=EngineConfig(cache="int8"))
