"""Report of regression."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd

from bhpeft.report.answered import Answered
from bhpeft.scores import regression_figures

ROWS = [
    ("rmse", "root mean squared error"),
    ("mae", "mean absolute error"),
    ("r2", "R2 (share of variance explained)"),
    ("mae_of_mean", "error of guessing the mean"),
]


def predictions(answered: Answered, task) -> pd.DataFrame:
    """id, label and prediction, both in the labels' own units.

    With posterior samples the prediction is their mean, and `epistemic_sd` their (population) deviation.
    """
    expected = [float(row.expected) for row in answered.outputs]
    table = pd.DataFrame({"id": answered.ids, "label": expected, "prediction": answered.scores[:, 0].astype(float)})
    if answered.samples is None:
        return table
    samples = answered.samples[:, :, 0]
    return table.assign(prediction=samples.mean(axis=1), epistemic_sd=samples.std(axis=1))


def figures(answered: Answered, table: pd.DataFrame, task) -> dict:
    """As of `regression_figures`, and the mean absolute error of always guessing the training rows' mean."""
    expected, predicted = table["label"].to_numpy(), table["prediction"].to_numpy()
    guess = float(np.abs(expected - answered.mean).mean())
    return {"rows": len(table), **regression_figures(expected, predicted, answered.deviation), "mae_of_mean": guess}


def sentence(figures: dict) -> str:
    """How far off it is, beside guessing."""
    share = figures["mae"] / figures["mae_of_mean"] if figures["mae_of_mean"] else float("nan")
    return (
        f"It is off by {figures['mae']:.2f} on average; guessing the mean each time would be off by "
        f"{figures['mae_of_mean']:.2f} ({share:.0%} of that error remains)."
    )


def draw(columns: dict[str, dict], table: pd.DataFrame, task) -> bytes:
    """Predictions over labels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4.5), layout="constrained")
    axes.scatter(table["label"], table["prediction"], s=12, alpha=0.5, color="#2f6f9f", edgecolors="none")
    ends = [min(table["label"].min(), table["prediction"].min()), max(table["label"].max(), table["prediction"].max())]
    axes.plot(ends, ends, color="#b5542c", linewidth=1, linestyle="--")
    last = list(columns.values())[-1]
    axes.set(xlabel="label", ylabel="prediction", title=f"R2 {last['r2']:.3f}, mean absolute error {last['mae']:.2f}")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    pyplot.close(figure)
    return png.getvalue()
