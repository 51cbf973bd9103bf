"""Rows kept between starts: the same training from them, made once, never from what has changed or is broken."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import statement_rows
from transformers import AutoTokenizer
from transformers.trainer_pt_utils import LengthGroupedSampler

import parameter_efficient_fine_tuning as script
from bhpeft import feature_distance
from bhpeft.arguments import DataArguments
from bhpeft.checkpoints import MANIFEST
from bhpeft.errors import InputError
from bhpeft.files import write_rows
from bhpeft.length_groups import LengthGroups
from bhpeft.tasks import Example, Task, cache, head_encoding, load_task, stored, token_rows
from bhpeft.tasks.dialogue import Reply
from bhpeft.tasks.encoding import Encoder
from bhpeft.tasks.example import at_most, digest_of, hold_out, keep_fraction, pick, where
from bhpeft.tasks.head_encoding import HeadEncoder, Standardiser
from bhpeft.tasks.stored import StoredExamples, read_examples, write_examples
from bhpeft.tasks.token_rows import ROWS, TokenRows, write_tokens


def entries(folder: Path) -> dict[str, Path]:
    """The cache's entries by their kind; there is one of each."""
    found = {path.name.split("-")[0]: path for path in folder.iterdir()}
    assert set(found) == {"rows", "tokens"} and len(list(folder.iterdir())) == 2
    return found


@pytest.fixture
def flags(tmp_path):
    """Words of a short training in which every row counts; `flags(cache, *more)`."""

    def words(row_cache, *more) -> list[str]:
        run = ["--row_cache", row_cache, "--results_dir", tmp_path / "results", "--output_dir", tmp_path / "adapter",
               "--max_length", 40, "--max_steps", 6, "--logging_steps", 1, "--save_strategy", "no", "--overwrite",
               "--disable_tqdm", True, "--batch_size", 4, "--run_name", "run"]  # fmt: skip
        return list(map(str, [*run, *more]))

    return words


# ------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
@pytest.mark.parametrize("kind", ["classes", "text"])
def test_losses_are_the_same_without_a_cache_at_the_first_and_at_the_second_start(
    kind, sampling, flags, labelled, statements, tiny_encoder, tiny_model, tmp_path, monkeypatch
):
    if kind == "classes":
        data = ["--base_model", tiny_encoder, "--dataset_name", labelled, "--do_eval"]
    else:
        data = ["--base_model", tiny_model, "--dataset_name", statements[0], "--test_file", statements[1],
                "--max_new_tokens", 4]  # fmt: skip
    data += ["--train_sampling_strategy", sampling]
    folder, records, states = tmp_path / "cache", [], []
    for row_cache in ("none", folder, folder):
        if len(records) == 2:  # neither read nor tokenised again
            monkeypatch.setattr(cache, "load_task", None)
            monkeypatch.setattr(cache, "write_tokens", None)
        records.append(script.main(flags(row_cache, *data)))
        states.append((tmp_path / "adapter/adapter_model.safetensors").read_bytes())
    assert states[0] == states[1] == states[2]
    losses = [[entry["loss"] for entry in record["history"] if "loss" in entry] for record in records]
    assert len(losses[0]) == 6 and losses[0] == losses[1] == losses[2]
    assert records[0]["metrics"] == records[1]["metrics"] == records[2]["metrics"]
    assert records[0]["rows"] == records[2]["rows"]
    entries(folder)


