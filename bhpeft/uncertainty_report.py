"""What a file of results/predictions/ says of a model's uncertainty: figures with intervals, curves, plots.

NumPy only; matplotlib is imported where it is used.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bhpeft import uncertainty as un
from bhpeft.errors import InputError, nearest
from bhpeft.files import column_indices, read_rows, write_atomic, write_rows
from bhpeft.metrics import wilson_interval
from bhpeft.results import PREDICTION_COLUMNS
from bhpeft.scores import entropy

# Columns that are taken for measures of uncertainty without being named: higher is less sure.
MEASURES = ("one_minus_max_prob", "entropy", "expected_entropy", "mutual_information", "variance", "kl_to_mean",
            "max_prob_sd", "feature_distance")  # fmt: skip
DEVIATIONS = ("sd", "total_sd", "epistemic_sd", "prediction_sd")  # of regression
REJECTED = (0.1, 0.2, 0.5)  # fractions in the table
LEVELS = (0.5, 0.9, 0.95)  # of intervals in the table
SCHEMES = ("width", "mass")
# Okabe and Ito's colours, told apart by line and marker in print as well.
STYLES = [
    {"color": color, "linestyle": line, "marker": marker}
    for color, line, marker in zip(
        ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00"),
        ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1))),
        ("o", "s", "^", "D", "v", "P", "X"),
        strict=True,
    )
]
METADATA = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}


class FreeText(InputError):
    """A predictions file of free text, which has no uncertainty here."""


class Figure(NamedTuple):
    """One figure of a file; `measure` is "" where it is of no one measure, low and high are None without interval."""

    measure: str
    name: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass
class Predictions:
    """One file's N labelled rows, of labels or, where `labels` is empty, of numbers.

    Attributes:
        labels: C names.
        p: (N, C) probabilities, None for numbers.
        y: (N,) the labels' places, or numbers.
        predicted: (N,) numbers, None for labels.
        correct: (N,) whether the column `prediction` is the label, None for numbers.
        measures: name -> (N,); standard deviations for numbers.
        notes: what was left out.
    """

    path: Path
    labels: list[str]
    p: np.ndarray | None
    y: np.ndarray
    predicted: np.ndarray | None
    correct: np.ndarray | None
    measures: dict[str, np.ndarray]
    notes: list[str] = field(default_factory=list)


# -------------------------------------------------------------------------------------------- reading


class _Table:
    """A predictions file's cells; its numbers are read strictly."""

    def __init__(self, path: Path):
        self.path = path
        self.header, self.rows = read_rows(path)
        if not self.rows:
            raise InputError(f"{path}: a header and no rows; name a file that has rows.")

    def texts(self, name: str) -> list[str]:
        place = column_indices(self.path, self.header, [name])[0]
        return [row[place].strip() for _, row in self.rows]

    def numbers(self, name: str) -> np.ndarray:
        values = []
        for (line, _), text in zip(self.rows, self.texts(name), strict=True):
            try:
                values.append(float(text))
            except ValueError:
                values.append(math.nan)
            if not math.isfinite(values[-1]):
                raise InputError(
                    f"{self.path}:{line}: {name} is {text[:40]!r}; every row needs a finite number: predict it again."
                )
        return np.array(values)

    def numeric(self, name: str) -> bool:
        try:
            return all(math.isfinite(float(text)) for text in self.texts(name) if text)
        except ValueError:
            return False

    def probabilities(self) -> tuple[list[str], np.ndarray | None]:
        labels = [name.removeprefix("prob_") for name in self.header if name.startswith("prob_")]
        if not labels:
            return [], None
        p = np.column_stack([self.numbers(f"prob_{label}") for label in labels])
        bad = (p < -un.TOLERANCE).any(axis=1) | (np.abs(p.sum(axis=1) - 1) > un.TOLERANCE)
        if bad.any():
            line, sums = self.rows[int(bad.argmax())][0], p[bad][0].sum()
            raise InputError(
                f"{self.path}:{line}: the prob_ columns are no probabilities (they sum to {sums:.6g}); "
                "there must be one for each label."
            )
        return labels, p

    def measures(self, p: np.ndarray | None, names: Sequence[str]) -> dict[str, np.ndarray]:
        """The measures of that name, or all there are of `MEASURES` or `DEVIATIONS`."""
        made = {} if p is None else {"one_minus_max_prob": un.one_minus_max_prob(p)}
        if p is not None and "entropy" not in self.header:
            made["entropy"] = entropy(p)
        columns = [name for name in self.header if name not in (*PREDICTION_COLUMNS, "max_prob")]
        known = list(made) + [name for name in columns if not name.startswith("prob_") and self.numeric(name)]
        for name in names:
            if name not in known:
                found = ", ".join(known) or "none"
                raise InputError(f"{self.path}: no measure {name!r}; found: {found}.{nearest(name, known)}")
        names = names or [name for name in (DEVIATIONS if p is None else MEASURES) if name in known]
        found = {name: made[name] if name in made else self.numbers(name) for name in dict.fromkeys(names)}
        for name, values in found.items():
            if p is None and values.min() < 0:
                line = self.rows[int(values.argmin())][0]
                raise InputError(f"{self.path}:{line}: {name} is {values.min()}; a standard deviation is 0 or more.")
        return found


