"""Replies as models write them, and what they answer."""

from fractions import Fraction

import pytest

from lm.evaluation import answers


@pytest.mark.parametrize(
    "text, letter",
    [
        ("Conclusion: (B). Eliminated: (A), (C), (D).", "B"),
        ("Eliminated: (A), (C), (D). Conclusion: (B).", "B"),
        ("B", "B"),
        (" (C) because the cat is black", "C"),
        ("D. The dog ran.", "D"),
        ("B) three", "B"),
        ("**C**", "C"),
        ("The answer is A.", "A"),
        ("The correct answer is (D), not (A).", "D"),
        ("I first thought the answer is A. But no: the answer is B", "B"),
        ("Answer: C", "C"),
        ("answer = C", "C"),
        ("The answer must be: D", "D"),
        ("So we get \\boxed{A}.", "A"),
        ("So we get \\boxed{\\text{C}}.", "C"),
        ("A cat sat, so I take C.", "C"),
        ("It is (B).", "B"),
        ("I choose A.", "A"),
        ("A cat sat on the mat.", None),
        ("The answer is a cat.", None),
        ("The answer is A cat.", None),
        ("Either (A) or (B).", None),
        ("B or C", None),
        ("", None),
        ("None of these", None),
        ("The answer is E.", None),
        ("Because", None),
        ("A", "A"),
    ],
)
def test_choices(text, letter):
    assert answers.choice(text) == letter


def test_choices_may_be_others():
    assert answers.choice("The answer is (E).", "ABCDE") == "E"
    assert answers.choice("The answer is 2.", "123") == "2"


@pytest.mark.parametrize(
    "text, value",
    [
        ("12", 12),
        ("Three.", 3),
        ("There are three cats and two dogs. The answer is 5.", 5),
        ("5 + 7 = 12", 12),
        ("She had 3. #### 1,234", 1234),
        ("It costs $1,200.50 in all.", Fraction("1200.5")),
        ("The answer: -7", -7),
        ("−7", -7),
        ("The answer is 18, as 3 * 6 = 18 and not 17", 18),
        ("\\boxed{42} or so 3", 42),
        ("1/2", Fraction(1, 2)),
        ("answer is twelve", 12),
        ("No number here", None),
        ("x2y", None),
        ("", None),
    ],
)
def test_numbers(text, value):
    assert answers.number(text) == value


@pytest.mark.parametrize(
    "text, value",
    [
        ("Yes.", True),
        ("no, he is not", False),
        (" No. That is not true.", False),
        ("True", True),
        ("It is false.", False),
        ("I think the answer is yes", True),
        ("Yes and no.", None),
        ("Yes or no?", None),
        ("It is not true.", None),
        ("Maybe.", None),
        ("", None),
        ("Nobody knows", None),
        ("The yes and the no", None),
    ],
)
def test_yes_and_no(text, value):
    assert answers.yes_no(text) is value


@pytest.mark.parametrize(
    "text, value",
    [
        (" sad day.", "sad"),
        ("The Tree House, I think, not the tree", "tree house"),
        ("It was in a tree.", "tree"),
        ("'tree'", "tree"),
        ("It was sad, very sad", "sad"),
        ("sad or happy", "sad"),  # the first word counts
        ("It was sad or happy", None),
        ("He was not sad", None),
        ("He was not sad but happy", "happy"),
        ("sadly", None),
        ("", None),
    ],
)
def test_one_of_several(text, value):
    assert answers.one_of(text, ("sad", "happy", "tree", "tree house")) == value
