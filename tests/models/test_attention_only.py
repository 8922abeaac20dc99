"""Models without an MLP, or without norms, are what one would write by hand."""

import numpy as np
import pytest
import tiny_models

from lm.config import ConfigError
from lm.models import costs, param_specs, skeleton
from lm.models.huggingface.families import family_for

FIELDS = {"positions": "learned", "tie_embeddings": False, "activation": "relu"}


def softmax(scores):
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def layer_norm(x, scale):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def by_hand(config, params, tokens_BT):
    """Logits, from the parameters' names alone."""
    T = tokens_BT.shape[1]
    x_BTD = params["embedding.tokens"][tokens_BT] + params["embedding.positions"][:T]
    normed = config.norm != "none"
    for n in range(config.num_layers):
        p = {k.removeprefix("blocks."): v[n] for k, v in params.items() if k.startswith("blocks.")}
        read = layer_norm(x_BTD, p["attention_norm.scale"]) if normed else x_BTD
        names = ("query", "key", "value")
        q, k, v = (np.einsum("btd,dhc->bhtc", read, p[f"attention.{of}"]) for of in names)
        scores = np.einsum("bhtc,bhsc->bhts", q, k) / np.sqrt(config.head_width)
        pattern = softmax(np.where(np.tri(T, dtype=bool), scores, -np.inf))
        heads = np.einsum("bhts,bhsc->bhtc", pattern, v)
        x_BTD = x_BTD + np.einsum("bhtc,hcd->btd", heads, p["attention.output"])
        if config.feed_forward:
            read = layer_norm(x_BTD, p["mlp_norm.scale"]) if normed else x_BTD
            x_BTD = x_BTD + np.maximum(read @ p["mlp.up"], 0) @ p["mlp.down"]
    x_BTD = layer_norm(x_BTD, params["final_norm.scale"]) if normed else x_BTD
    return x_BTD @ params["head"].T


@pytest.mark.parametrize("mlp_width", [0, 48])
@pytest.mark.parametrize("norm", ["none", "layernorm"])
def test_a_model_without_mlp_or_norms_is_one_written_by_hand(norm, mlp_width):
    config = tiny_models.config(**FIELDS, norm=norm, mlp_width=mlp_width)
    params, tokens = tiny_models.params(config), tiny_models.tokens()
    assert any("mlp" in name for name in params) == (mlp_width > 0)
    assert any("norm" in name for name in params) == (norm != "none")
    params64 = {name: value.astype(np.float64) for name, value in params.items()}
    wanted = by_hand(config, params64, tokens)
    np.testing.assert_allclose(tiny_models.logits(config, params, tokens), wanted, atol=2e-5)


def test_costs_are_those_of_what_is_there():
    one = tiny_models.config(**FIELDS, norm="none", mlp_width=0)
    both = tiny_models.config(**FIELDS, norm="layernorm", mlp_width=48)
    L, D, F, V, T = 2, 32, 48, 40, 16
    attention = L * 4 * D * D
    assert costs.parameters(one).total == 2 * V * D + T * D + attention
    assert costs.parameters(both).total - costs.parameters(one).total == L * 2 * D * F + 5 * D
    keys = costs.mean_keys(T, T)
    flops = costs.forward_flops_per_token(one, T)
    assert flops == 2 * (attention + V * D) + L * 4 * D * keys
    assert costs.forward_flops_per_token(both, T) - flops == L * 4 * D * F


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mlp_width": 0, "parallel": True}, "mlp_width=0 needs num_experts=0 and parallel=False"),
        ({"norm": "none", "norm_position": "post"}, "norm='none' needs norm_position='pre'"),
        ({"norm": "none", "qk_norm": True}, "norm='none' needs"),
        ({"norm": "none", "final_norm": True}, "final_norm=True needs a norm"),
        ({"norm": "non"}, "did you mean 'none'"),
    ],
)
def test_what_needs_the_missing_part_is_refused_in_a_line(fields, message):
    with pytest.raises(ConfigError, match=message):
        tiny_models.config(**fields)


@pytest.mark.parametrize("field", [{"mlp_width": 0}, {"norm": "none"}])
def test_no_hugging_face_family_has_blocks_without_them(field):
    ((name, value),) = field.items()
    with pytest.raises(ConfigError, match=f"config.model.{name}={value!r}: every Hugging Face"):
        family_for(tiny_models.config(**field))
    assert "blocks.attention.query" in param_specs(skeleton(tiny_models.config(**field)))
