"""Report of answers that open with True or False and go on with an explanation."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd

from bhpeft.metrics import accuracy_counts, expected_truth, first_word_baseline, truth_of, wilson_interval
from bhpeft.report.answered import Answered
from bhpeft.report.sureness import draw_sureness, how_sure
from bhpeft.scores import probability_figures

ROWS = [
    ("accuracy", "accuracy of the answers"),
    ("first_word_baseline", "what the first word alone gives"),
    ("ties", "answers neither true nor false"),
    ("scored_accuracy", "accuracy by probability"),
    ("mean_confidence", "mean probability of its answer"),
    ("exact_match", "answers equal word for word"),
]


def predictions(answered: Answered, task) -> pd.DataFrame:
    """id, label, prediction, then `prob_<label>` in lower case, `max_prob`, `entropy` (nats).

    The prediction is read off the generated text; the probabilities are those of the labels as the opening of an
    answer, so they need not agree with it. With samples they are their mean, and `sample_measures` are added.
    """
    rows = zip(answered.ids, answered.outputs, strict=True)
    table = pd.DataFrame(
        [(i, row.expected and expected_truth(row.expected), truth_of(row.output)) for i, row in rows],
        columns=["id", "label", "prediction"],
    )
    p, measures = answered.probabilities()
    for column, label in enumerate(task.labels):
        table[f"prob_{label.lower()}"] = p[:, column]
    return table.assign(**measures)


def figures(answered: Answered, table: pd.DataFrame, task) -> dict:
    """The figures of a run.

    Returns:
        `accuracy` of the generated text with its 95 % Wilson interval, `ties` (neither or both said equally often:
        counted as wrong), `first_word_accuracy` (the answer's first word decides), `first_word_baseline` (what the
        *query's* first word alone gives), `exact_match`, and of the probabilities those of `probability_figures`.
    """
    outputs = answered.outputs
    counts, strict = accuracy_counts(outputs), accuracy_counts(outputs, strict=True)
    labels = [label.lower() for label in task.labels]
    p = table[[f"prob_{label}" for label in labels]].to_numpy()
    train_pairs = ((example.query, example.answer) for example in task.train)
    same = [" ".join(row.output.split()) == " ".join(row.expected.split()) for row in outputs]
    return {
        "accuracy": counts.accuracy,
        "accuracy_interval_95": list(wilson_interval(counts.correct, counts.total)),
        "ties": counts.tie,
        "first_word_accuracy": strict.accuracy,
        "first_word_baseline": first_word_baseline(train_pairs, [(row.query, row.expected) for row in outputs]),
        **probability_figures(table["label"].tolist(), p, labels),
        "exact_match": float(np.mean(same)),
        "rows": len(outputs),
    }


def sentence(figures: dict) -> str:
    """A plain sentence on how sure the model is, and whether it may be."""
    return how_sure("Asked for true or false, it gives its answer", figures)


def draw(columns: dict[str, dict], table: pd.DataFrame, task) -> bytes:
    """Accuracy before and after beside the first-word baseline, and how sure right and wrong answers are.

    Rows without probabilities (NaN) are left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    places = np.arange(len(columns))
    for shift, key, color, label in (
        (-0.2, "accuracy", "#2f6f9f", "its answers"),
        (0.2, "scored_accuracy", "#9aa5b1", "forced to choose"),
    ):
        values = [figures[key] for figures in columns.values()]
        bars = left.bar(places + shift, values, width=0.36, color=color, label=label)
        left.bar_label(bars, fmt="%.2f", padding=3)
    left.set_xticks(places, list(columns))
    baseline = list(columns.values())[-1]["first_word_baseline"]
    left.axhline(baseline, color="#b5542c", linestyle="--", linewidth=1, label=f"first word alone: {baseline:.2f}")
    left.set(ylim=(0, 1.35), yticks=np.linspace(0, 1, 6), ylabel="accuracy on held-out rows", title="True or false?")
    left.legend(loc="upper left", frameon=False, ncols=2)

    labels = [label.lower() for label in task.labels]
    draw_sureness(right, table, [f"prob_{label}" for label in labels], labels)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    pyplot.close(figure)
    return png.getvalue()
