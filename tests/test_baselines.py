"""Baselines of uncertainty by the trainer itself: temperature, Monte Carlo dropout, other domains, noise of numbers."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ACTS, KINDS, ROOT, statement_rows
from scipy.optimize import minimize_scalar
from sklearn.metrics import roc_auc_score
from torch import nn
from transformers import BertConfig, GPTNeoXConfig, LlamaConfig

import parameter_efficient_fine_tuning as trainer_script
from bhpeft.arguments import AdapterArguments, DataArguments
from bhpeft.calibration import calibrate
from bhpeft.config import parse_arguments
from bhpeft.environment import bf16_in_hardware
from bhpeft.errors import InputError
from bhpeft.mc_dropout import batch_seed, check_dropout, dropout_noise
from bhpeft.report import labels, numbers
from bhpeft.report.answered import Answered
from bhpeft.results import ModelOutput, read_metrics, read_predictions
from bhpeft.scores import probabilities
from bhpeft.tasks import Example, Task, load_task
from bhpeft.tasks.card import TaskCard
from bhpeft.tasks.ood import read_ood
from bhpeft.temperature import fit_sample_temperature, fit_temperature
from bhpeft.uncertainty import nll

sys.path.insert(0, str(ROOT / "demo"))
import classify  # noqa: E402


def write(path, rows, header=("text_input", "text_label")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def probs(table):
    return table[["prob_no", "prob_yes"]].to_numpy()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices")
    rows = [(query, "yes" if answer.startswith("True") else "no") for query, answer in statement_rows()]
    noisy = [(query, "no" if i % 5 == 0 else label) for i, (query, label) in enumerate(rows)]
    write(folder / "train.csv", rows[::2])
    write(folder / "validation.csv", [*noisy[1::4], rows[0]])  # one row that training has as well
    write(folder / "test.csv", noisy[3::4])
    write(folder / "ood.csv", [(f"xyz {i} qqq {i * i}",) for i in range(25)], header=("text_input",))
    return folder


@pytest.fixture(scope="module")
def runs(files, tiny_encoder, tmp_path_factory):
    """Runs of one adapter: trained with a temperature; tested as its card says, without it, and with dropout."""
    folder = tmp_path_factory.mktemp("runs")
    common = ["--base_model", tiny_encoder, "--dataset_name", files / "train.csv", "--results_dir", folder / "results"]
    common += ["--disable_tqdm", "true"]

    def run(name, *flags):
        words = [*common, "--run_name", name, *flags]
        if "--test_file" not in flags:
            words += ["--test_file", files / "test.csv"]
        record = trainer_script.main(list(map(str, words)))
        return record, read_predictions(folder / "results/predictions" / f"{name}.csv")

    adapter = folder / "adapter"
    found = {"folder": folder, "adapter": adapter}
    found["trained"] = run(
        "trained", "--output_dir", adapter, "--lora_dropout", 0.1, "--lr", 0.005, "--epochs", 15,
        "--save_strategy", "no",
        "--do_eval", "true", "--validation_file", files / "validation.csv", "--fit_temperature", "true",
        "--ood_dataset_name", files / "ood.csv", "--max_ood_samples", 20,
    )  # fmt: skip
    found["demo"] = folder / "demo.csv"
    classify.main(["--adapter_path", str(adapter), "--file", str(files / "test.csv"), "--out", str(found["demo"])])
    tested = ("--adapter_path", adapter, "--do_train", "false")
    found["tested"] = run("tested", *tested)
    card = json.loads((adapter / "task.json").read_text())
    (adapter / "task.json").write_text(json.dumps({**card, "score_temperature": None}))
    found["card"] = card
    found["raw"] = run("raw", *tested)
    found["validation"] = run("validation", *tested, "--test_file", files / "validation.csv")
    dropout = (*tested, "--mc_dropout_samples", 3)
    found["dropout"] = [run(f"dropout{i}", *dropout, "--seed", seed) for i, seed in enumerate((1, 1, 2))]
    return found


def test_the_temperature_is_that_of_the_validation_rows_and_divides_what_is_written(runs):
    record, table = runs["trained"]
    fitted = record["metrics"]["temperature"]
    assert runs["card"]["score_temperature"] == fitted and runs["card"]["score_temperature_samples"] == 0
    everything = runs["validation"][1]
    y = (everything["label"] == "yes").to_numpy().astype(int)

    def loss(log_t):
        scaled = probs(everything) ** (1 / np.exp(log_t))
        return nll(scaled / scaled.sum(1, keepdims=True), y)

    best = minimize_scalar(loss, bounds=(-4, 4), method="bounded")
    assert fitted == pytest.approx(np.exp(best.x), rel=1e-3) and 1.05 < fitted < 50
    scaled = probs(runs["raw"][1]) ** (1 / fitted)
    assert probs(table) == pytest.approx(scaled / scaled.sum(1, keepdims=True), abs=1e-5)
    labels = (table["label"] == "yes").to_numpy().astype(int)
    assert record["metrics"]["nll"] == pytest.approx(nll(probs(table), labels))
    assert record["metrics"]["validation"]["nll"] == pytest.approx(best.fun, abs=1e-5)


def test_the_card_carries_it_to_tests_and_to_the_demo(runs):
    assert runs["tested"][0]["metrics"]["temperature"] == runs["card"]["score_temperature"]
    assert probs(runs["tested"][1]) == pytest.approx(probs(runs["trained"][1]), abs=1e-6)
    assert "temperature" not in runs["raw"][0]["metrics"]
    with open(runs["demo"], encoding="utf-8") as file:
        asked = [[float(row["prob_no"]), float(row["prob_yes"])] for row in csv.DictReader(file)]
    assert np.array(asked) == pytest.approx(probs(runs["trained"][1]), abs=1e-5)


def test_rows_of_another_domain_are_written_and_told_by_each_measure(runs):
    record, table = runs["trained"]
    outside = read_predictions(runs["folder"] / "results/predictions/trained.ood.csv")
    assert len(outside) == 20 and outside["label"].isna().all() and set(outside["prediction"]) <= {"yes", "no"}
    values = np.concatenate([table["entropy"], outside["entropy"]])
    is_outside = np.repeat([0, 1], [len(table), 20])
    assert record["metrics"]["ood"]["rows"] == 20
    assert record["metrics"]["ood"]["auroc_entropy"] == pytest.approx(roc_auc_score(is_outside, values))


def test_dropout_samples_follow_the_seed_and_disagree(runs):
    (_, first), (_, again), (_, other) = runs["dropout"]
    assert probs(first).tolist() == probs(again).tolist()
    assert abs(probs(first) - probs(other)).max() > 1e-4
    assert (first["mutual_information"] > 0).all() and (first["max_prob_sd"] > 0).all()


def test_dropout_noise_has_dropouts_variance_and_leaves_no_trace():
    model = nn.Sequential(nn.Dropout(0.25), nn.Linear(6, 1, bias=False), nn.Identity()).eval()
    model[2].train()
    x = torch.randn(6)
    one, other = torch.tensor([1, 2]), torch.tensor([1, 3])
    before = torch.random.get_rng_state()
    with dropout_noise(model, 3):
        y = model(x.expand(40_000, 6))
    with dropout_noise(model, 3):
        assert torch.equal(model(x.expand(40_000, 6)), y)
    with dropout_noise(model, 4):
        assert not torch.equal(model(x.expand(40_000, 6)), y)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [module.training for module in model] == [False, False, True] and not y.requires_grad
    expected = (0.25 / 0.75 * (x * model[1].weight[0]) ** 2).sum().item()
    assert y.var().item() == pytest.approx(expected, rel=0.05)
    assert y.mean().item() == pytest.approx(model(x).item(), abs=0.02)
    assert len({batch_seed(*given) for given in ((0, one), (1, one), (0, other), (0, one.flip(0)))}) == 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--fit_temperature", "true"], "--do_eval"),
        (["--validation_file", "x.csv"], "--do_eval"),
        (["--mc_dropout_samples", "1"], "0 .dropout off., or 2 or more"),
        (["--mc_dropout_samples", "4", "--posterior_samples", "4"], "give one of them"),
        (["--mc_dropout_samples", "4", "--base_dropout", "0"], "no dropout in the model"),
        (["--ood_dataset_name", "nothing"], "--ood_dataset_name.*unknown"),
        (["--max_ood_samples", "0"], "at least 1"),
    ],
)
def test_flags_that_cannot_be_are_refused_before_a_model_is_loaded(flags, words, files, tiny_encoder, tmp_path):
    common = ["--base_model", tiny_encoder, "--dataset_name", files / "train.csv", "--results_dir", tmp_path / "r"]
    with pytest.raises(InputError, match=words):
        trainer_script.main(list(map(str, [*common, "--output_dir", tmp_path / "a", *flags])))
    assert not (tmp_path / "a").exists() and not (tmp_path / "r").exists()


BERT = BertConfig(hidden_dropout_prob=0.1)
LLAMA = LlamaConfig()  # attention_dropout: 0.0
PYTHIA = GPTNeoXConfig(attention_dropout=0.0, hidden_dropout=0.0, classifier_dropout=0.1)


@pytest.mark.parametrize(
    ("config", "base_dropout", "adapter", "drops"),
    [
        (BERT, None, {}, True),
        (BERT, 0.0, {}, False),
        (LLAMA, None, {}, False),
        (LLAMA, 0.1, {}, True),
        (PYTHIA, 0.1, {}, True),
        (PYTHIA, None, {}, False),  # what it calls classifier_dropout is in no head of ours
        (LLAMA, None, {"lora_dropout": 0.1}, True),
        (LLAMA, None, {"lora_dropout": 0.1, "adapter_name": "qlora"}, True),
        (LLAMA, None, {"lora_dropout": 0.1, "adapter_name": "hybrid"}, True),
        (LLAMA, None, {"lora_dropout": 0.1, "adapter_name": "mam"}, False),
        (LLAMA, None, {"lora_dropout": 0.1, "adapter_name": "prompt-tuning"}, False),
        (LLAMA, None, {"lora_dropout": 0.1, "adapter_name": "bh-peft", "sites": ["prefix", "adapter"]}, False),
    ],
)
def test_dropout_is_asked_for_where_there_is_some(config, base_dropout, adapter, drops):
    run = SimpleNamespace(
        data=SimpleNamespace(mc_dropout_samples=10), base=SimpleNamespace(base_dropout=base_dropout),
        adapter=AdapterArguments(**adapter),
    )  # fmt: skip
    if drops:
        return check_dropout(run, config)
    with pytest.raises(InputError, match="no dropout in the model"):
        check_dropout(run, config)


def test_no_input_of_the_validation_file_is_trained_on(files):
    arguments = parse_arguments(
        ["--base_model", "m", "--dataset_name", str(files / "train.csv"), "--test_file", str(files / "test.csv"),
         "--validation_file", str(files / "validation.csv"), "--do_eval", "true"]
    ).data  # fmt: skip
    task = load_task(arguments, 0, with_validation=True)
    groups = [{example.group for example in part} for part in (task.train, task.validation, task.test)]
    assert not (groups[0] & groups[1] or groups[1] & groups[2] or groups[0] & groups[2])
    assert any("1 training rows also stand in the validation rows" in note for note in task.notes)
    arguments.validation_file = str(files / "test.csv")
    with pytest.raises(InputError, match="every row is also a test row"):
        load_task(arguments, 0, with_validation=True)
    arguments.validation_file = str(files / "ood.csv")
    with pytest.raises(InputError, match="no column 'text_label'"):
        load_task(arguments, 0, with_validation=True)


def test_other_domains_of_known_datasets_need_no_label_and_free_text_is_refused(tmp_path):
    write(tmp_path / "negative.csv", [("Birds fly.", "Penguins do not fly.")], ("generic", "exemplar"))
    write(tmp_path / "positive.csv", [("Birds fly.", "Robins fly.")], ("generic", "exemplar"))
    data = DataArguments(dataset_name="x.csv", ood_dataset_name="generics", ood_data_path=str(tmp_path))
    task = Task("t", [], [], [], "classification", ("a", "b"))
    found = read_ood(data, task, 0)
    assert [example.query for example in found] == [f"{word} birds fly." for word in ("All", "Not all", "Some", "No")]
    assert {example.answer for example in found} == {""}
    with pytest.raises(InputError, match="free text"):
        read_ood(data, Task("t", [], [], [], "generation"), 0)


def test_the_temperature_of_samples():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(300, 3)) * 2
    y = np.array([rng.choice(3, p=row) for row in probabilities(logits)])
    samples = 3 * (logits + rng.normal(size=(5, 300, 3)))
    best = minimize_scalar(
        lambda log_t: nll(probabilities(samples / np.exp(log_t)).mean(0), y), bounds=(-2, 3), method="bounded"
    )
    assert fit_sample_temperature(samples, y) == pytest.approx(np.exp(best.x), rel=1e-3)
    assert fit_sample_temperature(samples[:1], y) == pytest.approx(fit_temperature(samples[0], y), rel=1e-4)
    assert fit_sample_temperature(np.zeros((2, 3, 2)), [0, 1, 0]) == 1


def calibrated(validation, test, tmp_path):
    """`calibrate` with --fit_temperature on two labels: the card."""
    run = SimpleNamespace(
        data=SimpleNamespace(posterior_samples=0, mc_dropout_samples=0, fit_temperature=True),
        training=SimpleNamespace(do_train=True, output_dir=tmp_path),
    )
    card = TaskCard("classification", ["no", "yes"], True, "{text_input}", None, 64, "score")
    calibrate(run, LABELS, {"validation": validation, "adapter": test}, card)
    return card


LABELS = Task("t", [], [], [], "classification", ("no", "yes"))


def scored(samples, expected):
    outputs = [ModelOutput("", "", label) for label in expected]
    return Answered([str(i) for i in range(len(expected))], outputs, samples.mean(1), False, samples=samples)


@pytest.mark.parametrize(("expected", "end"), [(("yes", "no"), "0.01"), (("no", "yes"), "100")])
@pytest.mark.parametrize("sampled", [True, False])
def test_a_temperature_at_an_end_of_the_search_is_not_applied(expected, end, sampled, tmp_path, capsys):
    samples = np.array([[[0.0, 2.0], [0.0, 3.0]], [[4.0, 0.0], [1.0, 0.0]]])
    validation, test = scored(samples, expected), scored(samples, expected)
    if not sampled:
        validation.samples = test.samples = None
    card = calibrated(validation, test, tmp_path)
    assert card.score_temperature == test.temperature == TaskCard.read(tmp_path).score_temperature == 1
    lines = capsys.readouterr().out.strip().splitlines()
    words = f"not fitted, T stays 1; the NLL of 2 validation rows falls as far as T = {end}, "
    assert len(lines) == 1 and words in lines[0]


def test_texts_of_sampled_labels_are_the_predictions_at_the_fitted_temperature(tmp_path):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(300, 2)) * 2
    expected = [("no", "yes")[rng.choice(2, p=row)] for row in probabilities(logits)]
    samples = 5 * (logits[:, None] + rng.normal(size=(300, 5, 2)))
    validation, test = scored(samples, expected), scored(samples, expected)
    at_one = labels.predictions(test, LABELS)["prediction"].tolist()
    card = calibrated(validation, test, tmp_path)
    found = labels.predictions(test, LABELS)["prediction"].tolist()
    assert card.score_temperature > 2 and found != at_one
    assert [row.output for row in test.outputs] == found


def test_intervals_of_numbers_hold_what_they_say():
    rng = np.random.default_rng(1)
    rows, epistemic, noise = 4000, 0.6, 0.8
    truth = rng.normal(size=rows)
    centre = truth + epistemic * rng.normal(size=rows)  # the model's own error, which its samples know
    samples = centre[:, None, None] + epistemic * rng.normal(size=(rows, 50, 1))
    labels = truth + noise * rng.normal(size=rows)
    outputs = [ModelOutput("", "", repr(float(label))) for label in labels]
    answered = Answered([str(i) for i in range(rows)], outputs, centre[:, None], samples=samples)

    from bhpeft.calibration import label_noise

    answered.noise_sd = label_noise(answered)
    assert answered.noise_sd == pytest.approx(noise, rel=0.05)
    task = Task("t", [Example("0", "q", "0", "g")], [], [], "regression")
    table = numbers.predictions(answered, task)
    found = numbers.figures(answered, table, task)
    assert found["coverage_95"] == pytest.approx(0.95, abs=0.01)
    inside = (table["low_95"] <= labels) & (labels <= table["high_95"])
    assert found["coverage_95"] == inside.mean()
    total = table["total_sd"].to_numpy()
    assert total**2 == pytest.approx(table["epistemic_sd"].to_numpy() ** 2 + answered.noise_sd**2)
    assert found["nll"] == pytest.approx(0.5 * np.log(2 * np.pi * (epistemic**2 + noise**2)) + 0.5, abs=0.03)
    # Measured without samples it holds the epistemic part as well, which must not be added a second time.
    alone = Answered(answered.ids, outputs, samples.mean(1))
    answered.noise_sd, answered.noise_samples = label_noise(alone), 0
    assert answered.noise_sd**2 == pytest.approx(epistemic**2 + noise**2, rel=0.05)
    table = numbers.predictions(answered, task)
    assert table["total_sd"].to_numpy() == pytest.approx(np.full(rows, answered.noise_sd)) and "epistemic_sd" in table
    assert numbers.figures(answered, table, task)["coverage_95"] == pytest.approx(0.95, abs=0.01)
    answered.noise_samples = None  # a card that does not say is taken for one with samples
    assert numbers.figures(answered, numbers.predictions(answered, task), task)["coverage_95"] > 0.965
    certain = Answered(answered.ids, outputs, labels[:, None], deviation=2.0)  # residuals of 0 are floored
    assert label_noise(certain) == pytest.approx(0.02)


# ----------------------------------------------------------------------------------------- benchmarks


@pytest.fixture(scope="module")
def little_sst2(tmp_path_factory):
    """SST-2's own layout, of sentences and phrases of them."""
    folder = tmp_path_factory.mktemp("sst2")
    sentences = [(f"i saw that the {kind} {act} at night .", i % 2) for i, kind in enumerate(KINDS) for act in ACTS]
    phrases = [(" ".join(text.split()[3:-1]), label) for text, label in sentences[:60:2]]
    for name, rows in {"train": sentences[:60] + phrases, "dev": sentences[60:]}.items():
        lines = ["sentence\tlabel", *(f"{text} \t{label}" for text, label in rows)]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_slices_share_no_phrase_and_validate_on_whole_sentences(little_sst2, tmp_path):
    from benchmarks.slices import write_slices

    def read(folder, name):
        with open(folder / f"{name}.csv", encoding="utf-8") as file:
            return [f" {row['text_input']} " for row in csv.DictReader(file)]

    for train_rows in (30, None):
        folder = tmp_path / str(train_rows)
        write_slices(little_sst2, folder, train_rows, 12, seed=3)
        train, validation = read(folder, "train"), read(folder, "validation")
        assert len(validation) == 12 and (len(train) == 30 if train_rows else len(train) > 40)
        assert not any(a in b or b in a for a in train for b in validation)
        assert all(text.endswith(" . ") for text in validation)
        assert read(folder, "fit") + read(folder, "report") == validation and len(read(folder, "dev")) == 12
    write_slices(little_sst2, tmp_path / "again", 30, 12, seed=3, held_out_rows=5)
    for part in ("train", "validation"):  # the same whether more is held out or not
        assert read(tmp_path / "again", part) == read(tmp_path / "30", part)
    held_out, others = read(tmp_path / "again", "held_out"), read(tmp_path / "again", "train")
    assert len(held_out) == 5 and not set(held_out) & set(read(tmp_path / "again", "validation"))
    assert not any(a in b or b in a for a in others for b in held_out) and not (tmp_path / "30/held_out.csv").exists()
    write_slices(little_sst2, tmp_path / "whole", None, 12, seed=3, held_out_rows=5)
    others = read(tmp_path / "whole", "train")
    assert not any(a in b or b in a for a in others for b in read(tmp_path / "whole", "held_out"))
    with pytest.raises(InputError, match="too few for 30 to train on and 9999 to keep"):
        write_slices(little_sst2, tmp_path / "none", 30, 12, seed=3, held_out_rows=9987)


