"""The whole trainer in one process: results written, nothing lost, existing adapters tested and continued."""

from __future__ import annotations

import csv
import json
import sys

import pytest
from conftest import ROOT, run_command
from safetensors.numpy import load_file

from bhpeft.results import read_metrics, read_model_outputs, read_predictions

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LEARNS = ["--epochs", 30, "--lr", 1e-2, "--batch_size", 16, "--save_strategy", "no"]
LEARNS += ["--lora_rank", 16, "--lora_alpha", 32]
LEARNS += ["--target_modules", *ALL_LINEAR]


def listing(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_writes_everything_and_is_tested_and_continued_from_its_folder(train, tmp_path):
    finished = train(*LEARNS, "--run_name", "first", "--compare_base", "--do_eval")
    record = read_metrics(tmp_path / "results/metrics/first.json")
    losses = [entry["loss"] for entry in record["history"] if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert record["metrics"]["base"]["accuracy"] < record["metrics"]["accuracy"]
    assert record["metrics"]["eval_loss"] > 0
    assert record["rows"]["train"] + record["rows"]["validation"] == 60 and record["rows"]["test"] == 12
    assert record["hardware"]["ranks"] == 1 and record["hardware"]["peak_memory_mib"][0]["host"] > 100
    assert record["config"]["lora_rank"] == 16 and record["config"]["learning_rate"] == 1e-2

    outputs = read_model_outputs(tmp_path / "results/model_outputs/first.txt")
    table = read_predictions(tmp_path / "results/predictions/first.csv")
    assert len(outputs) == len(table) == 12
    right = (table["label"] == table["prediction"]).mean()
    assert right == pytest.approx(record["metrics"]["accuracy"])
    assert (table["prob_true"] + table["prob_false"]).to_numpy() == pytest.approx(1.0)
    assert (tmp_path / "results/plots/first/answers.png").stat().st_size > 1000
    assert "==== RUN first ====" in (tmp_path / "results/model_descriptions").read_text()
    assert "frozen base" in finished.stdout and "Asked for true or false" in finished.stdout

    # Tested again from its folder: the same answers and probabilities.
    adapter = ["--adapter_path", tmp_path / "adapter"]
    train(*adapter, "--do_train", "false", "--run_name", "again")
    again = read_predictions(tmp_path / "results/predictions/again.csv")
    assert again["prob_true"].to_numpy() == pytest.approx(table["prob_true"].to_numpy(), abs=1e-5)
    assert read_model_outputs(tmp_path / "results/model_outputs/again.txt") == outputs

    # Continued: it starts from where it was, not from the beginning.
    train(*adapter, *LEARNS, "--lr", 1e-3, "--epochs", 1, "--run_name", "on", "--output_dir", tmp_path / "on")
    history = read_metrics(tmp_path / "results/metrics/on.json")["history"]
    assert history[0]["loss"] < 0.5 * losses[0]

    # The first run's files are still the first run's.
    assert read_metrics(tmp_path / "results/metrics/first.json") == record


def test_an_existing_run_is_refused_and_stays_whole(train, tmp_path, tiny_model, statements):
    quick = ["--max_steps", 1, "--run_name", "r", "--save_strategy", "no"]
    train(*quick)
    before = listing(tmp_path)
    words = [sys.executable, ROOT / "parameter_efficient_fine_tuning.py", "--base_model", tiny_model]
    words += ["--dataset_name", statements[0], "--results_dir", tmp_path / "results", *quick]
    refused = run_command(words, cwd=tmp_path)
    assert refused.returncode == 2 and "--overwrite" in refused.stderr and "Traceback" not in refused.stderr
    assert listing(tmp_path) == before
    train(*quick, "--overwrite")

    def mine():
        return {p.name for p in (tmp_path / "results").rglob("*") if p.name.startswith("r.") or p.parent.name == "r"}

    assert len(mine()) >= 4  # answers, predictions, figures, a plot
    (tmp_path / "results/plots/r/reliability.png").write_text("drawn by a script of what the run before said")
    train(*quick, "--overwrite", "--do_predict", "false", "--do_eval")  # it writes less, and nothing of before stays
    assert mine() == {"r.json"}
    train(*quick, "--overwrite")

    human = tmp_path / "results/human_evaluation/r.csv"
    rows = list(csv.reader(human.open(newline="")))
    rows[1][3:] = ["1", "0"]
    with human.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    before = listing(tmp_path)
    refused = run_command([*words, "--overwrite"], cwd=tmp_path)
    assert refused.returncode == 2 and "scores a person gave" in refused.stderr
    assert listing(tmp_path) == before


def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_adapter(train, tmp_path):
    flags = ["--epochs", 2, "--batch_size", 16, "--save_strategy", "steps", "--save_steps", 5, "--do_predict", "false"]
    train(*flags, "--run_name", "whole", "--output_dir", tmp_path / "whole")
    whole = load_file(tmp_path / "whole/adapter_model.safetensors")
    checkpoint = tmp_path / "whole/checkpoint-5"
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 5
    train(*flags, "--run_name", "on", "--output_dir", tmp_path / "whole", "--resume_from_checkpoint", checkpoint)
    resumed = load_file(tmp_path / "whole/adapter_model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all((whole[name] == resumed[name]).all() for name in whole)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora_rnk", 4], "Did you mean 'lora_rank'?"),
        (["--dataset_name", "nowhere.csv"], "nowhere.csv: no such file"),
        (["--dataset_name", "generic"], "Did you mean 'generics'?"),
        (["--text_column", "question"], "found: text_input, text_label"),
        (["--max_length", 4, "--max_new_tokens", 4], "--long_prompts truncate or drop"),
        (["--max_length", 128], "128 positions"),
        (["--adapter_path", "nowhere"], "nowhere: no such folder"),
        (["--base_model", "nowhere"], "--base_model nowhere"),
        (["--run_name", "a/b"], "--run_name"),
    ],
)
def test_bad_input_is_one_line_before_any_model_is_loaded(tiny_model, statements, tmp_path, flags, words):
    base = [sys.executable, ROOT / "parameter_efficient_fine_tuning.py", "--base_model", tiny_model]
    finished = run_command([*base, "--dataset_name", statements[0], *flags], cwd=tmp_path)
    assert finished.returncode == 2, finished.stderr
    errors = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0], finished.stderr
    assert "Traceback" not in finished.stderr and "Loading weights" not in finished.stderr
    assert listing(tmp_path) == {}


