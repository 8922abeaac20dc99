import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.config import ConfigError
from lm.models import ModelConfig, param_specs, skeleton
from lm.parallel.sharding import ParamSpec
from lm.training import optimizer
from lm.training.config import OPTIMIZERS, SCHEDULES, OptimizerConfig
from lm.training.optimizer import make_optimizer
from lm.training.schedules import make_schedule

L, D, H, C, F, V = 3, 8, 2, 4, 16, 32


def spec(shape, axes):
    return ParamSpec(shape, axes, lambda key, shape, dtype: jax.random.normal(key, shape, dtype))


SPECS = {
    "embed": spec((V, D), ("vocab", "embed")),
    "positions": spec((V, D), ("length", "embed")),
    "layers.query": spec((L, D, H, C), ("layers", "embed", "heads", "head_dim")),
    "layers.out": spec((L, H, C, D), ("layers", "heads", "head_dim", "embed")),
    "layers.up": spec((L, D, F), ("layers", "embed", "mlp")),
    "layers.query.bias": spec((L, H, C), ("layers", "heads", "head_dim")),
    "layers.norm": spec((L, D), ("layers", "embed")),
    "norm": spec((D,), ("embed",)),
    "head": spec((D, V), ("embed", "vocab")),
}


def arrays(seed):
    draw = np.random.default_rng(seed)
    return {name: jnp.asarray(draw.normal(size=s.shape), jnp.float32) for name, s in SPECS.items()}


def run(config, steps=5, specs=SPECS, gradients=None, pick=lambda tree: tree, total=20):
    """Parameters and state after some steps; `pick` may replace each tree by a part of it."""
    transform = make_optimizer(config, total, specs)
    params = pick(arrays(0))
    state = jax.jit(transform.init)(params)

    @jax.jit
    def step(params, state, gradients):
        updates, state = transform.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for n in range(steps):
        given = arrays(n + 1) if gradients is None else gradients[n]
        params, state = step(params, state, pick(given))
    return params, state


def test_adamw_is_the_published_algorithm():
    """Loshchilov & Hutter 2019, algorithm 2, with torch's clip_grad_norm_, in float64."""
    config = OptimizerConfig(learning_rate=3e-2, warmup_steps=2, clip_norm=0.7, eps=1e-6)
    # Every third gradient is too small to be clipped.
    gradients = [{k: g * (1.0 if n % 3 else 0.01) for k, g in arrays(n).items()} for n in range(10)]
    params, _ = run(config, steps=10, gradients=gradients)
    expected = {name: np.float64(value) for name, value in arrays(0).items()}
    m = dict.fromkeys(expected, 0.0)
    v = dict.fromkeys(expected, 0.0)
    for n in range(10):
        g = {name: np.float64(value) for name, value in gradients[n].items()}
        norm = math.sqrt(sum((value**2).sum() for value in g.values()))
        rate = float(make_schedule(config, 20)(n))
        for name in expected:
            clipped = g[name] * min(1.0, 0.7 / (norm + 1e-6))
            m[name] = config.b1 * m[name] + (1 - config.b1) * clipped
            v[name] = config.b2 * v[name] + (1 - config.b2) * clipped**2
            m_hat, v_hat = (
                m[name] / (1 - config.b1 ** (n + 1)),
                v[name] / (1 - config.b2 ** (n + 1)),
            )
            if optimizer.decay_mask("matrices", SPECS)[name]:
                expected[name] = expected[name] * (1 - rate * config.weight_decay)
            expected[name] = expected[name] - rate * m_hat / (np.sqrt(v_hat) + config.eps)
    for name in expected:
        np.testing.assert_allclose(params[name], expected[name], rtol=3e-6, atol=3e-6)


def test_the_rate_is_the_callers_and_the_state_that_of_older_checkpoints():
    config = OptimizerConfig(learning_rate=0.5, schedule="linear", final_fraction=0.0)
    made, params = make_optimizer(config, 10, SPECS), arrays(0)
    older = optax.chain(
        optimizer.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.1, mask=optimizer.decay_mask("matrices", SPECS)),
        optax.scale_by_learning_rate(made.schedule),
    )
    state = made.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(older.init(params))
    own, _ = made.update(arrays(1), state, params)
    given, _ = made.update(arrays(1), state, params, learning_rate=made.schedule(6))
    for name in params:
        np.testing.assert_allclose(given[name], 0.4 * own[name], rtol=1e-5)


