"""Figures of a method's predictions, and the table and plot of several methods over seeds."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np

from bhpeft import uncertainty as un
from bhpeft.feature_distance import COLUMN as FEATURE_DISTANCE
from bhpeft.files import write_atomic
from bhpeft.uncertainty_report import read_measures, read_uncertainty

BASELINES = ("map", "map+temperature")  # what the others are set against
MEASURE = "one_minus_max_prob"  # what rejects and tells other domains, unless a method's settings say otherwise
# name of the figure, heading, digits, whether lower is better
COLUMNS = (
    ("accuracy", "accuracy", 4, False),
    ("nll", "NLL", 4, True),
    ("ece", "ECE", 4, True),
    ("brier", "Brier", 4, True),
    ("aurc", "AURC", 4, True),
    ("gain_10", "gain without 10 %", 4, False),
    ("auroc_ood", "OOD AUROC", 4, False),
    ("auroc_ood_distance", "by distance", 4, False),
    ("seconds", "seconds", 0, True),
)


def figures_of(file: Path, ood_file: Path) -> dict:
    """All figures of a predictions file; `ood_file` may be absent.

    Returns:
        accuracy, nll, ece and ece_mass (15 bins), brier; and measure -> {aurc, auroc_errors, gain_10 (accuracy without
        the least sure tenth, minus accuracy), auroc_ood} as `measures`.
    """
    found = read_uncertainty(file)
    p, y, correct = found.p, found.y, found.correct
    confidence = p.max(axis=1)
    ood = read_measures(ood_file, list(found.measures), True) if ood_file.is_file() else None
    measures = {}
    for name, values in found.measures.items():
        aurc, errors, kept = un.selective_figures(values, correct, (0.1,)).tolist()
        measures[name] = {"aurc": aurc, "auroc_errors": errors, "gain_10": kept - float(correct.mean())}
        if ood is not None:
            outside = np.repeat([False, True], [len(values), len(ood[name])])
            measures[name]["auroc_ood"] = un.auroc(np.concatenate([values, ood[name]]), outside)
    return {
        "accuracy": float(correct.mean()),
        "nll": un.nll(p, y),
        "ece": un.ece(confidence, correct),
        "ece_mass": un.ece(confidence, correct, scheme="mass"),
        "brier": un.brier(p, y),
        "measures": measures,
    }


def value_of(run: dict, name: str) -> float:
    """One figure of a run, those of a measure by the method's own; NaN where there is none."""
    if name in run:
        return run[name]
    if name == "auroc_ood_distance":
        return run["measures"].get(FEATURE_DISTANCE, {}).get("auroc_ood", math.nan)
    return run["measures"][run["settings"].get("measure", MEASURE)].get(name, math.nan)


def t_interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """Student's t interval of a mean over seeds; NaN for fewer than two values, or where one is NaN."""
    from scipy.stats import t

    if len(values) < 2 or np.isnan(values).any():
        return math.nan, math.nan
    mean = float(np.mean(values))
    half = float(t.ppf((1 + level) / 2, len(values) - 1) * np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean - half, mean + half


def _by_method(runs: list[dict], order: list[str]) -> dict[str, dict[int, dict]]:
    groups: dict[str, dict[int, dict]] = {}
    for method in order:
        group = {run["seed"]: run for run in runs if run["method"] == method}
        if group:
            groups[method] = dict(sorted(group.items()))
    return groups


def aligned(title: str, lines: list[list[str]]) -> list[str]:
    """A title, and lines of cells under each other: the first to the left, the rest to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = []
    for line in lines:
        first, *rest = zip(line, widths, strict=True)
        text.append("  ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest)]))
    return [title, *text]


def _differences(groups: dict[str, dict[int, dict]], base: str) -> list[list[str]]:
    """A line of cells for each method that shares seeds with `base` and is not told in a table of another one."""
    lines = []
    for method, group in groups.items():
        shared = [seed for seed in group if seed in groups.get(base, {})]
        if not shared or method in BASELINES[: BASELINES.index(base) + 1]:
            continue
        cells = [method, str(len(shared))]
        for name, _, digits, _ in COLUMNS:
            values = [value_of(group[seed], name) - value_of(groups[base][seed], name) for seed in shared]
            low, high = t_interval(values)
            mean = np.mean(values)
            ends = "" if math.isnan(low) else f" ({low:+.{digits}f} to {high:+.{digits}f})"
            cells.append("-" if math.isnan(mean) else f"{mean:+.{digits}f}{ends}")
        lines.append(cells)
    return lines


def tables(runs: list[dict], order: list[str]) -> str:
    """Means +- deviations over seeds, and paired differences to each of `BASELINES` with 95 % t intervals, as text."""
    groups = _by_method(runs, order)
    lines = [["method", "seeds", *(heading for _, heading, _, _ in COLUMNS)]]
    for method, group in groups.items():
        cells = [method, str(len(group))]
        for name, _, digits, _ in COLUMNS:
            values = [value_of(run, name) for run in group.values()]
            spread = f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
            mean = np.mean(values)
            cells.append("-" if math.isnan(mean) else f"{mean:.{digits}f}{spread}")
        lines.append(cells)
    text = aligned("Mean +- sample deviation over seeds:", lines)
    for base in BASELINES:
        lines = [lines[0], *_differences(groups, base)]
        if len(lines) > 1:
            title = f"Minus {base}, seed by seed (95 % interval: Student's t of the differences):"
            text += ["", *aligned(title, lines)]
    return "\n".join(text)


def draw(path: Path, runs: list[dict], order: list[str]) -> None:
    """A panel a figure: each method's mean over seeds and its 95 % t interval, and every seed as a small mark."""
    from matplotlib.figure import Figure

    groups = _by_method(runs, order)
    columns = [column for column in COLUMNS if column[0] != "seconds"]
    canvas = Figure(figsize=(2.3 * len(columns) + 1.5, 0.32 * len(groups) + 1.4), layout="constrained")
    panels = np.atleast_1d(canvas.subplots(1, len(columns), sharey=True))
    for axes, (name, heading, _, lower) in zip(panels, columns, strict=True):
        for place, (method, group) in enumerate(groups.items()):
            values = [value_of(run, name) for run in group.values()]
            own = method.startswith("bh-peft")
            color = "#d55e00" if own else "#0072b2"
            low, high = t_interval(values)
            if not math.isnan(low):
                axes.plot([low, high], [place, place], color=color, linewidth=1.2)
            axes.plot(values, [place] * len(values), "|", color="0.45", markersize=7)
            axes.plot([np.mean(values)], [place], "s" if own else "o", color=color, markersize=5)
        axes.set_title(f"{heading} ({'lower' if lower else 'higher'} is better)", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(axis="x", color="0.9")
        seen = [value_of(run, name) for group in groups.values() for run in group.values()]
        seen = [value for value in seen if not math.isnan(value)]
        if seen:  # an interval of two seeds must not squeeze the rest
            margin = 0.4 * (max(seen) - min(seen)) or 0.01
            axes.set_xlim(min(seen) - margin, max(seen) + margin)
    panels[0].set_yticks(range(len(groups)), list(groups))
    panels[0].invert_yaxis()
    png = io.BytesIO()
    canvas.savefig(png, format="png", dpi=120, metadata={"Software": None})
    write_atomic(path, png.getvalue())
