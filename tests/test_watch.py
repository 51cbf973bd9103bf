"""Numbers that go wrong stop a run, by name of step and rows, and nothing of them is saved; a stuck loss is said."""

from __future__ import annotations

import signal

import pytest
import torch

import parameter_efficient_fine_tuning as trainer_script
from bhpeft.checkpoints import steps
from bhpeft.errors import EXIT_FAILED, RunError, Stopped
from bhpeft.tasks.encoding import Collator
from bhpeft.tasks.packing import PackingCollator
from bhpeft.training import AdapterTrainer
from bhpeft.watch import SKIPS, Watch, stuck, texts_of


@pytest.fixture
def learn(tiny_encoder, labelled, tmp_path, monkeypatch):
    """Run the trainer in this process, eight rows a step in two micro-steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    words = ["--base_model", tiny_encoder, "--dataset_name", labelled, "--test_fraction", 0.2, "--max_length", 48]
    words += ["--adapter_name", "lora", "--lr", 1e-2, "--batch_size", 4, "--gradient_accumulation_steps", 2]
    words += ["--max_steps", 6, "--save_strategy", "steps", "--save_steps", 2, "--disable_tqdm", "true"]
    return lambda *flags: trainer_script.main(list(map(str, [*words, "--run_name", "r", *flags])))


def poisoned(monkeypatch, at: int, part: str, micro_step: int = 0) -> list[list[int]]:
    """Have the loss, or its gradient alone, be infinite in one micro-step; gives the rows of it."""
    rows, calls, compute = [], [], AdapterTrainer.compute_loss

    def spoil(self, model, inputs, *args, **kwargs):
        loss = compute(self, model, inputs, *args, **kwargs)
        if model.training:
            calls.append(self.state.global_step)
            if self.state.global_step == at and calls.count(at) == micro_step + 1:
                rows.extend(texts_of(inputs))
                if part == "loss":
                    return loss * float("nan")
                loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(AdapterTrainer, "compute_loss", spoil)
    return rows


@pytest.mark.parametrize("micro_step", [0, 1])
def test_a_loss_that_is_no_number_stops_the_run_and_names_step_rows_and_checkpoint(
    learn, monkeypatch, tmp_path, micro_step
):
    seen, train = [], AdapterTrainer.train
    monkeypatch.setattr(AdapterTrainer, "train", lambda self, **k: (seen.append(self.train_dataset), train(self, **k)))
    rows = poisoned(monkeypatch, 3, "loss", micro_step)
    with pytest.raises(RunError) as error:
        learn()
    message = str(error.value)
    assert error.value.code == EXIT_FAILED and "\n" not in message
    assert message.startswith("the loss is not finite at step 4,")
    assert "last good checkpoint: adapters/r/checkpoint-2." in message
    places = [next(i for i, row in enumerate(seen[0]) if row["input_ids"] == ids) for ids in rows]
    assert len(places) == 4 and all(f" {place} 'Do " in message for place in places)
    assert [step for step, _ in steps(tmp_path / "adapters/r")] == [2]
    assert not (tmp_path / "adapters/r/adapter_model.safetensors").exists()
    assert not (tmp_path / "results/metrics/r.json").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as before


def test_a_gradient_that_is_no_number_stops_the_run(learn, monkeypatch, tmp_path):
    poisoned(monkeypatch, 0, "gradient")
    with pytest.raises(RunError, match="the gradient is not finite at step 1, .*last good checkpoint: none"):
        learn()
    assert steps(tmp_path / "adapters/r") == []


class Scaled:
    """As much of a trainer as `Watch` looks at, under fp16."""

    args = type("Args", (), {"fp16": True})
    step_gradient = float("inf")
    accelerator = type("Accelerator", (), {"optimizer_step_was_skipped": True})


def test_the_scaler_may_skip_some_steps_in_a_row_and_no_more():
    watch = Watch(Scaled())
    assert not any(watch._bad_gradient() for _ in range(SKIPS))
    watch.trainer.step_gradient, watch.trainer.accelerator.optimizer_step_was_skipped = 1.0, False
    assert not watch._bad_gradient()
    watch.trainer.step_gradient, watch.trainer.accelerator.optimizer_step_was_skipped = float("inf"), True
    assert [watch._bad_gradient() for _ in range(SKIPS + 1)] == [False] * SKIPS + [True]


def test_an_adapter_that_did_not_move_is_an_error_and_not_saved(learn, tmp_path):
    with pytest.raises(RunError, match="not one of the adapter's weights has moved"):
        learn("--lr", 0)
    assert not (tmp_path / "adapters/r/adapter_model.safetensors").exists()


def test_a_loss_that_never_falls_is_said(learn, capsys):
    flat = [{"loss": 1.0 + 0.1 * (i % 2)} for i in range(16)]
    assert "has not fallen: 1.05 at the beginning, 1.05 at the end" in stuck(flat)
    assert stuck(flat[:7]) is None and stuck([{"loss": 16.0 - i} for i in range(16)] + [{"eval_loss": 99}]) is None
    learn("--lr", 1e-12, "--logging_steps", 1, "--max_steps", 8, "--save_strategy", "no")
    assert "the loss has not fallen" in capsys.readouterr().out


def test_sigterm_ends_training_with_its_step_saved(learn, monkeypatch, tmp_path):
    step = AdapterTrainer.training_step

    def told(self, *args, **kwargs):
        if self.state.global_step == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", told)
    with pytest.raises(Stopped, match="SIGTERM at step 4; saved adapters/r/checkpoint-4: .*--resume"):
        learn()
    assert [step for step, _ in steps(tmp_path / "adapters/r")] == [2, 4]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_texts_of_a_batch_are_its_rows():
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    for collator in (Collator(0), PackingCollator(0)):
        assert texts_of(collator(rows)) == [[5, 6, 7], [8, 9]]
    choices = Collator(0)([{"input_ids": [[1, 2], [3]], "labels": 0}, {"input_ids": [[4], [5]], "labels": 1}])
    assert choices["input_ids"].shape == (2, 2, 2) and texts_of(choices) == [[1, 2], [3], [4], [5]]
    assert torch.is_tensor(choices["labels"])
