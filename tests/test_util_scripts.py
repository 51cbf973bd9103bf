"""The scripts of util/, run as a user runs them: exact figures, one-line errors, light imports."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bhpeft import results
from bhpeft.results import HumanScore, ModelOutput, write_human_evaluation, write_model_outputs

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("BHPEFT_SHARED_DATA", ROOT.parent / "shared" / "data"))
SCRIPTS = ["accuracy_evaluation", "explanation_evaluation", "dataset_analysis"]


def run(script, *arguments, cwd=None):
    command = [sys.executable, str(ROOT / "util" / f"{script}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=cwd, timeout=120)


def shared(path):
    if not (SHARED / path).exists():
        pytest.skip(f"real data absent: {path} (set BHPEFT_SHARED_DATA to its folder)")
    return SHARED / path


def refused(done, *parts):
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for part in parts:
        assert str(part) in done.stderr


# ------------------------------------------------------------------------------------------ real data


def test_accuracy_of_the_seed_outputs(tmp_path):
    folder = shared("seed_results/model_outputs")
    done = run("accuracy_evaluation", folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    model3, model4 = (part.splitlines() for part in done.stdout.split("\n\n"))
    assert model3[0] == str(folder / "model3.txt") and model4[0] == str(folder / "model4.txt")
    assert model3[1:4] == [
        "correct=419 tie=1 incorrect=0 total=420 accuracy=0.9976190476190476",
        "neg_correct=419 neg_tie=1 neg_incorrect=0 neg_total=420 neg_accuracy=0.9976190476190476",
        "pos_correct=0 pos_tie=0 pos_incorrect=0 pos_total=0 pos_accuracy=nan",
    ]
    assert model4[1:4] == [
        "correct=506 tie=0 incorrect=0 total=506 accuracy=1.0",
        "neg_correct=316 neg_tie=0 neg_incorrect=0 neg_total=316 neg_accuracy=1.0",
        "pos_correct=190 pos_tie=0 pos_incorrect=0 pos_total=190 pos_accuracy=1.0",
    ]
    assert len(model3) == len(model4) == 5  # no row of neither kind, so no note


def test_the_seed_files_are_written_back_byte_for_byte(tmp_path):
    for file in sorted(shared("seed_results/model_outputs").glob("*.txt")):
        write_model_outputs(tmp_path / file.name, results.read_model_outputs(file))
        assert (tmp_path / file.name).read_bytes().rstrip(b"\n") == file.read_bytes().rstrip(b"\n")
    older = results.read_human_evaluation(shared("seed_results/human_evaluation/model4.csv"))
    write_human_evaluation(tmp_path / "model4.csv", older)
    assert results.read_human_evaluation(tmp_path / "model4.csv") == older
    assert all(row.query.endswith(".") and re.match("(?i)true|false", row.output) for row in older)


def test_explanations_of_the_seed_scores():
    done = run("explanation_evaluation", shared("seed_results/human_evaluation/model4.csv"))
    assert done.stdout.splitlines()[1:5] == [
        "overall=0.9407114624505929 factual=0.8873517786561265 justifies=0.9940711462450593",
        "pos_overall=0.968421052631579 pos_factual=0.9368421052631579 pos_justifies=1.0",
        "neg_overall=0.9240506329113924 neg_factual=0.8575949367088608 neg_justifies=0.990506329113924",
        "judged=506 not_judged=0",
    ]
    assert "factual_wilson_95=(0.8568, 0.9120)" in done.stdout.splitlines()[5]


def test_analysis_of_the_generics(tmp_path):
    done = run("dataset_analysis", shared("generics/positive.csv"), "--out", tmp_path)
    assert "rows=11653 " in done.stdout and "first-word baseline: none" in done.stdout
    assert (tmp_path / "lengths_positive.png").read_bytes().startswith(b"\x89PNG")


def test_analysis_of_unquoted_tsv():
    dev = shared("SST-2/dev.tsv")
    done = run("dataset_analysis", dev, "--text_column", "sentence", "--label_column", "label", "--no_plot")
    assert "rows=872 " in done.stdout


# ------------------------------------------------------------------------------------------ small data


def test_accuracy_reads_results_dir_and_says_what_it_leaves_out(tmp_path):
    rows = [ModelOutput("All a.", "False. True true", "False, b."), ModelOutput("Birds a.", "True", "good")]
    write_model_outputs(tmp_path / "model_outputs" / "run.txt", rows)
    lines = run("accuracy_evaluation", "--results_dir", tmp_path).stdout.splitlines()
    assert lines[1] == "correct=1 tie=0 incorrect=1 total=2 accuracy=0.5"
    assert lines[5].startswith("note: 1 of 2 queries begin with none of All, Not, Some, No")
    assert lines[6].startswith("note: 1 of 2 expected outputs state neither true nor false")
    full = run("accuracy_evaluation", "--results_dir", tmp_path, "--full").stdout
    assert "correct=0 tie=0 incorrect=2 total=2 accuracy=0.0\n" in full


def test_explanations_count_rows_not_judged(tmp_path):
    write_human_evaluation(
        tmp_path / "human_evaluation" / "run.csv",
        [HumanScore(0, "All a.", "b, c", 1, 0), HumanScore(1, "Some a.", "b")],
    )
    done = run("explanation_evaluation", "--results_dir", tmp_path)
    assert "\noverall=0.5 factual=1.0 justifies=0.0\npos_overall=nan " in done.stdout
    assert "\njudged=1 not_judged=1\n" in done.stdout


def test_analysis_of_two_tables_and_their_sum(tmp_path):
    for name, rows in (("a", 'All x.,"False, no."\n' * 5), ("b", "Some x.,True\nSome longer x.,True\n" * 3)):
        (tmp_path / f"{name}.csv").write_text("text_input,text_label\n" + rows)
    done = run("dataset_analysis", tmp_path, "--out", tmp_path / "plots")
    first, second, both, plot = done.stdout.strip().split("\n\n")
    assert "rows=5 duplicate_rows=4 duplicate_inputs=4" in first
    assert "rows=6 duplicate_rows=4 duplicate_inputs=4" in second
    assert "input words               6      2      2.50      2.5      3      0.55" in second
    assert "rows=11 " in both and "all                       5      0         5        0" in both
    assert "in_sample=1.0000 cross_validated=1.0000 (5 folds, 11 of 11 labels" in both
    assert plot == f"histogram: {tmp_path / 'plots' / 'lengths_a_b.png'}"


# --------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_file_and_an_empty_folder(script, tmp_path):
    (tmp_path / "model1").mkdir()
    refused(run(script, tmp_path / "model2"), tmp_path / "model2", "check the path", "Did you mean 'model1'?")
    refused(run(script, tmp_path / "model1"), tmp_path / "model1", "file in this folder")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_broken_file_after_a_good_one_prints_nothing(script, tmp_path):
    write_model_outputs(tmp_path / "good.txt", [ModelOutput("All a.", "True", "True")])
    write_human_evaluation(tmp_path / "good.csv", [HumanScore(0, "All a.", "b", 1, 1)])
    suffix = ".txt" if script == "accuracy_evaluation" else ".csv"
    columns = ["--text_column", "query", "--label_column", "model output"] if script == "dataset_analysis" else []
    out = ["--out", str(tmp_path / "plots")] if script == "dataset_analysis" else []
    broken = tmp_path / f"broken{suffix}"
    broken.write_text("index,query,model output,factual,justifies\n1,a,b,1,1\n2,a,b,1\n")
    line = 1 if script == "accuracy_evaluation" else 3
    refused(run(script, tmp_path / f"good{suffix}", broken, *columns, *out), f"{broken}:{line}: ")
    assert not (tmp_path / "plots").exists()


def test_results_without_runs(tmp_path):
    refused(run("accuracy_evaluation", "--results_dir", tmp_path), tmp_path / "model_outputs")
    refused(run("explanation_evaluation", "--results_dir", tmp_path), tmp_path / "human_evaluation")


def test_a_missing_column_names_those_found(tmp_path):
    (tmp_path / "a.csv").write_text("text,text_label\na,b\n")
    refused(run("dataset_analysis", tmp_path / "a.csv"), "no column 'text_input'; found: text, text_label")
    (tmp_path / "a.csv").write_text("text_input,text_label\n")
    refused(run("dataset_analysis", tmp_path / "a.csv"), "a header and no rows")


def test_a_plot_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "a.csv").write_text("text_input,text_label\na,b\n")
    refused(run("dataset_analysis", tmp_path / "a.csv", "--out", tmp_path / "a.csv"), "cannot be written")


@pytest.mark.parametrize("script", SCRIPTS)
def test_debug_shows_the_traceback_and_flags_are_not_guessed(script, tmp_path):
    done = run(script, tmp_path / "none", "--debug")
    assert done.returncode != 0 and "Traceback" in done.stderr
    assert run(script, "--deb").returncode == 2


# -------------------------------------------------------------------------------------------- imports


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_load_nothing_heavy(script):
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'util')!r}); import {script}; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert script in loaded
    assert not loaded & {
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "deepspeed",
        "pandas",
        "matplotlib",
        "scipy",
    }
