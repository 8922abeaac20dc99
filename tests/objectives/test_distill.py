"""What a student loses against a teacher is the divergence of the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from lm.config import ConfigError, view
from lm.models import bind, skeleton
from lm.objectives import DistillationConfig, ObjectiveConfig, loss
from lm.objectives.distill import linear_divergence
from lm.parallel.layout import lay_out
from lm.parallel.mesh import MeshConfig

B, T, V = 4, 12, 50


def problem(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"x": (B, T, 8), "head": (V, 8), "bias": (V,), "teacher": (B, T, 6), "its": (V, 6)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    weights = rng.uniform(0, 2, (B, T)).astype(np.float32)
    weights[:, [0, 4, 11]] = 0
    return arrays, weights


def differentiated(function, arrays, weights, config, **fields):
    def scaled(x, head, bias):
        teacher = arrays["teacher"], arrays["its"]
        return 3 * function(x, head, *teacher, weights, config, bias_V=bias, **fields)

    arguments = (arrays[name] for name in ("x", "head", "bias"))
    return tiny_models.compiled(jax.value_and_grad(scaled, (0, 1, 2)))(*arguments)


def by_definition(x, head, teacher, its, weights, config, *, bias_V, softcap=0, teacher_softcap=0):
    def log_p(logits, cap):
        logits = cap * jnp.tanh(logits / cap) if cap else logits
        return jax.nn.log_softmax(logits / config.temperature)

    student = log_p(jnp.einsum("btd,vd->btv", x, head) + bias_V, softcap)
    teacher = log_p(jnp.einsum("btd,vd->btv", teacher, its), teacher_softcap)

    def kl(p, q):
        return jnp.sum(jnp.exp(p) * (p - q), -1)

    share = config.mixture
    mixed = jnp.log(share * jnp.exp(teacher) + (1 - share) * jnp.exp(student))
    value = {
        "forward": kl(teacher, student),
        "reverse": kl(student, teacher),
        "jsd": share * kl(teacher, mixed) + (1 - share) * kl(student, mixed),
    }
    return jnp.sum(weights * value[config.divergence])


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-5)


KINDS = [
    DistillationConfig("forward", temperature=2.0),
    DistillationConfig("reverse"),
    DistillationConfig("jsd", mixture=0.3, temperature=0.5),
]


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.divergence)
@pytest.mark.parametrize("chunk", [4, 12])
def test_divergences_and_their_gradients_are_those_of_the_definition(config, chunk):
    arrays, weights = problem()
    caps = dict(softcap=3.0, teacher_softcap=2.0)
    found = differentiated(linear_divergence, arrays, weights, config, chunk=chunk, **caps)
    expected = differentiated(by_definition, arrays, weights, config, **caps)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-5), found, expected
    )


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.divergence)
def test_a_mesh_computes_the_same_and_masked_places_do_not_matter(config):
    arrays, weights = problem()
    one = differentiated(linear_divergence, arrays, weights, config)
    with lay_out("", MeshConfig(data=1, fsdp=4, tensor=2), 3).active():
        many = differentiated(linear_divergence, arrays, weights, config)
    assert_close(many, one)
    masked = (weights == 0)[..., None]
    for name in ("x", "teacher"):
        arrays[name] = np.where(masked, np.nan, arrays[name])
    jax.tree.map(
        np.testing.assert_array_equal,
        one,
        differentiated(linear_divergence, arrays, weights, config),
    )


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.divergence)
def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(config):
    model = tiny_models.config()
    values, tokens = tiny_models.params(model), tiny_models.tokens(2, 13)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((2, 12), "f4")}
    objective = ObjectiveConfig("distillation", distillation=config)

    @tiny_models.compiled
    def found(values, teacher):
        def summed(values):
            bound, reference = (bind(skeleton(model), each) for each in (values, teacher))
            return loss(bound, batch, objective, reference=reference)

        return jax.value_and_grad(summed, has_aux=True)(values)

    (total, metrics), gradients = found(values, values)
    assert abs(total) < 1e-4 and metrics["weight"] == 24
    assert all(np.abs(gradient).max() < 1e-4 for gradient in gradients.values())
    other = {name: value * 1.5 for name, value in values.items()}
    assert found(values, other)[0][0] > 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixture": 0.3}, "mixture=0.3 does nothing for divergence='forward'"),
        ({"divergence": "jsd", "mixture": 1.0}, "mixture=1.0 must lie between 0 and 1"),
    ],
)
def test_settings_that_do_nothing_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        view(DistillationConfig, fields, "config.objective.distillation")
