"""Figures of a run against hand-made and scikit-learn-free closed forms, tables and the plain sentence."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bhpeft import report
from bhpeft.metrics import first_word_baseline
from bhpeft.results import ModelOutput

LABELS = ("True", "False")
OUTPUTS = [
    ModelOutput("All cats fly.", "False, no.", "False, no."),
    ModelOutput("Some cats fly.", "True, yes.", "False, none."),
    ModelOutput("No cats fly.", "who knows", "True, not one."),
    ModelOutput("Some cats purr.", "True, it is. False.", "True, it is."),
]
LOG_P = np.log([[0.1, 0.3], [0.6, 0.2], [0.05, 0.01], [0.95, 0.05]])  # of "True" and "False"; rows need not sum to 1
TRAIN = [("All dogs bark.", "True, all."), ("All dogs fly.", "False."), ("Some dogs bark.", "True, so it is.")]


def figures():
    table = report.predictions_table(list("abcd"), OUTPUTS, LABELS, LOG_P)
    return report.summarise(OUTPUTS, table, TRAIN), table


def test_predictions_table():
    _, table = figures()
    assert table["label"].tolist() == ["false", "false", "true", "true"]
    assert table["prediction"].tolist() == ["false", "true", "tie", "true"]
    p = np.array([[0.25, 0.75], [0.75, 0.25], [5 / 6, 1 / 6], [0.95, 0.05]])
    assert table[["prob_true", "prob_false"]].to_numpy() == pytest.approx(p)
    assert table["max_prob"].to_numpy() == pytest.approx(p.max(1))
    assert table["entropy"].to_numpy() == pytest.approx(-(p * np.log(p)).sum(1))


def test_summary():
    found, _ = figures()
    assert (found["accuracy"], found["ties"], found["rows"]) == (0.5, 1, 4)
    assert found["exact_match"] == 0.25 and found["scored_accuracy"] == 0.75
    assert found["mean_confidence"] == pytest.approx((0.75 + 0.75 + 5 / 6 + 0.95) / 4)
    assert found["nll"] == pytest.approx(-np.log([0.75, 0.25, 5 / 6, 0.95]).mean())
    assert (found["sure_share"], found["sure_accuracy"]) == (0.25, 1.0)
    assert found["first_word_baseline"] == first_word_baseline(TRAIN, [(r.query, r.expected) for r in OUTPUTS])
    low, high = found["accuracy_interval_95"]
    assert low < 0.5 < high


def test_log_likelihoods_far_below_zero_give_probabilities():
    p = report.label_probabilities(np.array([[-5000.0, -5001.0], [-1e4, -1.0]]))
    assert p[0] == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))]) and p[1, 1] == 1


def test_answers_without_labels_are_compared_whole():
    table = report.predictions_table(["a"], [ModelOutput("q", "x  y", "x y")], (), None)
    assert table.columns.tolist() == ["id", "label", "prediction"]
    found = report.summarise([ModelOutput("q", "x  y", "x y")], table, [])
    assert found == {"exact_match": 1.0, "rows": 1} and "100.0%" in report.sentence(found)


@pytest.mark.parametrize(
    ("confidence", "right", "words"),
    [(0.9, 0.7, "too sure"), (0.6, 0.9, "less sure than it could be"), (0.8, 0.81, "about as sure as it may be")],
)
def test_the_sentence_says_whether_the_confidence_is_earned(confidence, right, words):
    text = report.sentence(
        {"mean_confidence": confidence, "scored_accuracy": right, "sure_share": 0.0, "sure_accuracy": math.nan}
    )
    assert words in text and f"{confidence:.0%}" in text and f"{right:.0%}" in text


def test_tables_and_plot():
    found, table = figures()
    text = report.figures_table({"frozen base": found, "lora": {**found, "accuracy": 0.875}})
    assert "0.500           0.875" in text and "nan" not in text
    samples = report.samples_table(OUTPUTS, OUTPUTS, count=2)
    assert "All cats fly." in samples and "Some cats purr." in samples and samples.count("expected") == 2
    assert report.draw_answers({"lora": found}, table).startswith(b"\x89PNG")
    table.loc[:, ["prob_true", "prob_false", "max_prob"]] = float(
        "nan"
    )  # a run whose numbers went wrong is still shown
    assert report.draw_answers({"lora": found}, table).startswith(b"\x89PNG")
