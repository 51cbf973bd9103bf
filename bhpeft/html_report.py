"""All runs in one file to be looked at: results/report.html and results/report.md.

The page is self-contained: plots stand in it as SVG, nothing is loaded, nothing runs. Texts of models, data and names
are escaped by the template; a policy in its head forbids scripts as well.
"""

from __future__ import annotations

import html
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bhpeft import __version__, report_plots, report_tables
from bhpeft import uncertainty_report as un
from bhpeft.compare import MAIN_METRICS, find, main_metric, make_table
from bhpeft.files import write_atomic
from bhpeft.report_data import Facts, Rounds, RunFacts, gather, samples
from bhpeft.run_comparisons import comparisons

TEMPLATES = Path(__file__).parent / "templates"
REJECT = [percent / 100 for percent in range(0, 100, 10)]
BINS = 15
CURVES = (  # (title, what is drawn: name in the history -> words, logarithmic)
    ("Loss", {"loss": "training rows", "eval_loss": "validation rows"}, False),
    ("Learning rate", {"learning_rate": "learning rate"}, False),
    ("What the loss is made of", {"nll": "NLL", "kl_term": "KL's part"}, True),
    ("KL of posterior and prior (nats)", {"kl": "KL"}, False),
    ("Gradients by the Gaussian weights", {"nll_grad_norm": "of the NLL", "kl_grad_norm": "of the KL"}, True),
    ("Mean sigma of the Gaussian weights", {"sigma": "sigma"}, False),
)
MOST_ROWS = 60  # of a table of rounds that are shown
MOST_LINES = 7  # of a plot of rounds
BESIDE = ("nll", "ece")  # figures that stand in columns of their own where `metric` names the main one


