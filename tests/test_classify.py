"""demo/classify.py: the trainer's own probabilities, posterior samples by a second path, forms of input, errors."""

import csv
import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run_command, statement_rows
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from bhpeft.adapters import attach_adapter, posterior_noise
from bhpeft.adapters.bh_peft import gaussian_layers
from bhpeft.arguments import AdapterArguments
from bhpeft.base_model import load_base_model, load_with_head
from bhpeft.errors import InputError
from bhpeft.results import read_predictions
from bhpeft.tasks.card import TaskCard

sys.path.insert(0, str(ROOT / "demo"))
import classify  # noqa: E402 - found through the path above

QUICK = ["--save_strategy", "no", "--max_steps", 4, "--lr", 1e-2, "--test_fraction", 0.2, "--run_name", "run"]
SMALL = ["--prefix_length", 4, "--bn_reduction_factor", 8, "--lora_rank", 4, "--kl_weight", 1e-3]
SAMPLES = 4


def answers(folder, file, tmp_path, *flags):
    """What the script says to all rows of a file: columns of text or numbers."""
    out = tmp_path / "answers.csv"
    classify.main(
        ["--adapter_path", str(folder), "--file", str(file), "--out", str(out), "--overwrite", *map(str, flags)]
    )
    with open(out, newline="", encoding="utf-8") as lines:
        header, *rows = list(csv.reader(lines))
    columns = dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))
    return {name: values if name in header[:1] else _numbers(values) for name, values in columns.items()}


def _numbers(values):
    try:
        return np.array(values, dtype=float)
    except ValueError:
        return values


def spread_out(folder, to):
    """A copy of an adapter whose Gaussian weights have deviations (0.64) large enough to be seen in what it answers."""
    shutil.copytree(folder, to)
    weights = load_file(to / "adapter_model.safetensors")
    for name, values in weights.items():
        if name.endswith(".g"):
            values.fill_(0.8)
    save_file(weights, to / "adapter_model.safetensors", metadata={"format": "pt"})
    return to


@torch.no_grad()
def one_by_one(model, passes):
    """Results (S, N, ...) of forward passes without padding, one weight and one text at a time."""
    found = []
    with posterior_noise(model, SAMPLES, 42) as noise:
        for s in range(SAMPLES):
            for layer, eps in zip(gaussian_layers(model), noise, strict=True):
                layer.eps = eps[s : s + 1]
            found.append(torch.stack([one() for one in passes]))
    return torch.stack(found).double()


def check_uncertainty(found, log_p, labels):
    """Columns against log-probabilities (S, N, C) up to a constant, by torch's own distributions."""
    each = torch.distributions.Categorical(logits=log_p)
    mean = torch.distributions.Categorical(probs=each.probs.mean(0))
    for i, label in enumerate(labels):
        assert found[f"prob_{label}"] == pytest.approx(mean.probs[:, i].numpy(), abs=1e-5)
    best = mean.probs.argmax(1)
    assert list(map(str, found["prediction"])) == [labels[i] for i in best]
    assert found["max_prob"] == pytest.approx(mean.probs.max(1).values.numpy(), abs=1e-5)
    assert found["entropy"] == pytest.approx(mean.entropy().numpy(), abs=1e-5)
    information = mean.entropy() - each.entropy().mean(0)
    assert found["mutual_information"] == pytest.approx(information.numpy(), abs=1e-5)
    assert (found["mutual_information"] >= 0).all() and found["mutual_information"].max() > 1e-4
    spread = each.probs[:, torch.arange(len(best)), best].std(0, correction=0)
    assert found["max_prob_sd"] == pytest.approx(spread.numpy(), abs=1e-5) and found["max_prob_sd"].max() > 1e-3


def same_as_the_trainers(found, tmp_path, columns, within=1e-5):
    table = read_predictions(tmp_path / "results/predictions/run.csv")
    assert len(table) >= 10
    for name in columns:
        assert found[name][table["id"].to_numpy()] == pytest.approx(table[name].to_numpy(), abs=within), name
    return table