def test_memory_stays_flat_while_rows_are_read_and_tokenised(tiny_encoder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    peaks = []
    for count in (3_000, 3_000, 30_000):  # the first one pays for what is imported and built once
        file = tmp_path / f"{count}.csv"
        rows = [(f"Do {i} cats swim in lakes {i % 7}?", "yes" if i % 2 else "no") for i in range(count)]
        write_rows(file, ["text_input", "text_label"], rows)
        write_rows(tmp_path / "test.csv", ["text_input", "text_label"], [("Do dogs fly?", "no")])
        del rows
        tracemalloc.start()
        arguments = DataArguments(dataset_name=str(file), test_file=str(tmp_path / "test.csv"))
        task = cache.load_cached(tmp_path / "cache" / str(len(peaks)), arguments, 0, False, True)
        encoder = HeadEncoder(tokenizer, "classification", task.labels, 64)
        assert len(cache.encode_cached(tmp_path / "cache" / str(len(peaks)), encoder, task, [])) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    as_list = 30_000 * 400  # an example and its tokens take more
    assert peaks[2] - peaks[1] < as_list / 10


# ----------------------------------------------------------------------------------- what stands in a file


EXAMPLES = [
    Example("a", "Do cats fly?", "no", "do cats fly?"),
    Example("b", "Wähle,\nbitte\u2028.", "B", "g", ("one", "", "drei")),
    Reply("c", "and then?", "nothing", "tree", (), (("hello", "hi"), ("why", "because"))),
    Reply("d", "alone", "so", "tree", (), ()),
]


@pytest.mark.parametrize("together", [1, 3, 1000])
def test_stored_examples_are_those_of_a_list(together, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "TOGETHER", together)
    some = [Example(str(i), q, a, q.split()[1]) for i, (q, a) in enumerate(statement_rows())]
    examples = EXAMPLES + some
    kept = write_examples(iter(examples), tmp_path / "examples.arrow")
    assert list(kept) == examples == list(read_examples(tmp_path / "examples.arrow"))
    assert [type(e) for e in kept] == [type(e) for e in examples]
    assert (kept[2], kept[-1], len(kept)) == (examples[2], examples[-1], len(examples))
    assert list(kept[3:9]) == examples[3:9] and isinstance(kept[3:9], StoredExamples)
    with pytest.raises(IndexError):
        kept[len(examples)]
    for places in ([], [0], [2, 3, 30, 31], list(range(0, len(examples), 5))):
        assert list(pick(kept, places)) == pick(examples, places) and len(pick(kept, places)) == len(places)
    picked = pick(pick(kept, range(4, 40)), [0, 7, 20])
    assert list(picked) == [examples[4], examples[11], examples[24]]
    for split in (
        lambda e: (where(e, lambda example: "swim" in example.query),),
        lambda e: hold_out(e, 0.3, 7),
        lambda e: (keep_fraction(e, 0.4, 7), at_most(e, 11, 3), at_most(e, None, 3)),
    ):
        assert [list(part) for part in split(kept)] == [list(part) for part in split(examples)]


def test_no_examples_at_all_can_be_stored(tmp_path):
    kept = write_examples([], tmp_path / "none.arrow")
    assert (list(kept), len(kept), bool(kept)) == ([], 0, False)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"test_fraction": 0.3, "data_fraction": 0.5, "max_train_samples": 9, "max_test_samples": 3},
        {"labels": ["no", "yes"], "max_validation_samples": 2},
    ],
)
def test_a_cached_task_is_the_one_that_is_read(settings, labelled, tmp_path):
    arguments = DataArguments(dataset_name=str(labelled), **settings)
    read = load_task(arguments, 5, True)
    for _ in range(2):
        task = cache.load_cached(tmp_path / "cache", arguments, 5, True, True)
        for name in ("name", "task_type", "labels", "instruction", "notes", "validation", "test"):
            assert getattr(task, name) == getattr(read, name)
        assert list(task.train) == list(read.train) and isinstance(task.train, StoredExamples)
        assert task.digest == digest_of(read) != digest_of(load_task(arguments, 6, True))


def test_the_digest_is_that_of_the_rows_as_json():
    train = [Example("a", 'say "yes"', "yé\ud800s", "g"), Example("b", "x", "no", "g")]
    for rows, new in (([], None), (train, [[0], [1]])):
        task = Task("name", rows, [], train[:1], labels=("no", "yes"))
        parts = [[(e.query, e.answer) for e in part] for part in (task.test, task.train)]
        text = json.dumps([*parts, new, ["no", "yes"]])
        assert digest_of(task, new) == hashlib.sha256(text.encode()).hexdigest()[:16]


ROW_KINDS = {
    "class": [{"input_ids": [5, 6, 7], "labels": 1}, {"input_ids": [8], "labels": 0}],
    "number": [{"input_ids": [5], "labels": 0.1 + 0.2}, {"input_ids": [300_000, 4], "labels": -1.5}],
    "answer": [{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [9], "labels": [9]}],
    "choices": [
        {"input_ids": [[5, 6], [7]], "token_type_ids": [[0, 1], [0]], "labels": 1},
        {"input_ids": [[1], [2, 3]], "token_type_ids": [[0], [0, 1]], "labels": 0},
    ],
}


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_token_rows_are_what_was_written(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(token_rows, "TOGETHER", 3)
    rows = ROW_KINDS[kind] * 4
    write_tokens(iter(rows), tmp_path)
    mapped = TokenRows(tmp_path)
    assert [mapped[i] for i in range(len(mapped))] == rows == [pickle.loads(pickle.dumps(mapped))[i] for i in range(8)]
    assert mapped.lengths.tolist() == [len(row["input_ids"]) for row in rows]
    assert [type(row["labels"]) for row in rows] == [type(mapped[i]["labels"]) for i in range(8)]
    loader = torch.utils.data.DataLoader(mapped, batch_size=3, collate_fn=list, num_workers=1)
    assert [row for batch in loader for row in batch] == rows


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="resident pages of files are told by Linux alone")
def test_rows_read_here_and_there_leave_a_mapped_file_out_of_memory(tmp_path):
    def mapped() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))

    count, row = 40_000, {"input_ids": list(range(200)), "labels": 1}
    write_tokens((row for _ in range(count)), tmp_path)
    size = (tmp_path / ROWS).stat().st_size // 1024
    rows = TokenRows(tmp_path)
    before, draw = mapped(), random.Random(0)
    assert all(rows[draw.randrange(count)] == row for _ in range(300))
    assert size > 30_000 and mapped() - before < size / 10


