"""What the report is made of: every run's files, read as far as they can be; what cannot be read is named.

A torn or foreign file costs the report that file and no more. NumPy only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bhpeft.errors import InputError
from bhpeft.files import column_indices, read_rows
from bhpeft.metrics import expected_truth, truth_of
from bhpeft.results import (
    OOD_SUFFIX,
    PREDICTION_COLUMNS,
    HumanScore,
    ModelOutput,
    read_human_evaluation,
    read_metrics,
    read_model_outputs,
    run_and_annotator,
)
from bhpeft.scores import IRREGULAR
from bhpeft.uncertainty_report import Predictions, read_measures, read_uncertainty

Row = dict[str, str]
T = TypeVar("T")


@dataclass
class RunFacts:
    """One run, as far as its files tell.

    Attributes:
        record: of results/metrics/; None without one.
        rows: of results/predictions/, column -> text; None without them.
        predictions: the same with probabilities or numbers; None where they have none.
        ood: measures of uncertainty of rows of another domain, name -> numbers; empty without them.
        outputs: of results/model_outputs/.
        people: annotator -> scores; "" where none is named.
    """

    name: str
    record: dict[str, Any] | None = None
    rows: list[Row] | None = None
    predictions: Predictions | None = None
    ood: dict[str, np.ndarray] = field(default_factory=dict)
    outputs: list[ModelOutput] | None = None
    people: dict[str, list[HumanScore]] = field(default_factory=dict)


@dataclass
class Rounds:
    """One file of results/rounds/."""

    name: str
    header: list[str]
    rows: list[list[str]]


@dataclass
class Facts:
    """All that results/ holds; `warnings` name what could not be read, and why."""

    runs: list[RunFacts]
    rounds: list[Rounds]
    warnings: list[str]


def gather(results_dir: Path, names: Sequence[str] = ()) -> Facts:
    """Read the files of all runs, or of those named.

    Raises:
        InputError: there is nothing to report on, or no run of that name.
    """
    warnings: list[str] = []

    def tried(read: Callable[[Path], T], path: Path) -> T | None:
        try:
            return read(path)
        except InputError as error:
            warnings.append(str(error).replace(f"{results_dir}/", ""))
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            why = f"{type(error).__name__}: {error}"
            warnings.append(f"{path.relative_to(results_dir)}: cannot be made sense of ({why}).")
        return None

    runs: dict[str, RunFacts] = {}

    def found(folder: str, suffix: str) -> Iterator[Path]:
        return (path for path in sorted((results_dir / folder).glob(f"*{suffix}")) if path.is_file())

    def run(name: str) -> RunFacts:
        return runs.setdefault(name, RunFacts(name))

    for path in found("metrics", ".json"):
        run(path.stem).record = tried(_record, path)
    for path in found("predictions", ".csv"):
        if path.name.endswith(OOD_SUFFIX):
            continue
        run(path.stem).rows = tried(_prediction_rows, path)
        if _has_uncertainty(run(path.stem).rows):
            run(path.stem).predictions = tried(read_uncertainty, path)
    for path in found("predictions", OOD_SUFFIX):
        known = runs.get(path.name.removesuffix(OOD_SUFFIX))
        if known and known.predictions:
            known.ood = tried(partial(_ood_measures, known.predictions), path) or {}
    for path in found("model_outputs", ".txt"):
        run(path.stem).outputs = tried(read_model_outputs, path)
    for path in found("human_evaluation", ".csv"):
        name, annotator = run_and_annotator(path)
        scores = tried(read_human_evaluation, path)
        if scores and any(row.factual is not None or row.justifies is not None for row in scores):
            run(name).people[annotator] = scores
    rounds = [table for path in found("rounds", ".csv") if (table := tried(_rounds, path))]
    if unknown := [name for name in names if name not in runs]:
        raise InputError(f"{unknown[0]}: no run of that name in {results_dir}; there are: {', '.join(runs) or 'none'}.")
    rounds = [table for table in rounds if not names or table.name in names]
    facts = [run for run in runs.values() if not names or run.name in names]
    kept = [run for run in facts if run.record or run.rows or run.outputs or run.people]
    if not kept and not rounds:
        raise InputError(
            f"{results_dir}: no run's files that can be read; run parameter_efficient_fine_tuning.py first."
            + "".join(f" {warning}" for warning in warnings[:3])
        )
    for bare in kept:
        file = f"metrics/{bare.name}.json"
        if bare.record is None and not (results_dir / file).exists():
            warnings.append(f"{bare.name}: has no record ({file}); reported as far as its other files go.")
    return Facts(sorted(kept, key=lambda run: (run.record is None, run.name)), rounds, warnings)


def _record(path: Path) -> dict[str, Any]:
    return read_metrics(path)


def _prediction_rows(path: Path) -> list[Row]:
    header, rows = read_rows(path)
    column_indices(path, header, PREDICTION_COLUMNS)
    if not rows:
        raise InputError(f"{path}: a header and no rows; predict at least one row.")
    return [dict(zip(header, row, strict=True)) for _, row in rows]


def _ood_measures(own: Predictions, path: Path) -> dict[str, np.ndarray]:
    return read_measures(path, list(own.measures), bool(own.labels))


def _rounds(path: Path) -> Rounds:
    header, rows = read_rows(path)
    column_indices(path, header, ["round"])
    return Rounds(path.stem, header, [row for _, row in rows])


def _has_uncertainty(rows: list[Row] | None) -> bool:
    rows = [row for row in rows or [] if row["label"].strip()]
    if not rows or "reference_nll" in rows[0]:  # texts, which may look like numbers
        return False
    if any(name.startswith("prob_") for name in rows[0]):
        return True
    return all(_number(row[name]) is not None for row in rows for name in ("label", "prediction"))


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# ------------------------------------------------------------------------------- rows that two runs share


@dataclass
class Answers:
    """A run's N test rows, to be compared with another's.

    Attributes:
        kind: "labels", "numbers" or "texts".
        rows: (id, expected answer, query) of each, in the order of the arrays.
        arrays: labels: right (0 or 1) and, where there are probabilities, nll; numbers: squares; texts: nll, tokens.
    """

    kind: str
    rows: list[tuple[str, str, str]]
    arrays: dict[str, np.ndarray]


def answers_of(run: RunFacts) -> Answers | None:
    """A run's rows that have a label, sorted by id, so that two runs over the same rows have them in one order; None
    where there are none, or ids repeat."""
    places = [i for i, row in enumerate(run.rows or []) if row["label"].strip()]
    if not places or len({run.rows[i]["id"] for i in places}) < len(places):
        return None
    order = sorted(places, key=lambda i: run.rows[i]["id"])
    rows = [run.rows[i] for i in order]
    queries = [""] * len(rows)
    if run.outputs and len(run.outputs) == len(run.rows):
        queries = [run.outputs[i].query for i in order]
    keys = [(row["id"], row["label"], query) for row, query in zip(rows, queries, strict=True)]
    if "reference_nll" in rows[0]:
        columns = {name: [_number(row.get(f"reference_{name}", "")) for row in rows] for name in ("nll", "tokens")}
        if any(None in values for values in columns.values()):
            return None
        return Answers("texts", keys, {name: np.array(values) for name, values in columns.items()})
    if any(name.startswith("prob_") for name in rows[0]) or not _has_uncertainty(rows):
        right = np.array([row["label"].strip() == row["prediction"].strip() for row in rows], dtype=float)
        p = [_number(row.get(f"prob_{row['label'].strip()}", "")) for row in rows]
        nll = {} if None in p else {"nll": -np.log(np.clip(np.array(p), 1e-300, None))}
        return Answers("labels", keys, {"right": right, **nll})
    errors = [float(row["prediction"]) - float(row["label"]) for row in rows]
    return Answers("numbers", keys, {"squares": np.square(errors)})


def shared_rows(a: Answers, b: Answers) -> bool:
    """Whether two runs answered the same test rows: ids, expected answers and, where both have them, queries."""
    if a.kind != b.kind or len(a.rows) != len(b.rows):
        return False
    return all(x[:2] == y[:2] and (x[2] == y[2] or not x[2] or not y[2]) for x, y in zip(a.rows, b.rows, strict=True))


# ---------------------------------------------------------------------------------------------- samples


@dataclass
class Sample:
    """One answer to be shown; `how` is "right", "wrong", "irregular" or "" where there is no telling."""

    how: str
    query: str
    output: str
    expected: str
    probability: float | None = None


def samples(run: RunFacts, each: int = 3) -> list[Sample]:
    """Some right, wrong and irregular answers, spread evenly over the rows."""
    if not run.outputs:
        return []
    rows = run.rows if run.rows and len(run.rows) == len(run.outputs) else [{}] * len(run.outputs)
    groups: dict[str, list[Sample]] = {"right": [], "wrong": [], "irregular": [], "": []}
    for row, output in zip(rows, run.outputs, strict=True):
        how, probability = _judged(row, output), _number(row.get("max_prob", ""))
        groups[how].append(Sample(how, output.query, output.output, output.expected, probability))
    picked = []
    for group in groups.values():
        places = np.linspace(0, len(group) - 1, min(each, len(group))).round().astype(int)
        picked += [group[i] for i in places]
    return picked


def _judged(row: Row, output: ModelOutput) -> str:
    if not row:
        expected, truth = expected_truth(output.expected), truth_of(output.output)
        if expected == "tie":
            return ""
        return "irregular" if truth == "tie" else "right" if truth == expected else "wrong"
    if "reference_nll" in row or not row["label"].strip() or not any(name.startswith("prob_") for name in row):
        return ""
    if row["prediction"] in (IRREGULAR, "tie"):
        return "irregular"
    return "right" if row["prediction"].strip() == row["label"].strip() else "wrong"
