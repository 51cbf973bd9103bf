"""Checkpoints: whole or named as not, found, rotated; a run goes on from the newest that is whole, to the bit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import parameter_efficient_fine_tuning as trainer_script
from bhpeft.checkpoints import MANIFEST, PARTIAL, STATE, fault, keep_last, newest, seal, steps, writing
from bhpeft.errors import InputError
from bhpeft.training import AdapterTrainer

STEPS = ["--save_strategy", "steps", "--save_steps", 2, "--max_steps", 8, "--batch_size", 8, "--save_total_limit", 3]


def checkpoint(folder, step: int):
    written = folder / PARTIAL / f"checkpoint-{step}"
    (written / "part").mkdir(parents=True)
    (written / STATE).write_text(json.dumps({"global_step": step}))
    (written / "part/weights").write_bytes(bytes(range(256)) * step)
    seal(written, folder / written.name, {"lr": 1.0})
    return folder / written.name


def flip(file) -> None:
    """Change one bit, and neither size nor date."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


BREAKS = {
    "weights is missing": lambda folder: (folder / "part/weights").unlink(),
    "bytes in place of": lambda folder: (folder / "part/weights").write_bytes(b"short"),
    "is not what was written": lambda folder: flip(folder / "part/weights"),
    "has no manifest.json": lambda folder: (folder / MANIFEST).unlink(),
    "manifest.json cannot be read": lambda folder: (folder / MANIFEST).write_text('{"files": '),
    "manifest.json cannot be read ": lambda folder: (folder / MANIFEST).write_text('{"files": [1], "settings": 0}'),
}


@pytest.mark.parametrize("words", BREAKS)
def test_what_is_not_whole_is_named_and_the_one_before_is_taken(tmp_path, words):
    for step in (2, 10, 9):
        checkpoint(tmp_path, step)
    assert [step for step, _ in steps(tmp_path)] == [2, 9, 10]
    assert newest(tmp_path) == (tmp_path / "checkpoint-10", [])
    BREAKS[words](tmp_path / "checkpoint-10")
    found, [line] = newest(tmp_path)
    assert found == tmp_path / "checkpoint-9"
    assert words.strip() in line and "checkpoint-10" in line and "\n" not in line


def test_one_of_the_same_name_is_replaced_and_nothing_else_is_left(tmp_path):
    first = checkpoint(tmp_path, 2)
    flip(first / "part/weights")
    assert fault(checkpoint(tmp_path, 2)) is None
    assert [path.name for path in tmp_path.iterdir() if path.name != PARTIAL] == ["checkpoint-2"]
    assert list((tmp_path / PARTIAL).iterdir()) == []


def test_the_last_and_the_best_are_kept(tmp_path):
    for step in (2, 4, 6, 8, 10, 100):
        checkpoint(tmp_path, step)
    keep_last(tmp_path, 10, 2, str(tmp_path / "checkpoint-4"))
    assert [step for step, _ in steps(tmp_path)] == [4, 8, 10, 100]  # 100: of what was not gone on from
    keep_last(tmp_path, 100, None, None)
    keep_last(tmp_path, 100, -1, None)  # as in transformers: no limit
    assert len(steps(tmp_path)) == 4


def test_a_write_that_fails_is_one_line_and_other_errors_are_themselves(tmp_path):
    with pytest.raises(InputError, match=r"here: cannot be written \(No space left on device\); make room"):
        with writing("here"):
            raise OSError(28, "No space left on device")
    with pytest.raises(InputError, match="cannot be written"):
        with writing("here"):
            torch.save({}, tmp_path / "nowhere/file")
    with pytest.raises(RuntimeError, match="Connection closed"):
        with writing("here"):
            raise RuntimeError("Connection closed by peer")


# --------------------------------------------------------------------------------------------------- resuming


