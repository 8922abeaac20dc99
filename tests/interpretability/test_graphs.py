"""Attribution graphs add up: to the model, to every target, to every attention score."""

import zlib

import jax
import numpy as np
import pytest

from lm.config import ConfigError
from lm.interpretability.dictionaries import Dictionary, pairs
from lm.interpretability.graphs import influence
from lm.interpretability.graphs.attribution import attribute, intervene, likeliest
from lm.interpretability.graphs.heads import loadings, looked
from lm.interpretability.graphs.replacement import freeze
from lm.models import ModelConfig, param_specs, skeleton

MODELS = {
    "gpt2": {"norm": "layernorm", "bias": True, "positions": "learned"},
    "gemma2": {
        "norm_position": "sandwich", "num_kv_heads": 2, "positions": "rotary", "embedding_scale": 0,
        "attention_softcap": 3.0, "logits_softcap": 5.0, "attention_pattern": ("local", "global"),
        "window": 3, "norm_unit_offset": True, "activation": "geglu",
    },
    "qwen": {
        "qkv_bias": True, "qk_norm": True, "num_kv_heads": 1, "rotary_fraction": 0.5,
        "tie_embeddings": False, "head_bias": True, "activation": "swiglu",
    },
    "olmo": {
        "norm_position": "reordered", "qk_norm": True, "qk_norm_joint": True, "num_kv_heads": 2,
        "rotary_pattern": (True, False), "scale_by_layer": True, "activation": "swiglu",
    },
    "2017": {
        "norm": "layernorm", "norm_position": "post", "bias": True, "positions": "sinusoidal",
        "embedding_norm": True, "token_types": 2, "activation": "relu",
    },
    "gptj": {"norm": "layernorm", "norm_bias": True, "parallel": True, "shared_norm": True},
    "bare": {"norm": "none", "positions": "none"},
    "t5": {"positions": "relative", "attention_scale": 1.0, "output_scale": 0, "parallel": True},
}  # fmt: skip
TOKENS = np.array([3, 17, 5, 3, 22])
SIZES = {"num_layers": 3, "num_heads": 4, "width": 16, "vocab_size": 24, "max_length": 8}


def values(shapes):
    """In general position, in float64: no gain is one, no bias zero, no two layers are alike."""
    found = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        found[name] = rng.normal(float("scale" in name), 0.4, shape)
    return found


def model(**fields):
    """A skeleton and parameters."""
    config = ModelConfig(**{**SIZES, "mlp_width": 24, **fields})
    skeleton_ = skeleton(config)
    return skeleton_, values({n: s.shape for n, s in param_specs(skeleton_).items()})


def transcoder(kind, source="mlp_norm.output", layers=(0, 1, 2), skip=False, k=0):
    """A random one, of which about a third of the features are active."""
    L, D, F = len(layers), SIZES["width"], 10
    shapes = {"W_enc": (L, D, F), "b_enc": (L, F), "W_dec": (len(pairs(kind, L)), F, D)}
    numbers = values({**shapes, "b_dec": (L, D), "threshold_scale": (L, F), "W_skip": (L, D, D)})
    numbers["threshold"] = numbers.pop("threshold_scale") / 2
    numbers["W_skip"] = numbers["W_skip"] if skip else None
    return Dictionary(**numbers, kind=kind, layers=layers, source=source, target="mlp.output", k=k)


CASES = {
    "gpt2": transcoder("cross_layer"),
    "gemma2": transcoder("cross_layer", skip=True),
    "qwen": transcoder("transcoder", layers=(0, 2), k=3),
    "olmo": transcoder("cross_layer", "residual_middle"),
    "2017": transcoder("cross_layer", "residual_middle"),
    "gptj": transcoder("transcoder", "attention_norm.output", skip=True),
    "bare": transcoder("cross_layer", "residual_middle", layers=(1, 2)),
    "t5": transcoder("transcoder"),
}


@pytest.fixture(scope="module")
def exact():
    with jax.enable_x64(True):
        yield


PARAMS = [
    pytest.param(name, marks=[pytest.mark.slow] * (name != "gemma2")) for name in CASES
]  # another one is the page's


