"""Which parameters a model has, and where they start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from lm.models import ModelConfig, Transformer, bind, count, init, param_specs
from lm.models.hooks import reading
from lm.models.params import unbind
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.parallel.sharding import parameter_shardings


def test_gpt2_small_has_exactly_the_published_number_of_parameters():
    config = ModelConfig(
        num_layers=12,
        num_heads=12,
        width=768,
        vocab_size=50_257,
        max_length=1024,
        positions="learned",
        norm="layernorm",
        bias=True,
    )
    assert count(param_specs(Transformer(config))) == 124_439_808


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_initial_parameters_do_not_depend_on_the_mesh(mesh):
    specs = param_specs(Transformer(tiny_models.config()))
    alone = tiny_models.compiled(lambda key: init(specs, key))(jax.random.key(3))
    shardings = parameter_shardings(specs, make_mesh(MeshConfig(**mesh)))
    sharded = tiny_models.compiled(lambda key: init(specs, key), out_shardings=shardings)(
        jax.random.key(3)
    )
    for name, value in alone.items():
        np.testing.assert_array_equal(value, sharded[name], err_msg=name)


def test_initial_parameters_do_not_depend_on_what_else_the_model_holds():
    def start(config):
        specs = param_specs(Transformer(config))
        return tiny_models.compiled(lambda key: init(specs, key))(jax.random.key(3))

    plain = start(tiny_models.config())
    larger = start(tiny_models.config(bias=True, norm="layernorm", tie_embeddings=False))
    assert set(plain) < set(larger)
    for name, value in plain.items():
        np.testing.assert_array_equal(value, larger[name], err_msg=name)


def test_layers_start_different_from_each_other_and_with_the_declared_spread():
    config = tiny_models.config(width=256, mlp_width=512, initializer="gpt2", num_layers=8)
    specs = param_specs(Transformer(config))
    values = tiny_models.compiled(lambda key: init(specs, key))(jax.random.key(0))
    up, down = values["blocks.mlp.up"], values["blocks.mlp.down"]
    assert not jnp.array_equal(up[0], up[1])
    np.testing.assert_allclose(up.std(axis=(1, 2)), 0.02, rtol=0.03)
    np.testing.assert_allclose(down.std(axis=(1, 2)), 0.02 / np.sqrt(2 * 8), rtol=0.03)


def test_scaled_zero_blocks_start_as_the_identity():
    config = tiny_models.config(initializer="scaled_zero")
    model = Transformer(config)

    @tiny_models.compiled
    def run(key, tokens):
        read = {}
        bind(model, init(param_specs(model), key))(tokens, tap=reading(read))
        return read

    read = run(jax.random.key(0), tiny_models.tokens(1, 4))
    np.testing.assert_array_equal(read["blocks.1.residual_after"], read["embedding"])


def test_unbind_is_the_inverse_of_bind():
    config = tiny_models.config()
    values = tiny_models.params(config)
    again = unbind(bind(Transformer(config), values))
    assert list(again) == list(param_specs(Transformer(config)))
    assert all(again[name] is values[name] for name in values)


def test_binding_the_wrong_parameters_names_them():
    config = tiny_models.config()
    values = dict(tiny_models.params(config))
    values["extra"] = values.pop("final_norm.scale")
    with pytest.raises(KeyError, match=r"missing: \['final_norm.scale'\]; unknown: \['extra'\]"):
        bind(Transformer(config), values)
