"""Runs side by side: columns taken from the records of `results/metrics/`, sorted and laid out. Plain Python."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bhpeft.errors import InputError, nearest
from bhpeft.files import csv_line

Record = dict[str, Any]

# A run's main metric is the first of these that it has: is more better? and what stands beside it, the first it has.
MAIN_METRICS = {"accuracy": True, "rmse": False, "perplexity": False}
SECOND_METRICS = {"accuracy": ("f1_macro", "scored_accuracy"), "rmse": ("mae",), "perplexity": ("bleu",)}
PATHS = {  # columns with a short name that stand in the record as they are
    "run": "run_name",
    "task": "task_type",
    "adapter": "config.adapter_name",
    "train rows": "rows.train",
    "trainable %": "parameters.trainable_percent",
    "adapter %": "parameters.adapter_percent",
    "train s": "timings.train",
}
DEFAULT_COLUMNS = (
    "run", "task", "data", "adapter", "base", "train rows", "trainable %", "adapter %", "metric", "second", "train s",
    "host MiB", "GPU MiB",
)  # fmt: skip
FORMATS = ("text", "markdown", "csv")
ABSENT = object()


@dataclass
class Column:
    """One column of N runs.

    Attributes:
        values: numbers, texts or lists as the records hold them, None where a run has none.
        texts: how they are shown.
        fields: heading -> N values, what the column is in CSV.
    """

    heading: str
    values: list[Any]
    texts: list[str] = field(default_factory=list)
    fields: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self):
        self.texts = self.texts or [text_of(value) for value in self.values]
        self.fields = self.fields or {self.heading: self.values}

    def take(self, order: Sequence[int]) -> Column:
        """The column with its runs in another order."""
        fields = {heading: [values[i] for i in order] for heading, values in self.fields.items()}
        return Column(self.heading, [self.values[i] for i in order], [self.texts[i] for i in order], fields)


# ------------------------------------------------------------------------------------------ one record


def look_up(record: Record, path: str) -> Any:
    """The value at a dotted path, as `metrics.base.accuracy`; `ABSENT` where the record has no such place."""
    value: Any = record
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            return ABSENT
        value = value[part]
    return None if value in ("None", "") else value  # transformers writes unset flags as the word


def find(record: Record, name: str) -> Any:
    """The value of a column: a short name, the bare name of a metric, else of a flag, or a dotted path."""
    if name in COMPUTED:
        return COMPUTED[name](record)
    paths = [PATHS[name]] if name in PATHS else [f"metrics.{name}", f"config.{name}", name]
    return next((value for value in (look_up(record, path) for path in paths) if value is not ABSENT), ABSENT)


def has(record: Record, name: str) -> bool:
    """Whether a run has a value in a column."""
    return find(record, name) not in (ABSENT, None)


def number_at(record: Record, path: str) -> float | None:
    """The finite number at a dotted path, or None."""
    value = look_up(record, path)
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return value if numeric and math.isfinite(value) else None


def main_metric(record: Record) -> str | None:
    """Name of a run's main metric; None where it has answered no rows."""
    return next((name for name in MAIN_METRICS if number_at(record, f"metrics.{name}") is not None), None)


def second_metric(record: Record) -> str | None:
    """Name of the metric that stands beside the main one, or None."""
    names = SECOND_METRICS.get(main_metric(record) or "", ())
    return next((name for name in names if number_at(record, f"metrics.{name}") is not None), None)


def _short(record: Record, path: str) -> str | None:
    value = look_up(record, path)
    if value is ABSENT or value is None:
        return None
    name = Path(str(value)).name
    return Path(name).stem if Path(name).suffix in (".csv", ".tsv", ".jsonl", ".parquet") else name


def _peak_memory(record: Record, where: str) -> float | None:
    """The most memory (MiB) that any rank held on "host" or "gpu"."""
    ranks = look_up(record, "hardware.peak_memory_mib")
    peaks = [number_at(rank, where) for rank in ranks if isinstance(rank, dict)] if isinstance(ranks, list) else []
    return max((peak for peak in peaks if peak is not None), default=None)


COMPUTED = {
    "data": lambda record: _short(record, "config.dataset_name"),
    "base": lambda record: _short(record, "config.base_model"),
    "metric": lambda record: number_at(record, f"metrics.{main_metric(record)}"),
    "second": lambda record: number_at(record, f"metrics.{second_metric(record)}"),
    "host MiB": lambda record: _peak_memory(record, "host"),
    "GPU MiB": lambda record: _peak_memory(record, "gpu"),
}


# ------------------------------------------------------------------------------------------ many records


def make_table(records: Sequence[Record], names: Sequence[str] = (), by: str | None = None) -> list[Column]:
    """Columns of runs, sorted.

    Args:
        names: of the columns (default: those of `DEFAULT_COLUMNS` that any run has); the run's name always comes along.
        by: column to sort by, ascending, runs without it last; it comes first. Without it runs of one task and
            dataset stand together, the best by its main metric first.

    Raises:
        InputError: no run has such a column, or it is a group of values.
    """
    wanted = list(names) if "run" in names or "run_name" in names else ["run", *names]
    if not names:
        wanted = [name for name in DEFAULT_COLUMNS if any(has(record, name) for record in records)]
    if by is not None:
        place = _place(records, by)
        by = next((name for name in wanted if _place(records, name) == place), by)
        wanted.insert(0, by)
    columns = [make_column(records, name) for name in dict.fromkeys(wanted)]
    order = sorted(range(len(records)), key=lambda i: _default_order(records[i]))
    if by is not None:
        order.sort(key=lambda i: _order(columns[0].values[i]))
    return [column.take(order) for column in columns]