def test_decay_mask():
    names = {
        "matrices": {"embed", "positions", "head", "layers.query", "layers.out", "layers.up"},
        "no_embeddings": {"layers.query", "layers.out", "layers.up"},
        "all": set(SPECS),
    }
    for decay, expected in names.items():
        mask = optimizer.decay_mask(decay, SPECS)
        assert {name for name, decayed in mask.items() if decayed} == expected
    untrained = ParamSpec((2, 8), ("layers", None), None)
    assert not any(optimizer.decay_mask("all", {"blocks.mlp.correction_bias": untrained}).values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zero_gradients_only_decay(name):
    config = OptimizerConfig(name=name, schedule="constant", learning_rate=0.5, weight_decay=0.5)
    zeros = [jax.tree.map(jnp.zeros_like, arrays(0))] * 2
    params, _ = run(config, steps=2, gradients=zeros)
    for key, decayed in optimizer.decay_mask("matrices", SPECS).items():
        factor = (1 - 0.25) ** 2 if decayed else 1.0
        np.testing.assert_allclose(params[key], factor * arrays(0)[key], rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_layers_are_updated_as_if_they_were_apart(name):
    config = OptimizerConfig(name=name, clip_norm=0.0)
    layer = 1
    alone = {
        key: spec(s.shape[1:], s.axes[1:]) if s.axes[0] == "layers" else s
        for key, s in SPECS.items()
    }

    def pick(tree):
        return {k: v[layer] if SPECS[k].axes[0] == "layers" else v for k, v in tree.items()}

    together, _ = run(config, steps=3)
    apart, _ = run(config, steps=3, specs=alone, pick=pick)
    for key, expected in pick(together).items():
        np.testing.assert_allclose(apart[key], expected, rtol=2e-4, atol=2e-5, err_msg=key)


def test_muon_updates_are_near_orthogonal_matrices():
    config = OptimizerConfig(
        name="muon", weight_decay=0.0, schedule="constant", learning_rate=1.0, muon_rms=0.0
    )
    params, state = run(config, steps=1)
    change = {name: np.asarray(arrays(0)[name] - params[name]) for name in params}
    for layer in range(L):
        matrices = [
            change["layers.query"][layer].reshape(D, H * C),
            change["layers.out"][layer].reshape(H * C, D),
            change["layers.up"][layer] / math.sqrt(F / D),
        ]
        for matrix in matrices:
            singular = np.linalg.svd(matrix, compute_uv=False)
            assert singular.min() > 0.5 and singular.max() < 1.3
    # Embeddings, head, gains and biases: AdamW, whose first step has size 1 everywhere.
    for name in ("embed", "positions", "head", "norm", "layers.norm"):
        np.testing.assert_allclose(np.abs(change[name]), 1.0, rtol=1e-2)
    (direction, *_) = [part for part in state if isinstance(part, dict)]
    assert set(direction["adam"].mu) == set(params) - set(direction["muon"][0].mu)


def test_muon_leaves_every_table_of_every_architecture_to_adamw():
    config = ModelConfig(
        architecture="encoder_decoder", positions="relative", vocab_size=16, max_length=8
    )
    bert = ModelConfig(
        architecture="encoder", positions="learned", token_types=2, vocab_size=16, max_length=8
    )
    for model, tables in (
        (config, {"embedding.tokens", "relative_bias", "encoder.relative_bias"}),
        (bert, {"embedding.tokens", "embedding.positions", "embedding.types"}),
    ):
        specs = param_specs(skeleton(model))
        optimizer = make_optimizer(OptimizerConfig(name="muon"), 1000, specs)
        shapes = {n: jax.ShapeDtypeStruct(s.shape, jnp.float32) for n, s in specs.items()}
        state = jax.eval_shape(optimizer.init, shapes)
        (direction, *_) = [part for part in state if isinstance(part, dict)]
        in_muon = set(direction["muon"][0].mu)
        assert tables <= set(specs) - in_muon
        assert "blocks.attention.query" in in_muon


def test_muon_rms_matches_adamw():
    config = OptimizerConfig(name="muon", weight_decay=0.0, schedule="constant", learning_rate=1.0)
    params, _ = run(config, steps=1)
    for name in ("layers.query", "layers.out", "layers.up"):
        change = np.asarray(arrays(0)[name] - params[name])
        assert 0.1 < np.sqrt(np.mean(change**2)) < 0.3


def test_matrix_axes():
    cases = {
        ("layers", "embed", "heads", "head_dim"): ((0,), (1,), (2, 3)),
        ("layers", "heads", "head_dim", "embed"): ((0,), (1, 2), (3,)),
        ("layers", "embed", None, "heads", "head_dim"): ((0, 2), (1,), (3, 4)),
        ("layers", "expert", "embed", "mlp"): ((0, 1), (2,), (3,)),
        ("layers", "embed", "embed"): ((0,), (1,), (2,)),
        ("layers", "embed"): None,
        ("layers", "heads", "head_dim"): None,
        ("layers", "expert", "mlp"): None,
        (None, "embed"): ((), (0,), (1,)),
    }
    for axes, expected in cases.items():
        assert optimizer.matrix_axes(spec((2,) * len(axes), axes)) == expected, axes


def test_adafactor_memory_is_sublinear():
    wide = {"w": spec((2, 256, 4, 64), ("layers", "embed", "heads", "head_dim"))}
    transform = make_optimizer(OptimizerConfig(name="adafactor"), 10, wide)
    state = jax.eval_shape(
        transform.init, {"w": jax.ShapeDtypeStruct(wide["w"].shape, jnp.float32)}
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < wide["w"].size / 100


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "sgd"])
def test_momentum_dtype(name):
    _, state = run(OptimizerConfig(name=name, momentum_dtype="bfloat16"), steps=2)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim > 1}
    assert jnp.dtype("bfloat16") in dtypes


