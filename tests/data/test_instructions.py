import functools
import json
import subprocess
import sys
from collections import Counter

import pytest

from lm.config import ConfigError
from lm.data import storyworld
from lm.data.storyworld import instructions as ins
from lm.data.storyworld.asking import UNKNOWN, WORDINGS, Draw, asked, beginning, words

# SHA-256 over 40 lines of each kind, of training and held out.
GOLDEN = "b5208348c519714cca91632cbd0237edfe49df5cd8eeaa71729bafcb0789b546"


@functools.cache
def prompts():
    return [ins.prompt(3, index) for index in range(1500)]


@functools.cache
def pairs():
    return [ins.preference(3, index) for index in range(800)]


def line(kind, answer, story="The cat sat on the mat. Mia saw the cat."):
    return {"kind": kind, "answer": answer, "story": story}


@pytest.mark.parametrize(
    ("kind", "answer", "response", "reward"),
    [
        ("where", "On the mat.", "On the mat.", 1.0),
        ("where", "On the mat.", "Sure! On the mat.", 1.5),
        ("where", "On the mat.", "Sure! Gladly! On the mat.", 1.4),
        ("where", "On the mat.", "On the mat. Mia was sad.", 0.7),
        ("where", "On the mat.", UNKNOWN, -0.1),
        ("where", "On the mat.", "In the park.", -1.0),
        ("where", "On the mat.", "Of course! In the park.", -0.5),
        ("where", "On the mat.", "on the mat", -1.0),
        ("where", "On the mat.", "", -1.0),
        ("where", "On the mat.", "Sure!", -0.5),
        ("where", "On the mat.", "Sure! " * 30 + "On the mat.", 0.5),
        ("unknown", UNKNOWN, UNKNOWN, 1.0),
        ("unknown", UNKNOWN, "Gladly! " + UNKNOWN, 1.5),
        ("unknown", UNKNOWN, "In the park.", -1.0),
        ("reverse", "mat cat", "mat cat", 1.0),
        ("reverse", "mat cat", "cat mat", -1.0),
        ("reverse", "mat cat", "mat cats", -1.0),
        ("continue", "Then a dog came.", "Then a dog came.", 1.0),
        ("continue", "Then a dog came.", "Sure! Mia smiled at the cat.", 1.5),
        ("continue", "Then a dog came.", "Tom smiled at the cat.", -1.0),
        ("continue", "Then a dog came.", "The cat sat on the mat.", -1.0),
        ("continue", "Then a dog came.", UNKNOWN, -1.0),
        ("continue", "Then a dog came.", "The the sun.", -1.0),
        ("continue", "Then a dog came.", "the sun went", -1.0),
    ],
)
def test_gold_is_what_its_description_says(kind, answer, response, reward):
    assert ins.gold(line(kind, answer), response) == pytest.approx(reward)


def test_gold_falls_with_every_word_too_many():
    asked_for = line("where", "On the mat.")
    rewards = [ins.gold(asked_for, "On the mat." + " And so on." * n) for n in range(6)]
    assert rewards == sorted(rewards, reverse=True) and len(set(rewards[:4])) == 4


def test_exactness_overlooks_courtesy_and_nothing_else():
    asked_for = line("where", "On the mat.")
    assert ins.exact(asked_for, "On the mat.") and ins.exact(asked_for, " Gladly! On the mat.\n")
    for response in ("On the mat", "On the mat. Yes.", "", "Sure!", "In the park."):
        assert not ins.exact(asked_for, response)


