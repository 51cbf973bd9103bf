"""Truth of answers, counts, intervals and baselines."""

import math

import pytest
from scipy.stats import binomtest

from bhpeft import metrics
from bhpeft.results import HumanScore, ModelOutput


@pytest.mark.parametrize(("text", "cut", "full"), [
    ("False, frogs swim. True or true", "false", "true"),
    ("TRUE, it is tRuE", "true", "true"),
    ("true false", "tie", "tie"),
    ("", "tie", "tie"),
    (". True", "tie", "true"),
    ("junkFalse, glued", "false", "false"),  # counted inside words, as the source project does
])  # fmt: skip
def test_truth_is_the_more_frequent_word(text, cut, full):
    assert metrics.truth_of(text) == cut
    assert metrics.truth_of(text, full=True) == full


@pytest.mark.parametrize(("text", "truth"), [
    ("False, true", "false"), (" \n'True.' so", "true"), ("It is true", "irregular"),
    ("junkFalse,", "irregular"), ("truely", "irregular"), ("", "irregular"), (", .", "irregular"),
])  # fmt: skip
def test_first_word_truth(text, truth):
    assert metrics.first_word_truth(text) == truth


@pytest.mark.parametrize(("query", "kind"), [
    ("All birds fly.", "neg"), ("Not all birds fly.", "neg"),
    ("Some birds fly.", "pos"), ("No birds fly.", "pos"),
    ("Birds fly.", None), ("Allied birds fly.", None), ("Nothing flies.", None), ("", None),
])  # fmt: skip
def test_exemplar_kind(query, kind):
    assert metrics.exemplar_kind(query) == kind


def test_accuracy_counts():
    rows = [
        ModelOutput("All a.", "False, b. True true", "False, c."),
        ModelOutput("Not all a.", "So false", "True, c."),
        ModelOutput("Some a.", "maybe", "True, c."),
        ModelOutput("Birds a.", "It is true", "True, c."),
        ModelOutput("No a.", "perhaps", "perhaps"),  # no truth on either side is not agreement
    ]
    assert metrics.accuracy_counts(rows) == (2, 2, 1, 5, 0.4)
    assert metrics.accuracy_counts(rows, full=True) == (1, 2, 2, 5, 0.2)
    assert metrics.accuracy_counts(rows, kind="neg") == (1, 0, 1, 2, 0.5)
    assert metrics.accuracy_counts(rows, kind="pos") == (0, 2, 0, 2, 0.0)
    assert metrics.accuracy_counts(rows, strict=True) == (1, 4, 0, 5, 0.2)
    assert math.isnan(metrics.accuracy_counts([]).accuracy)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
@pytest.mark.parametrize(
    ("successes", "total"), [(0, 1), (1, 1), (0, 50), (50, 50), (419, 420), (3, 7), (10**6, 3 * 10**6)]
)
def test_wilson_interval_is_scipys(successes, total, level):
    theirs = binomtest(successes, total).proportion_ci(confidence_level=level, method="wilson")
    assert metrics.wilson_interval(successes, total, level) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_interval_at_the_edges():
    assert all(map(math.isnan, metrics.wilson_interval(0, 0)))
    for wrong in ((2, 1), (-1, 1)):
        with pytest.raises(ValueError, match="no interval"):
            metrics.wilson_interval(*wrong)
    with pytest.raises(ValueError, match="level 1"):
        metrics.wilson_interval(1, 2, level=1)


def test_first_word_baseline():
    train = [
        ("All a", "False"),
        ("All b", "False"),
        ("all c", "True"),
        ("Some a", "True"),
        ("Some b", "True"),
    ]
    assert metrics.first_word_baseline(train, train) == 4 / 5
    test = [
        ("All x", "False, not true at all, false"),
        ("Unseen x", "true"),
        ("Some x", "False"),
        ("Some", "neither"),
    ]
    assert metrics.first_word_baseline(train, test) == 2 / 3
    assert math.isnan(metrics.first_word_baseline([], test))
    assert math.isnan(metrics.first_word_baseline(train, [("All x", "no answer")]))


def test_explanation_scores_leave_out_rows_not_judged():
    rows = [
        HumanScore(0, "All a.", "", 1, 1),
        HumanScore(1, "Not all a.", "", 0, 1),
        HumanScore(2, "Some a.", "", 1, 0),
        HumanScore(3, "Some b.", "", 1, None),
        HumanScore(4, "b.", ""),
    ]
    assert metrics.explanation_scores(rows) == (4 / 6, 2 / 3, 2 / 3, 3, 2)
    assert metrics.explanation_scores(rows, "neg") == (0.75, 0.5, 1.0, 2, 0)
    assert metrics.explanation_scores(rows, "pos") == (0.5, 1.0, 0.0, 1, 1)
    assert math.isnan(metrics.explanation_scores([]).overall)