def read_measures(path: Path, names: Sequence[str], of_labels: bool) -> dict[str, np.ndarray]:
    """Measures of a file whose rows need no label: those of out-of-domain rows."""
    table = _Table(path)
    _, p = table.probabilities()
    if (p is not None) != of_labels:
        own, other = ("labels", "numbers") if p is not None else ("numbers", "labels")
        raise InputError(f"{path}: predictions of {own} beside a file of {other}; name some of the same model.")
    return table.measures(p, names)


def read_uncertainty(path: Path, names: Sequence[str] = ()) -> Predictions:
    """Read a predictions file and its measures; rows without a label are left out.

    Raises `InputError` for missing columns, numbers that are none, and labels without a `prob_` column; `FreeText`
    where there are neither labels nor numbers.
    """
    table = _Table(path)
    column_indices(path, table.header, PREDICTION_COLUMNS)
    all_rows = table.rows
    given = [bool(text) for text in table.texts("label")]
    table.rows = [row for row, there in zip(all_rows, given, strict=True) if there]
    if not table.rows:
        raise InputError(f"{path}: no row has a label; there is nothing to compare the predictions with.")
    notes = []
    if left_out := len(all_rows) - len(table.rows):
        notes.append(f"{left_out} of {len(all_rows)} rows have no label and are left out")

    labels, p = table.probabilities()
    if not labels:
        if not (table.numeric("label") and table.numeric("prediction")):
            raise FreeText(
                f"{path}: no prob_<label> columns, and the labels and predictions are no numbers; name predictions of "
                "labels or of numbers (free text has no uncertainty here)."
            )
        y, predicted = table.numbers("label"), table.numbers("prediction")
        return Predictions(path, [], None, y, predicted, None, table.measures(None, names), notes)

    expected, predicted = table.texts("label"), table.texts("prediction")
    place = {label: i for i, label in enumerate(labels)}
    for (line, _), label in zip(table.rows, expected, strict=True):
        if label not in place:
            raise InputError(
                f"{path}:{line}: the label {label[:40]!r} has no column of probabilities; found: "
                f"{', '.join(labels)[:200]}.{nearest(label, labels)}"
            )
    y = np.array([place[label] for label in expected])
    correct = np.array([a == b for a, b in zip(expected, predicted, strict=True)])
    if none := sum(label not in place for label in predicted):
        notes.append(f"{none} of {len(y)} predictions are none of the labels: wrong answers")
    return Predictions(path, labels, p, y, None, correct, table.measures(p, names), notes)


# -------------------------------------------------------------------------------------------- figures


def ood_auroc(measures: dict[str, np.ndarray], ood: dict[str, np.ndarray]) -> list[Figure]:
    """AUROC of each measure for telling out-of-domain rows from the file's; resamples draw from both together."""
    found = []
    for name in measures:
        scores = np.concatenate([measures[name], ood[name]])
        outside = np.repeat([False, True], [len(measures[name]), len(ood[name])])

        def of_counts(counts, scores, inside):  # AUROC of "wrong" rows, here those outside
            return un.selective_figures(scores, inside, counts=counts)[:, 1]

        interval = un.bootstrap_interval(of_counts, [scores, ~outside], by_counts=True)
        found.append(Figure(name, "auroc_ood", un.auroc(scores, outside), *interval))
    return found