def test_the_benchmark_runs_writes_and_goes_on(little_sst2, tiny_encoder, tmp_path, capsys, monkeypatch):
    from benchmarks import uncertainty

    few = {"train_rows": 30, "validation_rows": 12, "test_rows": 12, "max_steps": 2}
    monkeypatch.setattr(uncertainty, "SMOKE", few)
    write(tmp_path / "negative.csv", [("Birds fly.", "Penguins do not.")], ("generic", "exemplar"))
    write(tmp_path / "positive.csv", [("Birds fly.", "Robins fly.")], ("generic", "exemplar"))
    flags = ["--base_model", str(tiny_encoder), "--data_path", str(little_sst2), "--ood_data_path", str(tmp_path)]
    flags += ["--smoke", "--out", str(tmp_path / "u.json"), "--work_folder", str(tmp_path / "work"), "--seeds", "0"]
    small = {**uncertainty.BH_PEFT, "bn_reduction_factor": 8}
    monkeypatch.setitem(uncertainty.SETTINGS, "bh-peft+temperature",
                        {"train": small, "test": {"posterior_samples": 2, "fit_temperature": True}})  # fmt: skip
    record = uncertainty.main([*flags, "--methods", "map,bh-peft+temperature"])
    assert [run["method"] for run in record["runs"]] == ["map", "bh-peft+temperature"]
    configuration = read_metrics(tmp_path / "work/results/bh-peft+temperature-0/metrics/run.json")["config"]
    assert configuration["fit_temperature"] and configuration["validation_file"].endswith("validation.csv")
    assert configuration["bf16"] == bf16_in_hardware() and configuration["max_length"] == 128  # as in training
    assert all(0 <= run["measures"]["entropy"]["auroc_ood"] <= 1 for run in record["runs"])
    text = capsys.readouterr().out
    assert "Minus map" in text and (tmp_path / "u.png").read_bytes().startswith(b"\x89PNG")

    held = uncertainty.main([*flags[:4], *flags[6:], "--methods", "map", "--held_out_rows", "4"])["runs"]
    assert [run["reported_on"] for run in held] == ["dev", "dev", "4 held out"]  # beside the others, not in their place
    asked = read_metrics(tmp_path / "work/results/map-0/metrics/run.json")["config"]["test_file"]
    assert asked.endswith("held_out.csv")
    with pytest.raises(InputError, match="give one"):
        uncertainty.parse_arguments([*flags, "--held_out_rows", "4", "--tune_on_validation"])

    before = json.loads((tmp_path / "u.json").read_text())
    with monkeypatch.context() as patch:
        patch.setattr(uncertainty.Bench, "run", lambda *args: pytest.fail("was run already"))
        assert uncertainty.main([*flags, "--methods", "map,bh-peft+temperature"]) == before
    with monkeypatch.context() as patch:
        patch.setattr(uncertainty.Bench, "train", _adapter_of_map(uncertainty.Bench.train, tmp_path))
        free = uncertainty.main([*flags, "--methods", "training-free"])["runs"][-1]
    assert free["method"] == "training-free" and free["measures"]["mutual_information"]


