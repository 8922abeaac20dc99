"""Lenses, direct logit attribution and maps of the stream: closed forms, and the page."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from linear_models import linear_model
from tiny_run import write_tiny_run

import lm
from lm.config import ConfigError, defaults
from lm.evaluation.card import NotApplicable, Section
from lm.evaluation.page import write_report
from lm.interpretability.attribution import TERMS, direct_logit_attribution, summed
from lm.interpretability.heatmaps import heatmap
from lm.interpretability.lens_report import attributed
from lm.interpretability.lenses import Lens, divergences, jacobian, streams, train_tuned
from lm.interpretability.prompts import opened
from lm.jobs import lens as job
from lm.models import bind, skeleton

RIGHT, WRONG = np.array([1, 2]), np.array([3, 4])
FAMILIES = {
    "layernorm, biases, learned positions, types, soft cap": {
        "norm": "layernorm",
        "bias": True,
        "positions": "learned",
        "token_types": 2,
        "head_bias": True,
        "logits_softcap": 5.0,
    },
    "sandwich, untied, grouped-query, gated": {
        "norm": "layernorm",
        "norm_position": "sandwich",
        "bias": True,
        "tie_embeddings": False,
        "output_scale": 0.0,
        "num_kv_heads": 2,
        "activation": "swiglu",
    },
    "reordered, a norm over all heads": {
        "norm_position": "reordered",
        "qk_norm": True,
        "qk_norm_joint": True,
    },
    "tied, rotary, experts after a dense layer": {
        "num_experts": 2,
        "activation": "swiglu",
        "dense_layers": 1,
    },
}


def model_of(**fields):
    config = tiny_models.config(**fields)
    values = tiny_models.params(config)
    return config, values, bind(skeleton(config), values)


def test_a_jacobian_lens_is_exact_where_what_is_left_is_linear():
    config, values = linear_model()
    tokens = tiny_models.tokens(3, 1)  # one place: attention's pattern is one
    lens = jacobian(skeleton(config), values, tokens)

    @tiny_models.compiled
    def read(values, lens):
        model = bind(skeleton(config), values)
        x_LBTD = streams(model, tokens)
        return lens(model, x_LBTD), Lens()(model, x_LBTD)

    lens_LBTV, plain_LBTV = read(values, lens)
    assert np.allclose(lens_LBTV, lens_LBTV[-1], atol=5e-6)
    assert np.abs(plain_LBTV[0] - plain_LBTV[-1]).max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_parts_add_sums_to_the_logit(family):
    config, values, _ = model_of(**FAMILIES[family])

    @tiny_models.compiled
    def found(values, tokens):
        model = bind(skeleton(config), values)
        terms = direct_logit_attribution(model, tokens, RIGHT, WRONG)
        lens = Lens()(model, streams(model, tokens))
        return terms, model(tokens), lens

    terms, logits_BTV, lens_LBTV = found(values, tiny_models.tokens())
    last_BV, cap = logits_BTV[:, -1], config.logits_softcap
    last_BV = cap * jnp.arctanh(last_BV / cap) if cap else last_BV
    wanted = last_BV[jnp.arange(2), RIGHT] - last_BV[jnp.arange(2), WRONG]
    assert np.allclose(terms["logit"], wanted, atol=2e-6)
    assert np.allclose(sum(summed(terms[name]) for name in TERMS), wanted, atol=2e-6)
    assert np.allclose(terms["sources"].sum(-1), terms["heads"], atol=1e-6)
    if "neurons" in terms:
        assert np.allclose(terms["neurons"].sum(-1) + terms["mlp_bias"], terms["mlp"], atol=1e-6)
    else:
        assert config.num_experts
    if config.positions == "learned" and "embedding.tokens" in terms:
        parts = [terms[f"embedding.{name}"] for name in ("tokens", "positions", "types")]
        assert np.allclose(sum(parts), terms["embedding"], atol=1e-6)
    # After the last block there is nothing left for a lens to leave out.
    assert np.allclose(lens_LBTV[-1], logits_BTV, atol=2e-6)
    assert np.abs(lens_LBTV[0] - logits_BTV).max() > 0.01


def test_identity_is_the_logit_lens_and_bert_is_read_through_its_own_head():
    config, _, model = model_of(
        num_layers=1,
        width=16,
        architecture="encoder",
        norm="layernorm",
        norm_position="post",
        bias=True,
        head_transform=True,
        head_bias=True,
    )
    tokens = tiny_models.tokens(1, 6)
    x_LBTD = streams(model, tokens)
    eye_LDD = jnp.broadcast_to(jnp.eye(config.width), (len(x_LBTD), config.width, config.width))
    plain_LBTV = Lens()(model, x_LBTD)
    assert np.array_equal(Lens(eye_LDD)(model, x_LBTD), plain_LBTV)
    assert np.allclose(plain_LBTV[-1], model(tokens), atol=2e-6)


@pytest.mark.slow
def test_a_jacobian_is_that_of_the_layers_that_are_left():
    config, values, _ = model_of(norm="layernorm", bias=True)
    tokens = tiny_models.tokens(1, 6)
    lens = jacobian(skeleton(config), values, tokens, seed=3)
    place = int(np.random.default_rng(3).integers(6, size=1)[0])

    def last(x_D, model):
        def tap(name, x_BTD):
            if name == "blocks.0.residual_after":
                x_BTD = x_BTD.at[0, place].set(x_D)
            elif name == "blocks.1.residual_after":
                found.append(x_BTD[0, place])
            return x_BTD

        found = []
        model.hidden(tokens, tap=tap)
        return found[0]

    @tiny_models.compiled
    def backwards(values):
        model = bind(skeleton(config), values)
        return jax.jacrev(last)(streams(model, tokens)[1, 0, place], model)

    wanted = backwards(values)
    assert np.allclose(lens.matrix_LDD[1], wanted, atol=1e-5)
    assert np.array_equal(lens.matrix_LDD[-1], np.eye(config.width))


@pytest.mark.slow
def test_a_tuned_lens_is_nearer_and_comes_back_from_its_file(tmp_path):
    config, values, model = model_of(num_layers=1)
    rows = np.random.default_rng(0).integers(0, 40, (64, 8), np.int32)
    lens, losses = train_tuned(skeleton(config), values, rows, steps=40, learning_rate=5e-3)

    @tiny_models.compiled
    def both(values, lens):
        model = bind(skeleton(config), values)
        x_LBTD = streams(model, rows[:16])
        return divergences(model, Lens(), x_LBTD), divergences(model, lens, x_LBTD)

    plain, tuned = both(values, lens)
    assert losses[0] == pytest.approx(float(plain[0]), rel=0.2)
    assert tuned[0] < 0.5 * plain[0] and abs(tuned[-1]) < 1e-6
    lens.save(tmp_path / "lens", {})
    again = Lens.load(tmp_path / "lens", model)
    assert all(np.array_equal(a, b) for a, b in zip(lens, again))
    other = model_of(num_layers=2)[2]
    with pytest.raises(ConfigError, match=r"\(2, 32, 32\); this model's are \(3, 32, 32\)"):
        Lens.load(tmp_path / "lens", other)
    with pytest.raises(ConfigError, match="holds no lens"):
        Lens.load(tmp_path, model)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "tiny"
    path.mkdir()
    write_tiny_run(path, positions="learned")
    (path / "text.txt").write_text("A cat sat on a mat and saw a dog. " * 40)
    return path


def config_of(run, **fields):
    config = defaults(job.LensJob)
    config.init_from, config.path, config.prompt = str(run), str(run / "text.txt"), "The cat"
    config.update({"tuned_steps": 4, "jacobian_rows": 4, "length": 16, **fields})
    return config


@pytest.mark.slow
def test_a_run_through_lenses(run, tmp_path):
    job.run(config_of(run, right="a", wrong="b"), str(tmp_path))
    page = (tmp_path / "lens.html").read_text(encoding="utf-8")
    found = json.loads((tmp_path / "lens.json").read_text(encoding="utf-8"))["sections"]
    assert "http" not in page.replace("http://www.w3.org", "")
    assert all(title in page for title in ("logit lens:", "tuned lens:", "Jacobian lens:"))
    divergence = found["lens"]["tables"][0]
    assert divergence["head"] == ["after block", "logit lens", "tuned lens", "Jacobian lens"]
    assert np.allclose(divergence["rows"][-1][1:], 0, atol=1e-5) and divergence["rows"][0][1] > 0
    parts = dict(found["attribution"]["tables"][0]["rows"])
    assert parts["all of these"] == pytest.approx(parts["the model's own"], abs=1e-5)
    assert len(found["stream"]["pictures"]) == 7
    norms = found["stream"]["pictures"][0]  # the picture's numbers, the last block's first
    wanted = np.linalg.norm(lm.load(run).trace("The cat", "embedding")["embedding"][0], axis=-1)
    assert norms["rows"] == ["0", "embedding"]
    assert norms["columns"] == ["<|endoftext|>", *"The␣cat"]
    assert norms["values"][1] == pytest.approx(wanted.tolist(), rel=1e-5)
    to_last, to_next = found["stream"]["pictures"][1:3]
    assert to_next["rows"] == ["embedding"]  # of one block, whose stream is both the next and last
    assert to_next["values"][0] == pytest.approx(to_last["values"][1], abs=1e-6)
    # The lens that was trained is read again, in place of training.
    again = job.run(config_of(run, tuned=str(tmp_path / "tuned_lens")), str(tmp_path / "again"))
    assert again["lens"].tables[0].rows[0][2] == pytest.approx(divergence["rows"][0][2], rel=1e-4)
    assert not (tmp_path / "again/tuned_lens").exists()


def test_what_no_lens_can_read_is_said_in_a_line(run, tmp_path):
    with pytest.raises(ConfigError, match=r"config.right='ab' must be one token.*: a b"):
        job.run(config_of(run, right="ab"), str(tmp_path))
    with pytest.raises(ConfigError, match=r"config.prompt='' must be a text"):
        job.run(config_of(run, prompt=""), str(tmp_path))
    with pytest.raises(ConfigError, match=r"config.path.*tuned_steps=0"):
        job.run(config_of(run, path=str(tmp_path / "none")), str(tmp_path))
    both = tmp_path / "both"
    both.mkdir()
    write_tiny_run(both, architecture="encoder_decoder")
    with pytest.raises(ConfigError, match="no single residual stream"):
        job.run(config_of(both), str(tmp_path))


@pytest.mark.slow
def test_logits_of_a_post_norm_model_are_not_attributed(run, tmp_path):
    post = tmp_path / "post"
    post.mkdir()
    write_tiny_run(post, norm_position="post")
    found = job.run(config_of(post, tuned_steps=0, jacobian_rows=0, path=""), str(tmp_path))
    assert [*found] == ["lens", "stream"]
    left_out = json.loads((tmp_path / "lens.json").read_text(encoding="utf-8"))["left_out"]
    assert "norm_position='post'" in left_out["attribution"]
    with pytest.raises(NotApplicable):
        attributed(opened(str(post), None), np.ones((1, 3), np.int32), 1, None)


def test_a_picture_of_numbers_says_them_plainly_and_its_title_once(tmp_path):
    drawn = heatmap("Each head's way & <back>", np.array([[421.7, -0.25]]), ["0"], ["a", "b"])
    assert ">422<" in drawn.svg and ">-0.25<" in drawn.svg
    section = Section("one", "One", "", (), (), [drawn])
    page = write_report(tmp_path / "a.html", "a", "", {"model": "m"}, "", [section])
    assert "<figcaption>" not in page.read_text(encoding="utf-8")