# -------------------------------------------------------------------------------- row by row, and grouped


@pytest.mark.parametrize("mode", ["truncate", "drop", "error"])
@pytest.mark.parametrize("kind", ["head", "text"])
def test_rows_encoded_in_small_parts_are_those_encoded_at_once(kind, mode, tiny_encoder, tiny_model, monkeypatch):
    examples = [Example(str(i), q * (1 + i % 3), a, q) for i, (q, a) in enumerate(statement_rows())]

    def encoded() -> tuple:
        notes: list[str] = []
        if kind == "text":
            encoder = Encoder(AutoTokenizer.from_pretrained(tiny_model), "{text_input}", 16, mode)
        else:
            standardiser = Standardiser(0.0, 1.0)
            numbers = [Example(e.id, e.query, str(len(e.answer)), e.group) for e in examples]
            encoder = HeadEncoder(AutoTokenizer.from_pretrained(tiny_encoder), "regression", (), 16, mode, standardiser)
        try:
            return encoder.train_rows(numbers if kind == "head" else examples, notes), notes
        except InputError as error:
            return str(error), notes

    at_once = encoded()
    monkeypatch.setattr(head_encoding, "TOGETHER", 5)
    assert encoded() == at_once
    assert (mode == "error") == isinstance(at_once[0], str)
    assert f" of {len(examples)} training " in (at_once[0] if mode == "error" else at_once[1][0])
    if mode != "error":
        assert (len(at_once[0]) < len(examples)) == (mode == "drop")


def test_lengths_are_grouped_as_transformers_groups_them_by_seed_and_epoch():
    draw = random.Random(0)
    for rows in (1, 3, 16, 100, 1000, 5000):
        lengths = [draw.randint(1, 30) for _ in range(rows)]
        for batch in (1, 4, 32):
            sampler, orders = LengthGroups(batch, np.array(lengths, np.int32), seed=rows), []
            for epoch in (0, 1):
                generator = torch.Generator().manual_seed(rows + epoch)
                sampler.epoch = epoch
                orders.append(list(LengthGroupedSampler(batch, lengths=lengths, generator=generator)))
                torch.rand(1)  # what else is drawn does not matter
                assert list(sampler) == orders[-1] and len(sampler) == rows
            assert rows < 16 or orders[0] != orders[1]


# ---------------------------------------------------------------------------------------- when it is used


@pytest.fixture
def prepare(labelled, tiny_encoder, tmp_path):
    """`prepare(length=..., tokenizer=..., **data)`: how many entries were made, and the training rows."""
    made = []

    def run(length: int = 40, tokenizer: Path = tiny_encoder, seed: int = 1, **data) -> tuple[list[str], list[dict]]:
        folder = tmp_path / "cache"
        before = set(os.listdir(folder)) if folder.is_dir() else set()
        folder.mkdir(exist_ok=True)
        task = cache.load_cached(folder, DataArguments(dataset_name=str(labelled), **data), seed, False, True)
        encoder = HeadEncoder(AutoTokenizer.from_pretrained(tokenizer), "classification", task.labels, length, "drop")
        rows = cache.encode_cached(folder, encoder, task, made)
        new = sorted(name.split("-")[0] for name in set(os.listdir(folder)) - before)
        return new, [rows[i] for i in range(len(rows))]

    return run


