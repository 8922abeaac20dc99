"""Linear probes: they read what is there, and nothing that is not."""

import jax
import numpy as np
import pytest
from tiny_run import write_tiny_run

import lm
from lm.evaluation import probe
from lm.evaluation.subject import Subject
from lm.models import bind
from lm.models.activations import trace


def test_states_are_those_of_each_texts_last_token(tmp_path):
    write_tiny_run(tmp_path, num_layers=2, max_length=32)
    subject = Subject(lm.load(tmp_path))
    texts = [list(range(100, 150)), [7, 8, 9]]  # the first one is too long
    names, states = probe.states(subject, texts)
    layers = [f"blocks.{layer}.residual_after" for layer in range(2)]
    assert names == ["embedding", *layers] and states.shape == (3, 2, 32)
    seen = jax.jit(lambda params, ids: trace(bind(subject.run.skeleton, params), ids, names=names))
    for number, ids in enumerate(texts):
        found = seen(subject.run.params, np.array([ids[-32:]]))
        for name, states_ND in zip(names, states):
            np.testing.assert_allclose(states_ND[number], found[name][0, -1], atol=1e-4)


def test_recurrent_networks_have_states_too(tmp_path):
    write_tiny_run(tmp_path, cell="lstm", max_length=32)
    names, states = probe.states(Subject(lm.load(tmp_path)), [[7, 8], [9]])
    assert len(names) == len(states) and np.isfinite(states).all()
    assert np.abs(states[-1, 0] - states[-1, 1]).max() > 1e-3


@pytest.mark.parametrize("width", [5, 300])
def test_the_regression_is_at_its_minimum(width):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(200, width)), rng.normal(size=width) / width**0.5
    y = x @ w + 0.3 * rng.normal(size=200) > 0.5  # not half of them
    found, bias = probe.logistic(x, y, 0.01)
    p = 1 / (1 + np.exp(-(x @ found + bias)))
    weight = np.where(y, 0.5 / y.sum(), 0.5 / (~y).sum())
    assert np.abs(x.T @ (weight * (p - y)) + 0.01 * found).max() < 1e-5
    assert abs(weight @ (p - y)) < 1e-4
    assert np.mean((p > 0.5) == y) > 0.9


def test_a_probe_finds_the_layer_that_knows():
    rng = np.random.default_rng(0)
    labels, clusters = rng.random(400) < 0.5, np.arange(400) // 4
    states = rng.normal(size=(3, 400, 12))
    states[1] += 1.5 * np.outer(2 * labels - 1, rng.normal(size=12))
    states[2] = 1.0  # constant: nothing to read
    found = probe.cross_validated(states, labels, clusters)
    assert found.layers == [1] * probe.FOLDS
    assert np.mean((found.score > 0) == labels) > 0.95
    assert np.mean((found.by_layer[0] > 0) == labels) < 0.6
    with pytest.raises(ValueError, match="4 clusters"):
        probe.cross_validated(states, labels, np.arange(400) % 4)


def test_what_a_cluster_shares_is_not_learnt_by_heart():
    rng = np.random.default_rng(1)
    clusters = np.arange(300) // 3
    states = rng.normal(size=(100, 40))[clusters][None]  # a story is known by its states
    labels = (rng.random(100) < 0.5)[clusters]  # which say nothing of its label
    found = probe.cross_validated(states, labels, clusters)
    assert 0.35 < np.mean((found.score > 0) == labels) < 0.65
