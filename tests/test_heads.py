"""Models with a head of their own: what is trained, its loss, and that it is saved with the adapter."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run_command, statement_rows
from peft import PeftModel
from test_bh_peft import DECODERS, EVERY, base_of, batch, config_of
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainingArguments,
)

import parameter_efficient_fine_tuning as trainer_script
from bhpeft.adapters import attach_adapter, posterior_samples, small
from bhpeft.arguments import AdapterArguments
from bhpeft.base_model import head_modules, load_config, load_with_head, parameter_counts, settle_head
from bhpeft.errors import InputError
from bhpeft.results import read_metrics, read_predictions
from bhpeft.tasks import Example, load_task
from bhpeft.tasks.encoding import Collator
from bhpeft.tasks.head_encoding import HeadEncoder, Standardiser
from bhpeft.training import AdapterTrainer

SMALL = {"prefix_length": 4, "bn_reduction_factor": 8, "lora_rank": 4}


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Folder of a base model of each architecture as its makers publish it: no task's head."""
    folders = {}
    for kind in EVERY:
        folders[kind] = tmp_path_factory.mktemp("bare") / kind
        torch.manual_seed(0)
        config = config_of(kind)
        if kind in DECODERS:
            model = AutoModelForCausalLM.from_config(config)
        else:
            model = AutoModel.from_config(config, **({} if kind == "distilbert" else {"add_pooling_layer": False}))
        model.save_pretrained(folders[kind])
    return folders


EXPECTED = {
    ("bert", "classification"): ["bert.pooler.dense", "classifier"],
    ("roberta", "classification"): ["classifier"],
    ("roberta", "multiple_choice"): ["classifier", "roberta.pooler.dense"],
    ("distilbert", "classification"): ["classifier", "pre_classifier"],
    ("gpt2", "classification"): ["score"],
    ("llama", "regression"): ["score"],
}


@pytest.mark.parametrize(("kind", "task"), EXPECTED)
def test_what_the_checkpoint_lacks_is_trained(bare, kind, task):
    model, modules = load_with_head(str(bare[kind]), task, ("a", "b", "c"), pad_token_id=1)
    assert modules == EXPECTED[kind, task]
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_pooler_of_the_checkpoint_stays_frozen(tmp_path):
    AutoModel.from_config(config_of("bert")).save_pretrained(tmp_path)
    assert load_with_head(str(tmp_path), "classification", ("a", "b"), 1)[1] == ["classifier"]


def test_further_modules_are_trained_and_saved_with_the_head(tmp_path):
    AutoModel.from_config(config_of("bert")).save_pretrained(tmp_path)
    base, modules = load_with_head(str(tmp_path), "classification", ("a", "b"), 1)
    arguments = AdapterArguments(adapter_name="bh-peft", **SMALL)
    with pytest.raises(InputError, match="--modules_to_save poler.dense"):
        attach_adapter(base, arguments, "x", "classification", [*modules, "poler.dense"])
    model = attach_adapter(base, arguments, "x", "classification", [*modules, "pooler.dense"])
    trained = [name for name, p in model.named_parameters() if p.requires_grad and ".modules_to_save." in name]
    assert any("pooler.dense" in name for name in trained) and any("classifier" in name for name in trained)
    assert parameter_counts(model)["head"] == 64 * 64 + 64 + 64 * 2 + 2


