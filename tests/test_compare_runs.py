"""util/compare_runs.py on made-up records: cells, order, formats, columns by name, one-line errors, light imports."""

import csv
import io
import json
import os
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from bhpeft.compare import DEFAULT_COLUMNS
from bhpeft.results import write_metrics


def run(*arguments, **environment):
    command = [sys.executable, str(ROOT / "util" / "compare_runs.py"), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env={**os.environ, **environment}, timeout=60
    )


def shown(*arguments):
    """The table as rows of cells; cells of text are two spaces or more apart."""
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return [re.split(r" {2,}", line.strip()) for line in done.stdout.splitlines()]


def refused(done, *parts):
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for part in parts:
        assert str(part) in done.stderr


def record(name, metrics, config=None, **more):
    config = {"adapter_name": "lora", "base_model": "/models/roberta-base", "dataset_name": "sst2"} | (config or {})
    return {
        "run_name": name, "task_type": "classification", "metrics": metrics, "config": config, "seed": 1,
        "versions": {"torch": "2.13.0"}, "hardware": {"peak_memory_mib": [{"host": 900.5}, {"host": 950.0}]},
        "timings": {"load": 1.5, "train": 61.25, "predict": 2.0}, "rows": {"train": 1000, "test": 100},
        "parameters": {"trainable": 10, "all": 1000, "trainable_percent": 1.0},
    } | more  # fmt: skip


ACCURACY = {"accuracy": 0.91, "accuracy_interval_95": [0.84, 0.95], "f1_macro": 0.905, "nll": 0.25}


@pytest.fixture
def results(tmp_path):
    """Runs of three tasks, by names whose order is none of the tables'."""
    runs = [
        record("better", ACCURACY | {"base": {"accuracy": 0.5}}, {"lora_rank": 16, "learning_rate": 1e-5}),
        record("worse", {"accuracy": 0.7, "f1_macro": 0.69, "nll": None}, {"lora_rank": 4, "bayesian": "None"}),
        record("another", {"accuracy": 0.8}, {"lora_rank": 128, "dataset_name": "data/own.csv", "note": "a|b,\nc"}),
        record(
            "numbers",
            {"rmse": 12.5, "mae": 9.75, "accuracy": None},
            {"dataset_name": "owner/prices", "adapter_name": "bh-peft"},
            task_type="regression",
            hardware={"peak_memory_mib": [{"host": 1.0, "gpu": 2048.5}, {"host": 1.0, "gpu": 4096.0}]},
            parameters={"trainable": 7, "all": 100, "trainable_percent": 7.0, "head": 1, "adapter_percent": 6.0},
        ),
        record("words", {"perplexity": 3.5, "bleu": 20.25}, task_type="generation"),
        record("untested", {}, task_type="generation"),
    ]
    for one in runs:
        write_metrics(tmp_path / "metrics" / f"{one['run_name']}.json", one)
    return tmp_path


def test_runs_of_several_tasks_stand_together_best_first(results):
    header, *lines = shown("--results_dir", results)
    assert header == list(DEFAULT_COLUMNS)
    assert [line[0] for line in lines] == ["another", "better", "worse", "words", "untested", "numbers"]
    cells = {line[0]: line for line in lines}
    assert cells["better"] == [
        "better", "classification", "sst2", "lora", "roberta-base", "1000", "1", "-",
        "accuracy 0.9100 [0.8400, 0.9500]", "f1_macro 0.9050", "61.25", "950", "-",
    ]  # fmt: skip
    assert cells["another"][2] == "own" and cells["another"][8:10] == ["accuracy 0.8000", "-"]
    assert cells["numbers"][2:] == [
        "prices", "bh-peft", "roberta-base", "1000", "7", "6", "rmse 12.5000", "mae 9.7500", "61.25", "1", "4096",
    ]  # fmt: skip
    assert cells["words"][8:10] == ["perplexity 3.5000", "bleu 20.2500"]
    assert cells["untested"][8:10] == ["-", "-"]


def test_runs_of_one_metric_name_it_once_and_empty_columns_are_left_out(results):
    files = [results / "metrics" / f"{name}.json" for name in ("worse", "better")]
    header, first, second = shown(*files)
    assert "accuracy" in header and "f1_macro" in header and "adapter %" not in header and "GPU MiB" not in header
    assert first[0] == "better" and "0.9100 [0.8400, 0.9500]" in first and second[0] == "worse"
    header, first, _ = shown(*files, "--by", "accuracy")  # the column that is there already, moved
    assert header[:2] == ["accuracy", "run"] and header.count("accuracy") == 1 and first[:2] == ["0.7000", "worse"]


