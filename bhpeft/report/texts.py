"""Report of free text: dialogue, or any answers that are no labels."""

from __future__ import annotations

import pandas as pd

from bhpeft.report.answered import Answered
from bhpeft.text_scores import text_figures

INTERVAL = "    95 % interval"
SAMPLED = [
    ("bleu", "BLEU"),
    ("bleu_interval_95", ""),
    ("chrf", "chrF"),
    ("chrf_interval_95", ""),
    ("distinct_1", "different words"),
    ("distinct_2", "different pairs"),
    ("mean_words", "words an answer"),
]
ROWS = [
    ("perplexity", "perplexity of the expected answers"),
    ("perplexity_interval_95", INTERVAL),
    ("bleu", "BLEU of its answers"),
    ("bleu_interval_95", INTERVAL),
    ("chrf", "chrF of its answers"),
    ("chrf_interval_95", INTERVAL),
    ("distinct_1", "different words / words"),
    ("distinct_2", "different pairs / pairs of words"),
    ("exact_match", "answers equal word for word"),
    ("mean_words", "words an answer"),
    ("mean_words_interval_95", INTERVAL),
    *((f"sampled_{key}", INTERVAL if "interval" in key else f"sampled: {words}") for key, words in SAMPLED),
]


def predictions(answered: Answered, task) -> pd.DataFrame:
    """id, label and prediction (both whole texts), `reference_nll` (nats) and `reference_tokens`; `sampled` text."""
    rows = [(i, row.expected, row.output) for i, row in zip(answered.ids, answered.outputs, strict=True)]
    table = pd.DataFrame(rows, columns=["id", "label", "prediction"])
    table = table.assign(reference_nll=-answered.scores[:, 0], reference_tokens=answered.tokens)
    return table if answered.drawn is None else table.assign(sampled=answered.drawn)


def figures(answered: Answered, table: pd.DataFrame, task) -> dict:
    """`rows` and `text_figures`, of sampled texts as `sampled_NAME`; a conversation is drawn with all its replies."""
    texts, references = table["prediction"].tolist(), table["label"].tolist()
    groups = answered.ids if answered.groups is None else answered.groups
    scores = answered.scores[:, 0], answered.tokens
    found = {"rows": len(table), **text_figures(texts, references, *scores, groups, answered.generated)}
    if answered.drawn is not None:
        others = text_figures(answered.drawn, references, *scores, groups)
        found |= {f"sampled_{key}": value for key, value in others.items() if not key.startswith("perplexity")}
    return found


def sentence(figures: dict) -> str:
    """How well the expected answers are foreseen, and how the texts were compared."""
    text = f"It foresees the expected answers with a perplexity of {figures['perplexity']:.2f} a token"
    if "bleu" not in figures:
        return text + "."
    share = f"{figures['exact_match']:.1%} of its own answers equal them word for word"
    return (
        f"{text}; {share} (BLEU {figures['bleu']:.1f}, chrF {figures['chrf']:.1f}).\n"
        f"BLEU|{figures['bleu_signature']}\nchrF|{figures['chrf_signature']}"
    )


def draw(columns: dict[str, dict], table: pd.DataFrame, task) -> None:
    """There is no plot of free text."""