@pytest.mark.parametrize("adapter", ["bh-peft", "lora"])
@pytest.mark.parametrize("kind", EVERY)
def test_heads_on_every_architecture_train_save_and_reload(bare, kind, adapter, tmp_path):
    inputs = batch()
    tasks = ["classification", "regression"] + (["multiple_choice"] if kind not in DECODERS else [])
    for task in tasks:
        if task == "multiple_choice":
            inputs = {name: value.view(1, 3, -1) for name, value in inputs.items()}
        base, modules = load_with_head(str(bare[kind]), task, ("a", "b", "c"), pad_token_id=1)
        base.eval()
        expected = base(**inputs).logits
        arguments = AdapterArguments(adapter_name=adapter, **SMALL)
        model = attach_adapter(base, arguments, str(bare[kind]), task, modules).eval()
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-5)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(".modules_to_save." in name or "bh_" in name or "lora_" in name for name in trainable)
        for module in modules:
            assert any(f"{module}.modules_to_save." in name for name in trainable), module

        labels = {
            "classification": torch.tensor([0, 1, 2]), "regression": torch.tensor([0.5, -1.0, 2.0]),
            "multiple_choice": torch.tensor([1]),
        }[task]  # fmt: skip
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model.train()
        losses = []
        for _ in range(12):
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.01, (task, losses)

        model.eval()
        trained = model(**inputs).logits
        model.save_pretrained(tmp_path / task, save_embedding_layers=False)
        torch.manual_seed(5)  # the fresh base's head is another random one: the saved head must replace it
        fresh, _ = load_with_head(str(bare[kind]), task, ("a", "b", "c"), pad_token_id=1)
        again = PeftModel.from_pretrained(fresh, tmp_path / task).eval()
        assert torch.allclose(again(**inputs).logits, trained, atol=1e-6), task


