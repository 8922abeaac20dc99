"""CORE: accuracies above chance, put together by hand."""

import math

import pytest

from lm.evaluation.core import TASKS, centred, core
from lm.evaluation.statistics import Estimate


def estimate(value, error=0.0, items=100):
    return Estimate(value, error, value - error, value + error, items, items)


def test_accuracy_is_centred_on_chance():
    assert centred(0.25, 0.25) == 0
    assert centred(1.0, 0.62) == 1
    assert centred(0.625, 0.25) == pytest.approx(0.5)
    assert centred(0.1, 0.5) == pytest.approx(-0.8)  # worse than a guess


def test_core_is_the_mean_of_its_22_tasks():
    assert len(TASKS) == len({task.name for task in TASKS}) == 22
    guesses = {task.name: (estimate(task.chance), task.chance) for task in TASKS}
    assert core(guesses).value == 0
    # ½ and ¼ of the way from chance to all: (0.5 + 0.25) / 22
    found = guesses | {
        "arc_easy": (estimate(0.625, 0.03), 0.25),
        "squad": (estimate(0.25, 0.02), 0.0),
    }
    by_hand = core(found)
    assert by_hand.value == pytest.approx(0.75 / 22)
    assert by_hand.error == pytest.approx(math.hypot(0.03 / 0.75, 0.02) / 22)
    assert by_hand.items == 2200
    # HellaSwag is asked twice, of the same documents: their errors add up, and not their squares.
    twice = {"hellaswag": (estimate(0.25, 0.03), 0.25)}
    twice["hellaswag_zeroshot"] = (estimate(0.25, 0.06), 0.25)
    assert core(guesses | twice).error == pytest.approx((0.03 + 0.06) / 0.75 / 22)
    del found["boolq"]
    with pytest.raises(KeyError, match="boolq"):
        core(found)
