"""A Transformer whose layers are shared in a pipeline is the same Transformer."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from lm.config import ConfigError
from lm.models import Transformer, bind, param_specs
from lm.models.text import texts
from lm.parallel.layout import Layout
from lm.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from lm.parallel.sharding import parameter_shardings

ROWS, LENGTH = 16, 20


class Case(NamedTuple):
    mesh: dict[str, int]
    model: dict[str, Any]
    microbatches: int = 0
    rounds: int = 1


T5 = {"architecture": "encoder_decoder", "positions": "relative"}
EXPERTS = {"num_experts": 4, "activation": "swiglu"}
CASES = {
    "fsdp": Case({"stage": 4, "data": 1, "fsdp": 2}, {"remat": "full", "dropout": 0.3}, 8),
    "tensor": Case({"stage": 2, "data": 2, "tensor": 2}, {}),
    "circular": Case(
        {"stage": 2, "data": 2, "tensor": 2}, {"remat": "dots", "dropout": 0.3}, 4, rounds=2
    ),
    "local": Case(
        {"stage": 2, "data": 1, "fsdp": 4},
        {"attention_pattern": ("local", "global"), "window": 3, "num_kv_heads": 2},
        2,
    ),
    "crossing": Case(
        {"stage": 2, "data": 2, "tensor": 2}, {**T5, "remat": "full", "dropout": 0.3}, 4
    ),
    "ring": Case(
        {"stage": 2, "data": 1, "fsdp": 2, "context": 2},
        {"positions": "relative", "remat": "full", "dropout": 0.3},
        2,
    ),
    "scaled": Case(
        {"stage": 2, "data": 1, "fsdp": 2, "tensor": 2},
        {"scale_by_layer": True, "embedding_width": 12},
        2,
    ),
    "unrotated": Case(
        {"stage": 2, "data": 1, "fsdp": 2, "context": 2},
        {
            "rotary_pattern": (True, False), "scale_by_layer": True, "num_kv_heads": 2,
            "norm_position": "reordered", "qk_norm": True, "qk_norm_joint": True,
        },
        2,
    ),
    "windows to either side": Case(
        {"stage": 2, "data": 1, "fsdp": 2, "context": 2},
        {
            "architecture": "encoder", "attention_pattern": ("global", "local"), "window": 3,
            "num_layers": 5, "first_norm": False, "embedding_norm": True, "norm": "layernorm",
        },
        2,
    ),
    "alibi": Case({"stage": 4, "data": 2}, {"positions": "alibi", "remat": "projections"}, 4),
    "experts": Case(
        {"stage": 2, "data": 2, "expert": 2}, {**EXPERTS, "num_layers": 6, "dense_layers": 2}, 4
    ),
}  # fmt: skip


def problem(case: Case):
    """Packed rows with padding, and a function of parameters and rows, with its gradient."""
    config = tiny_models.config(
        **{"num_layers": 4, "width": 16, "mlp_width": 24, "vocab_size": 40, **case.model}
    )
    rng = np.random.default_rng(0)
    shape = ROWS, LENGTH
    segments_BT = np.ascontiguousarray(np.sort(rng.integers(0, 3, shape, np.int32), 1)[:, ::-1])
    batch = {"tokens_BT": rng.integers(1, 40, shape, np.int32), "segments_BT": segments_BT}
    if config.architecture == "encoder_decoder":
        batch |= {
            "targets_BT": rng.integers(1, 40, shape, np.int32),
            "source_segments_BS": segments_BT,
        }
    skeleton, key = Transformer(config), jax.random.key(1) if config.dropout else None

    def score(values, batch):
        x, router = bind(skeleton, values).forward(*texts(config.architecture, **batch), key)
        score = jnp.sum(jnp.sin(jnp.arange(x.size)) * x.reshape(-1))
        if router is not None:
            score += jnp.sum(router.z) + jnp.sum(router.balance)
        return score, (x, router)

    function = tiny_models.compiled(jax.value_and_grad(score, has_aux=True))
    return param_specs(skeleton), tiny_models.params(config), batch, function


def on_mesh(case: Case, specs, values, batch, function):
    mesh = make_mesh(MeshConfig(**case.mesh))
    with Layout(mesh, microbatches=case.microbatches, rounds=case.rounds).active():
        values = jax.device_put(values, parameter_shardings(specs, mesh))
        batch = jax.device_put(batch, batch_sharding(mesh))
        compiled = function.lower(values, batch).compile()
        return compiled(values, batch), compiled.as_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_pipelined_model_computes_what_one_device_does(name):
    case = CASES[name]
    specs, values, batch, function = problem(case)
    (_, expected), expected_gradient = function(values, batch)
    ((_, actual), gradient), program = on_mesh(case, specs, values, batch, function)
    assert actual[0].sharding.spec[0][0] == "stage"
    if "context" in case.mesh:  # no device compares its tokens with all
        assert not re.search(rf"\b{LENGTH // case.mesh['context']},{LENGTH}\]", program)
    jax.tree.map(
        lambda e, a: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5), expected, actual
    )
    for parameter, wanted in expected_gradient.items():
        np.testing.assert_allclose(
            gradient[parameter],
            wanted,
            rtol=1e-4,
            atol=1e-5 * max(1, np.abs(wanted).max()),
            err_msg=parameter,
        )


def test_a_single_row_needs_no_pipeline():
    config = tiny_models.config(num_layers=4)
    values, tokens = tiny_models.params(config), tiny_models.tokens(1)
    alone = tiny_models.logits(config, values, tokens)
    with jax.set_mesh(make_mesh(MeshConfig(stage=4))):
        np.testing.assert_allclose(
            tiny_models.logits(config, values, tokens), alone, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("microbatches", "layers", "message"),
    [
        (0, 6, r"stage=4 .* 6 layers .* config.model.num_layers"),
        (12, 4, r"config.mesh.microbatches=12 .* 16 rows"),
    ],
)
def test_what_does_not_divide_over_the_stages_is_refused(microbatches, layers, message):
    case = Case({"stage": 4, "data": 2}, {"num_layers": layers}, microbatches)
    with pytest.raises(ConfigError, match=message):
        on_mesh(case, *problem(case))