def test_a_head_for_other_labels_is_begun_afresh_and_padding_is_the_batches_own(tmp_path):
    config = config_of("llama")
    config.num_labels, config.pad_token_id = 5, 0
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    model, modules = load_with_head(str(tmp_path), "classification", ("a", "b"), pad_token_id=2)
    assert modules == ["score"] and model.config.num_labels == 2
    ids = torch.tensor([[5, 6, 7]])
    padded = torch.tensor([[5, 6, 7, 2, 2]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    alone = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.allclose(model(input_ids=padded, attention_mask=mask).logits, alone, atol=1e-6)


def test_which_models_answer_by_a_head():
    bert, gpt2 = config_of("bert"), config_of("gpt2")
    assert settle_head("auto", bert, "classification") and not settle_head("auto", gpt2, "classification")
    assert settle_head("task", gpt2, "regression") and not settle_head("lm", gpt2, "multiple_choice")
    for asked, config, task, words in (
        ("auto", bert, "generation", "cannot generate"),
        ("lm", bert, "classification", "cannot generate"),
        ("task", gpt2, "generation", "not generated by a head"),
        ("auto", gpt2, "regression", "--head task"),
        ("task", gpt2, "multiple_choice", "no multiple_choice head"),
    ):
        with pytest.raises(InputError, match=words):
            settle_head(asked, config, task)


def test_the_head_is_counted_apart_and_its_frozen_copy_not_at_all():
    base = base_of("bert")
    everything = sum(p.numel() for p in base.parameters())
    modules = head_modules(base, [])
    model = attach_adapter(base, AdapterArguments(adapter_name="lora", lora_rank=4), "x", "classification", modules)
    counts = parameter_counts(model)
    lora = 2 * 2 * (4 * 64 + 64 * 4)  # two layers, query and value
    assert counts["head"] == 64 * 2 + 2 and counts["trainable"] == lora + counts["head"]
    assert counts["all"] == everything + lora
    assert counts["adapter_percent"] == pytest.approx(100 * lora / counts["all"])


# ------------------------------------------------------------------------------------------- encoding


@pytest.fixture(scope="module")
def tokenizer(tiny_encoder):
    return AutoTokenizer.from_pretrained(tiny_encoder)


def examples(*answers, text="Do cats sleep?", choices=()):
    return [Example(str(i), f"{text} {i}", answer, str(i), choices) for i, answer in enumerate(answers)]


def test_rows_of_classes_numbers_and_choices(tokenizer):
    rows = HeadEncoder(tokenizer, "classification", ("no", "yes"), 32).train_rows(examples("yes", "no"), [])
    assert [row["labels"] for row in rows] == [1, 0]
    assert tokenizer.decode(rows[0]["input_ids"]) == "<s>Do cats sleep? 0</s>"

    numbers = examples("1", "3", "8")
    standardiser = Standardiser.of(numbers)
    assert standardiser.mean == 4 and standardiser.deviation == pytest.approx(np.std([1, 3, 8]))
    rows = HeadEncoder(tokenizer, "regression", (), 32, standardiser=standardiser).train_rows(numbers, [])
    assert [row["labels"] for row in rows] == pytest.approx(list((np.array([1, 3, 8]) - 4) / np.std([1, 3, 8])))
    assert standardiser.restore(rows[2]["labels"]) == pytest.approx(8)

    encoder = HeadEncoder(tokenizer, "multiple_choice", ("A", "B", "C"), 32)
    rows = encoder.train_rows(examples("B", "C", choices=("one", "two or three", "four")), [])
    batch = Collator(tokenizer.pad_token_id)(rows)
    assert batch["input_ids"].shape[:2] == (2, 3) and batch["labels"].tolist() == [1, 2]
    assert tokenizer.decode(rows[0]["input_ids"][1]) == "<s>Do cats sleep? 0</s></s>two or three</s>"
    for ids, mask in zip(batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1), strict=True):
        assert ((ids != tokenizer.pad_token_id) == mask.bool()).all()


def test_long_texts_stop_the_run_or_are_cut_or_dropped(tokenizer):
    rows = [*examples("no"), *examples("yes", text="cats " * 50)]
    make = lambda mode: HeadEncoder(tokenizer, "classification", ("no", "yes"), 16, mode)  # noqa: E731
    with pytest.raises(InputError, match=r"1 of 2 test texts are longer than --max_length 16 .*--long_prompts"):
        make("error").test_rows(rows, [])
    notes = []
    cut = make("truncate").test_rows(rows, notes)
    assert len(cut[1]["input_ids"]) == 16 and cut[1]["input_ids"][-1] == tokenizer.eos_token_id and "cut" in notes[0]
    assert [row["index"] for row in make("drop").test_rows(rows, notes)] == [0] and "dropped" in notes[1]
    with pytest.raises(InputError, match="none is left"):
        make("drop").train_rows(rows[1:], [])


def test_a_choice_that_leaves_no_room_for_its_question_is_told_in_a_line(tokenizer):
    rows = [*examples("A", choices=("one", "two")), *examples("A", choices=("cats " * 20, "two"))]
    make = lambda mode: HeadEncoder(tokenizer, "multiple_choice", ("A", "B"), 16, mode)  # noqa: E731
    with pytest.raises(InputError, match="1 of 2 test texts are longer"):
        make("error").test_rows(rows, [])
    assert len(make("drop").test_rows(rows, [])) == 1
    with pytest.raises(InputError, match="leaves no room for its question beside a choice of"):
        make("truncate").test_rows(rows, [])


def test_equal_numbers_are_nothing_to_learn():
    with pytest.raises(InputError, match="nothing to learn"):
        Standardiser.of(examples("2", "2.0"))
    for large in ("39e300", "1.5e308"):
        with pytest.raises(InputError, match="as large as .*e.30. cannot"):
            Standardiser.of(examples("2", "1e308", large))


# ------------------------------------------------------------------------------------------- training


def gradients(tiny_encoder, tokenizer, tmp_path, per_step, accumulation):
    rows = HeadEncoder(tokenizer, "classification", ("no", "yes"), 48).train_rows(
        [Example(str(i), q, "yes" if a.startswith("T") else "no", q) for i, (q, a) in enumerate(statement_rows()[:8])],
        [],
    )
    torch.manual_seed(0)
    base, modules = load_with_head(str(tiny_encoder), "classification", ("no", "yes"), 1)
    model = attach_adapter(base, AdapterArguments(adapter_name="lora"), "x", "classification", modules)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=per_step, gradient_accumulation_steps=accumulation,
        max_steps=1, max_grad_norm=0, report_to="none", save_strategy="no", remove_unused_columns=False,
        learning_rate=0.0, disable_tqdm=True,
    )  # fmt: skip
    trainer = AdapterTrainer(model=model, args=arguments, train_dataset=rows, data_collator=Collator(1), with_head=True)
    found = {}
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(
        lambda *_: found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    )
    trainer.train()
    return found


