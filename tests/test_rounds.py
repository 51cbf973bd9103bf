"""Learning in rounds: what arrives, what is carried, what is still known, and that a killed run goes on."""

from __future__ import annotations

import csv
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import statement_rows
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainingArguments

import parameter_efficient_fine_tuning as trainer_script
from bhpeft.adapters import attach_adapter
from bhpeft.adapters.carry import Anchor, posterior_to_prior
from bhpeft.adapters.gaussian import GaussianLinear, PointLinear
from bhpeft.arguments import AdapterArguments, DataArguments, RoundArguments
from bhpeft.base_model import load_with_head
from bhpeft.errors import InputError
from bhpeft.report.rounds import matrix, name_of, read_rounds, sentence, still_known
from bhpeft.results import read_predictions
from bhpeft.rounds import carry
from bhpeft.tasks import Example, Task, load_task
from bhpeft.tasks.encoding import Collator
from bhpeft.tasks.rounds import RoundPlan, arrive, load_domains, load_in_rounds
from bhpeft.training import AdapterTrainer

SMALL = ["--adapter_name", "bh-peft", "--prefix_length", 4, "--bn_reduction_factor", 8, "--lora_rank", 4]
QUICK = ["--lr", 1e-2, "--max_steps", 2, "--save_strategy", "no", "--batch_size", 8, "--logging_steps", 1]


