"""Tables of the report: figures with intervals, settings, costs, explanations."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from bhpeft.agreement import cohen_kappa, krippendorff_alpha, raw_agreement
from bhpeft.arguments import ADAPTER_OWN, ALL_OWN, BH_PEFT_OWN
from bhpeft.compare import find, text_of
from bhpeft.explanation_metrics import METRICS as AUTOMATIC
from bhpeft.explanation_metrics import automatic_scores, mean
from bhpeft.metrics import (
    accuracy_counts,
    exemplar_kind,
    expected_truth,
    explanation_intervals,
    explanation_scores,
    wilson_interval,
)
from bhpeft.report_data import RunFacts
from bhpeft.results import ADAPTER_SETTINGS
from bhpeft.uncertainty_report import REJECTED, Figure, Predictions

WORDS = {
    "accuracy": "accuracy", "f1_macro": "F1, mean over the labels", "f1_weighted": "F1, weighted by support",
    "majority_baseline": "what the commonest label gives", "first_word_baseline": "what the first word alone gives",
    "irregular": "answers that are no label", "ties": "answers neither true nor false",
    "scored_accuracy": "accuracy by probability", "mean_confidence": "mean probability of its answer",
    "nll": "negative log-likelihood (nats)", "sure_share": "share of sure answers (probability 0.9 or more)",
    "sure_accuracy": "accuracy of the sure answers", "exact_match": "answers equal word for word",
    "rmse": "root mean squared error", "mae": "mean absolute error", "r2": "R2 (share of variance explained)",
    "mae_of_mean": "error of guessing the mean", "perplexity": "perplexity of the expected answers",
    "bleu": "BLEU of its answers", "mean_words": "words an answer", "eval_loss": "loss on validation rows",
    "likeliest_accuracy": "accuracy of the likeliest label", "brier": "Brier score", "aurc": "AURC",
    "ece_width": "ECE, bins of equal width", "ece_width_if_calibrated": "... below this in 95 % if calibrated",
    "ece_mass": "ECE, bins of equally many rows", "ece_mass_if_calibrated": "... below this in 95 % if calibrated",
    "auroc_errors": "AUROC of errors", "mean_sd": "mean standard deviation", "crps": "CRPS",
}  # fmt: skip
SETTINGS = (
    "base_model", "dataset_name", "task_type", "adapter_name", *ADAPTER_SETTINGS, "sites", "learning_rate",
    "lr_scheduler_type", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "max_train_samples", "max_length", "predict_by", "posterior_samples", "precision", "seed",
)  # fmt: skip
OF_TRAINING = (
    "learning_rate", "lr_scheduler_type", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "kl_weight", "max_train_samples", "warmup_steps", "train_sampling_strategy",
)  # fmt: skip
NONE = {"max_steps": -1, "posterior_samples": 0}  # what says that there is no such setting
# Settings in which runs differ without differing in what they do.
INCIDENTAL = re.compile(
    r"run_name|output_dir|results_dir|overwrite|local_rank|train_batch_size|adapter_path|report_to|disable_tqdm|smoke"
    r"|(logging|eval|save|do|hub|trackio|push)_.*|.*_eval_batch_size|eval_batch_size"
)


@dataclass
class Table:
    """Headings and rows of texts; `numeric` says which columns are set to the right."""

    headings: list[str]
    rows: list[list[str]] = field(default_factory=list)
    numeric: list[bool] = field(default_factory=list)

    def __post_init__(self):
        self.numeric = self.numeric or [False] + [True] * (len(self.headings) - 1)


def number(value: Any) -> str:
    """A number as the report shows it: four digits behind the point, counts whole, "-" where there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text_of(value)
    if isinstance(value, int) or (abs(value) >= 1000 and value == int(value)):
        return f"{int(value):,}"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"


def with_ends(value: Any, low: Any = None, high: Any = None) -> str:
    """A number with the ends of its interval, as "0.8750 (0.8514 to 0.8952)"."""
    ends = None not in (low, high) and math.isfinite(low) and math.isfinite(high)
    return number(value) + (f" ({number(float(low))} to {number(float(high))})" if ends else "")


def words_of(name: str) -> str:
    """A figure's name in words."""
    return WORDS.get(name, name.replace("_", " "))


# ------------------------------------------------------------------------------------------- one run