def test_a_heads_loss_is_divided_over_accumulated_micro_steps(tiny_encoder, tokenizer, tmp_path):
    """The Trainer takes every forward with **kwargs for one that divides by the items of a step; a head's does not."""
    whole = gradients(tiny_encoder, tokenizer, tmp_path, 8, 1)
    spread = gradients(tiny_encoder, tokenizer, tmp_path, 2, 4)
    assert any("classifier" in name for name in whole)
    for name, gradient in whole.items():
        assert torch.allclose(gradient, spread[name], atol=1e-5 + 1e-4 * gradient.abs().max().item()), name


@pytest.mark.parametrize("adapter", ["bh-peft", "lora"])
def test_a_classifier_is_trained_saved_tested_and_continued(train, tiny_encoder, labelled, tmp_path, adapter):
    data = ["--base_model", tiny_encoder, "--dataset_name", labelled]
    learns = ["--adapter_name", adapter, "--lr", 1e-2, "--epochs", 40, "--kl_weight", 1e-3, "--prefix_length", 4]
    flags = ["--save_strategy", "no", "--test_fraction", 0.2]
    flags += ["--train_sampling_strategy", "group_by_length"]  # answers come back in the rows' order all the same
    finished = train(*flags, *learns, "--bn_reduction_factor", 8, "--run_name", "one", "--do_eval", data=data)
    record = read_metrics(tmp_path / "results/metrics/one.json")
    assert record["task_type"] == "classification" and record["metrics"]["accuracy"] >= 0.7
    assert record["metrics"]["validation"]["rows"] == record["rows"]["validation"] > 0
    table = read_predictions(tmp_path / "results/predictions/one.csv")
    assert (table["label"] == table["prediction"]).mean() == pytest.approx(record["metrics"]["accuracy"])
    assert (table["prob_no"] + table["prob_yes"]).to_numpy() == pytest.approx(1)
    assert "taken as classification with the labels no, yes" in finished.stdout
    assert not (tmp_path / "results/human_evaluation/one.csv").exists()  # there is no text for a person to judge
    card = json.loads((tmp_path / "adapter/task.json").read_text())
    assert card["labels"] == ["no", "yes"] and card["head"]

    train(*flags, "--adapter_path", tmp_path / "adapter", "--do_train", "false", "--run_name", "two", data=data)
    again = read_predictions(tmp_path / "results/predictions/two.csv").set_index("id")
    both = table.set_index("id").index.intersection(again.index)
    assert len(both) == len(table)  # without training every row of the file is tested
    assert again.loc[both, "prob_yes"].to_numpy() == pytest.approx(
        table.set_index("id")["prob_yes"][both].to_numpy(), abs=1e-5
    )