def test_columns_by_name(results):
    flags = [
        "metrics.nll",
        "nll",
        "lora_rank",
        "config.bayesian",
        "rows.train",
        "base.accuracy",
        "accuracy_interval_95",
    ]
    header, *lines = shown("--results_dir", results, "--columns", *flags, "versions.torch", "base", "train s")
    assert header == ["run", *flags, "versions.torch", "base", "train s"]
    cells = {line[0]: line[1:] for line in lines}
    assert cells["better"] == [
        "0.25",
        "0.25",
        "16",
        "-",
        "1000",
        "0.5",
        "[0.84, 0.95]",
        "2.13.0",
        "roberta-base",
        "61.25",
    ]
    assert cells["worse"][:4] == ["-", "-", "4", "-"]  # a figure that is NaN, a flag that is not set


def test_a_bare_name_is_a_metrics_before_a_flags(results):
    both = record("both", {"rows": 7, "accuracy": 1.0}, {"rows": 9})
    write_metrics(results / "both.json", both)
    columns = ["--columns", "rows", "config.rows", "rows.test"]
    assert shown(results / "both.json", *columns)[1] == ["both", "7", "9", "100"]


def test_by_sorts_numbers_as_numbers_and_puts_what_is_missing_last(results):
    header, *lines = shown("--results_dir", results, "--by", "lora_rank", "--columns", "accuracy")
    assert header == ["lora_rank", "run", "accuracy"]
    found = [line[:2] for line in lines]
    assert found[:3] == [["4", "worse"], ["16", "better"], ["128", "another"]]
    assert found[3:] == [["-", "words"], ["-", "untested"], ["-", "numbers"]]
    header = shown("--results_dir", results, "--by", "rows.train")[0]
    assert header[:2] == ["train rows", "run"] and header.count("train rows") == 1
    assert [line[0] for line in shown("--results_dir", results, "--by", "run")[1:]][:2] == ["another", "better"]


def test_csv_has_every_digit_and_empty_fields(results):
    rows = list(csv.DictReader(io.StringIO(run("--results_dir", results, "--format", "csv").stdout)))
    found = {row["run"]: row for row in rows}
    assert found["better"]["metric"] == "accuracy" and found["better"]["metric_value"] == "0.91"
    assert (found["better"]["low_95"], found["better"]["high_95"]) == ("0.84", "0.95")
    assert found["numbers"]["metric"] == "rmse" and found["numbers"]["low_95"] == "" == found["untested"]["metric"]
    assert found["numbers"]["second"] == "mae" and found["numbers"]["GPU MiB"] == "4096.0"
    rows = list(csv.reader(io.StringIO(run("--results_dir", results, "--format", "csv", "--columns", "note").stdout)))
    assert ["another", "a|b,\nc"] in rows and ["better", ""] in rows


def test_markdown_escapes_and_a_file_is_written_whole(results):
    out = results / "tables" / "runs.md"
    done = run("--results_dir", results, "--format", "markdown", "--columns", "note", "nll", "--out", out)
    assert done.returncode == 0 and done.stdout == "" and [file.name for file in out.parent.iterdir()] == ["runs.md"]
    lines = out.read_text().splitlines()
    assert lines[1] == "| -------- | ------- | ---: |" and "| another  | a\\|b, c |    - |" in lines
    assert len({len(line) for line in lines}) == 1
    refused(run("--results_dir", results, "--out", results), "cannot be written")


def test_errors_are_one_line(results):
    refused(run("--results_dir", results, "--columns", "acuracy"), "'acuracy'", "Did you mean 'accuracy'?")
    refused(run("--results_dir", results, "--by", "config.lora_rnk"), "Did you mean 'config.lora_rank'?")
    refused(
        run("--results_dir", results, "--columns", "timings"), "group", "timings.load, timings.train, timings.predict"
    )
    refused(run("--results_dir", results / "metrics"), "no such file or folder")
    refused(run(results / "metrics" / "beter.json"), "Did you mean 'better.json'?")
    assert run("--results_dir", results, "--format", "latex").returncode == 2
    for text, why in (("{", ":1: not JSON"), (json.dumps({"schema_version": 2}), "schema_version"), ("[]", "None")):
        (results / "metrics" / "broken.json").write_text(text)
        refused(run("--results_dir", results), results / "metrics" / "broken.json", why)
    assert "Traceback" in run("--results_dir", results, "--debug").stderr


def test_it_starts_at_once_and_loads_nothing_heavy(results):
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'util')!r}); import compare_runs; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "compare_runs" in loaded and not loaded & {"torch", "transformers", "peft", "numpy", "pandas"}
    started = time.perf_counter()
    run("--results_dir", results)
    assert time.perf_counter() - started < 5  # far less on an idle machine