@pytest.fixture
def learn(tiny_encoder, labelled, tmp_path, monkeypatch):
    """Run the trainer in this process on the labelled statements; `learn(*flags)` gives its record."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    words = ["--base_model", tiny_encoder, "--dataset_name", labelled, "--test_fraction", 0.2, "--max_length", 48]
    words += ["--adapter_name", "bh-peft", "--prefix_length", 4, "--bn_reduction_factor", 8, "--lr", 1e-2]
    words += ["--logging_steps", 1, "--disable_tqdm", "true", *STEPS, "--run_name"]
    return lambda name, *flags: trainer_script.main(list(map(str, [*words, name, *flags])))


def weights(name: str) -> dict[str, torch.Tensor]:
    return load_file(f"adapters/{name}/adapter_model.safetensors")


def same(one: str, two: str) -> bool:
    one, two = weights(one), weights(two)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def steps_taken(monkeypatch) -> list[int]:
    """The steps that are taken, as they are."""
    seen: list[int] = []
    step = AdapterTrainer.training_step

    def count(self, *args, **kwargs):
        seen.append(self.state.global_step)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", count)
    return seen


def cut(name: str, tmp_path) -> None:
    """What a run that was killed has left: checkpoints, and neither adapter nor results."""
    for file in (tmp_path / "adapters" / name).iterdir():
        if file.is_file():
            file.unlink()
    shutil.rmtree(tmp_path / "results")


def test_resume_goes_on_to_the_bit_wherever_it_was_cut(learn, tmp_path, steps_taken, capsys):
    whole = learn("whole")
    shutil.copytree("adapters/whole", "adapters/on")
    for begins, lines in (
        (8, []),  # behind the last step, before the results
        (6, ["checkpoint-8: not whole, optimizer.pt is not what was written"]),
        (4, ["checkpoint-8: not whole, ", "checkpoint-6: not whole, adapter_model.safetensors is missing"]),
    ):
        cut("on", tmp_path)
        if begins == 6:
            flip(tmp_path / "adapters/on/checkpoint-8/optimizer.pt")
        if begins == 4:
            flip(tmp_path / "adapters/on/checkpoint-8/optimizer.pt")
            (tmp_path / "adapters/on/checkpoint-6/adapter_model.safetensors").unlink()
            (tmp_path / f"adapters/on/{PARTIAL}/checkpoint-12").mkdir(parents=True)  # and one half written
        steps_taken.clear()
        capsys.readouterr()
        record = learn("on", "--resume")
        said = capsys.readouterr().out
        assert steps_taken == list(range(begins, 8)) and f"behind step {begins}" in said
        assert all(line in said for line in lines) and said.count("not whole") == len(lines)
        assert record["metrics"] == whole["metrics"] and same("whole", "on")
        assert [entry.get("loss") for entry in record["history"]][:8] == [e.get("loss") for e in whole["history"]][:8]
        assert [step for step, _ in steps(tmp_path / "adapters/on")] == [4, 6, 8]
        assert not (tmp_path / "adapters/on" / PARTIAL).exists()


def test_resume_in_a_later_epoch_meets_the_rows_that_it_would_have_met(learn, tmp_path, steps_taken):
    """Grouped by length: transformers' own sampler draws from torch's generator, which is elsewhere by then."""
    flags = ("--train_sampling_strategy", "group_by_length", "--per_device_train_batch_size", 16)
    whole = learn("whole", *flags)
    shutil.copytree("adapters/whole", "adapters/on")
    cut("on", tmp_path)
    flip(tmp_path / "adapters/on/checkpoint-8/optimizer.pt")
    steps_taken.clear()
    record = learn("on", *flags, "--resume")
    epoch = next(entry["epoch"] for entry in record["history"] if entry["step"] == 6)
    assert steps_taken == [6, 7] and epoch > 1 and epoch % 1  # in the middle of a later one
    assert record["metrics"] == whole["metrics"] and same("whole", "on")


def test_resume_begins_where_there_is_nothing_and_refuses_what_is_not_the_same_run(learn, tmp_path, capsys):
    learn("r", "--resume")
    assert "adapters/r: no whole checkpoint; beginning at the beginning" in capsys.readouterr().out
    with pytest.raises(InputError, match="the run r is finished, .*metrics/r.json"):
        learn("r", "--resume")
    cut("r", tmp_path)
    for flags, words in (
        (["--lr", 0.02], "made with learning_rate 0.01, and now it is 0.02"),
        (["--batch_size", 4], "made with 8 rows a step, and now it is 4"),
        (["--max_train_samples", 30], "made with max_train_samples None, and now it is 30"),
        (["--overwrite"], "--resume with --overwrite"),
        (["--resume_from_checkpoint", "adapters/r/checkpoint-8"], "--resume with --resume_from_checkpoint"),
    ):
        with pytest.raises(InputError, match=words):
            learn("r", "--resume", *flags)
    # As many rows a step, otherwise spread: the same run.
    learn("r", "--resume", "--batch_size", 4, "--gradient_accumulation_steps", 2)


def test_a_checkpoint_of_ranks_is_not_gone_on_from_by_one_process(learn, tmp_path):
    learn("r")
    folder = tmp_path / "adapters/r/checkpoint-8"
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["settings"]["zero3"] is False
    manifest["settings"]["zero3"] = True
    (folder / MANIFEST).write_text(json.dumps(manifest))
    cut("r", tmp_path)
    for flags in (["--resume"], ["--resume_from_checkpoint", "adapters/r/checkpoint-8"]):
        with pytest.raises(InputError, match="was made under ZeRO-3, by accelerate launch; start the run in the same"):
            learn("r", *flags)


def test_an_overwriting_run_leaves_nothing_of_the_one_before_to_go_on_from(learn, tmp_path):
    learn("r")
    learn("r", "--overwrite", "--max_steps", 2)
    assert [step for step, _ in steps(tmp_path / "adapters/r")] == [2]


def test_resume_in_rounds_is_resume_rounds(learn, capsys):
    learn("r", "--rounds", 8, "--max_steps", 2, "--resume")
    assert "beginning with the first round" in capsys.readouterr().out
    learn("r", "--rounds", 8, "--max_steps", 2, "--resume")
    assert "1 rounds are finished" in capsys.readouterr().out


def test_the_best_is_kept_and_is_what_the_run_ends_with(learn, tmp_path):
    best = ["--do_eval", "--eval_strategy", "steps", "--eval_steps", 2, "--load_best_model_at_end"]
    best += ["--metric_for_best_model", "loss", "--greater_is_better", "true"]  # the worst, which is not the last
    learn("r", *best, "--validation_fraction", 0.2, "--save_total_limit", 2, "--lr", 0.3)
    folder = tmp_path / "adapters/r"
    kept = [step for step, _ in steps(folder)]
    state = json.loads((folder / f"checkpoint-{kept[-1]}" / STATE).read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    assert losses.keys() == {2, 4, 6, 8}
    most = max(losses, key=losses.get)
    assert most < 8 and kept == sorted({most, 6, 8})
    assert state["best_model_checkpoint"] == f"adapters/r/checkpoint-{most}"
    saved = load_file(folder / f"checkpoint-{most}/adapter_model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in weights("r").items())
