"""Report of classification and multiple choice."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pandas as pd

from bhpeft.report.answered import Answered
from bhpeft.report.sureness import draw_sureness, how_sure
from bhpeft.scores import IRREGULAR, irregular_texts, label_figures, probability_figures, read_label

ROWS = [
    ("accuracy", "accuracy"),
    ("f1_macro", "F1, mean over the labels"),
    ("f1_weighted", "F1, weighted by support"),
    ("majority_baseline", "what the commonest label gives"),
    ("irregular", "answers that are no label"),
    ("scored_accuracy", "accuracy by probability"),
    ("mean_confidence", "mean probability of its answer"),
    ("nll", "negative log-likelihood (nats)"),
]


def predictions(answered: Answered, task) -> pd.DataFrame:
    """id, label, prediction, `prob_<label>`, `max_prob`, `entropy` (nats).

    The prediction is read off the generated text where there is one: it need not be the likeliest label. With
    samples the probabilities are their mean, and `sample_measures` are added: how far they disagree.
    """
    p, measures = answered.probabilities()
    likeliest = [task.labels[i] for i in p.argmax(axis=1)]
    texts = [row.output for row in answered.outputs]
    predicted = [read_label(text, task.labels) for text in texts] if answered.generated else likeliest
    table = pd.DataFrame({"id": answered.ids, "label": [o.expected for o in answered.outputs], "prediction": predicted})
    for column, label in enumerate(task.labels):
        table[f"prob_{label}"] = p[:, column]
    return table.assign(**measures)


def figures(answered: Answered, table: pd.DataFrame, task) -> dict:
    """As of `label_figures` and `probability_figures`; what the training rows' commonest label
    would give; of
    generated texts also which were irregular, and how often the regular ones are the likeliest label."""
    expected, predicted = table["label"].tolist(), table["prediction"].tolist()
    p = table[[f"prob_{label}" for label in task.labels]].to_numpy()
    found = {"rows": len(table), **label_figures(expected, predicted, task.labels)}
    found |= probability_figures(expected, p, task.labels)
    if task.train:
        commonest = _commonest(task)
        found["majority_baseline"] = float(np.mean([label == commonest for label in expected]))
    if answered.generated:
        regular = [i for i, label in enumerate(predicted) if label != IRREGULAR]
        found["irregular_texts"] = irregular_texts([row.output for row in answered.outputs], predicted)
        likeliest = p.argmax(axis=1)
        same = [predicted[i] == task.labels[likeliest[i]] for i in regular]
        found["regular_as_scored"] = float(np.mean(same)) if same else float("nan")
    else:
        del found["irregular"]
    return found


def _commonest(task) -> str:
    counts = Counter(example.answer for example in task.train)
    return max(task.labels, key=counts.__getitem__)


def sentence(figures: dict) -> str:
    """A plain sentence on how sure the model is, and whether it may be."""
    text = how_sure("It gives its likeliest label", figures)
    if figures.get("irregular"):
        commonest = next(iter(figures["irregular_texts"]))
        text += f" {figures['irregular']} of {figures['rows']} answers are no label, most often {commonest[:60]!r}."
    return text


def draw(columns: dict[str, dict], table: pd.DataFrame, task) -> bytes:
    """The confusion of the labels, and how sure right and wrong answers are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    last = list(columns.values())[-1]
    counts = np.array(last["confusion"])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    left.imshow(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    if counts.size <= 150:
        for (i, j), count in np.ndenumerate(counts):
            dark = count > 0.6 * counts[i].sum()
            left.text(j, i, str(count), ha="center", va="center", color="white" if dark else "black")
    names = [*task.labels, IRREGULAR][: counts.shape[1]]
    left.set_xticks(range(len(names)), names, rotation=30, ha="right", parse_math=False)  # "$10" is no formula
    left.set_yticks(range(len(task.labels)), task.labels, parse_math=False)
    left.set(xlabel="predicted", ylabel="label", title=f"accuracy {last['accuracy']:.3f}")

    draw_sureness(right, table, [f"prob_{label}" for label in task.labels], list(task.labels))
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    pyplot.close(figure)
    return png.getvalue()