def test_4bit_that_cannot_be_had_stops_the_run_or_is_said(tiny_model, statements, tmp_path, monkeypatch, capsys):
    import bitsandbytes.functional

    import parameter_efficient_fine_tuning as trainer_script
    from bhpeft import base_model
    from bhpeft.errors import InputError

    def broken(*args, **kwargs):
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", broken)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    loaded = []
    load = base_model.load_base_model
    monkeypatch.setattr(trainer_script, "load_base_model", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1])
    words = ["--base_model", tiny_model, "--dataset_name", statements[0], "--adapter_name", "qlora", "--max_steps", 1]
    words += ["--results_dir", tmp_path / "results", "--output_dir", tmp_path / "adapter", "--save_strategy", "no"]
    words = [str(word) for word in words]
    with pytest.raises(InputError, match="no kernel for this device.*--allow_full_precision"):
        trainer_script.main(words)
    assert not loaded and listing(tmp_path) == {}
    trainer_script.main([*words, "--allow_full_precision"])
    assert base_model.count_4bit_layers(loaded[0]) == 0
    assert "NOT in 4 bit, as --allow_full_precision permits" in capsys.readouterr().out


def test_the_demo_sample_is_input_for_any_model(tiny_model, tmp_path):
    words = [sys.executable, ROOT / "parameter_efficient_fine_tuning.py", "--base_model", tiny_model]
    words += ["--dataset_name", ROOT / "demo/data.csv", "--max_steps", 1, "--test_fraction", 0.2, "--run_name", "s"]
    finished = run_command([*words, "--save_strategy", "no"], cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert read_metrics(tmp_path / "results/metrics/s.json")["rows"]["test"] == 12
    assert (tmp_path / "adapters/s/adapter_config.json").exists()
