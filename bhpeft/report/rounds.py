"""What is known after each round, of the test and of the rounds before: table, sentence, plot. NumPy and pandas only.

R[t, s] is the main metric after round t on rows of round s <= t. What was forgotten is the backward transfer of
Lopez-Paz and Ranzato 2017 (GEM, arXiv 1706.08840, section 2), here with each round counted by its rows:

    sum over s < T of n_s (R[T, s] - R[s, s]) / sum over s < T of n_s
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bhpeft.errors import InputError
from bhpeft.files import column_indices, read_rows, write_rows
from bhpeft.metrics import wilson_interval
from bhpeft.report import report_for
from bhpeft.report.answered import Answered
from bhpeft.uncertainty import ece

COLUMNS = [
    "round", "evaluated_on", "rows", "metric", "value", "low_95", "high_95", "nll", "ece", "new_rows", "total_rows",
    "trained_rows", "replayed_rows", "epochs", "steps", "seconds", "carry", "replay",
]  # fmt: skip
NAMES = {"accuracy": "accuracy", "rmse": "root mean squared error", "perplexity": "perplexity"}


def main_metric(task) -> str:
    """The figure that a task is judged by: accuracy of labels, RMSE of numbers, perplexity of texts."""
    if task.task_type == "regression":
        return "rmse"
    return "accuracy" if task.labels else "perplexity"


def some_of(answered: Answered, places: Sequence[int]) -> Answered:
    """The answers at some places alone."""
    places = list(places)
    rows: dict[str, Any] = {}
    for name in ("ids", "groups", "outputs", "drawn", "scores", "tokens", "samples", "distances"):
        value = getattr(answered, name)
        cut = value[places] if isinstance(value, np.ndarray) else value and [value[place] for place in places]
        rows[name] = cut
    return dataclasses.replace(answered, **rows)


def evaluation(answered: Answered, task) -> dict[str, Any]:
    """`rows`, `metric` (its name), `value`, with its 95 % Wilson interval `low_95`, `high_95` where it is accuracy,
    `nll` (nats; of a token for texts) and `ece` of the probabilities; None where there is no such thing."""
    report, metric = report_for(task), main_metric(task)
    table = report.predictions(answered, task)
    figures = report.figures(answered, table, task)
    found: dict[str, Any] = {"rows": len(table), "metric": metric, "value": figures[metric]}
    found["low_95"], found["high_95"] = figures.get("accuracy_interval_95", (None, None))
    found["nll"] = math.log(figures["perplexity"]) if metric == "perplexity" else figures.get("nll")
    found["ece"] = _ece(table) if metric == "accuracy" else None
    return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in found.items()}


def _ece(table: pd.DataFrame) -> float | None:
    columns = [name for name in table.columns if name.startswith("prob_")]
    p = table[columns].to_numpy()
    whole = ~np.isnan(p).any(axis=1)
    if not whole.any():
        return None
    likeliest = np.array([name.removeprefix("prob_") for name in columns], dtype=object)[p[whole].argmax(axis=1)]
    return ece(p[whole].max(axis=1), likeliest == table["label"].to_numpy(dtype=object)[whole])


# ---------------------------------------------------------------------------------------------- files


def write_rounds(path: str | Path, rounds: Sequence[dict]) -> None:
    """Write results/rounds/RUN.csv: one line for each round and each set of rows it was evaluated on.

    Args:
        rounds: what each round did (the columns that are the round's own), with `evaluations`, the rest of the columns.
    """
    lines = [{**done, **asked} for done in rounds for asked in done["evaluations"]]
    write_rows(path, COLUMNS, [[line[name] for name in COLUMNS] for line in lines])


def read_rounds(path: str | Path) -> pd.DataFrame:
    """Read what `write_rounds` wrote; empty numbers are NaN.

    Raises:
        InputError: a column is missing, or a number is none.
    """
    header, rows = read_rows(path)
    places = column_indices(path, header, COLUMNS)
    table = pd.DataFrame([[row[place] for place in places] for _, row in rows], columns=COLUMNS)
    for name in set(COLUMNS) - {"evaluated_on", "metric", "carry", "replay"}:
        try:
            table[name] = pd.to_numeric(table[name].mask(table[name] == ""))
        except ValueError as error:
            raise InputError(f"{path}: column {name}: {error}; run again with --overwrite.") from None
    return table


# -------------------------------------------------------------------------------- what is still known


def name_of(number: int, what: str = "round") -> str:
    """`round-01`: a round's folder, and its rows as `evaluated_on` names them; `test-01`: its domain's test."""
    return f"{what}-{number:02d}"


def matrix(rounds: Sequence[dict], what: str = "round", columns: int | None = None) -> np.ndarray:
    """(T, S): R[t, s] after round t + 1 on the rows (or with "test" the test) of round s + 1; NaN where not asked.

    S is T unless `columns` says otherwise: tests of rounds to come are asked as well.
    """
    columns = len(rounds) if columns is None else columns
    found = np.full((len(rounds), columns), np.nan)
    place = {name_of(number, what): number - 1 for number in range(1, columns + 1)}
    for t, done in enumerate(rounds):
        for asked in done["evaluations"]:
            if asked["evaluated_on"] in place and asked["value"] is not None:
                found[t, place[asked["evaluated_on"]]] = asked["value"]
    return found


def still_known(rounds: Sequence[dict], what: str = "round") -> dict[str, float] | None:
    """`then` (R[s, s]), `now` (R[T, s]) and `backward_transfer`, now - then, of all rounds before the last.

    A round counts by its new rows, however many of them are asked (`--max_known_samples`); a test ("test") by its own.
    None where there is no round before. Means of squares for RMSE, of logarithms for perplexity.
    """
    values = matrix(rounds, what)[:, :-1]
    if values.shape[1] == 0 or np.isnan(values).all():
        return None
    metric = rounds[-1]["evaluations"][0]["metric"]
    if what == "round":
        weights = np.array([done["new_rows"] for done in rounds[:-1]], dtype=float)
    else:
        rows = {asked["evaluated_on"]: asked["rows"] for asked in rounds[-1]["evaluations"]}
        weights = np.array([rows.get(name_of(number, what), 0) for number in range(1, len(rounds))], dtype=float)
    asked = ~np.isnan(np.diag(values)) & ~np.isnan(values[-1])  # a part may have no row that fits
    if not asked.any():
        return None
    inside, outside = {"rmse": (np.square, np.sqrt), "perplexity": (np.log, np.exp)}.get(metric, (np.array, float))
    parts = (np.diag(values)[asked], values[-1][asked])
    then, now = (float(outside(np.average(inside(part), weights=weights[asked]))) for part in parts)
    return {"then": then, "now": now, "backward_transfer": now - then}


def sentence(rounds: Sequence[dict]) -> str:
    """How good the last round is, and how much of earlier rounds is still known, in plain words."""
    last = rounds[-1]
    test = next(asked for asked in last["evaluations"] if asked["evaluated_on"] == "test")
    form = "{:.1%}" if test["metric"] == "accuracy" else "{:.3g}"
    name, count = NAMES[test["metric"]], len(rounds)
    how = "1 round" if count == 1 else f"{count} rounds"
    text = f"After {how} ({last['total_rows']:,} rows) its {name} on the test is {form.format(test['value'])}."
    for what, of in (("round", "the rows"), ("test", "the tests")):
        known = still_known(rounds, what)
        if known is not None:
            earlier = "earlier round" if count == 2 else f"{count - 1} earlier rounds"
            then, now = form.format(known["then"]), form.format(known["now"])
            text += f" On {of} of the {earlier} it is {now} now; right after each was learned it was {then}."
    return text


def draw(rounds: Sequence[dict], files: Sequence[str] = ()) -> bytes:
    """A PNG file: the metric on the test over all rows seen so far, and what is known of each round as a heat map.

    Args:
        files: names of the rounds' domains; their tests then make the heat map.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tests = [next(a for a in done["evaluations"] if a["evaluated_on"] == "test") for done in rounds]
    seen, metric = [done["total_rows"] for done in rounds], tests[0]["metric"]
    values = [np.nan if test["value"] is None else test["value"] for test in tests]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    left.plot(seen, values, color="#2f6f9f", marker="o", markersize=4)
    if metric == "accuracy":
        ends = np.array([wilson_interval(round(test["value"] * test["rows"]), test["rows"]) for test in tests])
        left.fill_between(seen, *ends.T, color="#2f6f9f", alpha=0.18, linewidth=0, label="95 % interval (Wilson)")
        left.legend(loc="lower right", frameon=False)
    if len(seen) > 1 and seen[-1] > 20 * seen[0]:
        left.set_xscale("log")
    carry, replay = rounds[-1]["carry"], rounds[-1]["replay"]
    title = f"on the same {tests[0]['rows']} test rows (carry {carry}, replay {replay})"
    left.set(xlabel="training rows seen so far", ylabel=NAMES[metric], title=title)

    what = "test" if files else "round"
    found = matrix(rounds, what, len(files) or None)
    colors = pyplot.get_cmap("Blues" if metric == "accuracy" else "Blues_r").with_extremes(bad="#f2f2f2")
    ends = (min(0.5, np.nanmin(found)), 1.0) if metric == "accuracy" else (np.nanmin(found), np.nanmax(found))
    image = right.imshow(np.ma.masked_invalid(found), cmap=colors, aspect="auto", vmin=ends[0], vmax=ends[1])
    if max(found.shape) <= 14:
        for (t, s), value in np.ndenumerate(found):
            if not np.isnan(value):
                share = (value - ends[0]) / max(ends[1] - ends[0], 1e-12)
                color = "white" if (share > 0.6 if metric == "accuracy" else share < 0.4) else "black"
                right.text(s, t, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    numbers = list(range(1, len(rounds) + 1))
    slanted = {"rotation": 30, "ha": "right", "parse_math": False} if files else {}
    right.set_xticks(range(found.shape[1]), files or numbers, **slanted)
    right.set_yticks(range(len(rounds)), numbers)
    asked = "test of" if files else "rows of round"
    right.set(xlabel=asked, ylabel="after round", title=f"what is still known: {NAMES[metric]}")
    figure.colorbar(image, ax=right, shrink=0.85)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    pyplot.close(figure)
    return png.getvalue()
