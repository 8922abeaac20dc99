"""The evaluate job, as a user runs it: what it says, what it writes, and on many devices."""

import functools
import json
import shlex
import shutil
from unittest import mock

import jax
import pytest
import tiny_jobs
from test_main import main

from lm.jobs import evaluate
from lm.parallel.layout import lay_out

LANGUAGE = "suites=language", "language.path=storyworld", "language.documents=6"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("evaluate")
    tiny_jobs.run(place, "run", checkpoint__every=0)
    return place


def examine(place, *words, devices=1, out="out"):
    """Exit code, what was said, and the card."""
    words = [word if word.startswith("--") else f"--config.{word}" for word in words]
    if not any(word.startswith("--config=") for word in words):
        words = ["--config=configs/evaluate.py", f"--config.init_from={place / 'run'}", *words]
    some = functools.partial(lay_out, devices=jax.devices()[:devices])
    with mock.patch.object(evaluate, "lay_out", some):
        code, said, error = main(*words, f"--workdir={place / out}")
    card = place / out / "card.json"
    return code, said + error, json.loads(card.read_text()) if code == 0 else None


def scores(card):
    return {score["name"]: score for score in card["sections"]["language"]["scores"]}


@pytest.fixture(scope="module")
def examined(place):
    return examine(place, *LANGUAGE, "seed=3")


def test_a_card_says_what_was_found_and_how_to_find_it_again(place, examined):
    code, said, card = examined
    assert code == 0, said
    found = scores(card)
    assert f"card: {place}/out/card.html" in said and "bits_per_byte" in said
    assert card["facts"]["model"] == "run" and card["facts"]["step"] == "24"
    assert 1 < found["bits_per_byte"]["estimate"]["value"] < 9
    assert len(found["loss"]["items"]) == found["loss"]["estimate"]["clusters"] == 6
    measured = {one["type"] for one in card["model-index"][0]["results"][0]["metrics"]}
    assert measured <= {*found}
    page = (place / "out" / "card.html").read_text()
    assert "Language: scores" in page and "bits_per_byte" in page
    # The command that it gives makes it again.
    program, script, *words = shlex.split(card["command"])
    assert (program, script) == ("python", "main.py") and "--config.seed=3" in words
    code, said, again = examine(place, *words, out="again")
    assert code == 0, said
    assert scores(again) == found and again["command"] == card["command"]


def test_many_devices_come_to_the_same_scores(place, examined):
    mesh = "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"
    code, said, card = examine(place, *LANGUAGE, "seed=3", *mesh, devices=8, out="mesh")
    assert code == 0, said
    one, eight = scores(examined[2]), scores(card)
    assert one.keys() == eight.keys() and "--config.mesh.tensor=2" in card["command"]
    for name in one:
        assert eight[name]["items"] == pytest.approx(one[name]["items"], rel=1e-4)
        assert eight[name]["asked"] == one[name]["asked"]


def test_what_a_model_cannot_be_asked_is_left_out_unless_it_was_named(place, monkeypatch):
    suites = {name: evaluate.SUITES[name] for name in ("language", "harness")}
    monkeypatch.setattr(evaluate, "SUITES", suites)
    code, said, card = examine(place, *LANGUAGE[1:])
    assert code == 0, said
    assert [*card["sections"]] == ["language"]
    assert card["left_out"] == {"harness": "config.harness.tasks names none"}
    code, said, _ = examine(place, "suites=harness")
    assert code == 2 and "config.suites='harness': config.harness.tasks names none" in said


@pytest.mark.parametrize(
    "words, message",
    [
        (["suites=langauge"], "config.suites='langauge' is not one of"),
        (["suites=langauge"], "did you mean 'language'"),
        (["init_from="], "config.init_from='' must name the directory of a run"),
        (["init_from=nowhere"], "config.init_from='nowhere': nowhere does not exist"),
        (["suites=language", "language.stride=64"], "config.language.stride=64 must be"),
    ],
)
def test_mistakes_are_told_in_a_line(place, words, message):
    code, said, _ = examine(place, *words, out="mistaken")
    assert code == 2 and message in said.splitlines()[-1], said
    assert not (place / "mistaken" / "card.json").exists()


def test_what_was_found_stays_where_another_suite_fails(place):
    code, said, _ = examine(place, *LANGUAGE, "suites=harness", out="half")
    assert code == 2 and "config.harness.tasks names none" in said
    card = json.loads((place / "half" / "card.json").read_text())
    assert [*card["sections"]] == ["language"]


def test_a_card_is_not_replaced_by_that_of_another_model(place, examined):
    shutil.copytree(place / "run", place / "other")
    code, said, _ = examine(place, *LANGUAGE, f"init_from={place / 'other'}")
    assert code == 2 and f"holds the card of {place / 'run'}" in said, said