def load(folder, base, head, labels=()):
    arguments = AdapterArguments(adapter_path=str(folder))
    how = (str(base), head, labels, 1)
    model = load_base_model(str(base)) if head == "lm" else load_with_head(*how)[0]
    return attach_adapter(model, arguments, str(base), head).eval()


# ------------------------------------------------------------------------------------------ trained adapters


def test_a_head_with_point_weights(train, tiny_encoder, labelled, tmp_path):
    data = ["--base_model", tiny_encoder, "--dataset_name", labelled]
    train(*QUICK, "--adapter_name", "lora", data=data)
    found = answers(tmp_path / "adapter", labelled, tmp_path, "--batch_size", 5)
    assert list(found) == ["text_input", "prediction", "prob_no", "prob_yes", "max_prob", "entropy"]
    assert found["text_input"] == [query for query, _ in statement_rows()]
    table = same_as_the_trainers(found, tmp_path, ["prob_no", "prob_yes", "max_prob", "entropy"])
    assert [found["prediction"][i] for i in table["id"]] == table["prediction"].tolist()
    assert np.ptp(found["prob_yes"]) > 1e-3
    with pytest.raises(InputError, match=r"--posterior_samples 3: the adapter \(lora\) has no Gaussian weights"):
        answers(tmp_path / "adapter", labelled, tmp_path, "--posterior_samples", 3)


