"""Report of free text: dialogue, or any answers that are no labels."""

from __future__ import annotations

import numpy as np
import pandas as pd

from bhpeft.report.answered import Answered
from bhpeft.scores import text_figures

ROWS = [
    ("perplexity", "perplexity of the expected answers"),
    ("bleu", "BLEU of its answers"),
    ("exact_match", "answers equal word for word"),
    ("mean_words", "words an answer"),
]


def predictions(answered: Answered, task) -> pd.DataFrame:
    """id, label and prediction (both whole texts), `reference_nll` (nats) and `reference_tokens`."""
    rows = [(i, row.expected, row.output) for i, row in zip(answered.ids, answered.outputs, strict=True)]
    table = pd.DataFrame(rows, columns=["id", "label", "prediction"])
    return table.assign(reference_nll=-answered.scores[:, 0], reference_tokens=answered.tokens)


def figures(answered: Answered, table: pd.DataFrame, task) -> dict:
    """As of `text_figures`, and the mean number of words of an answer."""
    texts, references = table["prediction"].tolist(), table["label"].tolist()
    found = text_figures(texts, references, answered.scores[:, 0], answered.tokens)
    if not answered.generated:  # only the expected answers were scored
        return {"rows": len(table), "perplexity": found["perplexity"]}
    return {"rows": len(table), **found, "mean_words": float(np.mean([len(text.split()) for text in texts]))}


def sentence(figures: dict) -> str:
    """How well the expected answers are foreseen."""
    text = f"It foresees the expected answers with a perplexity of {figures['perplexity']:.2f} a token"
    if "bleu" not in figures:
        return text + "."
    share = f"{figures['exact_match']:.1%} of its own answers equal them word for word"
    return f"{text}; {share} (BLEU {figures['bleu']:.1f})."


def draw(columns: dict[str, dict], table: pd.DataFrame, task) -> None:
    """There is no plot of free text."""
