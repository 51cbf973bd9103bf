"""ZeRO-3 with CPU offload over two real ranks: sharded, trained, saved whole, reloaded, answered."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT, run_command
from safetensors.torch import load_file

from bhpeft.results import read_metrics, read_model_outputs, read_predictions

from .conftest import SHIPPED, launcher

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LEARNS = ["--lr", 1e-2, "--save_strategy", "no", "--lora_rank", 16, "--lora_alpha", 32, "--max_grad_norm", 1.0]
LEARNS += ["--target_modules", *ALL_LINEAR, "--per_device_eval_batch_size", 3]


def losses(path):
    return [entry["loss"] for entry in read_metrics(path)["history"] if "loss" in entry]


def test_the_shipped_configuration_shards_and_offloads(train, tmp_path, monkeypatch):
    monkeypatch.setenv("INSPECT_OUT", str(tmp_path))
    finished = train(
        "--max_steps", 2, "--save_strategy", "no", "--do_predict", "false", "--max_train_samples", 16,
        launcher=launcher(SHIPPED, 2), script="tests/distributed/inspect_sharding.py", real=True,
    )  # fmt: skip
    for rank in (0, 1):
        seen = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert seen["world"] == 2 and seen["stage"] == 3
        # Each rank holds half of the base from loading on (rounded up, parameter by parameter); none of it is whole.
        assert seen["whole_numel"] / 2 <= seen["held_numel"] < seen["whole_numel"] / 2 * 1.01
        assert seen["visible_numel"] == 0 and seen["visible_after"] == 0
        assert (seen["offload_param"], seen["offload_optimizer"]) == ("cpu", "cpu")
        assert seen["optimizer"] == "DeepSpeedCPUAdam" and seen["state_devices"] == ["cpu"]
        assert seen["shard_devices"] == ["cpu"] and seen["clipping"] == 1.0
        others = {"using bf16 instead": "torch.bfloat16", "using fp32 instead": "torch.float32"}
        assert seen["dtype"] == next((t for note, t in others.items() if note in finished.stdout), "torch.float16")


def test_two_ranks_train_save_whole_reload_and_answer_as_one(train, tmp_path, sharded_launcher):
    two = sharded_launcher(2)
    train(*LEARNS, "--epochs", 15, "--batch_size", 8, "--run_name", "two", launcher=two)
    falling = losses(tmp_path / "results/metrics/two.json")
    assert falling[-1] < 0.5 * falling[0]
    assert read_metrics(tmp_path / "results/metrics/two.json")["hardware"]["ranks"] == 2

    # Saved whole, by its true shapes, although no rank ever held it whole.
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(saved) == 2 * len(ALL_LINEAR) * 2
    assert all(16 in weight.shape and weight.numel() >= 16 * 32 for weight in saved.values())

    # Reloaded by one process without DeepSpeed, it gives the same probabilities and the same texts.
    train("--adapter_path", tmp_path / "adapter", "--do_train", "false", "--run_name", "one")
    results = tmp_path / "results"
    sharded = read_predictions(results / "predictions/two.csv")
    whole = read_predictions(results / "predictions/one.csv")
    assert sharded["id"].tolist() == whole["id"].tolist() and len(whole) == 12  # not divisible by ranks x batch
    assert sharded["prob_true"].to_numpy() == pytest.approx(whole["prob_true"].to_numpy(), abs=1e-5)
    answers = read_model_outputs(results / "model_outputs/two.txt")
    assert answers == read_model_outputs(results / "model_outputs/one.txt")
    assert len({len(row.output) for row in answers}) > 1  # answers of different lengths

    # Reloaded by two ranks, sharded again, without training.
    train("--adapter_path", tmp_path / "adapter", "--do_train", "false", "--run_name", "again", launcher=two)
    assert read_model_outputs(results / "model_outputs/again.txt") == answers

    # Trained on one rank with the same rows a step: a result of the same kind.
    train(*LEARNS, "--epochs", 15, "--batch_size", 16, "--run_name", "single", "--output_dir", tmp_path / "single",
          launcher=sharded_launcher(1))  # fmt: skip
    single = losses(results / "metrics/single.json")
    assert len(single) == len(falling) and single[0] == pytest.approx(falling[0], rel=0.05)
    accuracies = [read_metrics(results / f"metrics/{name}.json")["metrics"]["accuracy"] for name in ("two", "single")]
    assert abs(accuracies[0] - accuracies[1]) <= 0.25


def test_prompt_tuning_over_two_ranks_is_saved_whole_and_reloads(train, tmp_path, sharded_launcher):
    adapter = ["--adapter_name", "prompt-tuning", "--num_virtual_tokens", 5]
    flags = ["--epochs", 6, "--lr", 0.05, "--save_strategy", "epoch", "--run_name", "two"]
    train(*adapter, *flags, launcher=sharded_launcher(2))
    falling = losses(tmp_path / "results/metrics/two.json")
    assert falling[-1] < 0.8 * falling[0]
    for folder in (tmp_path / "adapter", next((tmp_path / "adapter").glob("checkpoint-*"))):
        [prompt] = load_file(folder / "adapter_model.safetensors").values()
        assert prompt.shape == (5, 64)
    train(*adapter, "--adapter_path", tmp_path / "adapter", "--do_train", "false", "--run_name", "one")
    two = read_predictions(tmp_path / "results/predictions/two.csv")
    one = read_predictions(tmp_path / "results/predictions/one.csv")
    assert two["prob_true"].to_numpy() == pytest.approx(one["prob_true"].to_numpy(), abs=1e-5)


def test_qlora_over_two_ranks_of_the_shipped_configuration(train, tmp_path, monkeypatch):
    monkeypatch.setenv("INSPECT_OUT", str(tmp_path))
    train(
        *LEARNS, "--adapter_name", "qlora", "--epochs", 8, "--batch_size", 8, "--compare_base", "--run_name", "q",
        launcher=launcher(SHIPPED, 2), script="tests/distributed/inspect_sharding.py",
    )  # fmt: skip
    seen = json.loads((tmp_path / "rank1.json").read_text())
    assert seen["layers_4bit"] == 2 * len(ALL_LINEAR)
    assert seen["held_after"] < 0.55 * seen["whole_after"]  # sharded although transformers loads 4-bit weights whole
    falling = losses(tmp_path / "results/metrics/q.json")
    assert falling[-1] < 0.6 * falling[0]
    record = read_metrics(tmp_path / "results/metrics/q.json")
    assert record["metrics"]["base"]["accuracy"] <= record["metrics"]["accuracy"]
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(16 in weight.shape for weight in saved.values())


def test_two_ranks_without_deepspeed(train, tmp_path):
    plain = ["torchrun", "--nproc_per_node", 2, "--master_port", 0, "--rdzv_backend", "c10d",
             "--rdzv_endpoint", "localhost:0"]  # fmt: skip
    train(*LEARNS, "--epochs", 8, "--batch_size", 8, "--run_name", "ddp", launcher=plain, real=True)
    falling = losses(tmp_path / "results/metrics/ddp.json")
    assert falling[-1] < 0.7 * falling[0]
    assert read_metrics(tmp_path / "results/metrics/ddp.json")["hardware"]["ranks"] == 2
    assert len(read_predictions(tmp_path / "results/predictions/ddp.csv")) == 12


ENDS = """
import atexit, os, sys
import torch
from bhpeft.environment import leave_together