def test_lines_are_the_golden_ones_in_another_process_too():
    program = (
        "import hashlib, json;"
        "from lm.data.storyworld import instructions as i;"
        "made = [f(1, n, h) for f in (i.conversation, i.prompt, i.preference)"
        " for h in (False, True) for n in (*range(19), 2**40)];"
        "print(hashlib.sha256(json.dumps(made).encode()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "321", "PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    assert done.stdout.strip() == GOLDEN, "update GOLDEN only if the lines are meant to change"


@pytest.mark.parametrize("make", [ins.conversation, ins.prompt, ins.preference])
def test_numbers_out_of_range_are_config_errors(make):
    for seed, index in ((-1, 0), (0, -1), (0, 2**64)):
        with pytest.raises(ConfigError, match="must be"):
            make(seed, index)


def test_the_user_and_the_assistant_take_turns():
    turns = Counter()
    for index in range(300):
        messages = ins.conversation(5, index)["messages"]
        turns[len(messages)] += 1
        for number, message in enumerate(messages):
            assert message["role"] == ("assistant" if number % 2 else "user")
            assert message["content"] == message["content"].strip() != ""
    assert set(turns) == {*range(2, 21, 2)}


def test_kinds_come_as_often_as_they_should_and_no_answer_is_a_tenth_of_all():
    kinds = Counter(prompt["kind"] for prompt in prompts())
    total = sum(ins.KINDS.values())
    for kind, tickets in ins.KINDS.items():
        assert kinds[kind] / len(prompts()) == pytest.approx(tickets / total, rel=0.35), kind
    answers = Counter(prompt["answer"] for prompt in prompts())
    assert answers.most_common(1)[0][1] < 0.1 * answers.total(), answers.most_common(3)


def test_the_user_asks_whether_answers_are_right():
    said = Counter()
    for index in range(300):
        messages = ins.conversation(5, index)["messages"]
        for question, reply in zip(messages[::2], messages[1::2]):
            checks = question["content"].endswith("Is that right?")
            said[ins._without_courtesies(reply["content"])[1] if checks else ""] += 1
    assert set(said) == {"", "Yes.", "No.", UNKNOWN}
    assert said["Yes."] / (said["Yes."] + said["No."]) == pytest.approx(0.5, abs=0.07)
    assert 0.35 < 1 - said[""] / said.total() < 0.5


def test_held_out_beginnings_are_told_in_no_other_set():
    held_out = {ins.prompt(3, index, held_out=True)["story"] for index in range(500)}
    trained = {prompt["story"] for prompt in prompts()}
    told = {
        ins.conversation(3, index)["messages"][0]["content"].rpartition("\n")[0]
        for index in range(500)
    }
    assert held_out & trained <= {""} and held_out & told <= {""}


def test_some_wordings_are_for_held_out_questions_alone():
    reserved = {several[-1].format("", "").strip() for several in WORDINGS.values()}
    assert len(reserved) == len(WORDINGS)
    go_on = WORDINGS["continue"]
    seen = {p["prompt"][0]["content"].rpartition("\n")[2] for p in prompts()}
    assert go_on[-1] not in seen and {*go_on[:-1]} <= seen
    new = {ins.prompt(3, n, held_out=True)["prompt"][0]["content"] for n in range(800)}
    assert any(content.endswith(go_on[-1]) for content in new)


def test_answers_follow_from_what_is_told():
    implied = {"sad", "happy", "afraid", "proud", "cold", "ill"}  # "began to cry"
    for prompt in prompts():
        kind, answer, story = prompt["kind"], prompt["answer"], prompt["story"]
        told = {word.lower() for word in words(story)}
        said = {word.lower() for word in words(answer)} - {"a", "an", "the"}
        if kind in ("where", "did", "has", "lost", "is a", "name", "lives", "count"):
            prepositions = {"in", "at", "by", "on", "under", "home"}
            assert said - prepositions <= told, (story, prompt)
        elif kind == "feels":
            assert said & (told | implied) or "not" in said, (story, prompt)
        elif kind in ("reverse", "words"):
            about = prompt["prompt"][0]["content"].rpartition(":")[2].split()
            if kind == "reverse":
                assert answer.split() == about[::-1]
            else:
                assert (
                    answer == ("", "One.", "Two.", "Three.", "Four.", "Five.", "Six.")[len(about)]
                )


def test_what_is_not_known_is_not_said():
    number = 0
    for prompt in prompts():
        if prompt["kind"] != "unknown":
            continue
        number += 1
        assert prompt["answer"] == UNKNOWN
        question = prompt["prompt"][0]["content"].rpartition("\n")[2]
        told = {word.lower() for word in words(prompt["story"])}
        asked_about = [word.lower() for word in words(question)]
        forms = {*words(" ".join(sum(WORDINGS.values(), ())).lower())}
        if {"eyes", "song", "old"} & {*asked_about}:  # of somebody, which no story tells
            assert not {"eyes", "years"} & told and "best song" not in prompt["story"]
        else:
            assert {*asked_about} - forms - told, prompt  # it names what the story does not
    assert number > 50


def test_statements_that_are_false_contradict_the_story():
    for index in range(1, 400):
        whole = storyworld.generate(9, index)
        story = beginning(whole, 5)
        found = asked(story, "", Draw(index))
        true = {one.about[0] for one in found.get("yes", ())}
        false = {one.about[0] for one in found.get("no", ())}
        assert not true & false
        assert story.text == " ".join(whole.sentences[:5])
        assert story.facts == tuple(f for f in whole.facts if f.sentence < 5)


def test_the_chosen_answer_has_more_of_the_true_reward():
    differ = Counter()
    for pair in pairs():
        chosen, rejected = ins.gold(pair, pair["chosen"]), ins.gold(pair, pair["rejected"])
        assert chosen > rejected + 0.2
        truths = {ins.truth(pair, pair[side]) for side in ("chosen", "rejected")}
        courtesies = {ins._without_courtesies(pair[side])[0] for side in ("chosen", "rejected")}
        differ[len(truths) == 2, len(courtesies) == 2] += 1
    for truth, courtesy, share in ((True, False, 0.39), (False, True, 0.31), (False, False, 0.22)):
        assert differ[truth, courtesy] / len(pairs()) == pytest.approx(share, abs=0.05), differ


def test_invented_answers_tell_of_what_the_story_does_not():
    of_thing = ("where", "did", "has", "lost", "is a", "name", "feels", "count", "lives", "why")
    invented = 0
    for pair in pairs():
        said = ins._without_courtesies(pair["rejected"])[1]
        short = len(said.split()) < 5
        if short and pair["kind"] in of_thing and ins.truth(pair, said) == -1:
            told = {*words(f"{pair['story']} {pair['prompt'][0]['content']}".lower())}
            assert {*words(said.lower())} - told, pair
            invented += 1
    assert invented > 100


def test_noise_exchanges_as_many_pairs_as_it_says():
    noisy = [ins.preference(3, index, noise=0.2) for index in range(500)]
    wrong = sum(ins.gold(p, p["chosen"]) < ins.gold(p, p["rejected"]) for p in noisy)
    assert 0.14 < wrong / 500 < 0.26
    for one, other in zip(noisy, pairs()):
        assert {one["chosen"], one["rejected"]} == {other["chosen"], other["rejected"]}


def test_lines_survive_json():
    for made in (prompts()[7], pairs()[7], ins.conversation(3, 7)):
        assert json.loads(json.dumps(made)) == made
