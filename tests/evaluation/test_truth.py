"""Answers, told and asked statements of models whose answers are known, and of one that babbles."""

import functools
import json
import math
from unittest import mock

import jax
import numpy as np
import pytest
from tiny_run import write_talker, write_tiny_run

import lm
from lm.__main__ import run
from lm.data.storyworld.asking import UNKNOWN
from lm.evaluation import truth
from lm.evaluation.beginnings import Question, questions
from lm.evaluation.subject import Subject, Written
from lm.jobs import evaluate
from lm.parallel.layout import lay_out

SMALL = truth.TruthSettings(stories=12, samples=3, max_new_tokens=16, draws=20)
WHERE = Question("Mia has a ball. Ben is in the park.", "has", "Who has the ball?", "Mia.")
OPEN = WHERE._replace(kind="unknown", asked="How old is Mia?", answer=UNKNOWN)


@pytest.mark.parametrize(
    ("question", "reply", "outcome"),
    [
        (WHERE, "Mia.", "right"),
        (WHERE, "Of course! mia. And more.", "right"),
        (WHERE, "Ben.", "factual"),  # of the story, and false
        (WHERE, "The ball.", "factual"),
        (WHERE, "Emma.", "faithfulness"),  # of no story
        (WHERE, "Mia and Emma.", "faithfulness"),
        (WHERE, "Sure! I do not know.", "abstained"),
        (WHERE, "Ben is in", "unparsed"),
        (OPEN, "I do not know.", "abstained"),
        (OPEN, "In the park.", "faithfulness"),  # of the story, which says nothing of it
    ],
)
def test_what_becomes_of_a_reply(question, reply, outcome):
    assert truth.outcome(question, truth.sentence(reply)) == outcome


def test_replies_that_say_the_same_mean_the_same():
    assert truth.meaning("Sure! In the park.") == truth.meaning(" in the park. Yes.")
    assert truth.meaning("In the park.") != truth.meaning("In the pond.")
    assert truth.meaning("In the") == "in the"


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    return Subject(lm.load(write_talker(tmp_path_factory.mktemp("talker"), max_length=512)))


def answering(monkeypatch, reply):
    """Makes a model reply `reply(question)`, the samples as the greedy one."""
    known = {one.prompt: one for one in questions(0, SMALL.stories, SMALL.questions)}

    def answer(self, asked, sampling, seed=0):
        written = [Written(f" {reply(known[one])}", -0.5, 4, True, False) for one in asked]
        return [[one] * sampling.num_samples for one in written]

    monkeypatch.setattr(Subject, "answer", answer)


def test_who_knows_and_knows_when_not_is_always_right(talker, monkeypatch):
    answering(monkeypatch, lambda question: f"Sure! {question.answer}")
    section = truth.measure(talker, SMALL, 0)
    values = {score.name: score.estimate.value for score in section.scores}
    assert values["answerable: right"] == values["unanswerable: abstained"] == 1
    assert values["answerable: majority right"] == 1
    for name in ("answerable: abstained", "factual errors", "faithfulness errors", "unparsed"):
        assert values[name] == 0
    assert values["semantic entropy"] == 0 and values["predictive entropy"] == 0.5
    assert values["self-consistency: Brier"] == 0
    assert not any(name.startswith("AUROC") for name in values)  # nothing is wrong


def test_who_always_invents_is_never_faithful(talker, monkeypatch):
    answering(monkeypatch, lambda question: "In the castle of Zanzibar.")
    section = truth.measure(talker, SMALL, 0)
    values = {score.name: score.estimate.value for score in section.scores}
    assert values["faithfulness errors"] == 1 and values["answerable: right"] == 0
    assert values["self-consistency: ECE, equal mass"] == 1  # sure, and always wrong
    assert {sample.right for sample in section.samples} == {False}
    assert section.samples[0].parts["reply"] == "In the castle of Zanzibar."