def metrics_table(run: RunFacts) -> Table | None:
    """The record's figures beside those of the frozen base and of validation rows."""
    if run.record is None:
        return None
    own = run.record["metrics"]
    parts = {"test": own}
    parts |= {name: own[name] for name in ("base", "validation") if isinstance(own.get(name), dict)}
    headings = {"test": "test rows", "base": "frozen base", "validation": "validation rows"}
    names = [name for name in dict.fromkeys(key for part in parts.values() for key in part) if _scalar(parts, name)]
    names.sort(key=lambda name: list(WORDS).index(name) if name in WORDS else len(WORDS))
    table = Table(["", *(headings[part] for part in parts)])
    for name in names:
        cells = []
        for part in parts.values():
            ends = part.get(f"{name}_interval_95")
            ends = ends if isinstance(ends, list) and len(ends) == 2 else (None, None)
            cells.append(with_ends(part.get(name), *ends))
        table.rows.append([words_of(name), *cells])
    return table if table.rows else None


def _scalar(parts: dict[str, dict], name: str) -> bool:
    values = [part.get(name) for part in parts.values()]
    return any(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def uncertainty_table(figures: Sequence[Figure]) -> Table:
    """Figures of the whole file; those of a measure stand in `measures_table`."""
    table = Table(["", "value (95 %)"])
    table.rows = [[words_of(f.name), with_ends(f.value, f.low, f.high)] for f in figures if not f.measure]
    return table


def measures_table(predictions: Predictions, figures: Sequence[Figure]) -> Table | None:
    """What each measure of uncertainty is worth."""
    keys = ["aurc", "auroc_errors", *(f"accuracy_rejecting_{100 * share:g}" for share in REJECTED)]
    headings = ["AURC", "AUROC of errors", *(f"accuracy without {100 * share:g} %" for share in REJECTED)]
    if not predictions.labels:
        keys = [name for name in dict.fromkeys(figure.name for figure in figures if figure.measure)]
        headings = [f"inside the {name[9:]} % interval" if name[:9] == "coverage_" else words_of(name) for name in keys]
    found = {(figure.measure, figure.name): figure for figure in figures}
    if any(figure.name == "auroc_ood" for figure in figures) and "auroc_ood" not in keys:
        keys, headings = [*keys, "auroc_ood"], [*headings, "AUROC of out-of-domain rows"]
    table = Table(["measure", *headings])
    for measure in predictions.measures:
        cells = [found.get((measure, key)) for key in keys]
        table.rows.append([measure.replace("_", " "), *(with_ends(*f[2:]) if f else "-" for f in cells)])
    return table if table.rows else None


def confusion(run: RunFacts) -> Table | None:
    """Counts of label (rows) and prediction (columns), with the record's own names; None for many labels or none."""
    if not run.predictions or not run.predictions.labels or len(run.predictions.labels) > 12:
        return None
    labels = run.predictions.labels
    pairs = [(row["label"].strip(), row["prediction"].strip()) for row in run.rows or []]
    other = any(b not in labels for a, b in pairs if a in labels)
    columns = [*labels, *(["(none of them)"] if other else [])]
    table = Table(["label, predicted:", *columns])
    for label in labels:
        said = [b if b in labels else "(none of them)" for a, b in pairs if a == label]
        table.rows.append([label, *(str(said.count(column)) for column in columns)])
    return table


def settings_of(record: dict[str, Any]) -> list[tuple[str, str]]:
    """The settings that decide what a run does, as far as they are set and its adapter has them."""
    config = flat_config(record)
    names = [name for name in SETTINGS if _concerns(config, name)]
    known = [name for name in names if config.get(name) not in (None, "", "None", []) and config[name] is not False]
    found = [(name, text_of(config[name])) for name in known if config[name] != NONE.get(name)]
    return [(name, Path(text).name if text.startswith("/") else text) for name, text in found]


def _concerns(config: dict[str, Any], name: str) -> bool:
    """Whether the run's adapter has such a setting at all, and, of training, whether it trained."""
    if config.get("do_train") is False and name in OF_TRAINING:
        return False
    return name not in ALL_OWN or name in ADAPTER_OWN.get(str(config.get("adapter_name")), BH_PEFT_OWN)


def _setting(config: dict[str, Any], name: str) -> str:
    value = config.get(name) if _concerns(config, name) else None
    return "-" if value == "None" else text_of(_without_folders(value))


def _without_folders(value: Any) -> Any:
    """The same with the names of files and folders in place of where they lie on this machine."""
    if isinstance(value, dict):
        return {name: _without_folders(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_folders(part) for part in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def flat_config(record: dict[str, Any]) -> dict[str, Any]:
    """The configuration without its groups, if it has any."""
    flat: dict[str, Any] = {}
    for name, value in record["config"].items():
        flat.update(value if isinstance(value, dict) else {name: value})
    return flat


def costs(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows, parameters, time and memory."""
    found = [(f"{name} rows", number(count)) for name, count in (record.get("rows") or {}).items()]
    parameters = record["parameters"]
    if all(isinstance(parameters.get(name), int | float) for name in ("trainable", "all", "trainable_percent")):
        share = f"{parameters['trainable']:,} of {parameters['all']:,} ({parameters['trainable_percent']:.4g} %)"
        found.append(("trained parameters", share))
    found += [(f"time to {name}", f"{t:,.1f} s") for name, t in record["timings"].items() if isinstance(t, int | float)]
    ranks = record["hardware"].get("peak_memory_mib")
    for where in ("host", "gpu"):
        each = [rank.get(where) for rank in ranks if isinstance(rank, dict)] if isinstance(ranks, list) else []
        if each := [value for value in each if isinstance(value, int | float)]:
            found.append((f"peak {where} memory of a rank", f"{max(each):,.0f} MiB"))
    hardware = {name: value for name, value in record["hardware"].items() if name != "peak_memory_mib"}
    return found + [(name.replace("_", " "), text_of(value)) for name, value in hardware.items() if value is not None]


def whole_record(record: dict[str, Any]) -> str:
    """Configuration, versions and the rest of the record but its history, as JSON."""
    told = {name: value for name, value in record.items() if name != "history"}
    return json.dumps(_without_folders(told), indent=2, ensure_ascii=False)


def outputs_figures(run: RunFacts) -> list[tuple[str, str]]:
    """True/false figures of a run without a record, off its outputs."""
    if run.record is not None or not run.outputs:
        return []
    if all(expected_truth(row.expected) == "tie" for row in run.outputs):
        return []
    counts = accuracy_counts(run.outputs)
    ends = wilson_interval(counts.correct, counts.total)
    return [("accuracy", with_ends(counts.accuracy, *ends)), ("answers neither true nor false", str(counts.tie))]


# ------------------------------------------------------------------------------------- explanations


def human_table(run: RunFacts) -> Table | None:
    """People's scores: overall, factual, justifies, by kind of exemplar, with Wilson intervals."""
    if not run.people:
        return None
    table = Table(["judged by", "rows", "overall", "factual", "justifies"])
    for person, rows in run.people.items():
        for words, kind in (("", None), (", positive exemplars", "pos"), (", negative exemplars", "neg")):
            scores = explanation_scores(rows, kind)
            if kind and not scores.judged:
                continue
            ends = explanation_intervals(scores)
            cells = [with_ends(getattr(scores, name), *ends[name]) for name in ("overall", "factual", "justifies")]
            table.rows.append([(person or "(no name)") + words, str(scores.judged), *cells])
    return table


def agreement_table(run: RunFacts) -> Table | None:
    """How far several people agree on a run."""
    if len(run.people) < 2:
        return None
    places = sorted({row.index for rows in run.people.values() for row in rows})
    headings = ["", "who", "same answer", "Cohen's kappa", "Krippendorff's alpha, all"]
    table = Table(headings, numeric=[False, False, True, True, True])
    for question in ("factual", "justifies"):
        values = {}
        for person, rows in run.people.items():
            known = {row.index: getattr(row, question) for row in rows}
            values[person or "(no name)"] = [known.get(place) for place in places]
        alpha = number(krippendorff_alpha(list(values.values())))
        for a, b in combinations(values, 2):
            pair = number(raw_agreement(values[a], values[b])), number(cohen_kappa(values[a], values[b]))
            table.rows.append([question, f"{a} and {b}", *pair, alpha])
    return table


def automatic_table(run: RunFacts) -> Table | None:
    """Figures of explanations that no person gave, for answers that state a truth and explain it."""
    kinds = run.outputs and sum(exemplar_kind(row.query) is not None for row in run.outputs)
    if not kinds or all(expected_truth(row.expected) == "tie" for row in run.outputs):
        return None
    rows = [[AUTOMATIC[name], number(mean(values))] for name, values in automatic_scores(run.outputs).items()]
    return Table(["", "mean"], rows)


# -------------------------------------------------------------------------------------- many runs


def differing_settings(runs: Sequence[RunFacts]) -> list[Table]:
    """For each task and dataset of 2 to 8 runs, the settings in which these differ."""
    groups: dict[tuple, dict[str, dict]] = {}
    for run in runs:
        if run.record:
            key = tuple(str(find(run.record, name)) for name in ("task", "data"))
            groups.setdefault(key, {})[run.name] = flat_config(run.record)
    tables = []
    for _, configs in sorted(groups.items()):
        table = Table(["setting", *configs], numeric=[False] * (len(configs) + 1))
        for name in dict.fromkeys(name for config in configs.values() for name in config):
            values = [_setting(config, name) for config in configs.values()]
            if not INCIDENTAL.fullmatch(name) and len(set(values)) > 1:
                table.rows.append([name, *values])
        if 2 <= len(configs) <= 8 and table.rows:
            tables.append(table)
    return tables