@pytest.fixture(scope="module", params=PARAMS)
def frozen(request, exact):
    local = freeze(*model(**MODELS[request.param]), CASES[request.param], TOKENS)
    return local, attribute(local, batch=16)


def test_the_replacement_is_the_original(frozen):
    local, _ = frozen
    found = local.values(local.sources)
    assert len(local.active.value_N) > 10
    for name in local.reads:
        np.testing.assert_allclose(found[name], local.original[name], atol=1e-12)
    np.testing.assert_allclose(local.logits(found), local.original["logits"], atol=1e-12)


def test_edges_and_biases_add_up_to_each_target(frozen):
    local, graph = frozen
    assert np.abs(graph.residual).max() < 1e-12
    # What they add up to is what the model says, by another way.
    logits_V = np.asarray(local.original["logits"])[-1]
    if cap := local.config.logits_softcap:
        logits_V = cap * np.arctanh(logits_V / cap)
    chosen = [node.index for node in graph.nodes if node.kind == "logit"]
    centred = logits_V[chosen] - logits_V.mean()
    np.testing.assert_allclose(graph.adjacency[graph.kinds == "logit"].sum(1), centred, atol=1e-12)
    said = graph.adjacency[graph.kinds == "feature"].sum(1)
    np.testing.assert_allclose(said, local.active.value_N, atol=1e-12)
    assert np.abs(graph.adjacency[:, graph.kinds == "bias"]).sum() > 0.1


def test_doubling_a_feature_changes_its_targets_by_the_edges(frozen):
    local, graph = frozen
    features = np.flatnonzero(graph.kinds == "feature")
    strongest = max(features, key=lambda n: np.abs(graph.adjacency[:, n]).sum())
    held, followed = intervene(local, graph, strongest, 2.0)
    np.testing.assert_allclose(held, graph.adjacency[graph.targets, strongest], atol=1e-12)
    taken, _ = intervene(local, graph, strongest, 0.0)
    np.testing.assert_allclose(taken, -held, atol=1e-12)
    # The model as it is answers otherwise, in later layers alone.
    assert np.abs(followed - held).max() > 1e-3
    node = graph.nodes[strongest]
    earlier = [graph.nodes[t].layer < node.layer for t in graph.targets]
    assert not followed[earlier].any()


def test_pairs_of_nodes_add_up_to_the_attention_score(frozen):
    local, graph = frozen
    layer, query, key = 2, 4, 2
    for head in (0, 3):
        found = looked(local, layer, head, query, key)
        assert found.terms_nn.shape == (np.sum(graph.kinds != "logit"),) * 2
        assert abs(found.terms_nn.sum() - found.score) < 1e-12
        # The score that the softmax saw, but for a cap and what positions add.
        seen = local.original[f"blocks.{layer}.attention.scores"][head, query, key]
        score = found.score
        if cap := local.config.attention_softcap:
            score = cap * np.tanh(score / cap)
        if local.config.positions == "relative":
            score += local.params["relative_bias"][query - key, head]
        # Learned biases are float32 in any model.
        assert abs(score - seen) < (1e-6 if local.config.positions == "relative" else 1e-12)
        assert len(set(np.abs(found.terms_nn).argmax(1))) > 1


def test_heads_and_what_passes_them_by_are_the_edge(frozen):
    local, graph = frozen
    logit = np.flatnonzero(graph.kinds == "logit")[0]
    row = np.abs(graph.adjacency[logit])
    sources = [np.flatnonzero(graph.kinds == k)[row[graph.kinds == k].argmax()] for k in (
        *set(graph.kinds) - {"logit"},
    )]  # fmt: skip
    feature = np.flatnonzero(graph.kinds == "feature")[-1]
    edges = [(logit, source) for source in sources] + [(feature, sources[0])]
    found = loadings(local, graph, edges)
    edge_E1 = np.array([[graph.adjacency[edge]] for edge in edges])
    assert np.abs(found.heads_ELH.sum(2) + found.bypass_EL - edge_E1).max() < 1e-12
    assert np.abs(found.heads_ELH).max() > 1e-3


