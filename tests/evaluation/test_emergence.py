"""Answers counted all or nothing and token by token, over training and over size."""

import json
import sys

import numpy as np
import pytest
import tiny_jobs

import lm
from lm.config import ConfigError, defaults
from lm.data import tasks
from lm.evaluation.curves import Curve, jump
from lm.evaluation.emergence import answers, distance, questions
from lm.evaluation.subject import Subject
from lm.jobs import emergence, evaluate

LEARNER = {
    "tokenizer__kind": "char",
    "tokenizer__chat_template": "plain",
    "objective__name": "sft",
    "data__num_documents": 400,
    "data__packing": "none",
    "data__block_size": 8,
    "data__batch_size": 32,
    "model__width": 32,
    "model__num_layers": 2,
    "model__positions": "learned",
    "optimizer__learning_rate": 3e-3,
    "train__steps": 100,
    "train__log_every": 50,
    "checkpoint__every": 50,
    "checkpoint__keep": 9,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model that has learnt some sums of one digit, and not all."""
    path = tmp_path_factory.mktemp("runs")
    return tiny_jobs.run(path, "sums", data__path="addition_1_reversed", **LEARNER)


def test_a_whole_answer_is_right_where_it_is_what_the_model_writes(run):
    subject = Subject(lm.load(run))
    asked = questions(subject, [tasks.item("addition_1_reversed", 0, n) for n in range(80)])
    found = answers(subject, asked)
    right = [w == one.answer for w, one in zip(found.written, asked.items)]
    assert found.exact.tolist() == right and 0 < sum(right) < 80
    assert ((found.edits == 0) == right).all()
    assert set(found.tokens) <= {0.0, 0.5, 1.0} and (found.tokens[found.exact == 1] == 1).all()
    assert np.allclose(found.power, found.tokens.mean() ** 2)


def test_likelihood_and_brier_score_are_those_of_the_logits(run):
    subject = Subject(lm.load(run))
    items = [tasks.item("addition_1_reversed", 0, n, True) for n in range(4)]
    found = answers(subject, questions(subject, items), write=False)
    digits = subject.tokenizer.encode("0123456789")
    for number, one in enumerate(items):
        ids = [subject.prefix, *subject.tokenizer.encode(one.prompt + one.answer)]
        logits = np.asarray(subject.run.model([ids]), np.float64)[0]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        start = 1 + len(one.prompt)
        logprob = [log_p[at - 1, ids[at]] for at in (start, start + 1)]
        assert found.logprob[number] == pytest.approx(np.mean(logprob), abs=1e-4)
        place = number % 2
        p = np.exp(log_p[start + place - 1, digits])
        p /= p.sum()
        p[int(one.answer[place])] -= 1
        assert found.brier[number] == pytest.approx((p**2).sum(), abs=1e-4)


def test_every_checkpoint_is_asked_and_drawn(run, tmp_path):
    config = defaults(emergence.EmergenceJob)
    config.runs, config.items = (str(run), str(run)), 20
    found = emergence.run(config, str(tmp_path))
    assert [curve["steps"] for curve in found] == [[50, 100]] * 2
    last = found[0]["means"][-1]
    subject = Subject(lm.load(run))
    asked = questions(subject, [tasks.item("addition_1_reversed", 0, n, True) for n in range(20)])
    assert last == pytest.approx(answers(subject, asked).means())
    assert json.loads((tmp_path / "emergence.json").read_text()) == found
    assert (tmp_path / "emergence.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_has_the_tasks_that_the_tokenizer_can_write(run, tmp_path):
    config = defaults(evaluate.EvaluateJob)
    config.init_from, config.suites = str(run), ("tasks",)
    config.tasks.items = 10
    section = evaluate.run(config, str(tmp_path))["tasks"]
    names = {score.name for score in section.scores}
    assert {"addition: exact match", "addition: tokens", "Brier score"} <= names
    assert not any("copying" in name for name in names)  # it has no letters
    exact = section.score("addition: exact match")
    assert exact.chance == pytest.approx(0.01) and len(exact.items) == 10
    assert section.tables[0].rows[0][:2] == ("addition_1_reversed", exact.estimate.value)


def test_a_jump_lies_where_the_exact_match_rises():
    exact, slow = [0.0, 0.0, 0.5, 1.0, 1.0], [0.0, 1.0, 2.0, 3.0, 4.0]
    means = [{"exact": e, "logprob": s} for e, s in zip(exact, slow)]
    curve = Curve("run", "corpus", "what", 1, [0, 10, 20, 30, 40], means)
    assert jump(curve) == pytest.approx((12, 28))
    assert curve.within("exact", *jump(curve)) == pytest.approx(0.8)
    assert curve.within("logprob", *jump(curve)) == pytest.approx(0.4)
    flat = Curve("run", "corpus", "what", 1, [5, 10], means[:2])
    assert jump(flat) == (5, 10) and flat.within("exact", 5, 10) == 0


def test_distance_is_that_of_levenshtein():
    assert distance("kitten", "sitting") == 3
    assert distance("", "ab") == distance("ab", "") == 2
    assert distance("same", "same") == 0 and distance("1234", "234") == 1


def test_what_cannot_be_followed_is_said_in_a_line(tmp_path):
    config = defaults(emergence.EmergenceJob)
    with pytest.raises(ConfigError, match=r"config.runs=\(\) must name"):
        emergence.run(config, str(tmp_path))
    tiny = tiny_jobs.run(tmp_path, "stories", train__steps=2)
    config.runs = (str(tiny),)
    with pytest.raises(ConfigError, match="was not trained on tasks"):
        emergence.run(config, str(tmp_path))
    config = defaults(evaluate.EvaluateJob)
    config.init_from, config.tasks.names = str(tiny), ("addition_9",)
    with pytest.raises(ConfigError, match=r"tasks\.names='addition_9'"):
        evaluate.run(config, str(tmp_path))


def followed(tmp_path, name, *fields):
    """What a user has who trains as a config says, in less time, and then follows the run."""
    shorter = [f"--config.data.cache_dir={tmp_path}", "--config.train.compilation_cache="]
    shorter += ["--config.train.eval_every=0", *fields]
    for words in (
        [f"--config=configs/emergence/{name}.py", *shorter, f"--workdir={tmp_path}/{name}"],
        [
            "--config=configs/emergence/curves.py",
            "--config.items=100",
            f"--config.runs={tmp_path}/{name}",
            f"--workdir={tmp_path}/picture",
        ],
    ):
        program = tiny_jobs.start([sys.executable, "main.py", *words], computes=True)
        output, errors = program.communicate()
        assert program.returncode == 0, output + errors
    return {c["what"]: c for c in json.loads((tmp_path / "picture/emergence.json").read_text())}


@pytest.mark.slow
def test_addition_seems_to_emerge_and_so_does_a_power_of_what_rises_slowly(tmp_path):
    (curve,) = followed(tmp_path, "addition", "--config.data.num_documents=8_000").values()
    steps, means = np.array(curve["steps"]), curve["means"]
    exact, power = (np.array([m[name] for m in means]) for name in ("exact", "power"))
    before, after = steps[exact < 0.02][-1], steps[exact > 0.85][0]
    assert after - before <= 75
    assert np.abs(exact - power).max() < 0.15
    assert exact[-1] > 0.95


@pytest.mark.slow
def test_what_is_told_one_way_round_is_not_known_the_other(tmp_path):
    found = followed(tmp_path, "reversal", "--config.checkpoint.every=0")  # the end alone counts
    ends = {what: curve["means"][-1]["exact"] for what, curve in found.items()}
    assert ends["forward"] >= 0.99 and ends["backward, trained"] >= 0.99
    assert ends["backward, held out"] <= 0.01