def test_what_rows_depend_on_makes_new_ones(prepare, labelled, tiny_encoder, tmp_path, monkeypatch):
    new, first = prepare()
    assert new == ["rows", "tokens"] and prepare() == ([], first)
    assert prepare(max_new_tokens=3, long_prompts="truncate") == ([], first)  # the rows are none the wiser
    new, shorter = prepare(length=7)
    assert new == ["tokens"] and len(shorter) < len(first)
    for change in ({"seed": 2}, {"max_train_samples": 20}, {"labels": ["yes", "no"]}):
        new, rows = prepare(**change)
        assert new == ["rows", "tokens"] and rows != first
    other = AutoTokenizer.from_pretrained(tiny_encoder)
    other.add_tokens(["cats"])
    other.save_pretrained(tmp_path / "other")
    new, rows = prepare(tokenizer=tmp_path / "other")
    assert new == ["tokens"] and rows != first
    same = os.stat(labelled)
    labelled.write_bytes(labelled.read_bytes().replace(b"Do cats fly", b"Do gnus fly"))
    os.utime(labelled, ns=(same.st_atime_ns, same.st_mtime_ns))
    assert labelled.stat().st_size == same.st_size
    new, rows = prepare()
    assert new == ["rows", "tokens"] and rows != first
    monkeypatch.setattr(cache, "_makers", lambda: ("another version",))
    assert prepare() == (["rows", "tokens"], rows)


@pytest.mark.parametrize("kind", ["rows", "tokens"])
@pytest.mark.parametrize("how", ["a byte", "cut short", "a file gone", "no manifest", "killed while it was made"])
def test_an_entry_that_is_not_whole_is_made_again(how, kind, prepare, tmp_path):
    _, first = prepare()
    folder = entries(tmp_path / "cache")[kind]
    file = folder / (ROWS if kind == "tokens" else "train.arrow")
    content = file.read_bytes()
    if how == "a byte":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "cut short":
        file.write_bytes(content[:-8])
    elif how == "a file gone":
        file.unlink()
    elif how == "no manifest":
        (folder / MANIFEST).unlink()
    else:
        partial = folder.rename(folder.with_name(f".{folder.name}.partial"))
        (partial / file.name).write_bytes(content[: len(content) // 2])
        for path in (partial, *partial.iterdir()):
            os.utime(path, (0, 0))
        (folder.parent / f".{folder.name}.lock").write_text("process 1 on a machine since yesterday")
    assert prepare()[1] == first
    assert file.read_bytes() == content and set(entries(tmp_path / "cache")) == {"rows", "tokens"}


def test_one_of_many_makes_an_entry_while_the_others_wait(tmp_path):
    made, found = [], []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "a").write_text("whole")

    def start() -> None:
        found.append((cache.entry(tmp_path / "entry", "a", make) / "a").read_text())

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and found == ["whole"] * 8 and os.listdir(tmp_path) == ["entry"]


def test_an_entry_that_cannot_be_made_leaves_nothing(prepare, labelled, tmp_path):
    with pytest.raises(InputError, match="none is left"):
        prepare(length=3)
    assert [name.split("-")[0] for name in os.listdir(tmp_path / "cache")] == ["rows"]

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left on device.*--row_cache"):
        cache.entry(tmp_path / "cache" / "x", "a", full)
    assert len(os.listdir(tmp_path / "cache")) == 1


def test_a_file_that_changes_while_it_is_read_is_told(labelled, tmp_path, monkeypatch):
    def reading(*args, **kwargs):
        task = load_task(*args, **kwargs)
        labelled.write_text(labelled.read_text() + "Do gnus fly?,no\n")
        return task

    monkeypatch.setattr(cache, "load_task", reading)
    with pytest.raises(InputError, match="changed while being read"):
        cache.load_cached(tmp_path, DataArguments(dataset_name=str(labelled)), 0, False, True)


def test_where_the_cache_is(tmp_path, monkeypatch):
    notes: list[str] = []
    assert cache.open_cache("none", notes) is None
    assert cache.open_cache(str(tmp_path / "a/b"), notes) == tmp_path / "a/b" and (tmp_path / "a/b").is_dir()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    assert cache.open_cache(None, notes) == tmp_path / "hub/bhpeft" and notes == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--row_cache .*file"):
        cache.open_cache(str(tmp_path / "file"), notes)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file")
    assert cache.open_cache(None, notes) is None and "cannot be written" in notes[0]


def test_rows_of_the_hub_are_told_apart_by_their_content():
    assert cache.data_files(DataArguments(dataset_name="owner/name")) is None
    assert cache.data_files(DataArguments(dataset_name="sst2")) is None
    keys = {cache.source_of(EXAMPLES[:n]) for n in (1, 2, 3)} | {cache.source_of(EXAMPLES[1:2])}
    assert len(keys) == 4 and cache.source_of(EXAMPLES[:2]) in keys


def test_rows_chosen_for_the_feature_distance_are_the_same_from_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_distance, "ROWS", 7)
    examples = [Example(str(i), f"text {i}", "no", f"text {i}") for i in range(40)]
    kept = write_examples(examples, tmp_path / "examples.arrow")
    for rows in (40, 5):
        assert feature_distance.chosen(kept[:rows], 3) == feature_distance.chosen(examples[:rows], 3)