def write_report(
    results_dir: str | Path, names: Sequence[str] = (), made: str | None = None
) -> tuple[list[Path], list[str]]:
    """Write report.html and report.md into `results_dir`, replacing those there.

    Args:
        names: of the runs to report on (default: all).
        made: the time stamp (default: now, in UTC).

    Returns:
        The files, and warnings: what could not be read or shown.

    Raises:
        InputError: there is nothing to report on, or the files cannot be written.
    """
    import jinja2

    results_dir = Path(results_dir)
    facts = gather(results_dir, names)
    page = build(facts, results_dir) | {
        "made": made or time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "version": __version__,
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=lambda name: bool(name) and name.endswith(".html"),
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["md"] = markdown_text
    files = []
    for name in ("report.html", "report.md"):
        files.append(results_dir / name)
        write_atomic(files[-1], environment.get_template(name).render(page).rstrip() + "\n")
    return files, facts.warnings


def markdown_text(text: Any) -> str:
    """A text as one line of Markdown that shows it as it is, in a table as well."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]#|~$])", r"\\\1", html.escape(line, quote=False))


def build(facts: Facts, results_dir: Path) -> dict[str, Any]:
    """What the templates show; parts that cannot be made are left out and named in `facts.warnings`."""

    def tried(make, *arguments, default=None):
        try:
            return make(*arguments)
        except Exception as error:  # one odd record must not cost the others their report
            run = next((a.name for a in arguments if isinstance(a, RunFacts | Rounds)), "all runs")
            facts.warnings.append(f"{run}: {make.__name__} cannot be shown ({type(error).__name__}: {error}).")
            return default

    with report_plots.page_style():
        page = {
            "overview": tried(overview, facts.runs),
            "overview_plots": tried(overview_plots, facts.runs, default=[]),
            "comparisons": tried(comparisons, facts.runs, default=[]),
            "differing": tried(report_tables.differing_settings, facts.runs, default=[]),
            "runs": [run_page(run, i, results_dir, tried) for i, run in enumerate(facts.runs)],
            "rounds": [page for i, table in enumerate(facts.rounds) if (page := tried(rounds_page, table, i))],
        }
    return page | {"warnings": facts.warnings}


def overview(runs: Sequence[RunFacts]) -> report_tables.Table | None:
    """The table of `util/compare_runs.py`."""
    records = [run.record for run in runs if run.record]
    if not records:
        return None
    columns = make_table(records)
    numeric = [all(isinstance(value, int | float | None) for value in column.values) for column in columns]
    rows = [list(row) for row in zip(*(column.texts for column in columns), strict=True)]
    return report_tables.Table([column.heading for column in columns], rows, numeric)


def overview_plots(runs: Sequence[RunFacts]) -> list[str]:
    """For each task, dataset and main metric of two or more runs, the metric with its interval."""
    groups: dict[tuple, list] = {}
    for run in runs:
        metric = main_metric(run.record) if run.record else None
        if metric is None:
            continue
        key = tuple(str(find(run.record, name)) for name in ("task", "data")) + (metric,)
        ends = run.record["metrics"].get(f"{metric}_interval_95") or (None, None)
        groups.setdefault(key, []).append((run.name, run.record["metrics"][metric], *ends))
    plots = []
    for i, ((_, data, metric), rows) in enumerate(sorted(groups.items())):
        rows.sort(key=lambda row: -row[1] if MAIN_METRICS[metric] else row[1])
        if 2 <= len(rows) <= 40:
            canvas = report_plots.intervals(rows, f"{metric} on {data}, 95 %")
            plots.append(report_plots.as_svg(canvas, f"o{i}", f"{metric} of {len(rows)} runs on {data} with intervals"))
    return plots


def run_page(run: RunFacts, number: int, results_dir: Path, tried) -> dict[str, Any]:
    """One run's part of the report."""
    key, tables = f"r{number}", report_tables
    record = run.record
    page: dict[str, Any] = {
        "name": run.name,
        "key": key,
        "created": record["created"] if record else None,
        "settings": tried(tables.settings_of, record, default=[]) if record else [],
        "costs": tried(tables.costs, record, default=[]) if record else [],
        "whole": tables.whole_record(record) if record else None,
        "metrics": tried(tables.metrics_table, run),
        "outputs_figures": tried(tables.outputs_figures, run, default=[]),
        "confusion": tried(tables.confusion, run),
        "samples": tried(samples, run, default=[]),
        "human": tried(tables.human_table, run),
        "agreement": tried(tables.agreement_table, run),
        "automatic": tried(tables.automatic_table, run),
        "plots": tried(curves, run, key, default=[]),
        "uncertainty": None,
        "measures": None,
        "notes": [],
        "sureness": [],
        "image": None,
    }
    if run.predictions:
        page |= tried(uncertainty, run, key, default={})
    image = Path("plots") / run.name / "answers.png"
    if (results_dir / image).is_file():
        page["image"] = image.as_posix()
    return page


def curves(run: RunFacts, key: str) -> list[str]:
    """Loss, learning rate, NLL and KL over the steps, as far as they were logged."""
    history = (run.record or {}).get("history")
    history = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    plots = []
    for i, (title, names, log) in enumerate(CURVES):
        found = {}
        for name, words in names.items():
            pairs = [(entry.get("step"), entry.get(name)) for entry in history]
            pairs = [pair for pair in pairs if all(isinstance(value, int | float) for value in pair)]
            if log:
                pairs = [pair for pair in pairs if pair[1] > 0]
            if pairs:
                found[words] = tuple(zip(*pairs, strict=True))
        if found and any(len(xs) > 1 for xs, _ in found.values()):
            canvas = report_plots.lines(found, title, "step", log=log)
            words = f"{title} of {run.name} over {max(xs[-1] for xs, _ in found.values())} steps"
            plots.append(report_plots.as_svg(canvas, f"{key}-h{i}", words))
    return plots


def uncertainty(run: RunFacts, key: str) -> dict[str, Any]:
    """Figures and plots of `util/uncertainty_evaluation.py`."""
    p = run.predictions
    page: dict[str, Any] = {"notes": p.notes}
    if p.labels:
        figures, rejection = un.label_uncertainty(p, BINS, REJECT)
        plots = {"Reliability": un.reliability_plot(p, BINS)}
        if rejection:
            plots["Accuracy after rejecting the least sure"] = un.rejection_plot(p, rejection, REJECT)
    else:
        figures = un.number_uncertainty(p)
        plots = {"Predictions over labels": report_plots.scatter(p.y.tolist(), p.predicted.tolist(), run.name)}
        if p.measures:
            levels = [i / 20 for i in range(1, 20)]
            plots["Rows inside intervals"] = un.intervals_plot(p, un.interval_curve(p, levels))
    if run.ood:
        figures = [*figures, *un.ood_auroc(p.measures, run.ood)]
    page["uncertainty"] = report_tables.uncertainty_table(figures)
    page["measures"] = report_tables.measures_table(p, figures)
    page["sureness"] = [
        report_plots.as_svg(canvas, f"{key}-u{i}", f"{title} of {run.name}, {len(p.y)} rows")
        for i, (title, canvas) in enumerate(plots.items())
    ]
    return page


# ------------------------------------------------------------------------------------------------ rounds


def rounds_page(table: Rounds, number: int) -> dict[str, Any]:
    """One file of rounds: its figures over the rounds, and its rows."""
    plots = []
    for i, (metric, lines) in enumerate(round_curves(table).items()):
        found = dict(list(lines.items())[:MOST_LINES])
        canvas = report_plots.lines(found, metric.replace("_", " "), "round")
        plots.append(report_plots.as_svg(canvas, f"t{number}-{i}", f"{metric} of {table.name} over the rounds"))
    filled = [i for i in range(len(table.header)) if any(row[i] for row in table.rows)]
    numeric = [all(_number(row[i]) is not None or not row[i] for row in table.rows) for i in filled]
    shown = [[_shown(row[i]) for i in filled] for row in table.rows[:MOST_ROWS]]
    return {
        "name": table.name,
        "plots": plots[:6],
        "table": report_tables.Table([table.header[i].replace("_", " ") for i in filled], shown, numeric),
        "left_out": len(table.rows) - len(shown),
    }


def _shown(text: str) -> str:
    value = _number(text)
    return text if value is None else report_tables.number(value)


def round_curves(table: Rounds) -> dict[str, dict[str, tuple]]:
    """metric -> line -> (rounds, values).

    Rows are either one figure each (columns `metric` and `value`, and those of `BESIDE`) or one evaluation each, its
    figures in columns. A line is what else tells rows of one round apart: `evaluated_on` and other columns of text.
    """
    header = table.header
    texts = [n for i, n in enumerate(header) if any(_number(r[i]) is None and r[i] for r in table.rows)]
    lines_by = [name for name in header if name in texts or name == "evaluated_on"]
    lines_by = [name for name in lines_by if name not in ("round", "metric", "value")]
    values = {name: {row[header.index(name)] for row in table.rows} for name in lines_by}
    lines_by = [name for name in lines_by if name == "evaluated_on" or 1 < len(values[name]) < 9]
    long = "metric" in header and "value" in header
    other = ("round", "seed", "rows", "evaluated_on", *texts)
    wide = [name for name in header if name not in other and not name.endswith(("low", "high"))]
    found: dict[str, dict[str, list]] = {}
    for row in table.rows:
        cells = dict(zip(header, row, strict=True))
        line = ", ".join(cells[name] for name in lines_by) or table.name
        pairs = [(cells["metric"], cells["value"])] if long else []
        pairs += [(name, cells[name]) for name in wide if not long or name in BESIDE]
        for metric, text in pairs:
            place, value = _number(cells["round"]), _number(text)
            if place is not None and value is not None:
                found.setdefault(metric, {}).setdefault(line, []).append((place, value))
    return {
        metric: {line: tuple(zip(*sorted(points), strict=True)) for line, points in lines.items()}
        for metric, lines in found.items()
    }


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return int(value) if value.is_integer() and abs(value) < 1e15 else value
