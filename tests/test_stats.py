"""lab/stats.py: each statistic by hand, by a slow definition, or by a known distribution."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab import stats


@pytest.mark.parametrize(
    "values, expected",
    [
        ([3.0], 3),
        ([1, 2], 1.5),
        ([0, 1, 5], 2),
        ([0, 1, 2, 9], 1.5),
        ([5, 0, 1, 2, 99], 8 / 3),
        ([1, 2, 3, 4, 5, 6, 7, 800], 4.5),
    ],
)
def test_interquartile_mean_by_hand(values, expected):
    """A quarter of the values, rounded down, is left out on either side, as by trim_mean(0.25)."""
    assert stats.iqm(values) == pytest.approx(expected)


def test_interquartile_mean_is_taken_along_the_last_axis_and_leaves_its_argument_alone():
    values = np.array([[9.0, 0.0, 1.0, 2.0], [4.0, 3.0, 2.0, 1.0]])
    kept = values.copy()
    assert stats.iqm(values).tolist() == [1.5, 2.5]
    assert (values == kept).all()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_intervals_hold_their_value_and_stay_within_the_data(values):
    value, low, high = stats.interval(values)
    assert min(values) - 1e-9 <= low <= value + 1e-9
    assert value <= high + 1e-9 and high <= max(values) + 1e-9
    assert stats.interval(values) == (value, low, high)  # the same at every call


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(size=400)
    value, low, high = stats.interval(values, lambda drawn: drawn.mean(-1))
    assert value == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=12))
def test_auroc_against_all_pairs(steps):
    right_scores = [score for score, right in steps if right]
    wrong_scores = [score for score, right in steps if not right]
    area = stats.auroc(*zip(*steps, strict=True))
    if right_scores and wrong_scores:
        pairs = [(a > b) + 0.5 * (a == b) for a in right_scores for b in wrong_scores]
        assert area == pytest.approx(sum(pairs) / len(pairs))
    else:
        assert math.isnan(area)


def test_lift_by_hand():
    """Ten tokens, the largest jump where entropy is highest: P(D | A) = 1 / 2, P(D) = 1 / 10."""
    entropy = np.arange(10.0)
    jump = np.where(np.arange(10) == 9, 1.0, 0.01 * np.arange(10))
    assert stats.lift(entropy, jump, q=0.2) == pytest.approx(5.0)
    assert stats.lift(entropy, jump[::-1], q=0.2) == 0.0


def test_lift_of_all_tokens_is_one():
    entropy, jump = np.random.default_rng(0).random((2, 50))
    assert stats.lift(entropy, jump, q=1.0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("values", "others", "expected"),
    [
        ([2.0, 3.0], [0.0, 1.0], 1.0),
        ([0.0], [0.0], 0.5),
        ([0.0, 2.0], [1.0], 0.5),
        ([1.0, 2.0, 3.0], [2.0, 9.0], 1.5 / 6),
    ],
)
def test_the_probability_of_improvement_by_hand(values, others, expected):
    """The share of the pairs that the first wins, half of it where they are equal."""
    share, low, high = stats.probability_of_improvement(values, others)
    assert share == pytest.approx(expected)
    assert low <= share <= high
    assert stats.probability_of_improvement(values, others) == (share, low, high)
    mirrored, _, _ = stats.probability_of_improvement(others, values)
    assert mirrored == pytest.approx(1 - expected)


def test_the_interval_of_an_improvement_is_that_of_the_normal_distribution():
    """Of n against m equal draws the share has the variance (n + m + 1) / (12 n m)."""
    rng, n, m = np.random.default_rng(0), 100, 80
    _, low, high = stats.probability_of_improvement(rng.normal(size=n), rng.normal(size=m))
    width = 2 * 1.96 * math.sqrt((n + m + 1) / (12 * n * m))
    assert high - low == pytest.approx(width, rel=0.15)


def test_of_reuse_the_largest_divergence_counts_wherever_a_curve_has_nothing():
    def run(*divergences):
        clipped = [0.1 + 0 * divergence for divergence in divergences]  # NaN in the same parts
        return {"accuracy": 0.5, "curve": {"approx_kl": divergences, "clip_fraction": clipped}}

    nothing = float("nan")
    for curve in ((nothing, 0.3, 0.1), (0.3, nothing, 0.1), (0.1, 0.3, nothing)):
        accuracy, clipped, divergence = stats.of_reuse([run(*curve), run(0.2)])
        assert (accuracy, clipped, divergence) == (0.5, pytest.approx(0.1), 0.3)