def label_uncertainty(
    predictions: Predictions, bins: int = 15, reject: Sequence[float] = ()
) -> tuple[list[Figure], dict[str, list[Figure]]]:
    """Figures of labels, and each measure's accuracies after rejecting the fractions `reject`.

    Accuracy and everything of a measure are by the column `prediction`; NLL, Brier and ECE are of the likeliest label.
    """
    p, y, correct = predictions.p, predictions.y, predictions.correct
    rows, likeliest = len(y), p.argmax(axis=1) == y
    confidence = p.max(axis=1)
    figures = [
        Figure("", "accuracy", float(correct.mean()), *wilson_interval(int(correct.sum()), rows)),
        Figure("", "likeliest_accuracy", float(likeliest.mean()), *wilson_interval(int(likeliest.sum()), rows)),
    ]
    means = np.column_stack([un.nll(p, y, average=False), un.brier(p, y, average=False)])
    low, high = un.bootstrap_interval(lambda counts, x: counts @ x / rows, [means], by_counts=True)
    figures += [Figure("", name, float(means[:, i].mean()), low[i], high[i]) for i, name in enumerate(("nll", "brier"))]
    for scheme in SCHEMES:
        figures.append(Figure("", f"ece_{scheme}", un.ece(confidence, likeliest, bins, scheme)))
        figures.append(Figure("", f"ece_{scheme}_if_calibrated", un.ece_if_calibrated(confidence, bins, scheme)))

    arrays, curves = list(predictions.measures.values()), {}
    if not arrays:
        return figures, curves

    def ranks(counts, *arrays):
        return np.stack([un.selective_figures(values, correct, (), counts) for values in arrays], axis=1)

    low, high = un.bootstrap_interval(ranks, arrays, by_counts=True)
    for i, (name, values) in enumerate(predictions.measures.items()):
        pairs = zip(("aurc", "auroc_errors"), un.selective_figures(values, correct).tolist(), strict=True)
        figures += [Figure(name, key, value, low[i, j], high[i, j]) for j, (key, value) in enumerate(pairs)]
        figures += rejection_curve(name, values, correct, REJECTED)
        curves[name] = rejection_curve(name, values, correct, reject)
    return figures, curves


def rejection_curve(name: str, values: np.ndarray, correct: np.ndarray, reject: Sequence[float]) -> list[Figure]:
    """Accuracies after rejecting fractions, with Wilson intervals of the rows that are left."""
    found = []
    for fraction, accuracy in zip(reject, un.accuracy_after_rejecting(values, correct, reject).tolist(), strict=True):
        left = un.kept_rows(len(correct), fraction)
        interval = wilson_interval(min(accuracy * left, left), left)
        found.append(Figure(name, f"accuracy_rejecting_{100 * fraction:g}", accuracy, *interval))
    return found


def number_uncertainty(predictions: Predictions) -> list[Figure]:
    """Figures of numbers: RMSE, and of each standard deviation coverage of its intervals, CRPS and NLL."""
    y, mean = predictions.y, predictions.predicted
    rows, squares = len(y), (y - mean) ** 2
    low, high = un.bootstrap_interval(lambda counts, x: np.sqrt(counts @ x / rows), [squares], by_counts=True)
    figures = [Figure("", "rmse", math.sqrt(squares.mean()), low, high)]
    for name, sd in predictions.measures.items():
        for level in LEVELS:
            inside = un.interval_coverage(mean, sd, y, level, average=False)
            interval = wilson_interval(int(inside.sum()), rows)
            figures.append(Figure(name, f"coverage_{100 * level:g}", float(inside.mean()), *interval))
        each = {"mean_sd": sd, "crps": un.crps_gaussian(mean, sd, y, average=False)}
        if sd.min() > 0:  # else it is infinite
            each["nll"] = un.nll_gaussian(mean, sd, y, average=False)
        means = np.column_stack(list(each.values()))
        low, high = un.bootstrap_interval(lambda counts, x: counts @ x / rows, [means], by_counts=True)
        figures += [Figure(name, key, float(means[:, i].mean()), low[i], high[i]) for i, key in enumerate(each)]
    return figures


