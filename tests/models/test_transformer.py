"""What a Transformer computes, whatever its shape and however it is run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from lm.models import Transformer, bind
from lm.models.activations import sites
from lm.models.config import ACTIVATIONS, NORMS
from lm.models.hooks import reading, replacing
from lm.models.layers import dropout
from lm.parallel.mesh import MeshConfig, make_mesh


def close(a, b, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=2e-5), a, b)


def test_scanned_and_unrolled_layers_compute_the_same():
    config = tiny_models.config(scan_layers=True, num_layers=3)
    values, tokens = tiny_models.params(config), tiny_models.tokens()
    unrolled = dataclasses.replace(config, scan_layers=False)
    close(
        tiny_models.score_and_gradient(config, values, tokens),
        tiny_models.score_and_gradient(unrolled, values, tokens),
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"positions": "learned"},
        {"norm_position": "post", "num_kv_heads": 1},
        {"architecture": "encoder"},
    ],
)
def test_a_token_changes_logits_before_it_in_an_encoder_alone(fields):
    config = tiny_models.config(**fields)
    values, tokens = tiny_models.params(config), tiny_models.tokens()
    before = tiny_models.logits(config, values, tokens)
    for t in (0, 5, 11):
        changed = tokens.copy()
        changed[:, t] = (tokens[:, t] + 1) % config.vocab_size
        after = tiny_models.logits(config, values, changed)
        if config.architecture == "encoder":
            assert t == 0 or not jnp.allclose(before[:, :t], after[:, :t])
        else:
            np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert not jnp.allclose(before[:, t], after[:, t])


def test_the_order_of_earlier_tokens_matters_exactly_when_positions_are_told():
    tokens = tiny_models.tokens(1, 8)
    swapped = tokens[:, [1, 0, *range(2, 8)]]

    def last(positions):  # one layer: with two, even a causal mask alone tells the order
        config = tiny_models.config(positions=positions, num_layers=1)
        values = tiny_models.params(config)
        return [tiny_models.logits(config, values, t)[:, -1] for t in (tokens, swapped)]

    close(*last("none"))
    for positions in ("learned", "sinusoidal", "rotary"):
        assert not jnp.allclose(*last(positions), atol=1e-3), positions


def test_rotary_attention_depends_on_distances_alone():
    config = tiny_models.config()
    values, tokens = tiny_models.params(config), tiny_models.tokens()
    shifted = jnp.broadcast_to(jnp.arange(12) + 100, tokens.shape)
    close(
        tiny_models.logits(config, values, tokens),
        tiny_models.logits(config, values, tokens, positions_BT=shifted),
        atol=2e-4,
    )


def test_grouped_query_attention_is_multi_head_attention_with_shared_keys_and_values():
    grouped = tiny_models.config(num_kv_heads=2)
    values, tokens = tiny_models.params(grouped), tiny_models.tokens()
    repeated = {
        name: jnp.repeat(value, 2, axis=2) if name.endswith((".key", ".value")) else value
        for name, value in values.items()
    }
    close(
        tiny_models.logits(grouped, values, tokens),
        tiny_models.logits(tiny_models.config(), repeated, tokens),
    )


def test_a_norm_over_all_heads_is_the_same_however_devices_share_them():
    config = tiny_models.config(
        num_kv_heads=2, norm="layernorm", norm_position="reordered", qk_norm=True,
        qk_norm_joint=True, num_layers=1,
    )  # fmt: skip
    values, tokens = tiny_models.params(config), tiny_models.tokens()
    alone = tiny_models.score_and_gradient(config, values, tokens)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])):
        close(tiny_models.score_and_gradient(config, values, tokens), alone)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_architecture_has_finite_logits_and_a_gradient_for_every_parameter(activation):
    index = ACTIVATIONS.index(activation)  # the other choices take turns
    config = tiny_models.config(
        activation=activation,
        norm=NORMS[index % 2],
        norm_position=("pre", "post")[index // 2 % 2],
        bias=index % 3 == 0,
        tie_embeddings=index % 2 == 0,
    )
    values, tokens = tiny_models.params(config), tiny_models.tokens()
    value, gradients = tiny_models.score_and_gradient(config, values, tokens)
    assert jnp.isfinite(value)
    for name, gradient in gradients.items():
        assert jnp.all(jnp.isfinite(gradient)), name
        # A key bias moves all scores of a query alike, and softmax does not see that.
        assert jnp.any(gradient != 0) or name.endswith("key_bias"), name


def test_remat_policies_change_what_is_kept_and_not_the_gradient():
    tokens, kept, results = tiny_models.tokens(4, 16), {}, {}
    for remat in ("none", "dots", "projections", "full", "offload"):
        config = tiny_models.config(remat=remat, scan_layers=True, num_layers=8)
        values = tiny_models.params(tiny_models.config(num_layers=8))
        compiled = tiny_models.score_and_gradient.lower(config, values, tokens).compile()
        kept[remat] = compiled.memory_analysis().temp_size_in_bytes
        results[remat] = compiled(values, tokens)
    for remat in ("dots", "projections", "full", "offload"):
        close(results["none"], results[remat])
    assert kept["none"] > kept["dots"] > kept["projections"] > kept["full"]


def test_bfloat16_computes_the_same_function_to_its_precision():
    config = tiny_models.config()
    values, tokens = tiny_models.params(config), tiny_models.tokens()
    half = dataclasses.replace(config, compute_dtype="bfloat16")
    exact = tiny_models.logits(config, values, tokens)
    rounded = tiny_models.logits(half, values, tokens)
    assert rounded.dtype == jnp.float32
    assert jnp.abs(exact - rounded).max() < 0.04 * jnp.abs(exact).max()


# ---- Taps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("remat", ["none", "full"])
def test_reading_activations_does_not_change_the_logits(remat):
    config = tiny_models.config(remat=remat, activation="swiglu")
    values, tokens = tiny_models.params(config), tiny_models.tokens()

    @tiny_models.compiled
    def read(values, tokens):
        into = {}
        return bind(Transformer(config), values)(tokens, tap=reading(into)), into

    logits, into = read(values, tokens)
    close(logits, tiny_models.logits(config, values, tokens))
    np.testing.assert_array_equal(logits, into["logits"])
    assert set(into) == set(sites(Transformer(config)))
    pattern = into["blocks.1.attention.pattern"]
    np.testing.assert_allclose(pattern.sum(-1), 1, atol=1e-6)
    assert jnp.all(pattern[..., jnp.triu_indices(12, 1)[0], jnp.triu_indices(12, 1)[1]] == 0)


def test_replacing_a_value_changes_only_what_comes_after_it():
    config = tiny_models.config()
    values, tokens = tiny_models.params(config), tiny_models.tokens()
    names = []  # in the order they are computed

    @tiny_models.compiled
    def read(values, tokens, factor):
        into = {}
        edit, keep = replacing({"blocks.1.attention.output": lambda x: x * factor}), reading(into)
        bind(Transformer(config), values)(tokens, tap=lambda n, x: keep(n, edit(n, x)))
        names.extend(into)
        return into

    before, after = read(values, tokens, 1.0), read(values, tokens, 0.0)
    cut = names.index("blocks.1.attention.output")
    for name in names[:cut]:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    for name in names[cut:]:
        assert not jnp.allclose(before[name], after[name]), name
    np.testing.assert_array_equal(
        after["blocks.1.residual_middle"], after["blocks.1.residual_before"]
    )


def test_the_gradient_of_an_added_perturbation_is_the_finite_difference():
    config = tiny_models.config()
    values, tokens = tiny_models.params(config), tiny_models.tokens()
    model = bind(Transformer(config), values)
    shape = (2, 12, 4, 8)

    def loss(perturbation):
        tap = replacing({"blocks.0.attention.heads": lambda heads: heads + perturbation})
        return jnp.mean(jax.nn.logsumexp(model(tokens, tap=tap), -1))

    gradient = tiny_models.compiled(jax.grad(loss))(np.zeros(shape, np.float32))
    direction = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    step, loss = 0.005, tiny_models.compiled(loss)
    difference = (loss(step * direction) - loss(-step * direction)) / (2 * step)
    np.testing.assert_allclose(difference, jnp.vdot(gradient, direction), rtol=5e-3)


# ---- Dropout ---------------------------------------------------------------------------------


def test_dropout_is_off_without_a_key_and_random_with_one():
    config = tiny_models.config(dropout=0.5)
    values, tokens = tiny_models.params(config), tiny_models.tokens()
    plain = tiny_models.logits(tiny_models.config(), values, tokens)
    np.testing.assert_array_equal(tiny_models.logits(config, values, tokens), plain)

    def run(seed):
        return tiny_models.logits(config, values, tokens, dropout_key=jax.random.key(seed))

    one, two = run(1), run(2)
    np.testing.assert_array_equal(one, run(1))
    assert not jnp.allclose(one, plain) and not jnp.allclose(one, two)


def test_dropout_keeps_the_mean():
    x = jax.random.normal(jax.random.key(0), (1000,)) + 3
    vectors = jnp.broadcast_to(x, (40, 50, 1000))
    many = dropout(vectors, 0.3, jax.random.key(1), jnp.arange(40)[:, None], jnp.arange(50))
    many = many.reshape(2000, 1000)
    np.testing.assert_allclose((many == 0).mean(), 0.3, atol=0.005)
    np.testing.assert_allclose(many.mean(0), x, rtol=0.1)
    np.testing.assert_allclose(many.mean(), x.mean(), rtol=0.005)


def test_dropout_is_a_function_of_each_number_s_coordinates():
    x, rows, places = jnp.ones((6, 8, 10)), jnp.arange(6), jnp.arange(8)
    key, columns = jax.random.key(1), jnp.arange(10)
    whole = dropout(x, 0.5, key, rows[:, None], places)
    order = (np.array([4, 1]), np.array([7, 0, 3]), np.array([9, 2, 5, 6]))
    part = dropout(
        x[:2, :3, :4], 0.5, key, rows[order[0]][:, None], places[order[1]], columns[order[2]]
    )
    np.testing.assert_array_equal(part, whole[np.ix_(*order)])
    assert len(np.unique(np.asarray(whole).reshape(48, 10), axis=0)) > 40


def test_dropout_differs_between_layers_and_not_between_scanned_and_unrolled():
    config = tiny_models.config(dropout=0.5)
    values, tokens, key = tiny_models.params(config), tiny_models.tokens(), jax.random.key(1)

    @tiny_models.compiled
    def read(values, tokens):
        into = {}
        bind(Transformer(config), values)(tokens, dropout_key=key, tap=reading(into))
        return into

    into = read(values, tokens)
    # A residual that did not change is a dropped output.
    dropped = [
        into[f"blocks.{i}.residual_middle"] == into[f"blocks.{i}.residual_before"] for i in (0, 1)
    ]
    assert all(0.3 < mask.mean() < 0.7 for mask in dropped)
    assert 0.3 < (dropped[0] != dropped[1]).mean() < 0.7
    close(into["logits"], tiny_models.logits(config, values, tokens, dropout_key=key))
