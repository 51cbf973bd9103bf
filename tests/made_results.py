"""A results/ folder as runs leave it, made without any: for the tests of the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bhpeft.files import write_rows
from bhpeft.metrics import wilson_interval
from bhpeft.results import HumanScore, ModelOutput, write_human_evaluation, write_metrics, write_model_outputs

LABELS = ("negative", "positive")
TEXT = "film <script>alert(1)</script> & more"  # a text that must come out as it is
STEPS = range(10, 101, 10)


def history(bayesian: bool) -> list[dict]:
    """Logged values: loss falls, KL is there for a Bayesian adapter."""
    logs = [{"step": s, "loss": 1 / s, "learning_rate": 0.01 * (1 - s / 100), "grad_norm": 1.0} for s in STEPS]
    if bayesian:
        for log in logs:
            log |= {"nll": 0.9 * log["loss"], "kl": 1e4 * log["loss"], "kl_term": 0.1 * log["loss"]}
            log |= {"nll_grad_norm": 0.5, "kl_grad_norm": 0.01, "sigma": 0.02}
    return [*logs, {"step": 50, "eval_loss": 0.4}, {"step": 100, "eval_loss": 0.38}, {"train_runtime": 6.0}]


def record(name: str, task: str, metrics: dict, rows: int, **config) -> dict:
    """As of results/metrics/."""
    settings = {"base_model": "org/tiny", "dataset_name": "films.csv", "adapter_name": "lora", "lora_rank": 8}
    return {
        "run_name": name, "created": "2026-01-02T03:04:05Z", "task_type": task, "metrics": metrics,
        "config": {**settings, "learning_rate": 1e-3, **config}, "seed": 7, "versions": {"torch": "2.13.0"},
        "hardware": {"device": "cpu", "ranks": 2, "peak_memory_mib": [{"host": 800.0}, {"host": 812.3, "gpu": None}]},
        "timings": {"load": 1.2, "train": 61.25}, "parameters": {"trainable": 10, "all": 1000, "trainable_percent": 1},
        "rows": {"train": 900, "validation": 0, "test": rows}, "history": history("bayesian" in config),
    }  # fmt: skip


def classifier(folder: Path, name: str, truth: np.ndarray, wrong: set[int], **config) -> None:
    """A run that has all rows right but those, sure of the right ones."""
    rows = []
    for i, y in enumerate(truth.tolist()):
        p = 0.6 if i in wrong else 0.7 + 0.25 * ((i * 7) % 10) / 10
        predicted = 1 - y if i in wrong else y
        probabilities = [p, 1 - p] if predicted == 0 else [1 - p, p]
        rows.append([i, LABELS[y], LABELS[predicted], *probabilities, p, 0.01 * (i % 5) + 0.1 * (i in wrong)])
    header = ["id", "label", "prediction", "prob_negative", "prob_positive", "max_prob", "mutual_information"]
    write_rows(folder / "predictions" / f"{name}.csv", header, rows)
    texts = [ModelOutput(f"{TEXT} {row[0]}", row[2], row[1]) for row in rows]
    write_model_outputs(folder / "model_outputs" / f"{name}.txt", texts)
    right = len(truth) - len(wrong)
    metrics = {"accuracy": right / len(truth), "accuracy_interval_95": list(wilson_interval(right, len(truth)))}
    metrics |= {"majority_baseline": 0.5, "base": {"accuracy": 0.5}, "sure_share": 0.4, "sure_accuracy": 1.0}
    write_metrics(folder / "metrics" / f"{name}.json", record(name, "classification", metrics, len(truth), **config))


def make_results(folder: Path) -> None:
    """Runs of every task: two classifiers over the same rows, numbers, texts, explanations with two annotators, rounds.

    Of 200 rows `weak` has 40 wrong, `strong` 10, and 8 of these weak has wrong too.
    """
    truth = np.arange(200) % 2
    classifier(folder, "weak", truth, set(range(0, 160, 4)), lora_rank=4)
    classifier(folder, "strong", truth, {*range(0, 32, 4), 1, 5}, bayesian="down")
    rng = np.random.default_rng(0)
    y = rng.normal(size=60)
    rows = [[i, float(v), float(v + 0.3 * rng.normal()), 0.3] for i, v in enumerate(y)]
    write_rows(folder / "predictions" / "numbers.csv", ["id", "label", "prediction", "epistemic_sd"], rows)
    write_metrics(folder / "metrics" / "numbers.json", record("numbers", "regression", {"rmse": 0.3}, 60))
    header = ["id", "label", "prediction", "reference_nll", "reference_tokens"]
    for name, factor in (("texts", 1.0), ("texts-2", 0.5)):
        rows = [[i, "a b c", "a b", factor * (1 + i % 4), 4] for i in range(40)]
        write_rows(folder / "predictions" / f"{name}.csv", header, rows)
        write_metrics(folder / "metrics" / f"{name}.json", record(name, "generation", {"perplexity": 2.0}, 40))
    birds = ("robin", "owl", "penguin", "duck")
    answers = [ModelOutput(f"All {b}s fly.", f"False, {b}s that sleep do not fly.", f"False, no {b}.") for b in birds]
    write_model_outputs(folder / "model_outputs" / "explained.txt", answers)
    for person, factual in (("anna", (1, 1, 0, 1)), ("ben", (1, 0, 0, 1))):
        judged = [HumanScore(i, a.query, a.output, f, 1) for i, (a, f) in enumerate(zip(answers, factual, strict=True))]
        write_human_evaluation(folder / "human_evaluation" / f"explained.{person}.csv", judged)
    header = ["round", "evaluated_on", "rows", "metric", "value", "low_95", "high_95", "nll", "ece", "carry"]
    rows = [[r, on, 100, "accuracy", 0.6 + 0.05 * r, 0.5, 0.9, 0.7 / r, None, "posterior"]
            for r in (1, 2, 3) for on in ("test", "round-01")]  # fmt: skip
    write_rows(folder / "rounds" / "weak.csv", header, rows)