# ---------------------------------------------------------------------------------------------- table


def _cell(figure: Figure | None) -> str:
    if figure is None or math.isnan(figure.value):
        return "-"
    digits = 3 if figure.name.startswith(("auroc", "accuracy_rejecting", "coverage")) else 4
    numbers = [figure.value] if figure.low is None else [figure.value, figure.low, figure.high]
    value, *ends = (f"{number:.{digits}f}" for number in numbers)
    return f"{value} ({' to '.join(ends)})" if ends else value


def _grid(headings: Sequence[str], names: Sequence[str], figures: dict, keys: Sequence[str]) -> list[str]:
    cells = [list(headings), *([name, *(_cell(figures.get((name, key))) for key in keys)] for name in names)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def text_table(predictions: Predictions, figures: Sequence[Figure], bins: int = 15) -> str:
    """One file's figures as text, 95 % intervals in brackets."""
    by_key = {(figure.measure, figure.name): figure for figure in figures}
    names = list(predictions.measures)
    lines = [str(predictions.path), *(f"note: {note}" for note in predictions.notes)]
    if not predictions.labels:
        lines += [f"{'rows':<22}{len(predictions.y)}", f"{'RMSE':<22}{_cell(by_key['', 'rmse'])}"]
        if not names:
            return "\n".join([*lines, f"note: no column of {', '.join(DEVIATIONS)}: nothing says how sure it is"])
        keys = [*(f"coverage_{100 * level:g}" for level in LEVELS), "crps", "nll", "mean_sd"]
        headings = ["", *(f"inside the {100 * level:g} % interval" for level in LEVELS), "CRPS", "NLL", "mean of it"]
    else:
        lines.append(f"{'rows':<22}{len(predictions.y)} of {len(predictions.labels)} labels")
        lines.append(f"{'accuracy':<22}{_cell(by_key['', 'accuracy'])}")
        if not np.array_equal(predictions.p.argmax(axis=1) == predictions.y, predictions.correct):
            lines.append(f"{'of the likeliest':<22}{_cell(by_key['', 'likeliest_accuracy'])}")
        lines += [f"{words:<22}{_cell(by_key['', key])}" for words, key in (("NLL (nats)", "nll"), ("Brier", "brier"))]
        for scheme in SCHEMES:
            chance = by_key["", f"ece_{scheme}_if_calibrated"].value
            lines.append(
                f"{f'ECE, equal {scheme}':<22}{_cell(by_key['', f'ece_{scheme}'])} "
                f"({bins} bins; below {chance:.4f} in 95 % of the cases if calibrated)"
            )
        keys = ["aurc", "auroc_errors", *(f"accuracy_rejecting_{100 * f:g}" for f in REJECTED)]
        headings = ["", "AURC", "AUROC of errors", *(f"accuracy without {100 * f:g} %" for f in REJECTED)]
    if any(figure.name == "auroc_ood" for figure in figures):
        keys.append("auroc_ood")
        headings.append("AUROC of out-of-domain rows")
    return "\n".join([*lines, "", *_grid(headings, names, by_key, keys)])


# ------------------------------------------------------------------------------------- curves, plots


def interval_curve(predictions: Predictions, levels: Sequence[float]) -> dict[str, list[Figure]]:
    """Share of rows inside intervals of many levels, by standard deviation, with Wilson intervals."""
    found: dict[str, list[Figure]] = {}
    for name, sd in predictions.measures.items():
        for level in levels:
            inside = un.interval_coverage(predictions.predicted, sd, predictions.y, level, average=False)
            ends = wilson_interval(int(inside.sum()), len(inside))
            found.setdefault(name, []).append(Figure(name, f"{level:g}", float(inside.mean()), *ends))
    return found


def write_figures(path: Path, figures: Sequence[Figure]) -> None:
    """Write figures as CSV: measure, figure, value, low, high."""
    write_rows(path, ["measure", "figure", "value", "low", "high"], figures)


def write_reliability(path: Path, predictions: Predictions, bins: int) -> None:
    """Write both schemes' bins as CSV; a bin without rows has empty means."""
    rows = []
    for scheme in SCHEMES:
        found = un.reliability_bins(*_calibration(predictions), bins, scheme)
        for k, count in enumerate(found.count.tolist()):
            means = [float(found.confidence[k]), float(found.accuracy[k])] if count else [None, None]
            rows.append([scheme, float(found.edges[k]), float(found.edges[k + 1]), *means, count])
    write_rows(path, ["scheme", "above", "up_to", "confidence", "accuracy", "rows"], rows)


def write_rejection(path: Path, curves: dict[str, list[Figure]], reject: Sequence[float]) -> None:
    """Write each measure's accuracies after rejecting as CSV."""
    rows = [
        [name, f"{100 * fraction:g}", figure.value, figure.low, figure.high]
        for name, curve in curves.items()
        for fraction, figure in zip(reject, curve, strict=True)
    ]
    write_rows(path, ["measure", "rejected_percent", "accuracy", "low", "high"], rows)


def write_risk_coverage(path: Path, predictions: Predictions) -> None:
    """Write each measure's risk-coverage curve as CSV."""
    rows = []
    for name, values in predictions.measures.items():
        coverages, risks = un.risk_coverage(values, predictions.correct)
        rows += [[name, *pair] for pair in zip(coverages.tolist(), risks.tolist(), strict=True)]
    write_rows(path, ["measure", "coverage", "risk"], rows)


def write_intervals(path: Path, curves: dict[str, list[Figure]]) -> None:
    """Write the shares inside intervals as CSV."""
    rows = [[f.measure, f.name, f.value, f.low, f.high] for curve in curves.values() for f in curve]
    write_rows(path, ["deviation", "level", "inside", "low", "high"], rows)


def _calibration(predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    return predictions.p.max(axis=1), predictions.p.argmax(axis=1) == predictions.y


def _figure(rows: int = 1, columns: int = 1, width: float = 5.2, height: float = 4.2, **options):
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(width * columns, height * rows), layout="constrained")
    return canvas, canvas.subplots(rows, columns, squeeze=False, **options)


def _save(canvas, path: Path) -> None:
    """Write PNG and SVG beside each other; the same data give the same bytes."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "bhpeft"}):
        for kind, metadata in METADATA.items():
            data = io.BytesIO()
            canvas.savefig(data, format=kind, dpi=150, metadata=metadata)
            write_atomic(path.with_name(f"{path.name}.{kind}"), data.getvalue())


def draw_reliability(path: Path, predictions: Predictions, bins: int) -> None:
    """Accuracy over confidence with Wilson intervals of the bins of equal width, and how many rows these hold."""
    _save(reliability_plot(predictions, bins), path)


def reliability_plot(predictions: Predictions, bins: int):
    """The matplotlib figure of `draw_reliability`."""
    canvas, ((upper,), (lower,)) = _figure(2, 1, 5.2, 2.9, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    upper.plot([0, 1], [0, 1], color="0.4", linewidth=1, linestyle=":", label="calibrated")
    for scheme, style in zip(SCHEMES, STYLES, strict=False):
        found = un.reliability_bins(*_calibration(predictions), bins, scheme)
        there = found.count > 0
        x, accuracy = found.confidence[there], found.accuracy[there]
        if scheme == "width":
            pairs = zip(accuracy, found.count[there], strict=True)
            ends = np.array([wilson_interval(round(a * n), int(n)) for a, n in pairs])
            below, above = np.maximum(accuracy - ends[:, 0], 0), np.maximum(ends[:, 1] - accuracy, 0)
            upper.errorbar(x, accuracy, [below, above], label="bins of equal width", capsize=2, markersize=5, **style)
            lower.bar(found.edges[:-1], found.count, np.diff(found.edges), align="edge", color="0.75", edgecolor="0.2")
        else:
            upper.plot(x, accuracy, label="bins of equally many rows", markersize=4, fillstyle="none", **style)
    upper.set(xlim=(0, 1), ylim=(-0.02, 1.02), ylabel="accuracy of the likeliest label", title=_title(predictions))
    upper.legend(loc="best", frameon=False)
    lower.set(xlabel="probability of the likeliest label", ylabel="rows")
    return canvas


def _title(predictions: Predictions) -> str:
    return f"{predictions.path.stem}, {len(predictions.y)} rows"


def _draw_rejection(axes, lines: dict[str, list[Figure]], reject: Sequence[float]) -> None:
    percents = [100 * fraction for fraction in reject]
    for i, (label, curve) in enumerate(lines.items()):
        style = STYLES[i % len(STYLES)]
        axes.plot(percents, [f.value for f in curve], label=label, markersize=5, fillstyle="none", **style)
    axes.set(xlabel="rejected, the least sure rows first (%)", ylabel="accuracy of what is left")
    axes.legend(loc="best", frameon=False)


def draw_rejection(path: Path, predictions: Predictions, curves: dict[str, list[Figure]], reject: Sequence[float]):
    """Accuracy over the share rejected, one line a measure, beside rejecting at random."""
    _save(rejection_plot(predictions, curves, reject), path)


def rejection_plot(predictions: Predictions, curves: dict[str, list[Figure]], reject: Sequence[float]):
    """The matplotlib figure of `draw_rejection`."""
    canvas, ((axes,),) = _figure()
    axes.axhline(float(predictions.correct.mean()), color="0.4", linewidth=1, linestyle=":", label="at random")
    _draw_rejection(axes, curves, reject)
    axes.set_title(_title(predictions))
    return canvas


def draw_rejections(path: Path, runs: dict[str, dict[str, list[Figure]]], reject: Sequence[float]) -> None:
    """Rejection curves of several runs, one panel for each measure that all of them have."""
    shared = [name for name in next(iter(runs.values())) if all(name in curves for curves in runs.values())]
    columns = min(3, len(shared))
    canvas, panels = _figure(-(-len(shared) // columns), columns, sharey=True)
    for axes, name in zip(panels.flat, shared, strict=False):
        _draw_rejection(axes, {run: curves[name] for run, curves in runs.items()}, reject)
        axes.set_title(name)
    for axes in panels.flat[len(shared) :]:
        axes.set_axis_off()
    _save(canvas, path)


def draw_risk_coverage(path: Path, predictions: Predictions) -> None:
    """Risk over coverage, one line a measure, beside the order that knows the answers."""
    canvas, ((axes,),) = _figure()
    coverages, risks = un.risk_coverage(~predictions.correct, predictions.correct)
    axes.plot(coverages, risks, color="0.4", linewidth=1, linestyle=":", label="errors last (the best there is)")
    for i, (name, values) in enumerate(predictions.measures.items()):
        coverages, risks = un.risk_coverage(values, predictions.correct)
        every = (0.02 * i, 0.12)  # of the diagonal of the axes
        style = {"markersize": 5, "fillstyle": "none", **STYLES[i % len(STYLES)]}
        axes.plot(coverages, risks, label=name, markevery=every, linewidth=1.2, **style)
    axes.set(xlim=(0, 1), ylim=(0, None), xlabel="coverage: share of rows answered, the surest first")
    axes.set(ylabel="risk: share of wrong answers among them", title=_title(predictions))
    axes.legend(loc="best", frameon=False)
    _save(canvas, path)


def draw_intervals(path: Path, predictions: Predictions, curves: dict[str, list[Figure]]) -> None:
    """Share of rows inside central intervals over their level (Kuleshov et al. 2018, arXiv 1807.00263)."""
    _save(intervals_plot(predictions, curves), path)


def intervals_plot(predictions: Predictions, curves: dict[str, list[Figure]]):
    """The matplotlib figure of `draw_intervals`."""
    canvas, ((axes,),) = _figure()
    axes.plot([0, 1], [0, 1], color="0.4", linewidth=1, linestyle=":", label="calibrated")
    for i, (name, curve) in enumerate(curves.items()):
        levels = [float(f.name) for f in curve]
        style = {"markersize": 5, "fillstyle": "none", **STYLES[i % len(STYLES)]}
        axes.plot(levels, [f.value for f in curve], label=name, **style)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="level of the interval", ylabel="share of rows inside")
    axes.set_title(_title(predictions))
    axes.legend(loc="best", frameon=False)
    return canvas
