"""Which of two runs is better: McNemar's p is scipy's, differences and their intervals are the closed forms."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from bhpeft import significance as sig


def mean(weights, x):
    return weights @ x / weights.sum(axis=1)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 1), (1, 1), (3, 12), (79, 13), (50, 50), (0, 30), (900, 1000)])
def test_mcnemar_is_the_binomial_test(only_a, only_b):
    expected = binomtest(only_a, only_a + only_b, 0.5).pvalue
    assert sig.mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_many_rows_meets_the_exact_one():
    exact = binomtest(5100, 10100, 0.5).pvalue
    assert sig.mcnemar(5100, 5000) == pytest.approx(exact, rel=0.01)
    assert sig.mcnemar(0, 0) == 1


def test_holm_by_hand():
    assert sig.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert sig.holm([0.9, 0.5]) == [1.0, 1.0]
    assert sig.holm([]) == []


def test_a_paired_interval_is_that_of_the_rows_differences():
    """Of a mean, the bootstrap is close to difference +- 1.96 s / sqrt N, s of the *differences*: far narrower here
    than that of two unpaired samples."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=2000)
    b = a + 0.05 + 0.1 * rng.normal(size=2000)
    found = sig.paired_difference("x", [a], [b], mean)
    half = norm.ppf(0.975) * (b - a).std() / math.sqrt(2000)
    assert found.value == pytest.approx((b - a).mean())
    assert found.low == pytest.approx(found.value - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.value + half, abs=0.1 * half)
    assert found.shown


def test_intervals_hold_what_they_promise():
    """Of 200 pairs of runs with the same chance of being right, about 5 % are called different."""
    rng = np.random.default_rng(1)
    called = sum(
        sig.paired_difference("x", [rng.random(200) < 0.8], [rng.random(200) < 0.8], mean).shown for _ in range(200)
    )
    assert 2 <= called <= 22  # of Binomial(200, 0.05), all but one in ten thousand


@pytest.mark.parametrize(("difference", "text"), [
    ((0.019, 0.004, 0.034), "B is better than A by 1.9 points (95 %: 0.4 to 3.4)."),
    ((-0.019, -0.034, -0.004), "A is better than B by 1.9 points (95 %: 0.4 to 3.4)."),
    ((0.003, -0.01, 0.016), "B is ahead of A by 0.3 points, which could be chance (95 %: -1.0 to 1.6)."),
    ((-0.003, -0.016, 0.01), "A is ahead of B by 0.3 points, which could be chance (95 %: -1.0 to 1.6)."),
    ((0.0, -0.01, 0.01), "B and A are equal (95 %: -1.0 to 1.0)."),
])  # fmt: skip
def test_the_sentence_names_the_better_one(difference, text):
    assert sig.sentence("A", "B", sig.Difference("accuracy", *difference), "points", 100) == text