@pytest.mark.slow
def test_what_is_beyond_the_most_features_is_error(exact):
    local = freeze(*model(**MODELS["gpt2"]), CASES["gpt2"], TOKENS, max_features=8)
    graph = attribute(local, logits=[7], batch=4)
    assert (graph.kinds == "feature").sum() == 8
    assert [graph.nodes[n].index for n in np.flatnonzero(graph.kinds == "logit")] == [7]
    assert np.abs(graph.residual).max() < 1e-12


@pytest.mark.slow
def test_float32_loses_what_float32_loses():
    with jax.enable_x64(False):
        local = freeze(*model(**MODELS["gpt2"]), CASES["gpt2"], TOKENS)
        graph = attribute(local)
    assert graph.adjacency.dtype == np.float32
    assert 0 < np.abs(graph.residual).max() < 1e-4


def test_the_smallest_set_of_tokens_that_reaches_95_percent():
    assert likeliest(np.array([0.1, 0.7, 0.18, 0.02])).tolist() == [1, 2, 0]
    assert likeliest(np.array([0.03, 0.96, 0.01])).tolist() == [1]
    assert likeliest(np.full(40, 1 / 40)).tolist() == [*range(10)]


def small_graph():
    """The adjacency of circuit-tracer's test: two tokens, two layers, five features, one logit."""
    adjacency = np.zeros((12, 12))
    for target, sources in {11: (1, 3, 6, 8), 3: (0, 1, 6), 1: (9, 10), 0: (9,)}.items():
        adjacency[target, sources] = 10
    return adjacency, np.eye(12)[11]


def test_influence_is_as_circuit_tracer_has_it():
    adjacency, weight = small_graph()
    found = influence.influence(adjacency, weight)
    expected = [1 / 12, 1 / 3, 0, 1 / 4, 0, 0, 1 / 3, 0, 1 / 4, 1 / 4, 1 / 6, 0]
    np.testing.assert_allclose(found, expected, atol=1e-15)
    errors, tokens = np.r_[5:9], np.r_[9:11]
    scores = influence.scores(adjacency, weight, errors, tokens)
    assert scores == (pytest.approx(5 / 12), pytest.approx(0.78125))
    adjacency[0, 9] = adjacency[3, 0] = 0  # as pruned of the least influential node
    edges = influence.edge_influence(adjacency, weight)
    expected = np.zeros((12, 12))
    expected[11, [1, 3, 6, 8]], expected[3, [1, 6]], expected[1, [9, 10]] = 1 / 4, 1 / 8, 3 / 16
    np.testing.assert_allclose(edges, expected, atol=1e-15)


def test_pruning_keeps_what_reaches_the_logits(frozen):
    _, graph = frozen
    pruned = influence.prune(graph)
    kept, edges = pruned.nodes_n, pruned.edges_nn
    assert kept[(graph.kinds == "token") | (graph.kinds == "logit")].all()
    inner = kept & (graph.kinds != "token") & (graph.kinds != "logit")
    assert edges[:, inner].any(0).all()
    assert edges[kept & (graph.kinds == "feature")].any(1).all()
    assert not edges[~kept].any() and not edges[:, ~kept].any()
    assert 0 < inner.sum() < (graph.kinds != "logit").sum()
    everything = influence.prune(graph, 1.0, 1.0)
    assert everything.nodes_n.sum() > kept.sum()
    order = np.argsort(-influence.influence(graph.adjacency, graph.probability_n), kind="stable")
    assert (np.diff(pruned.cumulative_n[order]) >= 0).all()
    assert pruned.cumulative_n.max() == pytest.approx(1)
    # A group's edges are what its members' add up to.
    groups = {"logits": np.flatnonzero(graph.kinds == "logit"), "rest": graph.kinds != "logit"}
    together = influence.grouped(graph, groups)
    logits = graph.values_n[graph.kinds == "logit"].sum()
    assert together[0, 1] == pytest.approx(logits, abs=1e-11) and together[0, 0] == 0


def test_what_is_no_transcoder_of_this_model_is_refused():
    dictionary = CASES["gpt2"]
    for fields, message in (
        ({"architecture": "encoder"}, "of a decoder with MLPs"),
        ({"num_layers": 2}, "the model has 2 of width 16"),
        ({"parallel": True, "shared_norm": True}, "source='mlp_norm.output' is not one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            freeze(*model(**fields), dictionary, TOKENS)
