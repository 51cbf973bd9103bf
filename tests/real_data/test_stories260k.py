"""A real pretrained LLaMA on the real generics, two ranks of ZeRO-3: the recipe's own command, shortened."""

from __future__ import annotations

from conftest import ROOT, run_command
from safetensors.numpy import load_file

from bhpeft.results import read_metrics
from bhpeft.tasks.generics import read_generics


def answer(shared_data, tmp_path, *flags):
    launch = ["accelerate", "launch", "--config_file", ROOT / "ds_zero3_cpu.yaml"]
    script = [ROOT / "parameter_efficient_fine_tuning.py", "--config", ROOT / "recipes/generics_stories260k.yaml"]
    data = ["--base_model", shared_data / "stories260K", "--data_path", shared_data / "generics"]
    out = ["--results_dir", tmp_path / "results", "--run_name", "run"]
    finished = run_command([*launch, *script, *data, *out, *flags], cwd=tmp_path, timeout=600)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]
    return read_metrics(tmp_path / "results/metrics/run.json")


def test_lora_answers_generics_over_two_ranks(shared_data, tmp_path):
    record = answer(shared_data, tmp_path, "--compare_base", "--data_fraction", 0.05)
    assert record["metrics"]["base"]["accuracy"] <= 0.60
    assert record["metrics"]["accuracy"] >= 0.85
    assert record["metrics"]["first_word_baseline"] == 1.0  # and it is said that the first word is enough here


def test_prompt_tuning_answers_generics_over_two_ranks(shared_data, tmp_path):
    flags = ["--adapter_name", "prompt-tuning", "--lr", 0.1, "--data_fraction", 0.05]
    record = answer(shared_data, tmp_path, *flags)
    losses = [entry["loss"] for entry in record["history"] if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    [prompt] = load_file(tmp_path / "adapters/run/adapter_model.safetensors").values()
    assert prompt.shape == (16, 64)
    assert record["rows"]["test"] == 128 and record["metrics"]["rows"] > 0


def test_every_exemplar_is_read(shared_data):
    assert len(read_generics(shared_data / "generics", exemplars_per_generic=0)) == 2 * (38_614 + 11_653)
    assert len(read_generics(shared_data / "generics", exemplars_per_generic=1)) == 2 * (10_488 + 6_335)
