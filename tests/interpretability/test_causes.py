"""Patching, edges and their attributions: closed forms on general and on linear models."""

import json

import numpy as np
import pytest
import tiny_models
from linear_models import linear_model
from tiny_run import write_tiny_run

from lm.__main__ import run as command
from lm.config import ConfigError
from lm.interpretability.edges import (
    Graph,
    edge_attribution,
    edge_patching,
    faithfulness,
    path_patching,
    strongest,
)
from lm.interpretability.patching import (
    Contrast,
    activation_patching,
    attribution_patching,
    causal_tracing,
    logit_difference,
    one_by_one,
)
from lm.models import bind, skeleton

LAYERS, T = 2, 5
PATTERN = ("blocks.*.attention.pattern",)


def contrast_of(config, values, freeze=()):
    clean = tiny_models.tokens(2, T)
    corrupt = clean.copy()
    corrupt[:, 1] = (corrupt[:, 1] + 7) % 40
    metric = logit_difference(np.array([1, 2]), np.array([3, 4]))
    return Contrast(skeleton(config), values, clean, corrupt, metric, freeze)


@pytest.fixture(scope="module")
def general():
    """Grouped-query, gated, normed, rotary in its first layer: nothing in it is linear."""
    config = tiny_models.config(
        num_kv_heads=2, activation="swiglu", width=16, bias=True, scale_by_layer=True,
        rotary_pattern=(True, False),
    )  # fmt: skip
    return contrast_of(config, tiny_models.params(config))


@pytest.fixture(scope="module")
def linear():
    return contrast_of(*linear_model(), PATTERN)


def test_all_is_one_and_nothing_is_none(general):
    masks = np.stack([np.zeros((LAYERS, 1), bool), np.ones((LAYERS, 1), bool)])
    found = activation_patching(general, "blocks.*.residual_before", masks)
    assert found[0] == pytest.approx(0, abs=1e-5) and found[1] == pytest.approx(1, abs=1e-5)
    edges_RS = Graph.of(general.skeleton.config).edges_RS
    both = np.stack([np.zeros_like(edges_RS), edges_RS])
    assert np.allclose(edge_patching(general, both), [0, 1], atol=1e-5)
    assert np.allclose(faithfulness(general, both), [0, 1], atol=1e-5)


def test_edges_of_a_sender_sum_to_the_attribution_of_what_it_writes(general):
    graph = Graph.of(general.skeleton.config)
    sums = dict(zip(graph.senders, edge_attribution(general).sum(0)))
    sites = ("embedding", "blocks.*.attention.heads", "blocks.*.mlp.output")
    found = {name: x.sum(0) for name, x in attribution_patching(general, sites).items()}
    assert sums["embedding"] == pytest.approx(found["embedding"], abs=1e-5)
    for i in range(LAYERS):
        heads = [sums[f"head {i}.{h}"] for h in range(4)]
        assert np.allclose(heads, found[f"blocks.{i}.attention.heads"], atol=1e-5)
        assert sums[f"mlp {i}"] == pytest.approx(found[f"blocks.{i}.mlp.output"], abs=1e-5)


@pytest.mark.slow
def test_integrated_gradients_sum_to_the_difference(general):
    plain, integrated = (edge_attribution(general, points)[:, 0].sum() for points in (0, 12))
    assert integrated == pytest.approx(1, abs=2e-3)
    assert abs(plain - 1) > 0.02


def test_to_first_order_is_exact_where_all_is_linear(linear):
    shape = (LAYERS, T)
    site = "blocks.*.residual_before"
    patched = activation_patching(linear, site, one_by_one(*shape)).reshape(shape)
    found = attribution_patching(linear, (site, "blocks.*.attention.heads"))
    assert np.allclose(
        [found[f"blocks.{i}.residual_before"] for i in range(LAYERS)], patched, atol=2e-4
    )
    masks = one_by_one(LAYERS, 1, 2).reshape(-1, LAYERS, 1, 2)
    heads = activation_patching(linear, "blocks.*.attention.heads", masks).reshape(LAYERS, 2)
    attributed = [found[f"blocks.{i}.attention.heads"].sum(0) for i in range(LAYERS)]
    assert np.allclose(attributed, heads, atol=2e-4) and np.abs(heads).max() > 0.01