def test_two_jobs_find_what_one_finds(little_sst2, tiny_encoder, tmp_path):
    from benchmarks import uncertainty

    flags = ["--base_model", str(tiny_encoder), "--data_path", str(little_sst2), "--train_rows", "30", "--seeds", "0"]
    flags += ["--validation_rows", "12", "--methods", "map,map+temperature,mc-dropout"]
    found = {}
    for jobs in ("1", "2"):
        record = uncertainty.main([*flags, "--jobs", jobs, "--out", str(tmp_path / f"{jobs}.json")])
        found[jobs] = {run["method"]: (run["accuracy"], round(run["nll"], 3)) for run in record["runs"]}
    assert found["1"] == found["2"] and len(found["1"]) == 3
    assert found["1"]["map"] != found["1"]["mc-dropout"]


def test_workers_end_with_the_benchmark_that_began_them(tmp_path):
    """A SIGTERM ends the benchmark before its pool can be closed."""
    script = tmp_path / "pool.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from benchmarks.processes import end_with_parent\n"
        "if __name__ == '__main__':\n"
        "    with ProcessPoolExecutor(1, get_context('spawn'), initializer=end_with_parent) as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        pool.submit(time.sleep, 60)\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    with open(tmp_path / "said", "w") as said:  # a pipe would wait for the worker
        done = subprocess.run([sys.executable, script], timeout=60, stdout=said, check=False)
    assert done.returncode == -signal.SIGTERM
    worker = int((tmp_path / "said").read_text())
    until = time.monotonic() + 20
    while lives(worker) and time.monotonic() < until:
        time.sleep(0.1)
    assert not lives(worker)


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def test_the_benchmark_of_rounds_runs_writes_and_goes_on(little_sst2, tiny_encoder, tmp_path, capsys, monkeypatch):
    from benchmarks import rounds

    few = {"rounds": [6, 12], "validation_rows": 12, "test_rows": 12, "epochs": 1, "steps": 2}
    monkeypatch.setattr(rounds, "SMOKE", few)
    monkeypatch.setitem(rounds.ADAPTER, "bn_reduction_factor", 8)
    flags = ["--base_model", str(tiny_encoder), "--data_path", str(little_sst2), "--smoke", "--seeds", "0"]
    flags += ["--out", str(tmp_path / "r.json")]
    record = rounds.main([*flags, "--methods", "weights;posterior;full replay"])
    weights, posterior, replay = record["runs"]
    assert weights["trained_rows"] == posterior["trained_rows"] == 2 * (6 + 12)  # two steps a round, of an epoch each
    assert replay["trained_rows"] == 2 * (6 + 18) and replay["steps"] == posterior["steps"] == 4
    for run in record["runs"]:
        (first, none), last = run["matrix"]
        assert none is None and run["backward_transfer"] == pytest.approx(last[0] - first)
        assert len(run["accuracies"]) == 2 and run["accuracies"][-1] == run["accuracy"]
    text = capsys.readouterr().out
    assert "Minus weights" in text and "full replay: accuracy on rows of each round" in text
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    with monkeypatch.context() as patch:
        patch.setattr(rounds, "run", lambda *args: pytest.fail("was run already"))
        assert rounds.main([*flags, "--methods", "weights;posterior"]) == json.loads((tmp_path / "r.json").read_text())