def make_column(records: Sequence[Record], name: str) -> Column:
    """A column by its name, in the records' order.

    Raises:
        InputError: as `make_table`.
    """
    found = [find(record, name) for record in records]
    if all(value is ABSENT for value in found):
        raise InputError(f"column {name!r}: no run has one.{nearest(name, known_names(records))}")
    for value in found:
        if isinstance(value, dict):
            keys = [f"{name}.{key}" for key in value]
            shown = ", ".join(keys[:5] + ["..."] * (len(keys) > 5))
            raise InputError(f"column {name!r}: is a group of values; name one of them: {shown}")
    values = [None if value is ABSENT else value for value in found]
    if name == "metric":
        return _metric_column("metric", values, [main_metric(r) for r in records], [_interval(r) for r in records])
    if name == "second":
        return _metric_column("second", values, [second_metric(r) for r in records])
    return Column(name, values)


def known_names(records: Sequence[Record]) -> list[str]:
    """Every name that a column of these runs can have."""
    names = [*PATHS, *COMPUTED]
    for record in records:
        names += [key for part in ("metrics", "config") if isinstance(record[part], dict) for key in record[part]]
        names += _paths(record)
    return list(dict.fromkeys(names))


def _paths(group: dict, before: str = "") -> Iterator[str]:
    for key, value in group.items():
        if isinstance(value, dict):
            yield from _paths(value, f"{before}{key}.")
        else:
            yield before + key


def _place(records: Sequence[Record], name: str) -> str:
    """The dotted path that a column's name stands for, so that two names of one thing are seen to be one."""
    if name in ("metric", "second"):
        metrics = {main_metric(r) if name == "metric" else second_metric(r) for r in records} - {None}
        return f"metrics.{metrics.pop()}" if len(metrics) == 1 else name
    if name in PATHS or name in COMPUTED:
        return PATHS.get(name, name)
    paths = (f"metrics.{name}", f"config.{name}")
    return next((path for path in paths if any(look_up(r, path) is not ABSENT for r in records)), name)


def _interval(record: Record) -> list[float] | None:
    ends = look_up(record, f"metrics.{main_metric(record)}_interval_95")
    right = isinstance(ends, list) and len(ends) == 2 and all(isinstance(end, int | float) for end in ends)
    return ends if right else None


def _metric_column(kind: str, values: list, metrics: list, intervals: list | None = None) -> Column:
    """A column whose runs need not have the same metric: where they differ, each cell names its own."""
    different = len(set(metrics) - {None}) > 1
    texts = []
    for value, metric, ends in zip(values, metrics, intervals or [None] * len(values), strict=True):
        text = "-" if value is None else f"{metric} {value:.4f}" if different else f"{value:.4f}"
        texts.append(text + (f" [{ends[0]:.4f}, {ends[1]:.4f}]" if ends else ""))
    fields = {kind: metrics, f"{kind}_value": values}
    if intervals:
        low_high = [ends or (None, None) for ends in intervals]
        fields |= {"low_95": [low for low, _ in low_high], "high_95": [high for _, high in low_high]}
    heading = kind if different else next((metric for metric in metrics if metric), kind)
    return Column(heading, values, texts, fields)


def _default_order(record: Record) -> tuple:
    metric = main_metric(record)
    value = number_at(record, f"metrics.{metric}")
    better = 0.0 if value is None else -value if MAIN_METRICS[metric] else value
    groups = [str(find(record, name)) if has(record, name) else "" for name in ("task", "data")]
    return (*groups, metric is None, metric or "", better, str(record["run_name"]))


def _order(value: Any) -> tuple:
    """Numbers by size, then texts, then what is missing."""
    if value is None:
        return (2, 0.0, "")
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    return (0, number, "") if math.isfinite(number) else (1, 0.0, text_of(value))


# ------------------------------------------------------------------------------------------ layout


def text_of(value: Any) -> str:
    """A value as one line: floats with four digits, "-" where there is none."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return " ".join((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).split())


def layout(columns: Sequence[Column], kind: str) -> str:
    """The table as "text", "markdown" or "csv", lines ended.

    Numbers of CSV have all their digits, and missing ones are empty fields; the main metric is four fields there:
    its name, its value, and the ends of its 95 % interval.
    """
    if kind == "csv":
        fields = {heading: values for column in columns for heading, values in column.fields.items()}
        values = [[_cell(value) for value in values] for values in fields.values()]
        return "".join(map(csv_line, [list(fields), *zip(*values, strict=True)]))
    escaped = "\\|" if kind == "markdown" else "|"
    cells = [[text.replace("|", escaped) for text in (column.heading, *column.texts)] for column in columns]
    widths = [max(map(len, texts)) for texts in cells]
    right = [all(isinstance(value, int | float | None) for value in column.values) for column in columns]
    for texts, width, to_right in zip(cells, widths, right, strict=True):
        texts[:] = [text.rjust(width) if to_right else text.ljust(width) for text in texts]
    lines = list(zip(*cells, strict=True))
    if kind == "text":
        return "".join("  ".join(line).rstrip() + "\n" for line in lines)
    rule = ["-" * (width - 1) + (":" if to_right else "-") for width, to_right in zip(widths, right, strict=True)]
    return "".join("| " + " | ".join(line) + " |\n" for line in [lines[0], rule, *lines[1:]])


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, int | float | str) else text_of(value)