def test_test_rows_are_scored_under_posterior_samples(train, tiny_encoder, labelled, tmp_path):
    data = ["--base_model", tiny_encoder, "--dataset_name", labelled]
    train("--adapter_name", "bayesian-lora", "--max_steps", 3, "--save_strategy", "no", "--run_name", "b", data=data)
    again = ["--adapter_path", tmp_path / "adapter", "--do_train", "false", "--seed", 5, "--posterior_samples", 6]
    train(*again, "--per_device_eval_batch_size", 7, "--run_name", "s", data=data)
    table = read_predictions(tmp_path / "results/predictions/s.csv")

    base, _ = load_with_head(str(tiny_encoder), "classification", ("no", "yes"), 1)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    inputs = tokenizer([q for q, _ in statement_rows()], padding=True, return_tensors="pt")
    p = posterior_samples(model, dict(inputs), 6, seed=5).softmax(-1)  # (S, N, 2)
    mean = p.mean(0)
    assert table["prob_yes"].to_numpy() == pytest.approx(mean[:, 1].numpy(), abs=1e-5)
    entropies = torch.distributions.Categorical(probs=p).entropy().mean(0)
    information = torch.distributions.Categorical(probs=mean).entropy() - entropies
    assert table["mutual_information"].to_numpy() == pytest.approx(information.numpy(), abs=1e-5)
    assert (information > 0).any()

    words = [sys.executable, ROOT / "parameter_efficient_fine_tuning.py", *data, "--posterior_samples", 4]
    refused = run_command(words, cwd=tmp_path)
    assert refused.returncode == 2 and "no Gaussian weights" in refused.stderr


def test_a_bayesian_lora_classifier_is_exported_and_merged_with_its_labels(train, tiny_encoder, labelled, tmp_path):
    data = ["--base_model", tiny_encoder, "--dataset_name", labelled]
    train("--adapter_name", "bayesian-lora", "--max_steps", 3, "--save_strategy", "no", "--run_name", "b", data=data)
    script = [sys.executable, ROOT / "util/export_adapter.py", tmp_path / "adapter", "--to"]
    assert run_command([*script, "lora", tmp_path / "lora"], cwd=tmp_path).returncode == 0
    train("--adapter_path", tmp_path / "lora", "--do_train", "false", "--run_name", "lora", data=data)
    assert run_command([*script, "merged", tmp_path / "merged"], cwd=tmp_path).returncode == 0
    train("--adapter_path", tmp_path / "adapter", "--do_train", "false", "--run_name", "mean", data=data)
    stock, own = (read_predictions(tmp_path / f"results/predictions/{name}.csv") for name in ("lora", "mean"))
    assert stock["prob_yes"].to_numpy() == pytest.approx(own["prob_yes"].to_numpy(), abs=1e-5)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.id2label == {0: "no", 1: "yes"}
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")(statement_rows()[0][0], return_tensors="pt")
    with torch.no_grad():
        p = merged(**ids).logits.softmax(-1)[0, 1].item()
    assert p == pytest.approx(own["prob_yes"][0], abs=1e-5)


def test_a_regression_is_reported_in_the_labels_units(train, tiny_encoder, tmp_path):
    rows = [(q, 50 + 10 * i) for i, (q, _) in enumerate(statement_rows())]
    (tmp_path / "rows.csv").write_text("text_input,text_label\n" + "".join(f"{q},{n}\n" for q, n in rows))
    data = ["--base_model", tiny_encoder, "--dataset_name", tmp_path / "rows.csv"]
    learns = ["--lr", 1e-2, "--epochs", 60, "--adapter_name", "bh-peft", "--kl_weight", 1e-3, "--base_dropout", 0]
    train("--save_strategy", "no", *learns, "--bn_reduction_factor", 8, "--run_name", "r", data=data)
    record = read_metrics(tmp_path / "results/metrics/r.json")
    assert record["task_type"] == "regression" and record["metrics"]["r2"] > 0.9
    table = read_predictions(tmp_path / "results/predictions/r.csv")
    assert record["metrics"]["rmse"] == pytest.approx(math.sqrt(((table["label"] - table["prediction"]) ** 2).mean()))
    card = json.loads((tmp_path / "adapter/task.json").read_text())
    train_rows = record["rows"]["train"]
    assert 50 < card["target_mean"] < 50 + 720 and train_rows == 65

    # Tested on other rows the numbers are restored as they were standardised in training.
    (tmp_path / "two.csv").write_text("text_input,text_label\n" + "".join(f"{q},{n}\n" for q, n in rows[:9]))
    other = ["--base_model", tiny_encoder, "--dataset_name", tmp_path / "two.csv"]
    train("--do_train", "false", "--adapter_path", tmp_path / "adapter", "--run_name", "again", data=other)
    again = read_predictions(tmp_path / "results/predictions/again.csv")
    same = table.merge(again.assign(label=again["label"].astype(float)), on="label")
    assert len(same) >= 1
    assert same["prediction_x"].to_numpy() == pytest.approx(same["prediction_y"].to_numpy(), abs=1e-2)


