"""The README.md in an adapter's folder: what it was trained on, how good it is, how sure it may be, how to load it.

It takes the place of the empty form that peft writes. Everything in it comes from the run's record; what no run can
know, the licence and what the adapter is meant for, is left to a person and says so.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bhpeft import __version__
from bhpeft.compare import number_at
from bhpeft.errors import InputError
from bhpeft.files import write_atomic
from bhpeft.report_data import RunFacts
from bhpeft.report_tables import metrics_table, number, settings_of, with_ends
from bhpeft.tasks.card import TaskCard
from bhpeft.uncertainty import ece, ece_if_calibrated
from bhpeft.uncertainty_report import Predictions, read_uncertainty

FEW_ROWS = 300  # of the test: below it the card says how wide the interval is
MODELS = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "multiple_choice": "AutoModelForMultipleChoice",
}
VERSIONS = ("bhpeft", "torch", "transformers", "peft")
PIPELINES = {"classification": "text-classification", "generation": "text-generation"}


def write_model_card(folder: str | Path, record: dict[str, Any], predictions: str | Path | None = None) -> None:
    """Write the card of a run's adapter, replacing peft's form; to be called on one rank, with the adapter saved.

    Args:
        folder: of the adapter; what it was trained for stands in its task.json.
        record: as of `results/metrics/RUN.json`.
        predictions: the run's file of test rows, from which the calibration is; None without one.
    """
    task = TaskCard.read(folder)
    found = None
    if predictions is not None:
        with contextlib.suppress(InputError):  # free texts have no probabilities
            found = read_uncertainty(Path(predictions))
    labels, with_head = (task.labels, task.head) if task else ([], False)
    write_atomic(Path(folder) / "README.md", model_card(Path(folder).name, record, labels, with_head, found))


def model_card(
    folder: str,
    record: dict[str, Any],
    labels: Sequence[str],
    with_head: bool,
    predictions: Predictions | None = None,
) -> str:
    """The card's text, Markdown with a YAML head as hubs read it.

    Args:
        folder: the adapter's folder, as it is to be named.
        labels: of the task, in the head's order.
        with_head: the adapter answers by a trained head.
        predictions: of the test rows, for the calibration.
    """
    config, task = record["config"], record.get("task_type", "classification")
    base = str(config.get("base_model") or "unknown")
    public = bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base)) and not Path(base).exists()
    name, data = Path(base).name, Path(str(config.get("dataset_name") or "unknown")).name
    head = ["---", *([f"base_model: {base}"] if public else []), "library_name: peft"]
    head += [f"pipeline_tag: {PIPELINES[task]}"] if task in PIPELINES else []
    head += ["tags:", "- bhpeft", f"- {config.get('adapter_name')}", "---"]
    kind, of_base = config.get("adapter_name"), base if public else f"`{name}`"
    about = f"A {kind} adapter for {of_base}, trained with bhpeft for {task.replace('_', ' ')} on {data}."
    if labels:
        about += f" Labels: {', '.join(f'`{label}`' for label in labels)}."
    parts = [
        "\n".join(head),
        f"# {record['run_name']}\n\n{about}",
        "## Licence\n\n*To be filled in by whoever publishes this; the licences of base model and data decide.*",
        "## Data\n\n" + _data(record, data),
        "## How good it is\n\n" + _figures(record),
    ]
    if predictions is not None and predictions.labels:
        parts.append("## How sure it may be\n\n" + _calibration(record, predictions))
    loaded = base if public else name
    parts.append("## Loading it\n\n" + _loading(folder, record, loaded, len(labels), with_head))
    parts.append("## Limits\n\n" + _limits(record))
    known = dict(settings_of(record)) | {"base_model": base if public else name, "dataset_name": data}
    settings = "\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in known.items())
    versions = {"bhpeft": __version__, **record["versions"]}
    made = ", ".join(f"{key} {versions[key]}" for key in VERSIONS if versions.get(key))
    parts.append(f"## Settings\n\n| setting | value |\n| --- | --- |\n{settings}\n\nMade with {made}.")
    return "\n\n".join(parts) + "\n"


def _data(record: dict[str, Any], data: str) -> str:
    rows = record.get("rows") or {}
    counts = ", ".join(f"{count:,} to {use}" for name, use in (("train", "train on"), ("validation", "validate on"),
                       ("test", "test on")) if (count := rows.get(name)))  # fmt: skip
    text = f"{data}: {counts or 'numbers of rows unknown'}. No input of the test rows was trained on"
    if record["config"].get("adapter_path"):
        text += " in this run; it went on with another adapter, whose training rows are not known here"
    text += "."
    return text + " *Where the data come from and whom they speak of: to be filled in.*"


def _figures(record: dict[str, Any]) -> str:
    table = metrics_table(RunFacts(record["run_name"], record))
    if table is None:
        return "It was not tested in this run."
    head = "| " + " | ".join(["figure", *table.headings[1:]]) + " |\n|" + " --- |" * len(table.headings)
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in table.rows]
    return "\n".join([head, *lines]) + "\n\nIn brackets 95 % intervals over test rows; they say nothing of other seeds."


def _calibration(record: dict[str, Any], p: Predictions) -> str:
    confidence, right = p.p.max(axis=1), p.p.argmax(axis=1) == p.y
    error, chance = ece(confidence, right), ece_if_calibrated(confidence)
    verdict = "no more than chance explains" if error <= chance else "more than chance explains"
    text = (
        f"Over {len(p.y):,} test rows it gives its likeliest label a probability of {confidence.mean():.1%} on average "
        f"and is right in {right.mean():.1%}. Expected calibration error (15 bins of equal width): {number(error)}, "
        f"{verdict} (a calibrated one stays below {number(chance)} in 95 % of the cases)."
    )
    share = number_at(record, "metrics.sure_share")
    accuracy = number_at(record, "metrics.sure_accuracy")
    if share and accuracy is not None:
        text += f" In {share:.0%} of the rows its probability is 0.9 or more; there it is right in {accuracy:.1%}."
    return text


def _loading(folder: str, record: dict[str, Any], base: str, labels: int, with_head: bool) -> str:
    config = record["config"]
    adapter, task = config.get("adapter_name"), record.get("task_type", "")
    model = MODELS.get(task, "AutoModelForCausalLM") if with_head else "AutoModelForCausalLM"
    own = adapter in ("bh-peft", "mam", "hybrid", "bayesian-lora")
    outputs = {"classification": labels, "regression": 1}.get(task) if with_head else None
    count = f", num_labels={outputs}" if outputs else ""
    lines = [
        "```python",
        *(["import bhpeft  # the adapter's kind is bhpeft's own"] if own else []),
        "from peft import PeftModel",
        f"from transformers import AutoTokenizer, {model}",
        "",
        f'base = {model}.from_pretrained("{base}"{count})',
        f'model = PeftModel.from_pretrained(base, "{folder}").eval()',
        "```",
    ]
    text = "\n".join(lines)
    if config.get("load_in_4bit") or adapter == "qlora":
        text += "\n\nThe base was in 4 bit (NF4) while it was trained; load it so, or answers may differ a little."
    if adapter == "prompt-tuning":
        text += (
            "\n\n`generate` of peft may leave the tuned prompt out without a word (seen with peft 0.21.2 and "
            "transformers 5.23); `bhpeft.prediction.generate` does not."
        )
    ask = 'python demo/classify.py "TEXT"' if task in ("classification", "regression") else ""
    again = f"parameter_efficient_fine_tuning.py --adapter_path {folder} --do_train false --dataset_name FILE"
    return text + "\n\nOr with bhpeft: " + (f"`{ask} --adapter_path {folder}`; " if ask else "") + f"`{again}`."


def _limits(record: dict[str, Any]) -> str:
    metrics, lines = record["metrics"], []
    rows = (record.get("rows") or {}).get("test")
    lines.append(f"- One run with seed {record.get('seed')}. Another seed gives other figures.")
    ends = metrics.get("accuracy_interval_95")
    if rows and rows < FEW_ROWS and isinstance(ends, list):
        shown = with_ends(metrics.get("accuracy"), *ends)
        lines.append(f"- Tested on {rows} rows only: the accuracy is known no better than {shown}.")
    for key, words in (
        ("majority_baseline", "always giving the commonest label"),
        ("first_word_baseline", "the first word of the input alone"),
    ):
        if (value := number_at(record, f"metrics.{key}")) is not None:
            lines.append(f"- For comparison: {words} gives an accuracy of {number(value)} on the same rows.")
    if irregular := metrics.get("irregular") or metrics.get("ties"):
        lines.append(f"- {irregular} of {rows} answers were none of the labels; they count as wrong.")
    if record.get("task_type") == "generation":
        lines.append("- Whether its texts are true has been judged by no one here.")
    lines.append("- It was tested on rows of its training rows' source; on others it may be wrong and sure of it.")
    return "\n".join(lines)


def _cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