def test_the_benchmark_compares_with_samples_that_have_no_pairs():
    from benchmarks import uncertainty
    from bhpeft import training
    from bhpeft.adapters.bh_peft import GaussianLinear

    layer = GaussianLinear(50, 40)
    (paired,) = training.drawn_noise(layer, 4, 7)
    assert torch.equal(paired[2:], -paired[:2])
    with uncertainty.independent_draws():
        (alone,) = training.drawn_noise(layer, 4, 7)
        assert torch.equal(alone, training.drawn_noise(layer, 4, 7)[0])
    correlations = torch.corrcoef(alone.flatten(1)) - torch.eye(4)
    assert alone.shape == paired.shape and correlations.abs().max() < 5 / 2000**0.5
    assert training.drawn_noise(layer, 4, 7)[0].equal(paired)  # in pairs again


def test_runs_of_the_benchmark_replace_their_own_alone(tmp_path, monkeypatch, capsys):
    from benchmarks import uncertainty

    asked = []

    def run(self, method, seed):
        asked.append((method, seed))
        figures = {name: len(asked) / 10 for name in ("accuracy", "nll", "ece", "brier", "seconds")}
        return {**figures, "measures": {"one_minus_max_prob": {"aurc": 0.1, "gain_10": 0.0}}}

    monkeypatch.setattr(uncertainty.Bench, "run", run)
    out = tmp_path / "u.json"

    def bench(*flags, base="minilm", methods="map,bh-peft", seeds="0,1", data="sst2"):
        asked.clear()
        record = uncertainty.main(["--base_model", base, "--data_path", data, "--out", str(out), "--seeds", seeds,
                                   "--methods", methods, *flags])  # fmt: skip
        assert json.loads(out.read_text()) == record
        return len(asked), len(record["runs"])

    assert bench() == (4, 4)
    text = capsys.readouterr().out  # no other domain: a dash, and no error
    assert "nan" not in text and text.split("bh-peft  ")[1].split("\n")[0].split()[-4:-3] == ["-"]
    monkeypatch.setattr(uncertainty, "draw", lambda *args: None)
    assert bench() == (0, 4)
    assert bench("--again", methods="map", seeds="1") == (1, 4)
    assert bench(base="other", seeds="0") == (2, 6)
    assert bench("--validation", "phrases", methods="map", seeds="0") == (1, 7)
    assert bench("--ood_data_path", "generics", methods="map", seeds="0") == (1, 8)
    assert bench(data="other", methods="map", seeds="0") == (1, 9)
    other = "fp32" if bf16_in_hardware() else "bf16"
    assert bench("--precision", other, methods="map", seeds="0") == (1, 10)
    assert bench() == (0, 10)
    changes = {"COMMON": {**uncertainty.COMMON, "max_length": 64}, "EPOCHS": {1000: 3}, "SAMPLES": 20}
    for name, value in changes.items():
        monkeypatch.setattr(uncertainty, name, value)
        assert bench(methods="map", seeds="0") == (1, 10)


