"""Report of regression."""

from __future__ import annotations

import io
from statistics import NormalDist

import numpy as np
import pandas as pd

from bhpeft.report.answered import Answered
from bhpeft.scores import regression_figures
from bhpeft.uncertainty import crps_gaussian, interval_coverage, nll_gaussian, total_deviation

ROWS = [
    ("rmse", "root mean squared error"),
    ("mae", "mean absolute error"),
    ("r2", "R2 (share of variance explained)"),
    ("mae_of_mean", "error of guessing the mean"),
    ("coverage_95", "inside the 95 % interval"),
    ("crps", "CRPS"),
]


def predictions(answered: Answered, task) -> pd.DataFrame:
    """id, label and prediction, both in the labels' own units; of what is known also deviations and an interval.

    With samples the prediction is their mean, and `epistemic_sd` their (population) deviation. Where the labels' noise
    is known (validation rows), `total_sd` is their `total_deviation`, and `low_95` to `high_95` is the central 95 %
    interval of a Gaussian with it.
    """
    expected = [float(row.expected) if row.expected else np.nan for row in answered.outputs]
    mean, epistemic = answered.numbers()
    table = pd.DataFrame({"id": answered.ids, "label": expected, "prediction": mean})
    if answered.samples is not None:
        table = table.assign(epistemic_sd=epistemic)
    if answered.noise_sd is not None:
        total = total_deviation(epistemic, answered.noise_sd, answered.noise_samples)
        half = NormalDist().inv_cdf(0.975) * total
        table = table.assign(total_sd=total, low_95=mean - half, high_95=mean + half)
    return table


def figures(answered: Answered, table: pd.DataFrame, task) -> dict:
    """As of `regression_figures`, and the mean absolute error of always guessing the training rows' mean.

    Where the total deviation is known also `coverage_95` (share of labels inside the 95 % interval), `crps` (in the
    labels' units), `nll` (of the Gaussian, nats) and `mean_total_sd`.
    """
    expected, predicted = table["label"].to_numpy(), table["prediction"].to_numpy()
    guess = float(np.abs(expected - answered.mean).mean())
    found = {"rows": len(table), **regression_figures(expected, predicted, answered.deviation), "mae_of_mean": guess}
    if "total_sd" in table:
        gaussians = predicted, table["total_sd"].to_numpy(), expected
        found["coverage_95"] = interval_coverage(*gaussians)
        found |= {"crps": crps_gaussian(*gaussians), "nll": nll_gaussian(*gaussians)}
        found["mean_total_sd"] = float(table["total_sd"].mean())
    return found


def sentence(figures: dict) -> str:
    """How far off it is, beside guessing."""
    share = figures["mae"] / figures["mae_of_mean"] if figures["mae_of_mean"] else float("nan")
    text = (
        f"It is off by {figures['mae']:.2f} on average; guessing the mean each time would be off by "
        f"{figures['mae_of_mean']:.2f} ({share:.0%} of that error remains)."
    )
    if "coverage_95" in figures:
        text += f" Its 95 % intervals hold {figures['coverage_95']:.1%} of the labels."
    return text


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
