"""Sparse dictionaries: what they compute, what they learn, and on any mesh the same."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import write_tiny_run

import lm
from lm.config import ConfigError, defaults
from lm.data import evaluation_batches, prepare
from lm.data.config import DataConfig
from lm.interpretability import dictionaries, dictionary_loss
from lm.interpretability.dictionary_loss import DictionaryConfig, Trainable
from lm.jobs import dictionary as job
from lm.models import bind, init, param_specs
from lm.parallel.layout import lay_out

CLONE = pathlib.Path(__file__).parent.parent.parent
L, D, F, N = 3, 6, 16, 40


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("kind", ["transcoder", "cross_layer"])
def test_a_dictionary_is_the_sum_of_what_its_layers_write(kind, tmp_path):
    where = dictionaries.pairs(kind, L)
    W_enc, b_enc, W_dec, b_dec = (
        draw(0, L, D, F),
        draw(1, L, F),
        draw(2, len(where), F, D),
        draw(3, L, D),
    )
    threshold, W_skip = abs(draw(4, L, F)), draw(5, L, D, D)
    made = dictionaries.Dictionary(
        W_enc,
        b_enc,
        W_dec,
        b_dec,
        threshold,
        W_skip,
        kind,
        (1, 2, 4),
        "mlp_norm.output",
        "mlp.output",
    )
    dictionaries.save(made, tmp_path)
    loaded = dictionaries.load(tmp_path)
    assert loaded.sources == tuple(f"blocks.{i}.mlp_norm.output" for i in (1, 2, 4))

    x = draw(6, L, 2, 5, D)
    z = np.einsum("lbtd,ldf->lbtf", x, W_enc) + np.asarray(b_enc)[:, None, None]
    a = np.where(z > np.asarray(threshold)[:, None, None], z, 0)
    y = np.einsum("lbtd,lde->lbte", x, W_skip) + np.asarray(b_dec)[:, None, None]
    for matrix, (k, to) in zip(np.asarray(W_dec), where):
        assert k == to or (kind == "cross_layer" and k < to)
        y[to] += a[k] @ matrix
    np.testing.assert_allclose(loaded.encode(x), a, atol=1e-5)
    np.testing.assert_allclose(loaded.encode_one(1, x[1]), a[1], atol=1e-5)
    np.testing.assert_allclose(loaded(x), y, atol=1e-4)


ARCHITECTURES = {
    "relu": {},
    "jumprelu": {},
    "topk": {"k": 3},
    "batch_topk": {"k": 3},
    "gated": {},
    "matryoshka": {"activation": "batch_topk", "k": 3, "prefixes": (4, 8)},
    "skip": {"activation": "jumprelu", "kind": "cross_layer", "skip": True},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_saved_reads_raw_activations_and_says_what_training_said(name):
    # Scales go into weights, biases and thresholds: were one left out, the rest would differ.
    config = DictionaryConfig(**{"activation": name, "features": F, **ARCHITECTURES[name]})
    model = Trainable(config, L, D)
    params = init(param_specs(model), jax.random.key(0))
    for number, each in enumerate(params):  # no bias is zero, and no two are alike
        params[each] += 0.3 * draw(number, *params[each].shape)
    read_scale, write_scale = jnp.array([0.5, 2.0, 3.0]), jnp.array([4.0, 0.25, 1.5])
    x, y = draw(20, L, N, D), draw(21, L, N, D)
    dead = jnp.zeros((L, F), bool)
    _, sums = jax.jit(
        lambda params, x, y: dictionary_loss.loss(bind(model, params), x, y, jnp.ones(N), dead, 0.1)
    )(params, x * read_scale[:, None, None], y * write_scale[:, None, None])
    folded = dictionary_loss.folded(
        config, params, sums["cut"] * 0.9999, read_scale, write_scale, (0, 1, 2), ("a", "b")
    )
    a = folded.encode(x)
    np.testing.assert_array_equal((a > 0).sum(1), sums["fired"])
    errors = (np.asarray(y - folded.decode(a, x)) * np.asarray(write_scale)[:, None, None]) ** 2
    np.testing.assert_allclose(errors.sum((1, 2)), sums["error"], rtol=1e-4)
    if "k" in ARCHITECTURES[name]:
        assert int((a > 0).sum()) == L * N * 3
    if folded.kind == "transcoder":  # a feature says how long the vector is that it writes
        np.testing.assert_allclose(jnp.linalg.norm(folded.W_dec, axis=-1), 1, rtol=1e-5)


def test_gradients_of_a_threshold_are_the_straight_through_ones():
    z, threshold, width = jnp.array([[0.7], [1.2], [1.3], [2.0]]), jnp.array([1.0]), 0.5
    g = jnp.array([[1.0], [2.0], [4.0], [8.0]])
    jumped, counted = (
        jax.grad(lambda t, f=f: jnp.sum(g * f(z, t[None], width)))(threshold)
        for f in (dictionary_loss.jump_relu, dictionary_loss.step)
    )
    # Only 1.2 lies within a half of the width of the threshold.
    np.testing.assert_allclose([jumped[0], counted[0]], [-1.0 / 0.5 * 2, -1 / 0.5 * 2])
    values = jnp.abs(draw(0, 7, 9))
    for n in (1, 20, 63):
        found, right = dictionary_loss.nth_largest(values, n), np.sort(values.ravel())[-n]
        assert right * (1 - 2**-12) <= found <= right


def test_dead_features_are_pulled_towards_what_is_left_over():
    config = DictionaryConfig(features=F, k=1, activation="topk")
    model = Trainable(config, 1, D)
    params = init(param_specs(model), jax.random.key(0))
    params["b_enc"] = params["b_enc"].at[0, F // 2 :].set(-50.0)  # these never fire
    x, y = draw(0, 1, N, D), draw(1, 1, N, D)

    def gradient(dead):
        def loss(params):
            return dictionary_loss.loss(bind(model, params), x, y, jnp.ones(N), dead, 0.0)[0]

        return np.abs(jax.jit(jax.grad(loss))(params)["W_enc"][0]).sum(0)

    nobody, half = jnp.zeros((1, F), bool), jnp.arange(F)[None] >= F // 2
    assert not gradient(nobody)[F // 2 :].any()
    assert gradient(half)[F // 2 :].any()


# ---- The job ------------------------------------------------------------------------------------

DATA = {"path": "storyworld", "num_documents": 60, "validation_fraction": 0.3, "block_size": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source")
    write_tiny_run(directory, num_layers=2)
    return directory


def trained(source, directory, devices=1, **fields):
    config = defaults(job.DictionaryJob)
    own = {f"data.{name}": value for name, value in DATA.items()}
    own |= {
        "init_from": str(source), "rows": 8, "tokens_per_row": 16, "eval_batches": 1,
        "dashboards": 2, "dictionary.features": 32, "dictionary.k": 4, "train.steps": 8,
        "train.steps_per_dispatch": 2, "train.log_every": 4, "checkpoint.every": 4,
        "optimizer.weight_decay": 0.0, "optimizer.learning_rate": 3e-3,
        "dictionary.dead_after": 200,
        "data.cache_dir": str(source / "tokens"), "train.compilation_cache": "",
    }  # fmt: skip
    config.update_from_flattened_dict(own | fields)
    some = functools.partial(lay_out, devices=jax.devices()[:devices])
    with mock.patch.object(job, "lay_out", some):
        return job.run(config, str(directory))


def test_a_run_becomes_a_dictionary_whose_figures_can_be_had_again(source, tmp_path):
    results = trained(source, tmp_path)
    dictionary, run = dictionaries.load(tmp_path), lm.load(source)
    assert dictionary.layers == (0, 1)

    data = DataConfig(**DATA, batch_size=8, cache_dir=str(source / "tokens"))
    _, held_out = prepare(data, run.tokenizer, 0)
    batch = next(iter(evaluation_batches(data, held_out, tokenizer=run.tokenizer)))
    names = [*dictionary.sources, *dictionary.targets]
    found = run.trace(batch["inputs"], names=names, segments_BT=batch["segment_ids"])
    valid = batch["segment_ids"] > 0
    x, y = (np.stack([found[n] for n in some])[:, valid] for some in (names[:2], names[2:]))
    rebuilt = np.asarray(dictionary(jnp.asarray(x)))
    fvu = ((y - rebuilt) ** 2).sum((1, 2)) / ((y - y.mean(1, keepdims=True)) ** 2).sum((1, 2))
    np.testing.assert_allclose(results["eval_fvu"], fvu.mean(), rtol=1e-3)
    np.testing.assert_allclose(
        results["eval_l0"], (dictionary.encode(x) > 0).sum(-1).mean(), rtol=1e-3
    )

    page = (tmp_path / "features.html").read_text(encoding="utf-8")
    assert "<mark" in page and "promotes" in page and "http" not in page
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open(encoding="utf-8")]
    assert {"fvu", "l0", "dead", "tokens"} <= records[0].keys()
    assert records[-2]["tokens"] == 8 * 8 * 16


def test_what_cannot_be_is_said_in_a_line(source, tmp_path):
    for fields, says in (
        ({"init_from": ""}, "init_from"),
        ({"dictionary.layers": (0, 5)}, "0 … 1"),
        (
            {"dictionary.kind": "sae", "dictionary.site": "mlp_norm.outpt"},
            "did you mean 'mlp_norm.output'",
        ),
        ({"dictionary.k": 64}, "dictionary.k=64"),
        ({"data.block_size": 64}, "max_length=32"),
    ):
        with pytest.raises(ConfigError, match=says):
            trained(source, tmp_path / "none", **fields)
    with pytest.raises(ConfigError, match="holds no dictionary"):
        dictionaries.load(source)


@pytest.mark.slow
def test_one_and_eight_devices_and_a_resumed_run_learn_the_same(source, tmp_path):
    fields = {"dictionary.kind": "cross_layer", "dictionary.skip": True}
    trained(source, tmp_path / "one", **fields)
    trained(source, tmp_path / "eight", 8, **fields, **{"mesh.tensor": 2, "mesh.fsdp": 2})
    one, eight = (dictionaries.load(tmp_path / name) for name in ("one", "eight"))
    for name in dictionaries.NUMBERS:
        np.testing.assert_allclose(getattr(one, name), getattr(eight, name), rtol=2e-3, atol=2e-4)

    before = (tmp_path / "one" / dictionaries.FILE).read_bytes()
    shutil.rmtree(tmp_path / "one" / "checkpoints" / "00000008")
    (tmp_path / "one" / dictionaries.FILE).unlink()
    trained(source, tmp_path / "one", **fields)
    assert (tmp_path / "one" / dictionaries.FILE).read_bytes() == before


@pytest.mark.slow
def test_features_that_are_known_are_found():
    # It runs more than it compiles.
    environment = {name: v for name, v in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(CLONE)
    words = ["--worlds=orthogonal", "--activations=relu,jumprelu,batch_topk,gated"]
    command = [sys.executable, "benchmarks/dictionaries.py", *words]
    done = subprocess.run(command, cwd=CLONE, env=environment, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["architecture"] for line in lines] == words[1].split("=")[1].split(",")
    for line in lines:
        assert line["mcc"] > 0.9 and abs(line["l0"] / line["true_l0"] - 1) < 0.1, line
