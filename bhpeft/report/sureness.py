"""How sure a model is, and whether it may be: in words, and drawn."""

from __future__ import annotations

import numpy as np
import pandas as pd

from bhpeft.scores import SURE

GAP = 0.03  # between mean probability and accuracy: below it the two are called equal


def how_sure(opening: str, figures: dict) -> str:
    """A plain sentence or two.

    Args:
        opening: what the probability is of, as "It gives its likeliest label".
        figures: as of `probability_figures`.
    """
    confidence, right = figures["mean_confidence"], figures["scored_accuracy"]
    verdict = "about as sure as it may be"
    if abs(confidence - right) > GAP:
        verdict = "too sure" if confidence > right else "less sure than it could be"
    text = f"{opening} a probability of {confidence:.0%} on average and is right in {right:.0%}: {verdict}."
    if figures["sure_share"] > 0:
        text += (
            f" It is sure (probability {SURE} or more) in {figures['sure_share']:.0%} of the cases, and there right in "
            f"{figures['sure_accuracy']:.1%}."
        )
    return text


def draw_sureness(axes, table: pd.DataFrame, columns: list[str], labels: list[str]) -> None:
    """Histogram of the likeliest label's probability, right and wrong answers apart.

    Args:
        axes: of matplotlib.
        table: predictions; rows without probabilities (NaN) are left out.
        columns, labels: the columns of probabilities, and the labels as the column "label" names them.
    """
    table = table.dropna(subset=["max_prob"])
    likeliest = table[columns].to_numpy().argmax(axis=1)
    correct = np.array([labels[i] for i in likeliest], dtype=object) == table["label"].to_numpy()
    parts = [table["max_prob"][correct], table["max_prob"][~correct]]
    bins = np.linspace(1 / len(labels), 1, 11)
    axes.hist(parts, bins=bins, stacked=True, color=["#2f6f9f", "#b5542c"], label=["right", "wrong"])
    axes.set(xlabel="probability of its likeliest label", ylabel="rows", title="How sure, and how often right")
    axes.legend(loc="upper left", frameon=False)
