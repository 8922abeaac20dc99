"""Calibration and entropy of models whose calibration and entropy are known."""

import math

import numpy as np
import pytest

from lm.evaluation import uncertainty as un


@pytest.mark.parametrize("equal", ["width", "mass"])
def test_a_calibrated_model_has_an_error_within_what_chance_gives(equal):
    rng, above = np.random.default_rng(0), 0
    for world in range(60):
        confidence = rng.beta(2, 1, 400)
        right = rng.random(400) < confidence
        mean, most = un.ece_by_chance(confidence, equal=equal, draws=200, seed=world)
        found = un.ece(confidence, right, equal=equal)
        above += found > most
        assert 0 < mean < most < 0.1
    assert above <= 8  # 3 of 60 on the average


def test_an_overconfident_model_is_found_out():
    rng = np.random.default_rng(1)
    right = rng.random(20_000) < 0.6
    assert un.ece(np.full(20_000, 0.9), right) == pytest.approx(0.3, abs=0.01)
    assert un.ece(np.where(right, 1.0, 0.0), right) == 0


def test_bins_hold_what_they_say():
    confidence = np.array([0.0, 0.1, 0.1001, 0.55, 0.95, 1.0])
    found = un.reliability(confidence, [0, 0, 1, 1, 1, 0])
    edges = [(round(one.low, 6), round(one.high, 6), one.items) for one in found]
    assert edges == [(0, 0.1, 2), (0.1, 0.2, 1), (0.5, 0.6, 1), (0.9, 1.0, 2)]
    assert [one.accuracy for one in found] == [0, 1, 1, 0.5]
    mass = un.reliability(np.random.default_rng(0).random(1000), np.ones(1000), equal="mass")
    assert [one.items for one in mass] == [100] * 10
    tied = un.reliability([0.3] * 7, [1] * 7, equal="mass")
    assert [(one.items, one.confidence) for one in tied] == [(7, pytest.approx(0.3))]
    for wrong in ([1.2], [-0.1]):
        with pytest.raises(ValueError, match="from 0 to 1"):
            un.ece(wrong, [1])
    with pytest.raises(ValueError, match="'width' or 'mass'"):
        un.ece([0.5], [1], equal="size")


def test_brier_has_the_range_that_it_says():
    assert un.brier([1.0, 0.0], [1, 0]) == 0 and un.brier([0.0, 1.0], [1, 0]) == 1
    assert un.brier([0.5] * 4, [1, 0, 0, 1]) == 0.25
    assert un.brier_of_choices([[1, 0, 0]], [0]) == 0 and un.brier_of_choices([[1, 0, 0]], [2]) == 2
    assert un.brier_of_choices([[0.25] * 4], [1]) == pytest.approx(0.75)


def test_entropy_of_meanings():
    assert un.discrete_semantic_entropy([0, 1, 2, 1]) == pytest.approx(1.0397, abs=5e-5)
    assert un.discrete_semantic_entropy([3, 3, 3]) == 0
    equal = np.log([0.2, 0.2, 0.2, 0.2])
    assert un.semantic_entropy(equal, [0, 1, 2, 1]) == pytest.approx(1.0397, abs=5e-5)
    one = un.semantic_entropy(np.log([0.6, 0.2, 0.2]), [0, 1, 1])
    assert one == pytest.approx(-(0.6 * math.log(0.6) + 0.4 * math.log(0.4)))
    assert un.semantic_entropy([-2000.0, -2001.0], [0, 0]) == 0  # no underflow
    assert un.predictive_entropy(np.log([0.5, 0.25])) == pytest.approx(1.5 * math.log(2))
    assert un.predictive_entropy([-4.0, -6.0], [2, 3]) == 2


def test_predictive_entropy_of_samples_is_that_of_their_distribution():
    p = np.array([0.5, 0.3, 0.2])
    drawn = np.random.default_rng(0).choice(3, 50_000, p=p)
    truth = -(p * np.log(p)).sum()
    assert un.predictive_entropy(np.log(p)[drawn]) == pytest.approx(truth, abs=0.01)


def test_meanings_are_clustered_against_the_first_of_each():
    def near(first, answer):
        return abs(int(first) - int(answer)) <= 1

    assert un.clusters(["1", "2", "3", "0"], near) == [0, 0, 1, 0]
    assert un.clusters(["a", "b", "a"], str.__eq__) == [0, 1, 0]


def test_auroc_is_how_often_a_right_answer_is_the_surer_one():
    assert un.auroc([0.9, 0.8, 0.3, 0.1], [1, 1, 0, 0]) == 1
    assert un.auroc([0.9, 0.8, 0.3, 0.1], [0, 0, 1, 1]) == 0
    assert un.auroc([0.9, 0.4, 0.6, 0.4], [1, 1, 0, 0]) == (1 + 1 + 0 + 0.5) / 4
    assert un.auroc([0.5] * 6, [1, 0, 1, 0, 0, 0]) == 0.5
    assert math.isnan(un.auroc([0.1, 0.2], [1, 1]))
    rng = np.random.default_rng(0)
    right = rng.random(40_000) < 0.3
    found = un.auroc(rng.normal(size=40_000) + right, right)
    assert found == pytest.approx(0.7602, abs=0.006)  # Φ(1/√2), of two normals one apart


def test_who_knows_what_it_knows_risks_less_at_less_coverage():
    right = np.array([1, 1, 0, 1, 0])
    coverage, risk, area = un.risk_coverage([0.9, 0.8, 0.3, 0.7, 0.1], right)
    assert coverage == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert risk == pytest.approx([0, 0, 0, 0.25, 0.4])
    assert area == pytest.approx(np.mean([0, 0, 0, 0.25, 0.4]))
    coverage, risk, area = un.risk_coverage([0.5] * 5, right)
    assert (coverage, risk, area) == (pytest.approx([1]), pytest.approx([0.4]), pytest.approx(0.4))
