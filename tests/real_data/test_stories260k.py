"""A real pretrained LLaMA on the real generics, two ranks of ZeRO-3: the recipe's own command, shortened."""

from __future__ import annotations

import sys

from conftest import ROOT, run_command
from safetensors.torch import load_file

from bhpeft.results import read_metrics
from bhpeft.tasks.generics import read_generics


def answer(shared_data, tmp_path, *flags, name="run"):
    launch = ["accelerate", "launch", "--config_file", ROOT / "ds_zero3_cpu.yaml"]
    script = [ROOT / "parameter_efficient_fine_tuning.py", "--config", ROOT / "recipes/generics_stories260k.yaml"]
    data = ["--base_model", shared_data / "stories260K", "--data_path", shared_data / "generics"]
    out = ["--results_dir", tmp_path / "results", "--run_name", "run"]
    finished = run_command([*launch, *script, *data, *out, *flags], cwd=tmp_path, timeout=600)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]
    return read_metrics(tmp_path / f"results/metrics/{name}.json")


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


def test_bh_peft_on_4bit_weights_trains_saves_reloads_and_answers_over_two_ranks(shared_data, tmp_path):
    flags = ["--adapter_name", "bh-peft", "--load_in_4bit", "--prefix_length", 8, "--bn_reduction_factor", 8]
    flags += ["--max_test_samples", 32, "--max_new_tokens", 8]
    learns = ["--kl_weight", 0.01, "--lr", 1e-2, "--data_fraction", 0.05, "--epochs", 2, "--compare_base"]
    record = answer(shared_data, tmp_path, *flags, *learns)
    assert record["metrics"]["accuracy"] >= 0.8 > record["metrics"]["base"]["accuracy"]
    assert record["config"]["load_in_4bit"] and record["hardware"]["ranks"] == 2
    # Its folder says that the base was in 4 bit, and what was asked.
    adapter = tmp_path / "adapters/run"
    flags = ["--adapter_path", adapter, "--do_train", "false", "--run_name", "again", "--data_fraction", 0.02,
             "--max_test_samples", 32, "--max_new_tokens", 8]  # fmt: skip
    again = answer(shared_data, tmp_path, *flags, name="again")
    assert again["config"]["load_in_4bit"] and again["metrics"]["accuracy"] >= 0.8


def test_labels_as_text_on_sst2_are_generated_and_scored_alike(shared_data, tmp_path):
    """Its end-of-sequence token was never trained, so a line end ends an answer."""
    script = [sys.executable, ROOT / "parameter_efficient_fine_tuning.py", "--base_model", shared_data / "stories260K"]
    data = ["--dataset_name", "sst2", "--data_path", shared_data / "SST-2", "--prompt_template", "instruction"]
    data += ["--answer_end", "\n", "--max_length", 192, "--long_prompts", "truncate", "--max_new_tokens", 8]
    linear = ["--target_modules", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    learns = ["--lora_rank", 16, "--lora_alpha", 32, *linear, "--lr", 5e-3, "--batch_size", 16, "--epochs", 1]
    learns += ["--max_train_samples", 1600, "--max_test_samples", 100, "--compare_base", "--save_strategy", "no"]
    out = ["--results_dir", tmp_path / "results", "--run_name", "run", "--output_dir", tmp_path / "adapter"]
    finished = run_command([*script, *data, *learns, *out], cwd=tmp_path, timeout=600)
    assert finished.returncode == 0, finished.stderr[-3000:]
    record = read_metrics(tmp_path / "results/metrics/run.json")["metrics"]
    assert record["base"]["irregular"] >= 90 and sum(record["base"]["irregular_texts"].values()) >= 20
    assert record["irregular"] <= 10 and record["regular_as_scored"] >= 0.85
    assert record["nll"] < record["base"]["nll"] - 1.0


def test_every_exemplar_is_read(shared_data):
    assert len(read_generics(shared_data / "generics", exemplars_per_generic=0)) == 2 * (38_614 + 11_653)
    assert len(read_generics(shared_data / "generics", exemplars_per_generic=1)) == 2 * (10_488 + 6_335)
