"""What a model is said to cost is what XLA counts, and what its authors published."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from jax.extend.core import jaxprs_in_params

from lm.config import view
from lm.models import ModelConfig, bind, costs, param_specs, skeleton
from lm.models.presets import preset

SMALL = {"num_layers": 2, "num_heads": 4, "width": 256, "vocab_size": 512, "max_length": 64}
LONG = {**SMALL, "num_layers": 1, "num_kv_heads": 1, "width": 128, "max_length": 512}

TINY = {"num_layers": 2, "num_heads": 4, "width": 16, "vocab_size": 24, "max_length": 16}
ENCODER = {**TINY, "architecture": "encoder", "positions": "learned"}
BOTH = {**TINY, "architecture": "encoder_decoder", "num_encoder_layers": 3, "positions": "relative"}
GATED = {**TINY, "positions": "none", "activation": "swiglu"}
MIXTURE = {**GATED, "num_experts": 4, "expert_width": 10, "shared_experts": 2, "dense_layers": 1}
FAMILIES = {
    "biased": {**TINY, "positions": "alibi", "bias": True, "tie_embeddings": False},
    "grouped": {**GATED, "num_kv_heads": 2, "head_dim": 10, "qk_norm": True},
    "parallel": {**GATED, "num_kv_heads": 1, "parallel": True, "shared_norm": True},
    "narrow embeddings": {**TINY, "embedding_width": 6},
    "sandwich": {**GATED, "norm_position": "sandwich", "logits_softcap": 9.0},
    "reordered": {**GATED, "norm_position": "reordered", "qk_norm": True, "qk_norm_joint": True},
    "local": {**GATED, "attention_pattern": ("local", "global"), "window": 5},
    "a window wider than the text": {**GATED, "attention_pattern": ("local",), "window": 50},
    "experts": {**MIXTURE, "capacity_factor": 1.0},
    "latents": {
        **TINY,
        "head_dim": 6,
        "kv_rank": 10,
        "query_rank": 7,
        "shared_key_dim": 2,
        "value_dim": 5,
    },
    "local encoder": {
        **GATED,
        "architecture": "encoder",
        "attention_pattern": ("local", "global"),
        "window": 4,
    },
    "encoder": {**ENCODER, "norm_position": "post"},
    "masked": {**ENCODER, "head_transform": True, "head_bias": True},
    "sequence labels": {**ENCODER, "classifier": "sequence", "pooler": True},
    "transformed labels": {
        **ENCODER,
        "norm": "layernorm",
        "embedding_norm": True,
        "first_norm": False,
        "classifier": "token",
        "head_transform": True,
        "classifier_transform": True,
    },
    "token labels": {**ENCODER, "classifier": "token"},
    "encoder_decoder": BOTH,
    **{cell: {**TINY, "cell": cell} for cell in ("rnn", "gru", "lstm")},
    "attending lstm": {**BOTH, "cell": "lstm"},
    "attending gru": {**BOTH, "cell": "gru"},
    "fixed vector": {**BOTH, "cell": "lstm", "num_encoder_layers": 2, "cross_attention": False},
}


def model_of(fields):
    config = ModelConfig(**fields, compute_dtype="float32", scan_layers=False)
    view(type(config), config)
    return config, skeleton(config)


def abstract(model):
    specs = param_specs(model)
    return {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in specs.items()}


def ids(length):
    return jax.ShapeDtypeStruct((1, length), jnp.int32)


def xla_flops(function, *arguments) -> float:
    """FLOPs that XLA counts in `function` of abstract arguments."""
    return tiny_models.compiled(function).lower(*arguments).compile().cost_analysis()["flops"]


def products(function, *arguments) -> float:
    """FLOPs of the matrix products of `function`, those of a loop as often as it runs."""

    def total(jaxpr):
        flops = 0.0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                shape = equation.invars[0].aval.shape
                depth = math.prod(shape[axis] for axis in contracted)
                flops += 2 * depth * math.prod(equation.outvars[0].aval.shape)
            for inner in jaxprs_in_params(equation.params):
                flops += equation.params.get("length", 1) * total(inner)
        return flops

    return total(jax.make_jaxpr(function)(*arguments).jaxpr)


def forward(model):
    """The forward pass, to logits or labels."""

    def run(params, *texts):
        bound = bind(model, params)
        if model.config.classifier == "none":
            return bound(*texts)
        return bound.classify(bound.hidden(*texts))

    return run


def hidden_keys(config, length):
    """FLOPs a token of the keys that masks hide, which the reference multiplies all the same."""
    if config.cell != "attention":
        return 0
    places, encodes = np.arange(length), config.architecture == "encoder"
    ahead = places - places[:, None]
    within = np.abs(ahead) < (config.window or length)
    local = sum(config.is_local(layer) for layer in range(config.num_layers))
    keys = (config.num_layers - local) * np.sum((ahead > 0) & (not encodes)) / length
    keys += local * np.sum(~within | ((ahead > 0) & (not encodes))) / length
    return 2 * config.num_heads * (config.head_width + config.value_width) * keys


@pytest.mark.parametrize("fields", FAMILIES.values(), ids=FAMILIES)
def test_forward_flops_are_those_of_every_product(fields):
    config, model = model_of(fields)
    length, source_length = 12, 7
    both = config.architecture == "encoder_decoder"
    texts = [ids(source_length), ids(length)] if both else [ids(length)]
    counted = products(forward(model), abstract(model), *texts) / length
    expected = costs.forward_flops_per_token(config, length, source_length)
    expected += hidden_keys(config, length)
    # Routers also take a few sums by products, and angles of rotations are kept behind one.
    few = config.num_experts or config.positions == "rotary"
    assert expected == pytest.approx(counted, rel=0.01 if few else 1e-12)


def test_logits_of_a_few_targets_cost_their_share_of_the_head():
    config, model = model_of(FAMILIES["masked"])
    length, targets = 12, 3

    def masked(params, tokens):
        bound = bind(model, params)
        return bound.unembed(bound.hidden(tokens)[:, :targets])

    counted = products(masked, abstract(model), ids(length)) / length
    assert costs.forward_flops_per_token(config, length, max_targets=targets) == counted
    whole = costs.forward_flops_per_token(config, length)
    assert whole == costs.forward_flops_per_token(config, length, max_targets=99) > counted


@pytest.mark.parametrize(
    "name", ["grouped", "local", "latents", "encoder_decoder", "lstm", "attending gru"]
)
def test_flops_of_decoding_a_token_are_those_of_every_product(name):
    config, model = model_of(FAMILIES[name])
    context, source_length = 12, 7
    both = config.architecture == "encoder_decoder"

    def begin(params, source_BS):
        return bind(model, params).new_cache(1, context, source_BS if both else None)

    def decode(params, token, position, cache):
        bound = bind(model, params)
        x_BTD, cache = bound.extend(token, position, cache)
        return bound.unembed(x_BTD), cache

    cache = jax.eval_shape(begin, abstract(model), ids(source_length))
    counted = products(decode, abstract(model), ids(1), ids(1), cache)
    hidden = 4 * 4 * config.head_width * (context - 5) if name == "local" else 0
    expected = costs.decode_flops_per_token(config, context, source_length) + hidden
    expected += 8 if name == "latents" else 0  # behind which angles of rotations are kept
    assert expected == counted


def test_flops_of_reading_a_source_are_those_of_every_product():
    config, model = model_of(BOTH)

    def begin(params, source_BS):
        return bind(model, params).new_cache(1, 1, source_BS)

    counted = products(begin, abstract(model), ids(7)) / 7
    assert costs.prefill_flops_per_token(config, 7) == pytest.approx(counted)


def test_nearly_all_that_xla_counts_is_products():
    config, model = model_of({**LONG, "activation": "swiglu"})
    T = config.max_length
    counted = xla_flops(forward(model), abstract(model), ids(T)) / T
    expected = costs.forward_flops_per_token(config, T) + hidden_keys(config, T)
    assert 0.95 * counted < expected < counted  # the rest is norms, softmax and activations


def test_training_takes_three_forward_passes():
    config, model = model_of({**SMALL, "positions": "none"})
    T = config.max_length

    def loss(params, tokens):
        return jnp.sum(jax.nn.log_softmax(bind(model, params)(tokens))[..., 0])

    counted = products(jax.grad(loss), abstract(model), ids(T)) / T
    assert costs.training_flops_per_token(config, T) + 3 * hidden_keys(config, T) == counted


def test_training_flops_of_gpt2_small_by_hand():
    matrices = 12 * 12 * 768**2 + 50_257 * 768
    attention = 12 * 4 * 768 * 1025 / 2
    config = preset("gpt2_small")
    assert costs.training_flops_per_token(config, 1024) == 3 * (2 * matrices + attention)
    assert costs.decode_flops_per_token(config, 1024) == 2 * matrices + 12 * 4 * 768 * 1024
    head = 50_257 * 768
    prefill = 2 * (matrices - head) + attention + 2 * head / 1024
    assert costs.prefill_flops_per_token(config, 1024) == pytest.approx(prefill, rel=1e-12)


def test_palm_540b_costs_what_its_paper_says():
    # Appendix B: 6·N + 12·L·H·Q·T a token for 540.35B parameters, T = 2048 and all of its keys.
    config = preset("palm_540b")
    whole = 6 * 540.35e9 + 12 * 118 * 48 * 256 * 2048
    unseen = 3 * hidden_keys(config, 2048)
    assert costs.training_flops_per_token(config, 2048) + unseen == pytest.approx(whole, rel=1e-4)


# "Parameters without embedding" of Biderman et al. 2023, table 1, both tables left out.
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("pythia_70m", 18_915_328),
        ("pythia_160m", 85_056_000),
        ("pythia_410m", 302_311_424),
        ("pythia_1b", 805_736_448),
        ("pythia_1_4b", 1_208_602_624),
        ("pythia_2_8b", 2_517_652_480),
        ("pythia_6_9b", 6_444_163_072),
        ("pythia_12b", 11_327_027_200),
    ],
)
def test_non_embedding_parameters_are_the_published_ones(name, published):
    assert costs.parameters(preset(name)).non_embedding == published


def test_active_parameters_are_the_published_ones():
    # Jiang et al. 2024: 47B, 13B of them active. Dai et al. 2024: 16.4B, 2.8B of them active.
    # Yang et al. 2025: 235B, 22B of them active.
    mixtral, deepseek, qwen = (
        costs.parameters(preset(name))
        for name in ("mixtral_8x7b", "deepseek_moe_16b", "qwen3_235b_a22b")
    )
    assert (round(qwen.total / 1e9), round(qwen.active / 1e9)) == (235, 22)
    assert (round(mixtral.total / 1e9), round(mixtral.active / 1e9)) == (47, 13)
    assert (round(deepseek.total / 1e9, 1), round(deepseek.active / 1e9, 1)) == (16.4, 2.8)
    # OpenAI 2025, table 1: 3.61B of 20.91B are active, and 5.13B of 116.83B; the table of tokens
    # does not count there.
    for name, total, active in (("gpt_oss_20b", 20.91, 3.61), ("gpt_oss_120b", 116.83, 5.13)):
        config = preset(name)
        found = costs.parameters(config)
        assert round(found.total / 1e9, 2) == total
        assert round((found.active - config.vocab_size * config.width) / 1e9, 2) == active


# ---- Cache -----------------------------------------------------------------------------------


CACHED = {
    "plain": SMALL,
    "one_head": LONG,
    "latents": FAMILIES["latents"],
    "both": BOTH,
    "lstm": FAMILIES["attending lstm"],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fields", CACHED.values(), ids=CACHED)
def test_the_cache_is_as_large_as_the_model_allocates(fields, dtype):
    config = ModelConfig(**fields, compute_dtype=dtype)
    model, source = skeleton(config), 48 if "architecture" in fields else None

    def begin(params, source_BS):
        return bind(model, params).new_cache(1, 40, None if source is None else source_BS)

    cache = jax.eval_shape(begin, abstract(model), ids(48))
    arrays = [x for x in jax.tree.leaves(cache) if jnp.issubdtype(x.dtype, jnp.floating)]
    allocated = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
    assert allocated == costs.cache_bytes(config, 40, dtype, source or 0)


def test_local_layers_need_the_cache_of_their_window():
    config = preset("gemma3_1b")
    slot = 2 * 1 * 256 * 2
    assert config.num_layers == 26 and config.window == 512
    assert costs.cache_bytes(config, 100, "bfloat16") == 26 * 100 * slot
    assert costs.cache_bytes(config, 10_000, "bfloat16") == (22 * 512 + 4 * 10_000) * slot


def test_an_encoder_has_no_cache():
    assert costs.cache_bytes(preset("bert_base"), 512) == 0