@pytest.fixture
def learn(tiny_encoder, labelled, tmp_path, monkeypatch):
    """Run the trainer in this process on the labelled statements; `learn(*flags, data=[...])` gives its record."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")

    def run(*flags, data=None):
        data = data or ["--base_model", tiny_encoder, "--dataset_name", labelled, "--test_fraction", 0.2]
        words = [*data, *SMALL, *QUICK, "--max_length", 48, "--max_new_tokens", 4, "--disable_tqdm", "true", *flags]
        return trainer_script.main(list(map(str, words)))

    return run


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def plain(name: str) -> str:
    """A weight's name in the model as it is in a file: without the adapter's."""
    return name.replace(".modules_to_save.default", "").replace(".default", "")


def equal(one, two) -> bool:
    one, two = weights(one), weights(two)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def starts(monkeypatch):
    """Adapter weights and training rows of each trainer as its training begins."""
    seen: list[tuple[dict, list]] = []
    train = AdapterTrainer.train

    def look(self, *args, **kwargs):
        names = ("mu", "prior", "bh_", "modules_to_save")
        state = {n: v.clone() for n, v in self.model.state_dict().items() if any(part in n for part in names)}
        seen.append((state, self.train_dataset))
        return train(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "train", look)
    return seen


# ------------------------------------------------------------------------------------- which rows, when


def task_of(count: int):
    rows = [Example(str(i), f"text {i}", "ab"[i % 2], f"text {i}") for i in range(count)]
    return Task("toy", rows, [], rows[:0], "classification", ("a", "b"))


def test_rounds_take_new_rows_and_the_first_ones_do_not_depend_on_those_that_follow():
    whole = task_of(100)
    task, plan = arrive(whole, [10, 20, 40], seed=3)
    assert [len(new) for new in plan.new] == [10, 20, 40]
    assert sorted(place for new in plan.new for place in new) == list(range(70)) and len(task.train) == 70
    assert len({e.id for e in task.train}) == 70 and [int(e.id) for e in task.train] == sorted(
        int(e.id) for e in task.train
    )
    shorter, first = arrive(task_of(100), [10], seed=3)
    assert [e.id for e in first.trained(shorter, 1, "none", 0.2, 3)] == [
        e.id for e in plan.trained(task, 1, "none", 0.2, 3)
    ]
    other, _ = arrive(task_of(100), [10], seed=4)
    assert [e.id for e in other.train] != [e.id for e in shorter.train]


def test_replay_is_a_share_of_every_past_round_or_all_of_them():
    plan = RoundPlan([list(range(0, 10)), list(range(10, 30)), list(range(30, 32)), list(range(32, 40))])
    assert plan.replayed(4, "none", 0.2, 0) == [] and plan.replayed(1, "full", 0.2, 0) == []
    assert plan.replayed(4, "full", 0.2, 0) == list(range(32))
    some = plan.replayed(4, "partial", 0.2, 0)
    assert [sum(place in new for place in some) for new in plan.new] == [2, 4, 1, 0]  # at least one of every round
    assert some == plan.replayed(4, "partial", 0.2, 0) != plan.replayed(4, "partial", 0.2, 1)
    assert plan.replayed(3, "partial", 0.2, 0) != [place for place in some if place < 30]  # drawn anew
    assert plan.known(2, None, 0) == plan.new[1] and len(plan.known(2, 5, 0)) == 5
    assert plan.known(2, 5, 0) == plan.known(2, 5, 0) and set(plan.known(2, 5, 0)) < set(plan.new[1])


def test_files_are_rounds_and_what_one_tests_no_other_trains_on(tmp_path):
    rows = [(q, "yes" if a.startswith("T") else "no") for q, a in statement_rows()]
    for name, part in (("a", rows[:50]), ("b", rows[30:])):
        (tmp_path / f"{name}.csv").write_text("text_input,text_label\n" + "".join(f"{q},{a}\n" for q, a in part))
    files = [str(tmp_path / f"{name}.csv") for name in "ab"]
    rounds = RoundArguments(round_files=files, carry="weights")
    task, plan = load_in_rounds(rounds, DataArguments(test_fraction=0.3), 1, True, True)
    tested = {e.group for e in task.test}
    assert not tested & {e.group for e in task.train} and not tested & {e.group for e in task.validation}
    assert not {e.group for e in task.validation} & {e.group for e in task.train}
    assert task.task_type == "classification" and task.labels == ("no", "yes") and plan.files == ["a", "b"]
    assert [len(part) for part in plan.tests] == [15, 13] and len(task.test) == 28
    assert all(task.train[place].id.startswith("b:") for place in plan.new[1])
    everything = task.train + task.test + task.validation
    assert len({e.id for e in everything}) == len(everything)
    assert any("held out in other files" in note for note in task.notes)


# ----------------------------------------------------------------------------------------- what is carried


def test_the_posterior_is_the_next_rounds_prior_and_the_kl_begins_at_zero(learn, tmp_path):
    for widening in (1, 2):
        record = learn("--rounds", "6,8,10", "--prior_widening", widening, "--run_name", f"w{widening}")
        count = 0
        for number in (2, 3):
            before, after = (weights(tmp_path / f"adapters/w{widening}" / name_of(n)) for n in (number - 1, number))
            layers = [name.removesuffix(".mu") for name in before if name.endswith(".mu") and "._source." not in name]
            for layer in layers:
                assert torch.equal(after[f"{layer}.prior_mu"], before[f"{layer}.mu"])
                assert torch.equal(after[f"{layer}.prior_sigma"], widening * before[f"{layer}.g"] ** 2)
                assert not torch.equal(after[f"{layer}.mu"], before[f"{layer}.mu"])  # it has learned on
            count = sum(before[f"{layer}.mu"].numel() for layer in layers)
            first = next(entry for entry in record["history"] if entry["round"] == number and "kl" in entry)
            closed = count * 0.5 * (widening**-2 - 1 + math.log(widening**2))
            assert first["kl"] == pytest.approx(closed, rel=1e-4, abs=1e-3), widening
            rows = record["rounds"][number - 1]["trained_rows"]
            assert rows == [6, 8, 10][number - 1]
            assert first["kl_term"] == pytest.approx(first["kl"] / rows, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("how", ["weights", "none", "posterior"])
def test_what_a_round_starts_from(how, learn, starts, tmp_path):
    learn("--rounds", 6, 8, "--carry", how, "--run_name", "r")
    (first, _), (second, _) = starts
    after_one = weights(tmp_path / "adapters/r/round-01")
    after_one = {plain(name): value for name, value in weights(tmp_path / "adapters/r/round-01").items()}
    trained = {plain(name): value for name, value in second.items() if ".original_module." not in name}
    assert after_one.keys() <= trained.keys() and any("classifier" in name for name in after_one)
    for name, value in trained.items():
        if name not in after_one:
            continue
        if "prior" in name and how != "posterior":
            assert (value == (0.0 if "mu" in name else torch.tensor(0.1))).all(), name
        elif "prior" not in name and how != "none":
            assert torch.equal(value, after_one[name]), name
        elif "prior" not in name and ("mu" in name or "classifier.dense.weight" in name):
            assert not torch.equal(value, after_one[name]), name
    if how == "none":
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_from_scratch_with_full_replay_ends_as_an_ordinary_run_on_all_rows(learn, tmp_path):
    count = learn("--run_name", "plain")["rows"]["train"]
    learn("--rounds", 12, count - 12, "--carry", "none", "--replay", "full", "--run_name", "rounds")
    assert equal(tmp_path / "adapters/plain", tmp_path / "adapters/rounds")
    tables = [read_predictions(tmp_path / f"results/predictions/{name}.csv") for name in ("plain", "rounds")]
    assert tables[0]["id"].tolist() == tables[1]["id"].tolist()
    assert tables[1]["prob_yes"].to_numpy() == pytest.approx(tables[0]["prob_yes"].to_numpy(), abs=1e-5)


def test_two_rounds_of_posterior_to_prior_are_the_conjugate_update():
    """y = w x + noise of deviation s, x one-hot: what is learned is the exact posterior, that of all rows at once."""
    torch.manual_seed(0)
    size, s = 3, 0.5
    layer = GaussianLinear(size, 1, prior_mu=0.2, prior_sigma=0.7).double()
    truth = torch.randn(size, dtype=torch.float64)
    precision = torch.full((size,), 0.7**-2, dtype=torch.float64)
    product = precision * 0.2
    for rows in (5, 8):
        x = torch.nn.functional.one_hot(torch.randint(0, size, (rows,)), size).double()
        y = x @ truth + s * torch.randn(rows, dtype=torch.float64)
        optimizer = torch.optim.LBFGS(layer.parameters(), lr=1, max_iter=200, line_search_fn="strong_wolfe",
                                      tolerance_grad=1e-12, tolerance_change=1e-14)  # fmt: skip

        def negative_elbo(x=x, y=y, optimizer=optimizer):
            optimizer.zero_grad()
            sigma = layer.g**2
            expected = ((y - x @ layer.mu[0]) ** 2 + x**2 @ sigma[0] ** 2).sum() / (2 * s**2)
            layer(x)  # keeps its KL
            loss = expected + layer.kl
            loss.backward()
            return loss

        optimizer.step(negative_elbo)
        posterior_to_prior(layer)
        precision = precision + x.sum(0) / s**2
        product = product + x.T @ y / s**2
    assert layer.prior_mu[0].numpy() == pytest.approx((product / precision).numpy(), rel=1e-4)
    assert layer.prior_sigma[0].numpy() == pytest.approx(precision.rsqrt().numpy(), rel=1e-4)


# --------------------------------------------------------------------------------------------- the anchor


def one_step(tiny_encoder, tmp_path, how, l2_weight, accumulation, gaussian=True):
    """Gradients of one optimizer step after the weights have moved away from the anchor, and by how far they moved."""
    torch.manual_seed(0)
    base, modules = load_with_head(str(tiny_encoder), "classification", ("a", "b"), 1, dropout=0.0)
    arguments = AdapterArguments(adapter_name=how, prefix_length=4, bn_reduction_factor=8)
    model = attach_adapter(base, arguments, "x", "classification", modules)
    rows = [{"input_ids": [0, 5 + i, 9, 2], "labels": i % 2} for i in range(8)]
    settings = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=8 // accumulation, max_steps=1, learning_rate=0.0,
        gradient_accumulation_steps=accumulation, max_grad_norm=0, report_to="none", save_strategy="no",
        remove_unused_columns=False, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = AdapterTrainer(model=model, args=settings, train_dataset=rows, data_collator=Collator(1), with_head=True)
    trainer.kl_weight = 0.0
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if l2_weight:
        trainer.anchor, trainer.l2_weight = Anchor(model, gaussian), l2_weight
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in start and not name.endswith(".g"):
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
            elif name in start:
                p.fill_(1e-3)  # no noise
    found = {}
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(
        lambda *_: found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    )
    trainer.train()
    moved = {name: p.detach() - start[name] for name, p in model.named_parameters() if name in start}
    return found, moved, trainer.state.log_history[0]


@pytest.mark.parametrize(
    ("how", "gaussian", "accumulation"), [("lora", True, 1), ("bh-peft", True, 4), ("bh-peft", False, 1)]
)
def test_the_anchors_term_and_gradient_are_the_closed_form(tiny_encoder, tmp_path, how, gaussian, accumulation):
    without, _, _ = one_step(tiny_encoder, tmp_path, how, 0.0, accumulation)
    anchored, moved, logged = one_step(tiny_encoder, tmp_path, how, 3.0, accumulation, gaussian)
    square = 0.0
    for name, move in moved.items():
        free = not gaussian and name.endswith((".mu", ".g"))
        wanted = torch.zeros_like(move) if free else 3.0 * move
        assert torch.allclose(anchored[name] - without[name], wanted, atol=1e-5, rtol=1e-4), name
        square += 0 if free else move.square().sum().item()
    assert any("classifier" in name for name in moved) and square > 1
    assert logged["l2"] == pytest.approx(square, rel=1e-4)
    assert logged["l2_term"] == pytest.approx(1.5 * square, rel=1e-4)
    assert logged["loss"] == pytest.approx(logged["nll"] + logged["l2_term"], rel=1e-3)


@pytest.mark.parametrize(("how", "weight"), [("weights", 0), ("l2", 2.0), ("posterior", 0), ("posterior", 2.0)])
def test_what_is_carried_and_what_is_held(how, weight):
    torch.manual_seed(0)
    model = torch.nn.Sequential(GaussianLinear(4, 3, bias=True), PointLinear(3, 2)).train()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = SimpleNamespace(model=model, anchor=None)
    carry(RoundArguments(rounds=["1"], carry=how, l2_weight=weight), trainer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    model(torch.randn(5, 4))
    carried = how == "posterior"
    assert torch.equal(model[0].prior_mu, start["0.mu"]) == carried
    assert torch.equal(model[0].prior_sigma, start["0.g"] ** 2) == carried
    assert (trainer.anchor is not None) == bool(weight)
    if weight:
        held = [value for name, value in start.items() if how == "l2" or name not in ("0.mu", "0.g")]
        numbers = sum(value.numel() for value in held)
        assert trainer.anchor.distance_square().item() == pytest.approx(0.01 * numbers, rel=1e-5)


def test_l2_holds_the_weights_to_the_round_before(learn, tmp_path):
    moved = {}
    held = ["--l2_weight", 1000]  # with SGD a weight is then taken back in each step by all that it has moved before
    for name, flags in (("free", ["weights"]), ("held", ["l2", *held]), ("prior", ["posterior", *held])):
        plain_sgd = ["--optim", "sgd", "--lr", 1e-3, "--lr_scheduler_type", "constant", "--max_grad_norm", 0]
        learn("--rounds", 6, 8, "--run_name", name, "--max_steps", 12, *plain_sgd, "--carry", *flags)
        before, after = (weights(tmp_path / f"adapters/{name}" / name_of(n)) for n in (1, 2))
        for kind in (".mu", "classifier"):
            names = [n for n in before if kind in n and "prior" not in n]
            moved[name, kind] = sum((after[n] - before[n]).square().sum() for n in names).sqrt().item()
    assert moved["held", ".mu"] < 0.3 * moved["free", ".mu"]
    assert moved["held", "classifier"] < 0.3 * moved["free", "classifier"]
    assert moved["prior", "classifier"] < 0.3 * moved["free", "classifier"]


# ------------------------------------------------------------------------------------- what is written


def test_the_matrix_says_what_an_ordinary_test_of_the_adapter_says(learn, starts, tmp_path, tiny_encoder):
    record = learn("--rounds", 8, 8, 16, "--replay", "partial", "--replay_ratio", 0.25, "--max_steps", 12, "--run_name",
                   "r", "--posterior_samples", 3)  # fmt: skip
    table = read_rounds(tmp_path / "results/rounds/r.csv")
    assert len(table) == 3 * 4 // 2 + 3
    assert table.query("evaluated_on == 'test'")["replayed_rows"].tolist() == [0, 2, 4]
    trained = table.query("evaluated_on == 'test'")["trained_rows"].tolist()
    assert trained == [len(rows) for _, rows in starts] == [8, 10, 20]
    assert table["total_rows"].max() == 32 and set(table["steps"]) == {12}
    assert [done["new_rows"] for done in record["rounds"]] == [8, 8, 16]
    last = table.query("round == 3 and evaluated_on == 'test'").iloc[0]
    assert last["value"] == pytest.approx(record["metrics"]["accuracy"])
    assert last["nll"] == pytest.approx(record["metrics"]["nll"], rel=1e-4)
    assert (tmp_path / "results/plots/r/rounds.png").stat().st_size > 5000
    assert (tmp_path / "results/plots/r/answers.png").is_file() and equal(
        tmp_path / "adapters/r", tmp_path / "adapters/r/round-03"
    )

    # The rows of round 2, asked in an ordinary test of the adapters of rounds 2 and 3.
    data = DataArguments(dataset_name="labelled.csv", test_fraction=0.2)
    task, plan = arrive(load_task(data, 42), [8, 8, 16], 42)
    with open(tmp_path / "two.csv", "w", newline="") as file:
        rows = [(task.train[place].query, task.train[place].answer) for place in plan.new[1]]
        csv.writer(file).writerows([("text_input", "text_label"), *rows])
    for number in (2, 3):
        tested = ["--do_train", "false", "--run_name", f"t{number}", "--posterior_samples", 3]
        other = ["--base_model", tiny_encoder, "--dataset_name", "two.csv"]
        again = learn("--adapter_path", f"adapters/r/round-0{number}", *tested, data=other)
        asked = table.query(f"round == {number} and evaluated_on == 'round-02'").iloc[0]
        assert asked["value"] == pytest.approx(again["metrics"]["accuracy"]) and asked["rows"] == 8
        assert asked["nll"] == pytest.approx(again["metrics"]["nll"], rel=1e-4)


def test_no_test_row_is_trained_on_and_small_rounds_get_more_epochs(learn, starts, tmp_path):
    flags = ["--replay", "full", "--max_steps", -1, "--epochs", 1, "--min_round_steps", 3]
    record = learn("--rounds", 4, 20, *flags)
    assert [done["steps"] for done in record["rounds"]] == [3, 3] and [d["epochs"] for d in record["rounds"]] == [3, 1]
    data = DataArguments(dataset_name="labelled.csv", test_fraction=0.2)
    task = load_task(data, 42)
    tokenizer = AutoTokenizer.from_pretrained(record["config"]["base_model"])
    texts = [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for _, rows in starts for row in rows]
    assert len(texts) == 4 + 24 and not set(texts) & {e.query for e in task.test}
    assert set(texts) <= {e.query for e in task.train} and set(texts[:4]) <= set(texts[4:])


def done_of(*values, metric="accuracy", rows=(2, 6, 4)):
    test = {"evaluated_on": "test", "rows": 9, "metric": metric, "value": 0.5}
    return [
        {"new_rows": rows[t], "total_rows": 3, "carry": "weights", "replay": "none", "evaluations": [test] + [
            {"evaluated_on": name_of(s), "rows": min(rows[s - 1], 4), "metric": metric, "value": value}
            for s, value in enumerate(line, 1)
        ]} for t, line in enumerate(values)
    ]  # fmt: skip


def test_what_is_still_known_is_the_mean_over_rows_of_earlier_rounds():
    rounds = done_of([0.5], [0.0, 1.0], [1.0, 0.5, 0.75])
    assert matrix(rounds)[2].tolist() == [1.0, 0.5, 0.75] and math.isnan(matrix(rounds)[0, 1])
    known = still_known(rounds)
    assert known["then"] == pytest.approx((2 * 0.5 + 6 * 1.0) / 8)
    assert known["now"] == pytest.approx((2 * 1.0 + 6 * 0.5) / 8)
    assert known["backward_transfer"] == pytest.approx(-0.25)
    assert "62.5% now; right after each was learned it was 87.5%" in sentence(rounds)
    assert still_known(rounds[:1]) is None and "earlier" not in sentence(rounds[:1])
    squares = still_known(done_of([3.0], [1.0, 4.0], [2.0, 4.0, 9.0], metric="rmse"))
    assert squares["now"] == pytest.approx(math.sqrt((2 * 4 + 6 * 16) / 8))
    logs = still_known(done_of([2.0], [2.0, 8.0], [4.0, 8.0, 9.0], metric="perplexity"))
    assert logs["now"] == pytest.approx(4.0**0.25 * 8.0**0.75)


def numbers_file(tmp_path):
    (tmp_path / "numbers.csv").write_text(
        "text_input,text_label\n" + "".join(f"{q},{50 + 10 * i}\n" for i, (q, _) in enumerate(statement_rows()))
    )
    return tmp_path / "numbers.csv"


def test_numbers_are_standardised_by_the_first_round_alone(learn, tmp_path, tiny_encoder):
    file = numbers_file(tmp_path)
    data = ["--base_model", tiny_encoder, "--dataset_name", file, "--carry", "weights"]
    record = learn("--rounds", 5, 20, "--run_name", "n", data=data)
    task, plan = arrive(load_task(DataArguments(dataset_name=str(file)), 42), [5, 20], 42)
    numbers = [float(task.train[place].answer) for place in plan.new[0]]
    card = json.loads((tmp_path / "adapters/n/task.json").read_text())
    assert card["target_mean"] == pytest.approx(sum(numbers) / 5)
    table = read_rounds(tmp_path / "results/rounds/n.csv")
    assert set(table["metric"]) == {"rmse"} and table["ece"].isna().all() and table["low_95"].isna().all()
    tested = table.query("round == 2 and evaluated_on == 'test'")["value"].iloc[0]
    assert tested == pytest.approx(record["metrics"]["rmse"])


def test_generated_answers_and_texts_learn_in_rounds(learn, statements, tiny_model, tmp_path):
    data = ["--base_model", tiny_model, "--dataset_name", statements[0], "--test_file", statements[1]]
    flags = ["--max_known_samples", 3, "--max_test_samples", 4]
    record = learn("--rounds", 6, 12, *flags, "--run_name", "t", "--compare_base", data=data)
    table = read_rounds(tmp_path / "results/rounds/t.csv")
    assert set(table["metric"]) == {"accuracy"} and table.query("evaluated_on == 'round-01'")["rows"].tolist() == [3, 3]
    assert record["metrics"]["base"]["rows"] == 4 and table["nll"].notna().all() and table["ece"].notna().all()
    lines = [f'{q},"So {a}"' for q, a in statement_rows()]
    (tmp_path / "free.csv").write_text("\n".join(["text_input,text_label", *lines]))
    free = ["--base_model", tiny_model, "--dataset_name", "free.csv"]
    text = ["--adapter_name", "lora", "--carry", "weights", "--do_sample", "--max_new_tokens", 4]
    learn("--rounds", 6, 12, *flags, "--run_name", "f", *text, data=free)
    assert len(read_predictions(tmp_path / "results/predictions/f.csv")["sampled"]) == 4
    table = read_rounds(tmp_path / "results/rounds/f.csv")
    assert set(table["metric"]) == {"perplexity"}
    assert table["nll"].to_numpy() == pytest.approx(table["value"].map(math.log).to_numpy(), rel=1e-6)


def test_files_of_their_own_domains_are_tested_after_every_round(learn, tiny_encoder, tmp_path, capsys):
    rows = [(q, "yes" if a.startswith("T") else "no") for q, a in statement_rows()]
    for name, part in (("a", rows[:40]), ("b", rows[40:])):
        (tmp_path / f"{name}.csv").write_text("text_input,text_label\n" + "".join(f"{q},{a}\n" for q, a in part))
    data = ["--base_model", tiny_encoder, "--round_files", "a.csv", "b.csv"]
    point = ["--carry", "weights", "--adapter_name", "lora"]
    record = learn("--run_name", "d", "--test_fraction", 0.25, *point, data=data)
    table = read_rounds(tmp_path / "results/rounds/d.csv")
    asked = table.groupby("round")["evaluated_on"].apply(list).to_dict()
    tests = ["test", "test-01", "test-02"]
    assert asked == {1: [*tests, "round-01"], 2: [*tests, "round-01", "round-02"]}
    last = table.query("round == 2").set_index("evaluated_on")
    parts = last.loc[["test-01", "test-02"]]
    assert last["value"]["test"] == pytest.approx((parts["value"] * parts["rows"]).sum() / parts["rows"].sum())
    assert record["config"]["dataset_name"] == "a+b" and "On the tests of the earlier round" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------- resuming


def test_a_run_killed_in_a_round_goes_on_to_the_same_result(learn, tmp_path, monkeypatch):
    flags = ["--rounds", 8, 16, 16, "--save_strategy", "steps", "--save_steps", 2, "--max_steps", 5, "--run_name"]
    whole = learn(*flags, "whole")
    calls, step = [], AdapterTrainer.training_step

    def killed(self, *args, **kwargs):
        calls.append(0)
        if len(calls) == 9:  # in the fourth step of round 2, behind its first checkpoint
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            learn(*flags, "on")
    assert len(read_rounds(tmp_path / "results/rounds/on.csv")) == 2  # the first round's are there
    assert not (tmp_path / "results/metrics/on.json").exists()
    with pytest.raises(InputError, match="--overwrite"):
        learn(*flags, "on")
    with pytest.raises(InputError, match=r"learning_rate 0.01, and now it is 0.02"):
        learn(*flags, "on", "--resume_rounds", "--lr", 2e-2)

    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "training_step", lambda self, *a, **k: (calls.append(0), step(self, *a, **k))[1])
        resumed = learn(*flags, "on", "--resume_rounds")
    assert len(calls) == 3 + 5  # nothing is done twice but the steps since the checkpoint
    for folder in ("round-01", "round-02", "round-03", "."):
        assert equal(tmp_path / "adapters/whole" / folder, tmp_path / "adapters/on" / folder), folder
    tables = [read_rounds(tmp_path / f"results/rounds/{name}.csv").drop(columns="seconds") for name in ("whole", "on")]
    assert tables[0].equals(tables[1])
    assert resumed["metrics"] == whole["metrics"]

    # Killed behind the last round, before the results: they alone are made.
    (tmp_path / "results/metrics/on.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "train", None)
        assert learn(*flags, "on", "--resume_rounds")["metrics"] == whole["metrics"]


def test_overwriting_removes_the_rounds_of_the_run_before(learn, tmp_path):
    learn("--rounds", 4, 4, 4, "--run_name", "r")
    learn("--rounds", 4, "--run_name", "r", "--overwrite")
    assert [path.name for path in (tmp_path / "adapters/r").glob("round-*")] == ["round-01"]
    assert len(read_rounds(tmp_path / "results/rounds/r.csv")) == 2


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rounds", "40", "400"], "440 rows in all, and there are"),
        (["--rounds", "10,0"], "--rounds 0: must be numbers of rows"),
        (["--rounds", "ten"], "--rounds ten"),
        (["--rounds", "10", "--replay_ratio", "1.5"], "--replay_ratio 1.5"),
        (["--rounds", "10", "--replay", "some"], "none, partial, full"),
        (["--rounds", "10", "--carry", "all"], "posterior, weights, l2, none"),
        (["--rounds", "10", "--adapter_name", "lora"], "no Gaussian weights"),
        (["--rounds", "10", "--bayesian", "none"], "no Gaussian weights"),
        (["--rounds", "10", "--do_train", "false", "--adapter_path", "x"], "--rounds with --do_train false"),
        (["--rounds", "10", "--do_predict", "false"], "judged by their answers"),
        (["--rounds", "10", "--carry", "l2"], "--l2_weight above 0"),
        (["--rounds", "10", "--carry", "weights", "--l2_weight", "1"], "--l2_weight: has no use"),
        (["--rounds", "10", "--prior_widening", "0.5"], "--prior_widening 0.5"),
        (["--rounds", "10", "--carry", "none", "--prior_widening", "2"], "--prior_widening: has no use"),
        (["--rounds", "10", "--round_files", "a.csv"], "give one of them"),
        (["--rounds", "10", "--carry", "none", "--adapter_path", "x"], "--adapter_path with --carry none"),
        (["--round_files", "nowhere.csv"], "--dataset_name with --round_files"),
        (["--carry", "weights"], "--carry: is about rounds"),
        (["--resume_rounds"], "--resume_rounds: is about rounds"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(learn, tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr(trainer_script, "build_trainer", None)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as error:
        learn(*flags)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_of_a_round_that_is_missing_is_named(learn, tiny_encoder):
    with pytest.raises(InputError, match="--round_files nowhere.csv: no such file"):
        learn(data=["--base_model", tiny_encoder, "--round_files", "nowhere.csv"])


def test_domains_of_one_class_each_are_learned_one_after_another(tmp_path):
    for name in ("good", "bad"):
        rows = "\n".join(f"{name} thing {i},{name}" for i in range(20))
        (tmp_path / f"{name}.csv").write_text(f"text_input,text_label\n{rows}\n")
    files = [str(tmp_path / f"{name}.csv") for name in ("good", "bad")]
    task, plan = load_domains(DataArguments(dataset_name="both"), files, 0, False)
    assert task.labels == ("bad", "good")
    assert [{task.train[place].answer for place in places} for places in plan.new] == [{"good"}, {"bad"}]
    with pytest.raises(InputError, match="have the label 'good'"):
        load_domains(DataArguments(dataset_name="both", labels=["good", "bad"]), files[:1], 0, False)


def test_a_part_without_rows_is_left_out_of_what_is_still_known():
    def asked(name, value, rows=4):
        return {"evaluated_on": name, "metric": "accuracy", "value": value, "rows": rows}

    first = [asked("test", 0.5), asked("round-01", 1.0)]
    second = [asked("test", 0.5), asked("round-01", 0.5)]  # none of round 2's rows fits
    third = [asked("test", 0.5), asked("round-01", 0.25), asked("round-03", 1.0)]
    known = still_known([{"new_rows": 4, "evaluations": asked} for asked in (first, second, third)])
    assert (known["then"], known["now"]) == (1.0, 0.25)