def test_a_head_with_gaussian_weights(train, tiny_encoder, labelled, tmp_path, capsys):
    data = ["--base_model", tiny_encoder, "--dataset_name", labelled]
    train(*QUICK, *SMALL, "--adapter_name", "bh-peft", data=data)
    wide = spread_out(tmp_path / "adapter", tmp_path / "wide")
    found = answers(wide, labelled, tmp_path, "--posterior_samples", 0)
    assert "mutual_information" not in found
    same_as_the_trainers(found, tmp_path, ["prob_no", "prob_yes", "max_prob", "entropy"])

    found = answers(wide, labelled, tmp_path, "--posterior_samples", SAMPLES, "--batch_size", 20)
    assert list(found)[-2:] == ["mutual_information", "max_prob_sd"]
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_encoder), load(wide, tiny_encoder, "classification", "ab")
    texts = [tokenizer(query, return_tensors="pt") for query in found["text_input"]]
    logits = one_by_one(model, [lambda text=text: model(**text).logits[0] for text in texts])
    check_uncertainty(found, logits, ["no", "yes"])
    again = answers(wide, labelled, tmp_path, "--posterior_samples", SAMPLES, "--batch_size", 1)
    assert again["max_prob_sd"] == pytest.approx(found["max_prob_sd"], abs=1e-5)  # every batch has the same weights
    other = answers(wide, labelled, tmp_path, "--posterior_samples", SAMPLES, "--seed", 1)
    assert np.abs(other["max_prob_sd"] - found["max_prob_sd"]).max() > 1e-4

    classify.main(["Do cats fly?", "--adapter_path", str(wide)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "label" and lines[0].split()[1] == lines[1].split()[2]
    assert float(lines[1].split()[1]) + float(lines[2].split()[0]) == pytest.approx(1, abs=1e-4)
    assert [line[:20].strip() for line in lines[3:]] == ["entropy", "mutual information", "standard deviation"]
    assert "over 10 posterior samples" in lines[5]


def test_a_text_that_is_no_utf8_is_told_in_a_line(tmp_path):
    with pytest.raises(InputError, match="TEXT: character 4 is not UTF-8"):
        classify.main(["caf\udce9", "--adapter_path", str(tmp_path)])


def test_a_regression_has_the_labels_units(train, tiny_encoder, tmp_path, capsys):
    file = tmp_path / "rows.csv"
    queries = [query for query, _ in statement_rows()]
    file.write_text("text_input,text_label\n" + "".join(f"{q},{500 + 10 * i}\n" for i, q in enumerate(queries)))
    data = ["--base_model", tiny_encoder, "--dataset_name", file]
    train(*QUICK, *SMALL, "--adapter_name", "bh-peft", data=data)
    wide = spread_out(tmp_path / "adapter", tmp_path / "wide")
    found = answers(wide, file, tmp_path, "--posterior_samples", 0)
    assert list(found) == ["text_input", "prediction"]
    same_as_the_trainers(found, tmp_path, ["prediction"], within=1e-2)  # of a deviation of about 200

    found = answers(wide, file, tmp_path, "--posterior_samples", SAMPLES)
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_encoder), load(wide, tiny_encoder, "regression")
    texts = [tokenizer(query, return_tensors="pt") for query in queries]
    outputs = one_by_one(model, [lambda text=text: model(**text).logits[0, 0] for text in texts]).numpy()
    card = json.loads((wide / "task.json").read_text())
    numbers = outputs * card["target_deviation"] + card["target_mean"]
    assert 500 < card["target_mean"] < 1220 and 100 < card["target_deviation"] < 300
    assert found["prediction"] == pytest.approx(numbers.mean(0), abs=1e-2)
    assert found["prediction_sd"] == pytest.approx(numbers.std(0), abs=1e-2)
    assert found["prediction_sd"].max() > 1
    classify.main([queries[0], "--adapter_path", str(wide), "--posterior_samples", str(SAMPLES)])
    first, second = capsys.readouterr().out.splitlines()
    label, number = first.split()
    assert label == "number" and number == f"{float(number):.6g}"
    assert float(number) == pytest.approx(found["prediction"][0], abs=2e-3)
    assert second.startswith("standard deviation") and second.endswith("over 4 posterior samples")


def test_labels_as_text_of_a_causal_model(train, tiny_model, labelled, tmp_path):
    labelled.write_text(labelled.read_text().replace(",yes", ",True").replace(",no", ",False"))
    data = ["--base_model", tiny_model, "--dataset_name", labelled, "--task_type", "classification"]
    asked = ["--prompt_template", "{instruction} {text_input} Answer:", "--instruction", "Say so:", "--max_length", 64]
    train(*QUICK, *asked, "--adapter_name", "bayesian-lora", "--predict_by", "score", data=data)
    wide = spread_out(tmp_path / "adapter", tmp_path / "wide")
    found = answers(wide, labelled, tmp_path, "--posterior_samples", 0)
    assert list(found) == ["text_input", "prediction", "prob_False", "prob_True", "max_prob", "entropy"]
    same_as_the_trainers(found, tmp_path, ["prob_False", "prob_True", "max_prob", "entropy"])

    found = answers(wide, labelled, tmp_path, "--posterior_samples", SAMPLES, "--batch_size", 12)
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), load(wide, tiny_model, "lm")

    def likelihoods(text):
        prompt = f"Say so: {text} Answer:"
        start, sums = len(tokenizer(prompt)["input_ids"]), []
        for label in ("False", "True"):
            ids = tokenizer(f"{prompt} {label}", return_tensors="pt")["input_ids"]
            ids = torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], 1)
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)
            sums.append(sum(log_p[at - 1, ids[0, at]] for at in range(start, ids.shape[1])))
        return torch.stack(sums)

    log_p = one_by_one(model, [lambda text=text: likelihoods(text) for text in found["text_input"]])
    check_uncertainty(found, log_p, ["False", "True"])


# ------------------------------------------------------------------------------------------ forms and errors


@pytest.fixture(scope="module")
def adapter(tiny_encoder, tmp_path_factory):
    """Folder of an adapter with an untrained head of three labels."""
    folder = tmp_path_factory.mktemp("made") / "adapter"
    torch.manual_seed(0)
    base, modules = load_with_head(str(tiny_encoder), "classification", ("a", "b", "c d"), 1)
    model = attach_adapter(base, AdapterArguments(), str(tiny_encoder), "classification", modules)
    model.save_pretrained(folder, save_embedding_layers=False)
    card = TaskCard(
        "classification", ["a", "b", "c d"], True, "{text_input}", None, max_length=24, predict_by="generate"
    )
    card.write(folder)
    return folder


