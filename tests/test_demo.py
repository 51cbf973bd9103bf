"""The demo: statements that leak nothing and give little away, and the whole run, launched as `make demo` does."""

from __future__ import annotations

import csv
import os
import sys
from collections import Counter

import pytest
from conftest import ROOT, run_command

from bhpeft.metrics import first_word_baseline
from bhpeft.results import read_metrics

sys.path.insert(0, str(ROOT / "demo"))
import world  # noqa: E402


def test_no_pair_of_subject_and_property_is_on_both_sides():
    train, test = world.split(world.statements())
    assert len(test) >= 300 and len(train) >= 500
    held = {(row.fact.subject, row.fact.prop) for row in test}
    assert not held & {(row.fact.subject, row.fact.prop) for row in train}
    assert not held & set().union(*(row.pairs for row in train))  # nor in a training row's reason
    assert not {row.text_input for row in test} & {row.text_input for row in train}


def test_words_alone_give_little_away():
    train, test = ([(r.text_input, r.text_label) for r in part] for part in world.split(world.statements()))
    assert first_word_baseline(train, test) <= 0.60
    truths = Counter(label.split(",")[0] for _, label in train)
    assert 0.45 <= truths["True"] / len(train) <= 0.55


def test_the_base_never_read_a_statement():
    text = "\n" + "\n".join(world.plain_sentences()) + "\n"
    for row in world.statements():
        assert f"\n{row.text_input}" not in text and row.text_label not in text


def test_statements_are_the_same_at_every_call():
    assert world.statements() == world.statements()
    assert world.split(world.statements()) == world.split(world.statements())


def test_the_sample_is_readable_input():
    rows = list(csv.DictReader((ROOT / "demo/data.csv").open(newline="", encoding="utf-8")))
    assert len(rows) >= 40 and set(rows[0]) == {"text_input", "text_label"}
    assert all(row["text_label"].startswith(("True, ", "False, ")) for row in rows)


@pytest.mark.parametrize(
    ("adapter", "least"),
    [
        ("lora", 0.85),
        # Minutes each: `make test-demos`.
        pytest.param("qlora", 0.85, marks=pytest.mark.demos),
        pytest.param("prompt-tuning", 0.75, marks=pytest.mark.demos),
        pytest.param("bh-peft", 0.85, marks=pytest.mark.demos),
        pytest.param("hybrid", 0.85, marks=pytest.mark.demos),
    ],
)
def test_the_demo_goes_from_guessing_to_right_over_two_ranks(adapter, least, tmp_path):
    ranks = min(2, os.cpu_count() or 1)
    launch = ["accelerate", "launch", "--config_file", ROOT / "ds_zero3_cpu.yaml", "--num_processes", ranks]
    flags = ["--adapter_name", adapter, "--results_dir", tmp_path / "results", "--run_name", "demo"]
    finished = run_command([*launch, ROOT / "demo/demo.py", *flags], cwd=tmp_path, timeout=600)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]
    record = read_metrics(tmp_path / "results/metrics/demo.json")
    after, before = record["metrics"], record["metrics"]["base"]
    assert before["accuracy"] <= 0.60 and 0.35 <= before["scored_accuracy"] <= 0.65
    assert after["accuracy"] >= least and after["accuracy"] >= after["first_word_baseline"] + 0.10
    assert record["hardware"]["ranks"] == ranks
    assert max(memory["host"] for memory in record["hardware"]["peak_memory_mib"]) < 3 * 1024
    assert "Before: " in finished.stdout and "After: " in finished.stdout
    for name in ("model_outputs/demo.txt", "predictions/demo.csv", "metrics/demo.json", "model_descriptions"):
        assert (tmp_path / "results" / name).stat().st_size > 0


def test_an_unknown_adapter_is_named(tmp_path):
    finished = run_command([sys.executable, ROOT / "demo/demo.py", "--adapter_name", "lorra"], cwd=tmp_path)
    assert finished.returncode == 2 and "Did you mean 'lora'?" in finished.stderr
