"""Questions and statements about beginnings of stories: held out, and true or false as they say."""

import collections
import itertools

import pytest

from lm.data.storyworld import instructions
from lm.data.storyworld.asking import UNKNOWN, words
from lm.evaluation.beginnings import (
    Statement,
    beginnings,
    pairs,
    questions,
    sentence,
    without_courtesies,
)


def test_beginnings_are_held_out_and_the_same_for_every_model():
    stories = [story for story, _, _ in beginnings(0, 40)]
    assert stories == [story for story, _, _ in beginnings(0, 40)] and len({*stories}) == 40
    trained_on = {instructions.prompt(0, i)["story"] for i in range(300)}
    held_out = {instructions.prompt(0, i, held_out=True)["story"] for i in range(300)}
    assert all(map(instructions.is_held_out, held_out - {""}))
    assert not any(map(instructions.is_held_out, trained_on - {""}))
    assert all(map(instructions.is_held_out, stories))


def test_each_story_comes_with_questions_that_it_answers_and_one_that_it_does_not():
    found = questions(1, 60, 2)
    for _, own in itertools.groupby(found, lambda one: one.story):
        *answerable, last = own
        assert last.answer == UNKNOWN and not last.answerable
        assert len(answerable) <= 2 and all(one.answerable for one in answerable)
        assert len({one.kind for one in answerable}) == len(answerable)
    for one in found:
        line = {"kind": one.kind, "answer": one.answer, "story": one.story}
        assert instructions.gold(line, f"Sure! {one.answer}") == 1.5
        assert sentence(one.answer) == one.answer


def test_statements_are_false_in_the_way_that_they_say():
    found = pairs(0, 150)
    assert {one.true.about for one in found} == {"places", "owners", "numbers", "feelings"}
    owners = {
        (one.true.story, *one.true.said.split(" has ")[::-1])
        for one in found
        if " has " in one.true.said
    }
    owner_of = {(story, thing): owner for story, thing, owner in owners}
    assert len(owner_of) == len(owners)  # one owner each
    sorts = collections.Counter(one.false.sort for one in found)
    assert sorts["invented"] > 150 and sorts["mixed up"] > 20
    true_ones = {(one.true.story, one.true.said) for one in found}
    for true, false in found:
        assert (true.story, false.said) not in true_ones
        told = {*words(true.story.lower())}
        named = {*words(false.said.lower())} - {"is", "has", "in", "the", "at", "by", "on", "there"}
        assert true.sort == "true" and true.said != false.said and true.story == false.story
        if false.sort == "mixed up":
            assert named <= told
            assert false.said not in {
                one.true.said for one in found if one.true.story == true.story
            }
            if " has " in false.said:
                owner, thing = false.said.split(" has ")
                assert owner_of[true.story, thing] != owner


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (" In the garden.", "In the garden."),
        ("Sure! Gladly! In the garden. Then he went home.", "In the garden."),
        ("In the garden", None),  # no end
        ("Sure!", None),
        ("", None),
        (". Then she went home.", None),  # goes on with the question
        ("In the garden\nof Mia.", None),
        ("One " * 12 + "two.", None),
    ],
)
def test_the_answer_of_a_reply_is_its_first_sentence(reply, said):
    assert sentence(reply) == said


@pytest.mark.parametrize(
    ("said", "told", "about"),
    [
        ("the scarf is in the park", "The scarf was in the park.", "places"),
        ("Mia has the scarf", "Mia had the scarf.", "owners"),
        ("there are two pears", "There were two pears.", "numbers"),
        ("Mia is sad", "Mia was sad.", "feelings"),
    ],
)
def test_a_statement_is_told_in_the_past(said, told, about):
    one = Statement("", said, "true")
    assert one.told == told and one.about == about


def test_courtesies_are_no_part_of_what_is_said():
    assert without_courtesies(" Of course! Sure! Yes.") == "Yes."
    assert without_courtesies("Surely not.") == "Surely not."
