"""Scores of confidences that are known to be calibrated, or to tell right from wrong, or not."""

import numpy as np
import pytest

from lm.evaluation.confidence import (
    ENOUGH,
    calibration,
    reliability_diagram,
    risk_picture,
    telling_apart,
)


def world(seed, answers=400):
    rng = np.random.default_rng(seed)
    confidence = rng.beta(2, 1, answers)
    return confidence, rng.random(answers) < confidence, [i // 2 for i in range(answers)]


def test_calibrated_confidences_have_errors_that_may_be_none():
    held = 0
    for seed in range(10):
        width, mass, brier = calibration("c", *world(seed), "x", draws=50)
        held += width.estimate.low == mass.estimate.low == 0
        assert 0 < width.chance < 0.1 and 0 < mass.chance < 0.1
        assert brier.estimate.value == pytest.approx(np.mean(brier.items))
        assert 0.1 < brier.estimate.value < 0.25
    assert held >= 7


def test_overconfidence_has_an_error_above_chance():
    _, right, clusters = world(0)
    for score in calibration("c", np.full(len(right), 0.95), right, clusters, "x", draws=50)[:2]:
        assert score.estimate.value == pytest.approx(0.95 - right.mean(), abs=1e-9)
        assert score.estimate.low > score.chance


def test_what_tells_right_from_wrong_is_told_from_what_does_not():
    confidence, right, clusters = world(1)
    measures = {"sure": confidence, "noise": np.random.default_rng(2).random(len(right))}
    scores, (table,) = telling_apart(measures, right, clusters, draws=100)
    sure, noise = (score.estimate for score in scores)
    assert sure.low > 0.6 and noise.low < 0.5 < noise.high
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["hindsight"][0] == 1 and rows["sure"][1] < rows["noise"][1]
    half, most, whole = rows["sure"][3:]
    assert half < most < whole == pytest.approx(1 - right.mean())


def test_too_few_wrong_answers_tell_nothing():
    right = np.arange(40) >= ENOUGH - 1
    measures = {"sure": np.linspace(0, 1, 40)}
    assert telling_apart(measures, right, range(40), draws=10) == ([], [])


def test_pictures_take_the_colours_of_the_page():
    confidence, right, _ = world(3)
    for one in (
        reliability_diagram("diagram", {"c": (confidence, right)}),
        risk_picture("risk", {"c": confidence}, right),
    ):
        assert "<svg" in one.svg and "currentColor" in one.svg and "var(--line)" in one.svg
