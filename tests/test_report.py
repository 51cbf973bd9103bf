"""Figures of a run against hand-made and scikit-learn-free closed forms, tables and the plain sentence."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import numpy as np
import pytest

from bhpeft.metrics import first_word_baseline
from bhpeft.record import say
from bhpeft.report import labels, numbers, report_for, texts, true_false
from bhpeft.report.answered import Answered
from bhpeft.report.tables import figures_table, samples_table
from bhpeft.results import ModelOutput
from bhpeft.scores import probabilities
from bhpeft.tasks import Example, Task
from bhpeft.text_scores import text_figures

LABELS = ("True", "False")
OUTPUTS = [
    ModelOutput("All cats fly.", "False, no.", "False, no."),
    ModelOutput("Some cats fly.", "True, yes.", "False, none."),
    ModelOutput("No cats fly.", "who knows", "True, not one."),
    ModelOutput("Some cats purr.", "True, it is. False.", "True, it is."),
]
LOG_P = np.log([[0.1, 0.3], [0.6, 0.2], [0.05, 0.01], [0.95, 0.05]])  # of "True" and "False"; rows need not sum to 1
TRAIN = [("All dogs bark.", "True, all."), ("All dogs fly.", "False."), ("Some dogs bark.", "True, so it is.")]
TASK = Task("t", [Example(str(i), q, a, q) for i, (q, a) in enumerate(TRAIN)], [], [], "generation", LABELS)


def figures():
    answered = Answered(list("abcd"), OUTPUTS, LOG_P)
    table = true_false.predictions(answered, TASK)
    return true_false.figures(answered, table, TASK), table


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
    p = probabilities(np.array([[-5000.0, -5001.0], [-1e4, -1.0]]))
    assert p[0] == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))]) and p[1, 1] == 1


@pytest.mark.parametrize(
    ("confidence", "right", "words"),
    [(0.9, 0.7, "too sure"), (0.6, 0.9, "less sure than it could be"), (0.8, 0.81, "about as sure as it may be")],
)
def test_the_sentence_says_whether_the_confidence_is_earned(confidence, right, words):
    text = true_false.sentence(
        {"mean_confidence": confidence, "scored_accuracy": right, "sure_share": 0.0, "sure_accuracy": math.nan}
    )
    assert words in text and f"{confidence:.0%}" in text and f"{right:.0%}" in text


def test_tables_and_plot():
    found, table = figures()
    text = figures_table({"frozen base": found, "lora": {**found, "accuracy": 0.875}}, true_false.ROWS)
    assert "0.500           0.875" in text and "nan" not in text
    samples = samples_table(OUTPUTS, OUTPUTS, count=2)
    assert "All cats fly." in samples and "Some cats purr." in samples and samples.count("expected") == 2
    assert true_false.draw({"lora": found}, table, TASK).startswith(b"\x89PNG")
    table.loc[:, ["prob_true", "prob_false", "max_prob"]] = math.nan  # numbers went wrong: it is still shown
    assert true_false.draw({"lora": found}, table, TASK).startswith(b"\x89PNG")


# ------------------------------------------------------------------------- labels, numbers and texts


def task_of(task_type, labels=(), answers=("a", "b", "b")):
    return Task("t", [Example(str(i), f"q{i}", a, f"q{i}") for i, a in enumerate(answers)], [], [], task_type, labels)


def test_each_task_has_its_report():
    found = [report_for(task_of(kind, names)) for kind, names in (
        ("generation", LABELS), ("generation", ()), ("classification", ("a", "b")), ("multiple_choice", ("A", "B")),
        ("regression", ()),
    )]  # fmt: skip
    assert found == [true_false, texts, labels, labels, numbers]


def outputs(texts_, expected):
    return [ModelOutput(f"q{i}", text, label) for i, (text, label) in enumerate(zip(texts_, expected, strict=True))]


def test_generated_labels_are_read_off_the_text_and_scored_beside_it():
    task = task_of("classification", ("a", "b"))
    log_p = np.log([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4]])
    answered = Answered(list("wxyz"), outputs(["A.", "b\nand more", "no idea", "b"], "abba"), log_p)
    table = labels.predictions(answered, task)
    assert table["prediction"].tolist() == ["a", "b", "(irregular)", "b"]
    found = labels.figures(answered, table, task)
    assert (found["accuracy"], found["irregular"], found["irregular_texts"]) == (0.5, 1, {"no idea": 1})
    assert found["confusion"] == [[1, 1, 0], [0, 1, 1]]
    assert found["scored_accuracy"] == 1.0 and found["regular_as_scored"] == pytest.approx(2 / 3)
    assert found["majority_baseline"] == 0.5  # the training rows have more of b
    assert "no idea" in labels.sentence(found)
    assert labels.draw({"x": found}, table, task).startswith(b"\x89PNG")


def test_labels_of_a_head_follow_from_its_logits():
    task = task_of("classification", ("a", "b", "c"))
    answered = Answered(["0", "1"], outputs(["c", "a"], "ca"), np.array([[0, 1, 3.0], [2, 0, 0]]), generated=False)
    table = labels.predictions(answered, task)
    assert table["prediction"].tolist() == ["c", "a"] and "irregular" not in labels.figures(answered, table, task)
    assert table["prob_c"][0] == pytest.approx(math.exp(3) / (1 + math.e + math.exp(3)))


def test_numbers_are_reported_in_their_own_units():
    task = task_of("regression", answers=("2", "4", "9"))
    answered = Answered(["0", "1"], outputs(["3", "6"], "46"), np.array([[3.0], [6.0]]), False, mean=5.0, deviation=2.0)
    table = numbers.predictions(answered, task)
    found = numbers.figures(answered, table, task)
    assert (found["mae"], found["mse"], found["mse_standardised"], found["mae_of_mean"]) == (0.5, 0.5, 0.125, 1.0)
    assert found["r2"] == 0.5 and "50% of that error" in numbers.sentence(found)
    assert numbers.draw({"x": found}, table, task).startswith(b"\x89PNG")


def test_texts_are_judged_by_perplexity_and_bleu():
    task = task_of("generation")
    rows = outputs(["the cat sat on the mat", "no"], ["the cat sat on the mat", "yes indeed"])
    answered = Answered(["0", "1"], rows, np.array([[-6.0], [-4.0]]), tokens=np.array([3, 2]))
    table = texts.predictions(answered, task)
    found = texts.figures(answered, table, task)
    assert found["perplexity"] == pytest.approx(math.exp(10 / 5)) and found["exact_match"] == 0.5
    assert found["mean_words"] == 3.5 and 0 < found["bleu"] < 100 and "7.39" in texts.sentence(found)
    assert table["reference_tokens"].tolist() == [3, 2] and texts.draw({}, table, task) is None


def test_answers_to_one_input_are_drawn_together_whatever_rows_of_other_files_are_called():
    """Rows of a file are called 0, 1, ...: those of the validation file too."""
    rng = np.random.default_rng(0)
    log_p, tokens = -np.repeat(rng.uniform(1, 9, 4), 10)[:, None], np.full(40, 3)
    rows = outputs(["a"] * 40, ["b"] * 40)
    task = task_of("generation")
    task = replace(task, validation=[Example(str(i), f"v{i}", "b", f"v{i}") for i in range(40)])
    groups = [f"q{i // 10}" for i in range(40)]
    answered = Answered([str(i) for i in range(40)], rows, log_p, False, tokens, groups=groups)
    found = texts.figures(answered, texts.predictions(answered, task), task)
    expected = text_figures(["a"] * 40, ["b"] * 40, log_p[:, 0], tokens, groups, generated=False)
    assert found["perplexity_interval_95"] == expected["perplexity_interval_95"]
    alone = text_figures(["a"] * 40, ["b"] * 40, log_p[:, 0], tokens, None, generated=False)
    widths = [np.ptp(figures["perplexity_interval_95"]) for figures in (found, alone)]
    assert widths[0] > 1.5 * widths[1]


def test_labels_with_dollars_are_no_formulas():
    task = task_of("classification", ("$", "$$", "$10_$20", "US$ 1%"))
    answered = Answered(["0", "1"], outputs(["$", "$$"], ["$", "US$ 1%"]), np.eye(4)[:2], generated=False)
    table = labels.predictions(answered, task)
    assert labels.draw({"x": labels.figures(answered, table, task)}, table, task).startswith(b"\x89PNG")


def test_a_terminal_without_a_letter_ends_no_run(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    say("日本 is", "Japan")
    assert raw.getvalue().decode("latin-1").split("\n")[:2] == ["\\u65e5\\u672c is", "Japan"]