def test_lines_of_standard_input(adapter, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Do cats fly?\r\nDo éels swim?\n".encode())))
    classify.main(["--adapter_path", str(adapter)])
    first, second = capsys.readouterr().out.split("\n\n")
    assert first.splitlines()[0].split(maxsplit=1) == ["text", "Do cats fly?"]
    assert second.splitlines()[0].split(maxsplit=1) == ["text", "Do éels swim?"]
    classify.main(["Do cats fly?", "--adapter_path", str(adapter), "--dtype", "bfloat16"])
    alone = capsys.readouterr().out.splitlines()
    assert len(alone) == 5 and alone[0] == first.splitlines()[1]  # without its text, which was given
    for data, why in ((b"", "is empty"), (b"a\n\nb", "standard input:2: the line is empty"), (b"\xff", "not UTF-8")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        with pytest.raises(InputError, match=why):
            classify.main(["-", "--adapter_path", str(adapter)])


def test_kinds_of_files_and_long_texts(adapter, tmp_path, capsys):
    texts = ["Do cats fly?", 'Do "owls", cows\tand bees sleep?', "Do cats " * 30]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"said": text}) + "\n" for text in texts))
    flags = ["--adapter_path", str(adapter), "--file", str(tmp_path / "rows.jsonl"), "--text_column", "said"]
    with pytest.raises(InputError, match="1 of 3 test texts are longer than --max_length 24"):
        classify.main(flags)
    classify.main([*flags, "--long_prompts", "truncate"])
    printed = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(printed.out)))
    assert [row["said"] for row in rows] == texts and "their end is cut" in printed.err
    assert list(rows[0]) == ["said", "prediction", "prob_a", "prob_b", "prob_c d", "max_prob", "entropy"]
    p = [float(rows[0][f"prob_{label}"]) for label in ("a", "b", "c d")]
    assert sum(p) == pytest.approx(1) and rows[0]["prediction"] == ["a", "b", "c d"][int(np.argmax(p))]
    assert float(rows[0]["entropy"]) == pytest.approx(-np.sum(p * np.log(p)))
    with pytest.raises(InputError, match="has 512 positions"):
        classify.main([*flags[:2], "cats " * 900, "--max_length", "2000"])


def test_errors_before_a_model_is_loaded(adapter, tiny_encoder, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("bhpeft.base_model._load", never)

    def refused(why, *flags, folder=adapter):
        with pytest.raises(InputError, match=why) as error:
            classify.main(["--adapter_path", str(folder), *map(str, flags)])
        assert "\n" not in str(error.value)

    def changed(name, **fields):
        folder = shutil.copytree(adapter, tmp_path / name)
        (folder / "task.json").write_text(json.dumps(json.loads((folder / "task.json").read_text()) | fields))
        return folder

    (tmp_path / "rows.csv").write_text("text,entropy\nDo cats fly?,1\n")
    refused("TEXT: is empty", " ")
    refused("two sources of texts", "a", "--file", tmp_path / "rows.csv")
    refused("--batch_size 0", "a", "--batch_size", 0)
    refused("--posterior_samples 1: must be 0", "a", "--posterior_samples", 1)
    refused("no such folder", "a", folder=tmp_path / "none")
    refused("no adapter_config.json", "a", folder=tiny_encoder)
    refused("no such file", "--file", tmp_path / "none.csv")
    refused("no column 'text_input'; found: text, entropy", "--file", tmp_path / "rows.csv")
    refused("name of a column of the answers", "--file", tmp_path / "rows.csv", "--text_column", "entropy")
    refused("trained on base model", "a", "--base_model", ROOT / "demo" / "base")
    bare = shutil.copytree(adapter, tmp_path / "bare")
    (bare / "task.json").unlink()
    refused("no task.json", "a", folder=bare)
    refused(
        "trained for multiple_choice, .*--do_train false", "a", folder=changed("choices", task_type="multiple_choice")
    )
    refused(
        "trained for generation, .*--do_train false", "a", folder=changed("text", task_type="generation", head=False)
    )
    refused("lacks target_mean", "a", folder=changed("numbers", task_type="regression"))
    refused("cannot generate", "a", folder=changed("words", head=False))


def test_the_command_line(adapter, tmp_path):
    words = [sys.executable, ROOT / "demo" / "classify.py", "--adapter_path", adapter]
    done = run_command([*words, "Do cats fly?"], cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr.strip() and done.stdout.startswith("label "), done.stderr
