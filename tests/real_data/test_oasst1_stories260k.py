"""The hybrid on real conversations and a real pretrained LLaMA: the small twin's recipe, shortened."""

from __future__ import annotations

import sys

from conftest import ROOT, run_command

from bhpeft.results import read_metrics


def run(shared_data, tmp_path, name, *flags):
    script = [sys.executable, ROOT / "parameter_efficient_fine_tuning.py"]
    data = ["--base_model", shared_data / "stories260K", "--data_path", shared_data / "oasst1"]
    short = ["--max_length", 128, "--max_train_samples", 240, "--max_test_samples", 40, "--epochs", 1]
    short += ["--max_new_tokens", 4, "--do_sample", "false"]
    out = ["--results_dir", tmp_path / "results", "--output_dir", tmp_path / name, "--run_name", name]
    recipe = ["--config", ROOT / "recipes/hybrid_stories260k_oasst1.yaml"]
    finished = run_command([*script, *recipe, *data, *short, *out, *flags], cwd=tmp_path, timeout=300)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return read_metrics(tmp_path / f"results/metrics/{name}.json")["metrics"], finished.stdout


def test_held_out_replies_are_foreseen_better_than_by_the_frozen_base_and_the_prefix_matters(shared_data, tmp_path):
    figures, said = run(shared_data, tmp_path, "hybrid")
    base = figures["base"]
    assert figures["perplexity"] < 0.75 * base["perplexity"]
    assert f"{base['perplexity']:.3f}" in said and f"{figures['perplexity']:.3f}" in said  # one command prints both
    assert figures["rows"] == 40 and figures["perplexity_interval_95"][1] < base["perplexity_interval_95"][1]
    without, _ = run(shared_data, tmp_path, "lora", "--sites", "lora", "--compare_base", "false")
    assert abs(without["perplexity"] / figures["perplexity"] - 1) > 1e-3