def test_a_task_that_the_model_cannot_do_is_said_before_it_is_loaded(tiny_encoder, statements):
    task = load_task(arguments_for(statements), 0)
    assert task.task_type == "generation"
    with pytest.raises(InputError, match="cannot generate"):
        settle_head("auto", load_config(str(tiny_encoder)), task.task_type)


def arguments_for(statements):
    from bhpeft.arguments import DataArguments

    return DataArguments(dataset_name=str(statements[0]))


def test_multiple_choice_and_classification_models_are_the_stock_ones(bare):
    base, _ = load_with_head(str(bare["roberta"]), "multiple_choice", ("A", "B"), 1)
    assert isinstance(base, AutoModelForMultipleChoice._model_mapping[type(base.config)])
    base, _ = load_with_head(str(bare["bert"]), "classification", ("x", "y"), 1)
    assert isinstance(base, AutoModelForSequenceClassification._model_mapping[type(base.config)])
    assert base.config.id2label == {0: "x", 1: "y"}


def test_a_card_that_is_broken_is_named(tmp_path):
    from bhpeft.tasks.card import TaskCard

    assert TaskCard.read(tmp_path) is None
    for text in ("{", '{"task_type": "classification"}', "[]"):
        (tmp_path / "task.json").write_text(text)
        with pytest.raises(InputError, match="task.json"):
            TaskCard.read(tmp_path)


def test_the_base_s_dropout_can_be_switched_off(bare):
    for kind in EVERY:
        model, _ = load_with_head(str(bare[kind]), "classification", ("a", "b"), 1, dropout=0.0)
        model.train()
        torch.manual_seed(0)
        first = model(**batch()).logits
        assert torch.equal(model(**batch()).logits, first), kind
    model, _ = load_with_head(str(bare["bert"]), "classification", ("a", "b"), 1)
    model.train()
    assert not torch.equal(model(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize("in_c", [True, False])
def test_the_choices_of_a_question_are_trained_under_one_weight(in_c, tiny_encoder, tmp_path, monkeypatch):
    """Five choices that are one and the same have equal scores whatever that weight is: the NLL is log 5."""
    if not in_c:
        monkeypatch.setattr(small, "takes", lambda *args: False)
    data = tmp_path / "csqa"
    data.mkdir()
    for name, count in (("train_rand_split", 24), ("dev_rand_split", 4)):
        choices = [{"label": letter, "text": "a bank"} for letter in "ABCDE"]
        asked = [{"question": {"stem": f"What has {i} doors?", "choices": choices}, "answerKey": "ABCDE"[i % 5]}
                 for i in range(count)]  # fmt: skip
        (data / f"{name}.jsonl").write_text("".join(json.dumps({"id": "q", **row}) + "\n" for row in asked))
    flags = ["--base_model", tiny_encoder, "--dataset_name", "csqa", "--data_path", data, "--results_dir", tmp_path]
    flags += ["--adapter_name", "bh-peft", "--initial_sigma", 0.3, "--base_dropout", 0]
    flags += ["--learning_rate", 0.01, "--max_steps", 4, "--logging_steps", 1, "--save_strategy", "no"]
    flags += ["--output_dir", tmp_path / "adapter", "--disable_tqdm", "true"]
    record = trainer_script.main([str(flag) for flag in flags])
    losses = [entry["nll"] for entry in record["history"] if "nll" in entry]
    assert len(losses) == 4 and losses == pytest.approx([math.log(5)] * 4, abs=1e-5)
