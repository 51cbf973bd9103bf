"""Figures of labels and numbers, by scikit-learn, which is imported where it is used."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from bhpeft.metrics import wilson_interval

IRREGULAR = "(irregular)"  # the prediction of a text that is none of the labels
SURE = 0.9  # a probability from which on an answer is called sure


def probabilities(scores: np.ndarray) -> np.ndarray:
    """Softmax over the last axis: logits or log-likelihoods of C labels, (N, C), to probabilities."""
    scores = np.asarray(scores, dtype=float)  # single precision would underflow to 0 at 104 nats
    shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def entropy(p: np.ndarray) -> np.ndarray:
    """Entropy of each row of (N, C) probabilities, in nats."""
    return -(p * np.log(np.clip(p, 1e-300, None))).sum(axis=-1)


def read_label(text: str, labels: Sequence[str]) -> str:
    """The label that a generated text is, or `IRREGULAR`.

    The first line has to be the label and nothing else; case, quotes and closing punctuation aside where no two
    labels differ in those alone.
    """
    lines = text.strip().splitlines()
    line = lines[0].strip() if lines else ""
    if line in labels:
        return line
    plain = Counter(map(_plain_label, labels))
    found = [label for label in labels if _plain_label(label) == _plain_label(line)]
    return found[0] if found and plain[_plain_label(line)] == 1 else IRREGULAR


def _plain_label(text: str) -> str:
    return text.strip().strip("\"'`*").rstrip(".,:;!").strip("\"'`*").strip().casefold()


def label_figures(expected: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> dict:
    """Accuracy, precision, recall, F1 and confusion of labels.

    Args:
        expected: N labels.
        predicted: N labels, or `IRREGULAR`: wrong, and no label's prediction.
        labels: C names in order.

    Returns:
        accuracy with its 95 % Wilson interval; precision, recall and f1, weighted by support and macro (over labels
        that occur or are predicted, as scikit-learn); confusion, C rows (expected) of C counts, and one more
        column for irregular ones where there are any; `irregular`, their number.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    right = sum(a == b for a, b in zip(expected, predicted, strict=True))
    figures: dict = {
        "accuracy": right / len(expected) if len(expected) else math.nan,
        "accuracy_interval_95": list(wilson_interval(right, len(expected))),
    }
    seen = [label for label in labels if label in set(expected) | set(predicted)]
    for average in ("weighted", "macro"):
        scores = precision_recall_fscore_support(expected, predicted, labels=seen, average=average, zero_division=0)
        names = ("precision", "recall", "f1")  # and the support, which has no average
        figures |= {f"{name}_{average}": float(value) for name, value in zip(names, scores[:3], strict=True)}
    irregular = sum(label == IRREGULAR for label in predicted)
    columns = [*labels, IRREGULAR] if irregular else list(labels)
    figures["confusion"] = confusion_matrix(expected, predicted, labels=columns)[: len(labels)].tolist()
    return {**figures, "irregular": irregular}


def probability_figures(expected: Sequence[str], p: np.ndarray, labels: Sequence[str]) -> dict:
    """What the probabilities are worth.

    Args:
        expected: N labels.
        p: (N, C) probabilities of the labels.

    Returns:
        `scored_accuracy` (the likeliest label is right), `mean_confidence` (of the likeliest), `nll` (nats),
        `sure_share` and `sure_accuracy` (of answers with probability 0.9 or more).
    """
    place = {label: i for i, label in enumerate(labels)}
    index = np.array([place[label] for label in expected])
    best, sure = p.max(axis=1), p.max(axis=1) >= SURE
    right = p.argmax(axis=1) == index
    return {
        "scored_accuracy": float(right.mean()),
        "mean_confidence": float(best.mean()),
        "nll": float(-np.log(np.clip(p[np.arange(len(p)), index], 1e-300, None)).mean()),
        "sure_share": float(sure.mean()),
        "sure_accuracy": float(right[sure].mean()) if sure.any() else math.nan,
    }


def irregular_texts(texts: Sequence[str], predicted: Sequence[str], most: int = 20) -> dict[str, int]:
    """The texts that are no label, each with how often it was given, the most frequent first."""
    counts = Counter(" ".join(t.split()) for t, label in zip(texts, predicted, strict=True) if label == IRREGULAR)
    return dict(counts.most_common(most))


def regression_figures(expected: np.ndarray, predicted: np.ndarray, deviation: float) -> dict:
    """MSE, RMSE, MAE and R2.

    Args:
        expected, predicted: (N,) in the labels' own units.
        deviation: of the training labels; the `_standardised` figures are in units of it.
    """
    from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

    mse, mae = float(mean_squared_error(expected, predicted)), float(mean_absolute_error(expected, predicted))
    return {
        "mse": mse,
        "rmse": math.sqrt(mse),
        "mae": mae,
        "r2": float(r2_score(expected, predicted)) if len(expected) > 1 else math.nan,
        "mse_standardised": mse / deviation**2,
        "rmse_standardised": math.sqrt(mse) / deviation,
        "mae_standardised": mae / deviation,
    }
