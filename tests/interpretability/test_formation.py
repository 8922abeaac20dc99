"""How small models come to what they do: waves found where they were put, runs followed."""

import json
import sys

import jax
import numpy as np
import pytest
import tiny_jobs

import lm
from lm.__main__ import run as command
from lm.config import ConfigError
from lm.interpretability import grokking, induction
from lm.training.metrics import read_metrics

P = 13
SMALL = {
    "induction": {
        "data.num_documents": 300, "data.batch_size": 8, "model.num_heads": 2, "model.width": 16,
        "train.steps": 8, "checkpoint.every": 4, "data.validation_fraction": 0.0,
    },
    "grokking": {
        "data.path": "modular_addition_7", "data.num_documents": 25,
        "data.validation_fraction": 24 / 25, "data.batch_size": 25, "model.width": 16,
        "data.shuffle": False,  # a batch has them all, and to shuffle few takes Grain long
        "model.mlp_width": 32, "optimizer.learning_rate": 1e-2, "train.steps": 200,
        "train.eval_every": 100, "checkpoint.every": 100,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Both configs, made small, and what follows them, as a user would type it."""
    home = tmp_path_factory.mktemp("small")
    for name, fields in SMALL.items():
        fields = {**fields, "data.cache_dir": home / "tokens"}
        asked = [f"--config.{field}={value}" for field, value in fields.items()]
        with tiny_jobs.devices(1):
            command([f"--config=configs/interpret/{name}.py", f"--workdir={home / name}", *asked])
    both = [f"--config.runs={home / name}" for name in SMALL]
    asked = ["--config.texts=16", f"--workdir={home / 'formation'}", *both]
    command(["--config=configs/interpret/formation.py", *asked])
    return home


def test_both_pictures_and_what_they_show_are_written(runs):
    found = json.loads((runs / "formation" / "formation.json").read_text(encoding="utf-8"))
    for name in SMALL:
        picture = runs / "formation" / f"{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
    (one,), (other,) = found["induction"], found["grokking"]
    assert [point["step"] for point in one["points"]] == [4, 8]
    assert np.shape(one["points"][0]["prefix_LH"]) == (2, 2)
    assert other["p"] == 7 and len(other["embedding"]) == 3
    assert [point["step"] for point in other["points"]] == [100, 200]


def test_losses_of_sums_are_those_that_the_trainer_told(runs):
    found = json.loads((runs / "formation" / "formation.json").read_text(encoding="utf-8"))
    told = {r["step"]: r["eval_loss"] for r in read_metrics(runs / "grokking") if "eval_loss" in r}
    for point in found["grokking"][0]["points"]:
        assert point["test_loss"] == pytest.approx(told[point["step"]], rel=1e-4)
    assert point["train_accuracy"] == 1.0 and point["train_loss"] < 0.1


def test_a_checkpoint_is_asked_what_stood_a_period_before(runs):
    run = lm.load(runs / "induction")
    some = induction.texts(run, "repeats", 0, 8)
    assert (some.tokens_BT[:, 0] == run.tokenizer.bos_id).all()
    np.testing.assert_array_equal(some.tokens_BT[:, 1:], some.targets_BT[:, :-1])
    for targets, repeated in zip(some.targets_BT, some.repeated_BT):
        period = int(np.argmax(repeated))
        assert 8 <= period <= 20 and repeated[period:].all()
        assert (targets[period:] == targets[:-period]).all()
    logp = np.asarray(jax.nn.log_softmax(run.model(some.tokens_BT)))
    loss = -np.take_along_axis(logp, some.targets_BT[..., None], 2)[..., 0]
    point = induction.point(run, some)
    assert point.repeat_loss == pytest.approx(loss[some.repeated_BT].mean(), rel=1e-5)
    assert point.first_loss == pytest.approx(loss[~some.repeated_BT].mean(), rel=1e-5)
    assert point.in_context == pytest.approx(loss[:, -1].mean() - loss[:, 3].mean(), abs=1e-5)


def test_what_has_learnt_something_else_is_refused_in_a_line(runs, tmp_path):
    job = ["--config=configs/interpret/formation.py", f"--workdir={tmp_path}"]
    with pytest.raises(ConfigError, match=r"config.runs=\(\) must name"):
        command(job)
    with pytest.raises(ConfigError, match="nowhere"):
        command([*job, f"--config.runs={tmp_path / 'nowhere'}"])


def waves(frequencies, seed=0):
    """Logits that lie along cos and sin of these frequencies alone, and their mean."""
    rng = np.random.default_rng(seed)
    along = rng.normal(size=(2 * len(frequencies), P))
    return np.einsum("kab,kc->abc", grokking.directions(P, frequencies), along) + rng.normal(size=P)


def test_waves_are_found_where_they_were_put():
    every = grokking.directions(P, range(1, 7)).reshape(12, -1)
    np.testing.assert_allclose(every @ every.T, np.eye(12), atol=1e-12)
    logits = waves([2, 5])
    power = grokking.sum_power(logits)
    assert grokking.key_frequencies(power, 0.999) == [2, 5]
    assert power[[0, 2, 3, 5]].max() < 1e-20
    np.testing.assert_allclose(grokking.restricted(logits, [2, 5]), logits, atol=1e-12)
    rest = grokking.excluded(logits, [2, 5])
    np.testing.assert_allclose(rest, np.broadcast_to(logits.mean((0, 1)), rest.shape), atol=1e-12)
    both = logits + waves([3], 1)
    np.testing.assert_allclose(
        grokking.projected(both, [2, 5]), grokking.projected(logits, [2, 5]), atol=1e-12
    )
    a = 2 * np.pi / P * np.arange(P)[:, None]
    embedding = np.concatenate([3 * np.cos(4 * a) + 7, np.sin(a)], 1)
    np.testing.assert_allclose(
        grokking.embedding_power(embedding), [0.1, 0, 0, 0.9, 0, 0], atol=1e-12
    )
    assert grokking.key_frequencies(grokking.embedding_power(embedding)) == [4]


def test_a_network_of_waves_knows_every_sum_by_its_key_frequencies_alone():
    a, b, c = np.ogrid[:P, :P, :P]
    logits = 40 * sum(np.cos(2 * np.pi / P * k * (a + b - c)) for k in (1, 4, 6))
    answers = (a + b)[..., 0] % P
    assert grokking.losses(logits, answers).max() < 1e-3
    memory = np.where(c == (a * b + 1) % P, 20.0, 0.0)
    restricted = grokking.restricted(logits + memory, [1, 4, 6])
    assert (restricted.argmax(-1) == answers).all()
    assert grokking.losses(grokking.excluded(logits, [1, 4, 6]), answers) == pytest.approx(
        np.log(P)
    )


@pytest.mark.slow
def test_two_layers_find_an_induction_head_in_one_jump_and_one_layer_does_not(tmp_path):
    job = [f"--config.data.cache_dir={tmp_path}", "--config.data.num_documents=26_000"]
    job += [
        "--config.train.eval_every=0",
        "--config.data.validation_fraction=0",
        "--config.checkpoint.every=40",
        "--config.train.compilation_cache=",
    ]
    courses = []
    for layers, steps in ((2, 360), (1, 280)):
        directory = tmp_path / str(layers)
        sized = [f"--config.model.num_layers={layers}", f"--config.train.steps={steps}"]
        sized += [f"--workdir={directory}"]
        words = ["main.py", "--config=configs/interpret/induction.py", *sized, *job]
        program = tiny_jobs.start([sys.executable, *words], computes=True)
        output, errors = program.communicate()
        assert program.returncode == 0, output + errors
        runs = [lm.load(directory, step) for step in range(40, steps + 1, 40)]
        courses.append(induction.course(runs, directory.name, "repeats", 0, 64))
    two, one = courses
    before, after = two.change
    assert 80 <= before < after <= 360 and one.change is None
    assert two.points[2].repeat_loss > 2.5 and two.points[-1].repeat_loss < 1.2
    assert two.prefix > 0.6 and one.prefix < 0.2 and one.points[-1].repeat_loss > 2
