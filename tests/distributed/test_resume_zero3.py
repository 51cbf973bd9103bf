"""Over two ranks of ZeRO-3, no parameter whole: checkpoints are, and are gone on from; numbers that go wrong end it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import ROOT, run_command, statement_rows
from safetensors.torch import load_file

from bhpeft.checkpoints import STATE, steps

SMALL = ["--adapter_name", "bh-peft", "--prefix_length", 3, "--bn_reduction_factor", 8, "--lora_rank", 3]
SMALL += ["--batch_size", 4, "--save_strategy", "steps", "--save_steps", 2, "--max_steps", 8, "--kl_weight", 0.01]


@pytest.fixture
def data(tiny_encoder, tmp_path) -> list:
    """Three classes, so that a bias of three numbers is spread over two ranks."""
    rows = [f"{query},{'abc'[i % 3]}" for i, (query, _) in enumerate(statement_rows())]
    (tmp_path / "three.csv").write_text("\n".join(["text_input,text_label", *rows]) + "\n")
    return ["--base_model", tiny_encoder, "--dataset_name", tmp_path / "three.csv", "--test_fraction", 0.2]


def test_two_ranks_keep_the_best_whole_and_go_on(train, data, tmp_path, sharded_launcher):
    best = ["--do_eval", "--eval_strategy", "steps", "--eval_steps", 2, "--load_best_model_at_end", "--lr", 0.1]
    best += [
        "--metric_for_best_model",
        "loss",
        "--greater_is_better",
        "true",
        "--validation_fraction",
        0.2,
    ]  # the worst
    flags = [*SMALL, *best, "--save_total_limit", 2, "--run_name", "r"]
    train(*flags, data=data, launcher=sharded_launcher(2))
    whole = load_file(tmp_path / "adapter/adapter_model.safetensors")
    folders = dict(steps(tmp_path / "adapter"))
    state = json.loads((folders[8] / STATE).read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    most = max(losses, key=losses.get)
    assert sorted(folders) == sorted({most, 6, 8}) and most != 8
    saved = load_file(folders[most] / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in whole.items())

    # Rank 0 alone has written, whole tensors, the trained ones: some do not divide by two.
    kept = torch.load(folders[8] / "optimizer.pt", weights_only=True)
    sizes = {name: value.numel() for name, value in kept["weights"].items()}
    assert any(size % 2 for size in sizes.values()) and kept["moments"].keys() == {"exp_avg", "exp_avg_sq"}
    for values in kept["moments"].values():
        assert {name: value.numel() for name, value in values.items()} == sizes
        assert all(value.abs().sum() > 0 for name, value in values.items())
    last = load_file(folders[8] / "adapter_model.safetensors")
    assert sum(sizes.values()) <= sum(value.numel() for value in last.values())

    shutil.rmtree(folders[8])
    shutil.rmtree(tmp_path / "results")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    said = train(*flags, "--resume", data=data, launcher=sharded_launcher(2)).stdout
    assert "behind step 6" in said
    again = torch.load(folders[8] / "optimizer.pt", weights_only=True)
    for name, value in kept["weights"].items():
        assert torch.allclose(again["weights"][name], value, rtol=0, atol=1e-5), name
    resumed = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_a_loss_that_is_no_number_ends_both_ranks_with_one_line(data, tmp_path, sharded_launcher):
    words = [*sharded_launcher(2), ROOT / "parameter_efficient_fine_tuning.py", *data, *SMALL, "--lr", 1e30]
    finished = run_command([*words, "--output_dir", tmp_path / "adapter"], cwd=tmp_path, timeout=120)
    assert finished.returncode == 3
    [line] = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert "is not finite at step" in line and "with training rows" in line and "last good checkpoint: " in line
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "adapter/adapter_model.safetensors").exists()