class Late:
    def __del__(self, write=os.write):
        write(1, b"taken down ")

late = Late()  # a global: gone when Python takes itself down, with gloo's threads still there
torch.distributed.init_process_group("gloo")
torch.distributed.all_reduce(torch.ones(3))
atexit.register(os.write, 1, b"registered ")
sys.stdout.write("said ")
leave_together()
"""


def test_ranks_end_without_python_taking_itself_down_beside_their_threads(tmp_path):
    (tmp_path / "ends.py").write_text(ENDS)
    words = ["torchrun", "--nproc_per_node", 2, "--master_port", 0, "--rdzv_backend", "c10d",
             "--rdzv_endpoint", "localhost:0", tmp_path / "ends.py"]  # fmt: skip
    finished = run_command(words, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert sorted(finished.stdout.split()) == ["registered"] * 2 + ["said"] * 2


def test_bad_input_stops_every_rank_with_one_line(tmp_path, tiny_model):
    words = [*launcher(SHIPPED, 2), ROOT / "parameter_efficient_fine_tuning.py", "--base_model", tiny_model]
    finished = run_command([*words, "--dataset_name", "nowhere.csv"], cwd=tmp_path, real=True)
    assert finished.returncode != 0
    assert finished.stderr.count("error: nowhere.csv: no such file") == 1
    assert not (tmp_path / "results").exists()


def test_qlora_sharded_answers_as_one_process(train, tmp_path):
    """4-bit weights come back from their shards as they were: evaluated, trained, evaluated again."""
    flags = [*LEARNS, "--adapter_name", "qlora", "--bf16", "--run_name"]
    train(*flags, "two", "--epochs", 4, "--compare_base", launcher=launcher(SHIPPED, 2))
    train("--adapter_name", "qlora", "--bf16", "--adapter_path", tmp_path / "adapter", "--do_train", "false",
          "--compare_base", "--run_name", "one")  # fmt: skip
    two, one = (read_predictions(tmp_path / f"results/predictions/{name}.csv") for name in ("two", "one"))
    assert two["prob_true"].to_numpy() == pytest.approx(one["prob_true"].to_numpy(), abs=0.05)  # bf16
    two, one = (read_metrics(tmp_path / f"results/metrics/{name}.json")["metrics"]["base"] for name in ("two", "one"))
    assert two["mean_confidence"] == pytest.approx(one["mean_confidence"], abs=0.02)


# --------------------------------------------------------------------------------------------- BH-PEFT


@pytest.mark.parametrize("ranks", [1, 2])
def test_kl_and_its_gradient_are_exact_where_every_parameter_is_sharded(ranks, tmp_path):
    words = ["torchrun", "--nproc_per_node", ranks, "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    finished = run_command([*words, ROOT / "tests/distributed/inspect_kl.py"], cwd=tmp_path, INSPECT_OUT=str(tmp_path))
    assert finished.returncode == 0, finished.stderr[-5000:]
    for rank in range(ranks):
        for mode, seen in json.loads((tmp_path / f"rank{rank}.json").read_text()).items():
            assert seen["world"] == ranks and seen["sharded"] and seen["layers"] == 15, mode
            assert seen["kl"] < 1e-5 and seen["gradient"] < 1e-4, (mode, seen)


@pytest.mark.parametrize("preset", ["bh-peft", "hybrid"])
def test_bh_peft_over_two_ranks_is_saved_whole_and_reloads(preset, train, tmp_path, sharded_launcher):
    small = ["--prefix_length", 4, "--bn_reduction_factor", 8, "--lora_rank", 8, "--kl_weight", 0.1]
    adapter = ["--adapter_name", preset, *small]
    sampled = ["--posterior_samples", 3] if preset == "bh-peft" else []
    flags = ["--epochs", 20, "--lr", 2e-2, "--save_strategy", "no", "--compare_base", "--run_name", "two"]
    train(*adapter, *flags, *sampled, launcher=sharded_launcher(2))
    record = read_metrics(tmp_path / "results/metrics/two.json")
    falling = losses(tmp_path / "results/metrics/two.json")
    assert falling[-1] < 0.8 * falling[0]
    logged = [entry for entry in record["history"] if "kl" in entry]
    assert bool(logged) == (preset == "bh-peft")
    for entry in logged:
        assert entry["kl"] > 0 and entry["sigma"] > 0
        assert entry["kl_term"] == pytest.approx(0.1 * entry["kl"] / 60, rel=1e-3)

    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(weight.numel() > 0 for weight in saved.values())
    assert any(name.endswith("embedding") and weight.shape == (4, 64) for name, weight in saved.items())
    assert any("prior_mu" in name for name in saved) == (preset == "bh-peft")
    train(*adapter, *sampled, "--adapter_path", tmp_path / "adapter", "--do_train", "false", "--run_name", "one")
    results = tmp_path / "results"
    two, one = (read_predictions(results / f"predictions/{name}.csv") for name in ("two", "one"))
    if sampled:  # the same weights were drawn on two ranks, sharded, as on one
        assert two["mutual_information"].to_numpy() == pytest.approx(one["mutual_information"].to_numpy(), abs=1e-5)
        assert (two["mutual_information"] > 0).any()
    assert two["prob_true"].to_numpy() == pytest.approx(one["prob_true"].to_numpy(), abs=1e-5)
    answers = [read_model_outputs(results / f"model_outputs/{name}.txt") for name in ("two", "one")]
    assert answers[0] == answers[1]


def test_bh_peft_on_4bit_weights_over_two_ranks(train, tmp_path):
    flags = ["--adapter_name", "bh-peft", "--load_in_4bit", "--prefix_length", 4, "--bn_reduction_factor", 8]
    train(*flags, "--epochs", 10, "--lr", 2e-2, "--save_strategy", "no", "--kl_weight", 0.1, "--bf16", "--run_name",
          "two", launcher=launcher(SHIPPED, 2))  # fmt: skip
    falling = losses(tmp_path / "results/metrics/two.json")
    assert falling[-1] < 0.9 * falling[0]
    train(*flags, "--bf16", "--adapter_path", tmp_path / "adapter", "--do_train", "false", "--run_name", "one")
    two, one = (read_predictions(tmp_path / f"results/predictions/{name}.csv") for name in ("two", "one"))
    assert two["prob_true"].to_numpy() == pytest.approx(one["prob_true"].to_numpy(), abs=0.05)  # bf16


# ----------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("adapter", ["bh-peft", "lora"])
def test_a_head_over_two_ranks_is_trained_saved_whole_and_reloads(
    adapter, train, tiny_encoder, labelled, tmp_path, sharded_launcher
):
    data = ["--base_model", tiny_encoder, "--dataset_name", labelled]
    learns = ["--adapter_name", adapter, "--lr", 1e-2, "--epochs", 20, "--kl_weight", 1e-3, "--prefix_length", 4]
    learns += ["--bn_reduction_factor", 8, "--save_strategy", "no", "--test_fraction", 0.2, "--batch_size", 4]
    train(*learns, "--run_name", "two", "--max_grad_norm", 1.0, data=data, launcher=sharded_launcher(2))
    falling = losses(tmp_path / "results/metrics/two.json")
    assert sum(falling[-10:]) < 0.7 * sum(falling[:10])
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    shapes = {name.split("classifier.")[-1]: weight.shape for name, weight in saved.items() if "classifier" in name}
    assert shapes["dense.weight"] == (64, 64) and shapes["out_proj.weight"] == (2, 64)
    train("--adapter_path", tmp_path / "adapter", "--do_train", "false", "--run_name", "one", data=data)
    two, one = (read_predictions(tmp_path / f"results/predictions/{name}.csv") for name in ("two", "one"))
    both = two.merge(one, on="id")
    assert len(both) == len(two) and len(two) % 2 == 0
    assert both["prob_yes_x"].to_numpy() == pytest.approx(both["prob_yes_y"].to_numpy(), abs=1e-5)


def test_rows_that_do_not_divide_by_the_ranks_are_counted_once(train, tiny_encoder, labelled, tmp_path):
    data = ["--base_model", tiny_encoder, "--dataset_name", labelled]
    quick = ["--max_steps", 1, "--save_strategy", "no", "--max_test_samples", 13, "--test_fraction", 0.5]
    train(*quick, "--run_name", "two", "--eval_batch_size", 4, data=data, launcher=launcher(SHIPPED, 2))
    record = read_metrics(tmp_path / "results/metrics/two.json")["metrics"]
    table = read_predictions(tmp_path / "results/predictions/two.csv")
    assert record["rows"] == len(table) == table["id"].nunique() == 13
    assert record["accuracy"] == pytest.approx((table["label"] == table["prediction"]).mean())
    assert sum(map(sum, record["confusion"])) == 13
