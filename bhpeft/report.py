"""What a run says at its end: the figures, a table of answers, a plot, and a plain sentence on how sure it is.

NumPy and pandas only; matplotlib is imported where a plot is drawn.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from bhpeft.metrics import accuracy_counts, expected_truth, first_word_baseline, truth_of, wilson_interval
from bhpeft.results import ModelOutput

SURE = 0.9  # a probability from which on an answer is called sure


def label_probabilities(log_likelihoods: np.ndarray) -> np.ndarray:
    """Normalise log-likelihoods of the labels, (N, C), to probabilities that sum to 1 over C."""
    shifted = np.exp(log_likelihoods - log_likelihoods.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def predictions_table(
    ids: Sequence[str],
    outputs: Sequence[ModelOutput],
    labels: Sequence[str],
    log_likelihoods: np.ndarray | None,
) -> pd.DataFrame:
    """One row an example, as `results/predictions/` holds it.

    Args:
        ids: of the examples.
        labels: C words that answers open with; without any, label and prediction are the whole texts.
        log_likelihoods: (N, C), of each label as the opening of the answer.

    Returns:
        Columns id, label, prediction, then `prob_<label>`, `max_prob`, `entropy` (nats). The prediction is
        read off the generated text; the probabilities compare the labels alone, so they need not agree with it.
    """
    if not labels:
        rows = [(i, row.expected, row.output) for i, row in zip(ids, outputs, strict=True)]
        return pd.DataFrame(rows, columns=["id", "label", "prediction"])
    rows = [(i, expected_truth(row.expected), truth_of(row.output)) for i, row in zip(ids, outputs, strict=True)]
    table = pd.DataFrame(rows, columns=["id", "label", "prediction"])
    p = label_probabilities(log_likelihoods)
    for column, label in enumerate(labels):
        table[f"prob_{label.lower()}"] = p[:, column]
    table["max_prob"] = p.max(axis=1)
    table["entropy"] = -(p * np.log(np.clip(p, 1e-300, None))).sum(axis=1)
    return table


def summarise(
    outputs: Sequence[ModelOutput], table: pd.DataFrame, train_pairs: Sequence[tuple[str, str]]
) -> dict[str, float | int | list[float]]:
    """The figures of a run.

    Args:
        outputs: answers to the test rows.
        table: as of `predictions_table` for the same rows.
        train_pairs: (query, answer) of the training rows, for the baseline that knows the first word alone.

    Returns:
        `exact_match` for every task. For true/false answers also `accuracy` of the generated text with its 95 %
        Wilson interval, `ties` (neither or both said equally often: counted as wrong), `first_word_accuracy`
        (the answer's first word decides), `first_word_baseline` (what the *query's* first word alone gives), and of
        the probabilities: `scored_accuracy` (the likelier label is right), `mean_confidence` (of the likelier
        label), `nll` (nats), `sure_share` and `sure_accuracy` (of answers with probability 0.9 or more).
    """
    same = [" ".join(row.output.split()) == " ".join(row.expected.split()) for row in outputs]
    figures: dict = {"exact_match": float(np.mean(same)) if same else math.nan, "rows": len(outputs)}
    if "max_prob" not in table:
        return figures
    counts = accuracy_counts(outputs)
    strict = accuracy_counts(outputs, strict=True)
    p_label = np.array([row[f"prob_{row['label']}"] for _, row in table.iterrows()])
    best = table[[name for name in table if name.startswith("prob_")]].to_numpy().max(axis=1)
    right, sure = p_label == best, best >= SURE
    return {
        "accuracy": counts.accuracy,
        "accuracy_interval_95": list(wilson_interval(counts.correct, counts.total)),
        "ties": counts.tie,
        "first_word_accuracy": strict.accuracy,
        "first_word_baseline": first_word_baseline(train_pairs, [(row.query, row.expected) for row in outputs]),
        "scored_accuracy": float(right.mean()),
        "mean_confidence": float(best.mean()),
        "nll": float(-np.log(np.clip(p_label, 1e-300, None)).mean()),
        "sure_share": float(sure.mean()),
        "sure_accuracy": float(right[sure].mean()) if sure.any() else math.nan,
        **figures,
    }


def sentence(figures: dict) -> str:
    """A plain sentence on how sure the model is, and whether it may be."""
    if "mean_confidence" not in figures:
        return f"{figures['exact_match']:.1%} of the answers equal the expected ones word for word."
    confidence, right = figures["mean_confidence"], figures["scored_accuracy"]
    gap = confidence - right
    verdict = (
        "too sure" if gap > 0.03 else "less sure than it could be" if gap < -0.03 else "about as sure as it may be"
    )
    text = (
        f"Asked for true or false, it gives its answer a probability of {confidence:.0%} on average and is right in "
        f"{right:.0%}: {verdict}."
    )
    if figures["sure_share"] > 0:
        text += (
            f" It is sure (probability {SURE} or more) in {figures['sure_share']:.0%} of the cases, and there right in "
            f"{figures['sure_accuracy']:.1%}."
        )
    return text


def figures_table(columns: dict[str, dict]) -> str:
    """Figures of several runs side by side, as text.

    Args:
        columns: heading -> figures, as of `summarise`.
    """
    names = [
        ("accuracy", "accuracy of the answers"),
        ("first_word_baseline", "what the first word alone gives"),
        ("ties", "answers neither true nor false"),
        ("scored_accuracy", "accuracy by probability"),
        ("mean_confidence", "mean probability of its answer"),
        ("exact_match", "answers equal word for word"),
    ]
    lines = [" " * 34 + "".join(f"{heading:>16}" for heading in columns)]
    for key, name in names:
        if any(key in figures for figures in columns.values()):
            lines.append(f"{name:<34}" + "".join(f"{_number(figures.get(key)):>16}" for figures in columns.values()))
    return "\n".join(lines)


def _number(value: float | int | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def samples_table(outputs: Sequence[ModelOutput], before: Sequence[ModelOutput] | None = None, count: int = 6) -> str:
    """A few answers beside the expected ones, spread evenly over the rows."""
    lines = []
    for i in np.linspace(0, len(outputs) - 1, min(count, len(outputs))).round().astype(int):
        lines.append(f"  {outputs[i].query}")
        if before:
            lines.append(f"      base      {_one_line(before[i].output)}")
        lines.append(f"      answer    {_one_line(outputs[i].output)}")
        lines.append(f"      expected  {_one_line(outputs[i].expected)}")
    return "\n".join(lines)


def _one_line(text: str, width: int = 90) -> str:
    text = " ".join(text.split()) or "(nothing)"
    return text if len(text) <= width else text[: width - 1] + "…"


def draw_answers(columns: dict[str, dict], table: pd.DataFrame) -> bytes:
    """Draw accuracy before and after beside the first-word baseline, and how sure right and wrong answers are.

    Args:
        columns: heading -> figures, as of `summarise`.
        table: predictions of the last of them; rows without probabilities (NaN) are left out.

    Returns:
        A PNG file's bytes.
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

    table = table.dropna(subset=["max_prob"])
    probabilities = table[[name for name in table if name.startswith("prob_")]]
    of_label = [row[f"prob_{label}"] for label, (_, row) in zip(table["label"], probabilities.iterrows(), strict=True)]
    correct = np.array(of_label) == table["max_prob"].to_numpy()
    bins = np.linspace(0.5, 1, 11)
    parts = [table["max_prob"][correct], table["max_prob"][~correct]]
    right.hist(parts, bins=bins, stacked=True, color=["#2f6f9f", "#b5542c"], label=["right", "wrong"])
    right.set(xlabel="probability of its answer", ylabel="rows", title="How sure, and how often right")
    right.legend(loc="upper left", frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    pyplot.close(figure)
    return png.getvalue()
