"""benchmarks/training.py runs, and what it compares is the same training: equal rows give equal losses."""

from __future__ import annotations

import json
import shutil

import pytest

from benchmarks import training as benchmark


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "SST-2"
    folder.mkdir()
    words = ("river", "stone", "cloud", "tiger", "moon", "glass")
    lines = [f"{' '.join(words[(i + j) % 6] for j in range(3 + i % 7))} {i}\t{i % 2}" for i in range(5000)]
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text("sentence\tlabel\n" + "\n".join(lines) + "\n")
    return folder


@pytest.fixture
def encoder(tiny_encoder, tmp_path):
    """The tiny one without dropout, which ours draws otherwise than the stock Trainer does."""
    folder = shutil.copytree(tiny_encoder, tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_text())
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    assert dropouts.keys() <= config.keys()
    (folder / "config.json").write_text(json.dumps(config | dropouts))
    return folder


@pytest.mark.parametrize(
    ("part", "ours", "stock"), [("encoder-8", "lora", "stock, grouped"), ("labels", "ours", "stock")]
)
def test_ours_and_stock_take_the_same_steps(part, ours, stock, data, encoder, tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "ROWS", 60)
    flags = ["--base_model", encoder, "--data_path", data, "--tokenizer", tiny_model, "--parts", part]
    record = benchmark.main([*map(str, flags), "--methods", f"{stock};{ours}", "--smoke"])
    (turn,) = record["parts"][part]
    assert set(turn) == {ours, stock}
    assert turn[ours]["losses"] == pytest.approx(turn[stock]["losses"], abs=2e-4)
    assert len(turn[ours]["losses"]) == 1 + 1 + 2
    assert all(run["tokens_per_second"] > run["samples_per_second"] > 0 for run in turn.values())
    assert f"ratios to {benchmark.PARTS[part][1]!r}" in capsys.readouterr().out