def rates(name, peak, total, steps, **fields):
    config = OptimizerConfig(schedule=name, learning_rate=peak, **fields)
    return np.asarray(make_schedule(config, total)(np.arange(steps)))


def test_cosine_is_nanogpt():
    def reference(it, peak=1e-3, low=1e-4, warmup=100, end=2000):
        if it < warmup:
            return peak * (it + 1) / (warmup + 1)
        if it > end:
            return low
        ratio = (it - warmup) / (end - warmup)
        return low + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (peak - low)

    found = rates("cosine", 1e-3, 2500, 2500, warmup_steps=100, decay_steps=2000)
    np.testing.assert_allclose(found, [reference(it) for it in range(2500)], rtol=2e-5)


def test_shapes_of_the_schedules():
    for name in SCHEDULES:
        rate = rates(name, 2.0, 100, 121, warmup_steps=10, final_fraction=0.25)
        np.testing.assert_allclose(rate[:11], 2.0 * np.arange(1, 12) / 11, rtol=1e-6)
        assert rate.argmax() == 10 and (np.diff(rate[10:]) <= 0).all()
        if name in ("linear", "cosine", "wsd"):
            np.testing.assert_allclose(rate[100:], 0.5, rtol=1e-6)
        sudden = rates(name, 1.0, 10, 12, warmup_steps=10, final_fraction=0.5)
        assert np.isfinite(sudden).all()
    to_zero = {"warmup_steps": 10, "final_fraction": 0.0}
    np.testing.assert_allclose(rates("constant", 2.0, 100, 121, **to_zero)[10:], 2.0)
    np.testing.assert_allclose(rates("linear", 2.0, 100, 121, **to_zero)[55], 1.0, rtol=1e-6)
    np.testing.assert_allclose(rates("inverse_sqrt", 2.0, 100, 121, **to_zero)[43], 1.0, rtol=1e-6)
    wsd = rates("wsd", 2.0, 100, 121, **to_zero, decay_fraction=0.4)
    assert (wsd[10:61] == 2.0).all()
    np.testing.assert_allclose(wsd[80], 1.0, rtol=1e-6)
    sudden = rates("wsd", 1.0, 10, 11, decay_fraction=0.0, final_fraction=0.5)
    np.testing.assert_allclose(sudden[9:], [1.0, 0.5])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"name": "adam"}, "config.optimizer.name='adam' .*did you mean 'adamw'"),
        ({"warmup_steps": -1}, "config.optimizer.warmup_steps=-1 must be at least 0"),
        ({"warmup_steps": 9, "decay_steps": 5}, "warmup_steps=9 must be at most decay_steps=5"),
        ({"weight_decay": float("nan")}, "config.optimizer.weight_decay=nan"),
        ({"b2": 1.0}, "config.optimizer.b2=1.0"),
    ],
)
def test_mistakes_are_named_in_one_line(fields, message):
    with pytest.raises(ConfigError, match=message) as error:
        make_optimizer(OptimizerConfig(**fields), 20, SPECS)
    assert "\n" not in str(error.value)