def _adapter_of_map(train, folder):
    """`Bench.train` that may use adapters that are there, and train none."""

    def only_known(self, *args):
        before = set((folder / "work/adapters").iterdir())
        found = train(self, *args)
        assert set((folder / "work/adapters").iterdir()) == before
        return found

    return only_known


def test_paired_intervals_are_students():
    from benchmarks.uncertainty_table import t_interval

    low, high = t_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-5)


def test_intervals_without_a_figure():
    from benchmarks.uncertainty_table import t_interval

    assert np.isnan(t_interval([np.nan, np.nan])).all() and np.isnan(t_interval([0.5, np.nan])).all()


def test_samples_of_one_pass_equal_those_of_ten(tiny_encoder):
    from benchmarks import sampling

    words = ["--smoke", "--rows", "1,3", "--bayesian", "all", "--threads", "1"]
    found = sampling.main(["--base_model", str(tiny_encoder), *words])
    for precision, tolerance in (("fp32", 1e-3), ("bf16", 0.5)):
        for part in ("rows_1, in their order", "rows_3, in their order", "rows_3, by length"):
            figures = found[f"{precision}, {part}"]
            assert figures["rows"] == 8
            assert figures["largest_difference"] <= tolerance * figures["deviation_of_logits"]
            assert figures["deviation_of_logits"] > 1e-3  # there is noise to see