def test_edge_attribution_is_exact_where_all_is_linear(linear):
    graph = Graph.of(linear.skeleton.config)
    scores_RS = edge_attribution(linear)
    at = np.argwhere(graph.edges_RS)
    masks = np.zeros((len(at), *graph.edges_RS.shape), bool)
    masks[np.arange(len(at)), at[:, 0], at[:, 1]] = True
    patched = edge_patching(linear, masks, batch_size=16)
    assert np.allclose(patched, scores_RS[graph.edges_RS], atol=2e-4)
    # Frozen patterns: what queries and keys read changes nothing; the rest sums to the whole.
    assert not scores_RS[graph.rows("query 1")].any() and not scores_RS[graph.rows("key 0")].any()
    assert scores_RS[:, 0].sum() == pytest.approx(1, abs=1e-4)
    kept = strongest(scores_RS, 4)
    assert kept.sum() == 4 and np.abs(scores_RS[kept]).min() >= np.abs(scores_RS[~kept]).max()
    # The circuit of all that counts at all does everything.
    assert faithfulness(linear, [scores_RS != 0]) == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_a_path_to_the_logits_is_what_a_head_adds_to_them(linear):
    config = linear.skeleton.config
    model = bind(linear.skeleton, linear.params)
    added = {}
    for text in ("clean", "corrupt"):
        heads_BTHC = linear_heads(linear, text)
        head_VD = model.output_weights()
        direction_BD = head_VD[np.array([1, 2])] - head_VD[np.array([3, 4])]
        out_HCD = model.each_block()[1].attention.output[...]
        each = np.einsum("bhc,hcd,bd->bh", heads_BTHC[:, -1], out_HCD, direction_BD)
        added[text] = each.mean(0)
    clean, corrupt = linear.ends
    wanted = (added["clean"] - added["corrupt"]) / (clean - corrupt)
    senders = [f"head 1.{h}" for h in range(config.num_heads)]
    assert np.allclose(path_patching(linear, senders, ["logits"]), wanted, atol=1e-4)
    with pytest.raises(ConfigError, match=r"no edge from 'head 1.0' to 'query 1.0'"):
        path_patching(linear, ["head 1.0"], ["query 1.0"])


def linear_heads(contrast, text):
    held = contrast.held(contrast.params)
    tokens = contrast.clean_BT if text == "clean" else contrast.corrupt_BT
    name = "blocks.1.attention.heads"
    return np.asarray(contrast.values(contrast.params, tokens, [name], held)[1][name])


@pytest.mark.slow
def test_tracing_restores_what_the_noise_took():
    config = tiny_models.config(width=16)
    values = tiny_models.params(config)
    tokens = tiny_models.tokens(1, T)[0]
    found = causal_tracing(skeleton(config), values, tokens, (1, 3), token=5, samples=4)
    assert found.clean != found.corrupt
    whole = found.clean - found.corrupt
    # The last stream of the last place is all that the prediction is made of, and the first token
    # saw no noise.
    stream = found.effects["residual_after"]
    assert stream[-1] == pytest.approx([0, 0, 0, 0, whole], abs=1e-6)
    assert abs(stream[0, 0]) < 1e-7 < np.abs(stream[0, 1:]).min()
    assert {x.shape for x in found.effects.values()} == {(LAYERS, T)}


def test_what_cannot_be_patched_is_said_in_a_line(general):
    config, values = general.skeleton.config, general.params
    with pytest.raises(ConfigError, match=r"'blocks.*.atention.heads' is no activation"):
        activation_patching(general, "blocks.*.atention.heads", np.ones((1, 2)))
    post = tiny_models.config(norm_position="post")
    with pytest.raises(ConfigError, match="norm_position='post'"):
        Graph.of(post)
    with pytest.raises(ConfigError, match="qk_norm_joint=True"):
        Graph.of(tiny_models.config(qk_norm=True, qk_norm_joint=True))
    tokens = tiny_models.tokens(1, T)
    metric = logit_difference([1], [2])
    same = Contrast(skeleton(config), values, tokens, tokens, metric)
    with pytest.raises(ConfigError, match="nothing to explain"):
        edge_attribution(same)
    with pytest.raises(ConfigError, match=r"\(1, 5\), the corrupt one \(1, 4\)"):
        Contrast(skeleton(config), values, tokens, tokens[:, :4], metric)


@pytest.mark.slow
def test_a_page_of_causes(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    write_tiny_run(run, num_layers=2, width=16)
    pairs = [{"base": f"{a}{b}", "source": f"{b}{a}", "label": a} for a in "abcd" for b in "efg"]
    texts = [{"text": f"{a}{b}", "label": b == "x", "group": a} for a in "abcdefgh" for b in "xy"]
    for name, lines in (("pairs", pairs), ("texts", texts)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = [
        "--config=configs/interpret/causes.py",
        f"--config.init_from={run}",
        f"--workdir={tmp_path / 'page'}",
        *("--config.clean=a cat sat", "--config.corrupt=a dog sat", "--config.subject=cat"),
        *("--config.right=c", "--config.wrong=d", "--config.samples=2"),
        f"--config.interchange.path={tmp_path / 'pairs.jsonl'}",
        "--config.interchange.steps=3",
        f"--config.probe={tmp_path / 'texts.jsonl'}",
    ]
    command(words)
    page = (tmp_path / "page/causes.html").read_text(encoding="utf-8")
    assert "http" not in page.replace("http://www.w3.org", "")
    found = json.loads((tmp_path / "page/causes.json").read_text(encoding="utf-8"))["sections"]
    assert [*found] == ["patching", "edges", "tracing", "interchange", "probe"]
    faithful = found["edges"]["tables"][0]["rows"]
    assert faithful[-1] == pytest.approx([faithful[-1][0], 1, 1], abs=1e-4)
    # The last letter is all that the label is about, and every group has both.
    assert found["probe"]["tables"][0]["rows"][0][:2] == ["embedding", 1]
    names = [score["name"] for score in found["interchange"]["scores"]]
    assert names == ["found", "random parameters", "arbitrary labels"]
    for odd, message in (
        ("--config.corrupt=a bird sat", "config.clean has 10 tokens and config.corrupt 11"),
        ("--config.subject=dog", "config.subject='dog' is not in the prompt"),
        ("--config.right=cd", "config.right='cd' must be one token"),
    ):
        with pytest.raises(ConfigError, match=message):
            command([*words, odd])
