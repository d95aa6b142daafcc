"""Paired tests over seeds, and their correction."""

import math

import pytest

from flexfed.significance import Paired, holm, paired_test, verdict


def test_a_worked_example():
    # Student's 1908 data in their usual form (extra sleep, ten patients): t = 4.0621, p = 0.002833, half 0.8801.
    extra = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    found = paired_test(extra)
    assert found.mean == pytest.approx(1.58)
    assert found.p == pytest.approx(0.002833, abs=5e-7)
    assert found.half_width == pytest.approx(0.8798862, abs=1e-6)


def test_three_seeds_by_the_closed_form_of_two_degrees_of_freedom():
    # p = 1 - t / sqrt(t^2 + 2)
    t = 31.0
    assert paired_test([10.0, 11.0, 10.0]).p == pytest.approx(1 - t / math.sqrt(t**2 + 2), rel=1e-6)


def test_too_little_says_nothing():
    assert paired_test([]) is None
    assert paired_test([0.5]) == Paired(0.5, None, None)
    assert paired_test([0.5, 0.5]) == Paired(0.5, None, None)
    assert paired_test([0.0, 0.0, 0.0]) == Paired(0.0, None, None)
    rounded = [0.85 - 0.80, 0.06 - 0.01, 0.05]
    assert len(set(rounded)) > 1, "equal but for binary rounding"
    assert paired_test(rounded).p is None
    assert paired_test([0.05, 0.05, 0.0501]).p < 0.001


def test_holms_own_steps():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("mean", "probability", "lower", "said"),
    [
        (1.0, 0.049, False, "better"),
        (-1.0, 0.049, False, "worse"),
        (-1.0, 0.049, True, "better"),
        (1.0, 0.049, True, "worse"),
        (1.0, 0.05, False, "not shown"),
        (1.0, None, False, ""),
    ],
)
def test_what_is_said(mean, probability, lower, said):
    assert verdict(mean, probability, lower) == said