def test_a_confidence_is_that_of_the_answer_after_its_courtesy(talker):
    ids, start = truth.replied(talker, "Who?", "Sure!", "Mia.")
    assert talker.tokenizer.decode(ids[start:]).startswith(" Mia.")
    assert ids[:start] == talker.question("Who?") + talker.tokenizer.encode("Sure!")
    ids, start = truth.replied(talker, "Who?", "", "Mia.")
    assert ids[:start] == talker.question("Who?")
    (likely,) = talker.likely_ids([(ids, start)])
    written = Written(" Mia.", 0, 5, True, False)
    reply = truth.Reply(WHERE._replace(story="", asked=""), written, "Mia.", "right")
    found = truth._confidences(talker, [reply], [[written, written]])
    prompt = reply.question.prompt
    (expected,) = talker.likely_ids([truth.replied(talker, prompt, "", "Mia.")])
    assert found["probability"][0] == pytest.approx(math.exp(expected.scored.total))
    assert found["self-consistency"][0] == 1 and 0 < found["p(true)"][0] < 1
    assert len(likely.scored.logprob) == len(ids) - start


def card(directory, workdir, devices=1, **fields):
    """The section that the job writes of a run."""
    fields = {"stories": 12, "samples": 2, "max_new_tokens": 16, "draws": 20, **fields}
    words = [f"--config.truth.{name}={value}" for name, value in fields.items()]
    words += [f"--config.init_from={directory}", "--config.suites=truth"]
    one = functools.partial(lay_out, devices=jax.devices()[:devices])
    with mock.patch.object(evaluate, "lay_out", one):
        run(["--config=configs/evaluate.py", f"--workdir={workdir}", *words])
    return json.loads((workdir / "card.json").read_text())["sections"]["truth"]


def test_a_model_that_babbles_is_reported_as_it_is(tmp_path):
    (tmp_path / "talker").mkdir()
    section = card(write_talker(tmp_path / "talker", max_length=256), tmp_path / "card")
    scores = {score["name"]: score for score in section["scores"]}
    asked = questions(0, 12, 2)
    assert scores["unparsed"]["estimate"]["items"] == len(asked)
    assert scores["unparsed"]["estimate"]["clusters"] == 12
    assert scores["answerable: right"]["estimate"]["value"] < 0.1
    assert 0 < scores["unparsed"]["truncated"] < len(asked)  # some stories have too many bytes
    shares = [scores[name] for name in ("factual errors", "faithfulness errors", "unparsed")]
    total = sum(score["estimate"]["value"] for score in shares)
    assert 0.9 < total <= 1 and scores["unparsed"]["unparsed"] == sum(scores["unparsed"]["items"])
    table = section["tables"][0]
    assert table["rows"][0][1:] == [
        len(asked),
        *map(sum, zip(*[r[2:] for r in table["rows"][1:3]])),
    ]
    affirmed = scores["asked: a true statement affirmed"]["estimate"]
    denied = scores["asked: an invented one denied"]["estimate"]
    assert 0 <= affirmed["value"] <= 1 and 0 <= denied["value"] <= 1
    assert {"story", "question", "right", "reply", "outcome"} == {*section["samples"][0]["parts"]}
    assert "<svg" in section["pictures"][0]["svg"]


def test_a_model_without_a_chat_template_is_told_and_not_asked(tmp_path):
    (tmp_path / "plain").mkdir()
    write_tiny_run(tmp_path / "plain", max_length=256)
    section = card(tmp_path / "plain", tmp_path / "card", devices=2, stories=30)
    names = {score["name"] for score in section["scores"]}
    assert names and all(name.startswith("told: ") for name in names)
    assert "no chat template" in section["about"] and not section["samples"]
    scores = {score["name"]: score for score in section["scores"]}
    right = np.array(scores["told: true over invented"]["items"])
    assert 0.2 < right.mean() < 0.8  # random parameters know nothing
    known = scores["told: knows but says otherwise"]["estimate"]["value"]
    assert 0 <= known <= 1 - np.mean([*right, *scores["told: true over mixed up"]["items"]])
