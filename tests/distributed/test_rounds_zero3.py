"""Rounds over two ranks of ZeRO-3: the engine is built anew for each, and the posterior is carried whole."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from bhpeft.report.rounds import read_rounds
from bhpeft.results import read_metrics, read_predictions


def test_two_rounds_over_two_ranks(train, tiny_encoder, labelled, tmp_path, sharded_launcher):
    data = ["--base_model", tiny_encoder, "--dataset_name", labelled, "--test_fraction", 0.2]
    flags = ["--adapter_name", "bh-peft", "--prefix_length", 4, "--bn_reduction_factor", 8, "--lr", 1e-2]
    flags += ["--max_steps", 3, "--run_name", "two", "--rounds", 11, 20, "--replay", "partial"]
    flags += ["--prior_widening", 2, "--l2_weight", 0.5]
    train(*flags, "--save_strategy", "no", "--per_device_eval_batch_size", 5, data=data, launcher=sharded_launcher(2))
    one, two = (load_file(tmp_path / f"adapter/round-0{n}/adapter_model.safetensors") for n in (1, 2))
    layers = [name.removesuffix(".mu") for name in one if name.endswith(".mu") and "._source." not in name]
    assert len(layers) == 7 and all(value.numel() for value in (*one.values(), *two.values()))
    for layer in layers:
        assert torch.equal(two[f"{layer}.prior_mu"], one[f"{layer}.mu"])
        assert torch.equal(two[f"{layer}.prior_sigma"], 2 * one[f"{layer}.g"] ** 2)
        assert not torch.equal(two[f"{layer}.mu"], one[f"{layer}.mu"])
    final = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(torch.equal(final[name], two[name]) for name in two)

    record = read_metrics(tmp_path / "results/metrics/two.json")
    assert record["hardware"]["ranks"] == 2 and [done["trained_rows"] for done in record["rounds"]] == [11, 22]
    first = next(entry for entry in record["history"] if entry["round"] == 2 and "kl" in entry)
    count = sum(one[f"{layer}.mu"].numel() for layer in layers)
    assert first["kl"] == pytest.approx(count * 0.5 * (1 / 4 - 1 + math.log(4)), rel=1e-4)
    assert first["l2"] == 0 < [entry["l2"] for entry in record["history"] if "l2" in entry][-1]
    table = read_rounds(tmp_path / "results/rounds/two.csv")
    assert table["evaluated_on"].tolist() == ["test", "round-01", "test", "round-01", "round-02"]
    assert table.query("round == 2")["rows"].tolist() == [record["rows"]["test"], 11, 20]
    assert (tmp_path / "results/plots/two/rounds.png").is_file()

    # The last round's adapter, reloaded by one process without DeepSpeed, answers the same.
    train("--adapter_path", tmp_path / "adapter", "--do_train", "false", "--run_name", "one", data=data)
    tables = [read_predictions(tmp_path / f"results/predictions/{name}.csv") for name in ("two", "one")]
    both = tables[0].merge(tables[1], on="id")
    assert len(both) == len(tables[0]) > 5
    assert both["prob_yes_x"].to_numpy() == pytest.approx(both["prob_yes_y"].to_numpy(), abs=1e-5)
