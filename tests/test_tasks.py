"""Splits that leak nothing, questions made of generics, files read right, labels masked exactly."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from bhpeft.arguments import DataArguments
from bhpeft.errors import InputError
from bhpeft.tasks import Example, load, load_task
from bhpeft.tasks.encoding import IGNORED, Collator, Encoder
from bhpeft.tasks.example import at_most, hold_out, keep_fraction
from bhpeft.tasks.generics import read_generics
from bhpeft.tasks.table import read_examples


@pytest.fixture
def generics(tmp_path):
    negative = ["generic,exemplar"]
    positive = ["generic,exemplar"]
    for i in range(40):
        negative += [f"Kind{i}s fly.,Kind{i}s in cages do not fly.", f'Kind{i}s fly.,"Old, tired kind{i}s do not fly."']
        if i % 2:
            positive.append(f"Kind{i}s fly.,Kind{i}s fly by night.")
    (tmp_path / "negative.csv").write_text("\n".join(negative))
    (tmp_path / "positive.csv").write_text("\n".join(positive))
    return tmp_path


def test_generics_become_questions_with_their_explanations(tmp_path):
    (tmp_path / "negative.csv").write_text('generic,exemplar\nBirds fly.,"Penguins, for one, do not fly."\n')
    (tmp_path / "positive.csv").write_text("generic,exemplar\nDVDs spin.,Some DVDs spin fast.\n")
    pairs = {(e.query, e.answer) for e in read_generics(tmp_path)}
    assert pairs == {
        ("All birds fly.", "False, penguins, for one, do not fly."),
        ("Not all birds fly.", "True, penguins, for one, do not fly."),
        ("Some DVDs spin.", "True, some DVDs spin fast."),
        ("No DVDs spin.", "False, some DVDs spin fast."),
    }


@pytest.mark.parametrize(("per_generic", "count"), [(1, 40 * 2 + 20 * 2), (0, 80 * 2 + 20 * 2), (2, 80 * 2 + 20 * 2)])
def test_exemplars_per_generic(generics, per_generic, count):
    assert len(read_generics(generics, per_generic)) == count


@pytest.mark.parametrize("seed", range(5))
def test_no_generic_stands_on_two_sides_of_the_split(generics, seed):
    arguments = DataArguments(dataset_name="generics", data_path=str(generics), exemplars_per_generic=0)
    task = load_task(arguments, seed, with_validation=True)
    sides = [{e.group for e in part} for part in (task.train, task.validation, task.test)]
    assert all(sides) and sides[0] | sides[1] | sides[2] == {f"kind{i}s fly." for i in range(40)}
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert len(sides[2]) == 4  # a tenth of 40 generics
    assert task.labels == ("True", "False")


def test_split_is_the_same_for_the_same_seed_and_differs_for_another(generics):
    examples = read_generics(generics)
    assert hold_out(examples, 0.2, 7) == hold_out(list(reversed(examples))[::-1], 0.2, 7)
    assert hold_out(examples, 0.2, 7)[1] != hold_out(examples, 0.2, 8)[1]


def test_fraction_keeps_whole_groups_and_a_limit_keeps_order(generics):
    examples = read_generics(generics, 0)
    kept = keep_fraction(examples, 0.25, 3)
    groups = {e.group for e in kept}
    assert len(groups) == 10 and kept == [e for e in examples if e.group in groups]
    few = at_most(examples, 7, 3)
    assert len(few) == 7 and [examples.index(e) for e in few] == sorted(examples.index(e) for e in few)


def test_rows_of_the_test_file_are_not_trained_on(tmp_path):
    (tmp_path / "train.csv").write_text("text_input,text_label\na,True\nb,False\nc,True\n")
    (tmp_path / "test.csv").write_text("text_input,text_label\nb,False\n")
    task = load_task(
        DataArguments(dataset_name=str(tmp_path / "train.csv"), test_file=str(tmp_path / "test.csv")), seed=0
    )
    assert [e.query for e in task.train] == ["a", "c"]
    assert any("1 training rows also stand in the test rows" in note for note in task.notes)


@pytest.mark.parametrize("file", ["test_file", "validation_file"])
def test_a_file_keeps_whole_generics_from_training(file, generics, tmp_path):
    """Whose groups are of several questions, while a file's rows know nothing of groups."""
    asked = ["ALL  kind1s fly.", "Some kind3s fly.", "Do pigs fly?"]
    (tmp_path / "asked.csv").write_text("text_input,text_label\n" + "".join(f'{q},"True, so"\n' for q in asked))
    arguments = DataArguments(
        dataset_name="generics", data_path=str(generics), test_fraction=0.1, **{file: str(tmp_path / "asked.csv")}
    )
    task = load_task(arguments, seed=3, with_validation=file == "validation_file")
    trained = {e.group for e in task.train}
    assert len(trained) >= 33 and not trained & {"kind1s fly.", "kind3s fly."}
    assert {e.query for e in (task.test if file == "test_file" else task.validation)} <= set(asked)
    assert any("not trained on" in note for note in task.notes)


def test_conversations_of_a_known_split_are_told_apart_by_themselves_not_by_what_many_say(monkeypatch):
    """ "Continue" stands in many of them; the dataset's own test has conversations of its own."""

    def rows(*trees):
        return [
            Example(f"{tree}-{said}", said, "Well.", tree) for tree in trees for said in (f"About {tree}?", "Continue")
        ]

    splits = {"train": rows("a", "b", "c", "d"), "test": rows("c", "e")}
    monkeypatch.setattr(load, "read_known", lambda name, split, *more: splits[split])
    task = load_task(DataArguments(dataset_name="oasst1"), 0)
    assert {e.group for e in task.train} == {"a", "b", "d"} and {e.group for e in task.test} == {"c", "e"}


def test_a_folder_of_files_is_read_and_a_file_of_another_kind_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/talks").mkdir(parents=True)
    for name, count in (("train", 30), ("test", 6)):
        text = "text_input,text_label\n" + "".join(f"{name} {i},{'yes' if i % 2 else 'no'}\n" for i in range(count))
        (tmp_path / f"data/talks/{name}.csv").write_text(text)
    task = load_task(DataArguments(dataset_name="data/talks"), 0)
    assert (len(task.train), len(task.test), task.labels) == (30, 6, ("no", "yes"))
    (tmp_path / "data/rows.txt").write_text("text_input,text_label\na,yes\n")
    with pytest.raises(InputError, match=r"data/rows\.txt: unknown.*a file ending in"):
        load_task(DataArguments(dataset_name="data/rows.txt"), 0)


def test_questions_of_a_generic_are_one_group_however_it_is_spaced(tmp_path):
    (tmp_path / "negative.csv").write_text("generic,exemplar\nBirds fly.,Penguins do not.\nbirds  fly.,Kiwis do not.\n")
    (tmp_path / "positive.csv").write_text("generic,exemplar\nBirds  fly.,Robins fly.\n")
    examples = read_generics(tmp_path)
    assert len(examples) == 6 and {e.group for e in examples} == {"birds fly."}


def test_duplicate_inputs_stay_on_one_side(tmp_path):
    rows = "".join(f"q{i % 10},True x{i}\n" for i in range(30))
    (tmp_path / "rows.csv").write_text("text_input,text_label\n" + rows)
    task = load_task(DataArguments(dataset_name=str(tmp_path / "rows.csv"), test_fraction=0.3), seed=1)
    assert len(task.test) == 9 and not {e.query for e in task.train} & {e.query for e in task.test}


def test_files_of_every_kind_give_the_same_examples(tmp_path):
    import pandas as pd

    rows = [("is it so, really?", "True, so it is."), ("NA", "False, 1.0"), ("Ünï 日本 “q”", "True, a")]
    frame = pd.DataFrame(rows, columns=["text_input", "text_label"])
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t", quoting=3)
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "a.parquet")
    for kind in ("csv", "tsv", "jsonl", "parquet"):
        read = read_examples(tmp_path / f"a.{kind}", "text_input", "text_label")
        assert [(e.query, e.answer) for e in read] == rows, kind


def test_answers_that_are_nearly_all_true_or_false_are_noted(tmp_path):
    rows = "".join(f"q{i},True\n" for i in range(20)) + "q20,Maybe so\n"
    (tmp_path / "rows.csv").write_text("text_input,text_label\n" + rows)
    task = load_task(DataArguments(dataset_name=str(tmp_path / "rows.csv")), seed=0)
    assert task.labels == () and any("1 of 21 answers" in note and "Maybe so" in note for note in task.notes)


def test_without_training_every_row_is_tested(tmp_path):
    (tmp_path / "rows.csv").write_text("text_input,text_label\na,True\nb,False\n")
    for test_file in (None, str(tmp_path / "rows.csv")):
        arguments = DataArguments(dataset_name=str(tmp_path / "rows.csv"), test_file=test_file)
        task = load_task(arguments, seed=0, with_training=False)
        assert [e.query for e in task.test] == ["a", "b"] and task.train == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["is empty"]),
        ("text_input,text_label\n", ["no rows"]),
        ("question,answer\na,b\n", ["'text_input', 'text_label'", "found: question, answer"]),
        ("text_input,text_label\na,True\nb,\n", ["row 2", "'text_label'"]),
        ("text_input,text_label\na,True\n  ,True\n", ["row 2", "'text_input'"]),
        ("text_input,text_label\na,True,x\nb,False,y\n", [":2:"]),  # one field more in every row
        ("text_input,text_label,text_label\na,True,b\n", ["text_label"]),
    ],
)
def test_broken_tables_are_named(tmp_path, content, words):
    file = tmp_path / "rows.csv"
    file.write_text(content)
    with pytest.raises(InputError) as error:
        read_examples(file, "text_input", "text_label")
    assert all(word in str(error.value) for word in [str(file), *words]), str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text_input": "a", "text_label": "b"}\n{"text_input": "a", \n', [":2:", "no JSON"]),
        (b'{"text_input": "a", "text_label": "b"}\n["a", "b"]\n', [":2:", "list instead of an object"]),
        (b'{"text_input": "a", "text_label": "b"}\n{"text_input": "a", "text_label": 3}\n', ["row 2", "number '3'"]),
        (b'{"text_input": "a", "text_label": true}\n{"text_input": "a", "text_label": 1}\n', ["row 2", "truth value"]),
        (b'{"text_input": "a", "text_label": "b"}\n{"text_input": "caf\xe9", "text_label": "b"}\n', [":2:", "0xe9"]),
        (b'{"text_input": "a", "text_label": "b"}\n{"text_input": "a"}\n', ["row 2", "empty 'text_label'"]),
        (b'{"text_input": "a", "text_label": ["b"]}\n', ["row 1", "list or mapping"]),
        (b"\n\n", ["text_input"]),
    ],
)
def test_broken_json_lines_are_named(tmp_path, content, words):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_examples(file, "text_input", "text_label")
    assert all(word in str(error.value) for word in [str(file), *words]), str(error.value)


# ------------------------------------------------------------------------------------------ encoding


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def example(query, answer="True, cats sleep."):
    return Example("0", query, answer, query)


def test_loss_covers_the_answer_and_nothing_else(tokenizer):
    encoder = Encoder(tokenizer, "Q: {text_input} A: ", 64, labels=["True", "False"])
    [row] = encoder.train_rows([example("Do cats sleep?")], [])
    trained = [t for t in row["labels"] if t != IGNORED]
    assert tokenizer.decode(trained) == " True, cats sleep.</s>"
    first = row["labels"].index(trained[0])
    assert tokenizer.decode(row["input_ids"][:first]) == "<s>Q: Do cats sleep? A:"
    assert row["input_ids"][first:] == row["labels"][first:]
    # What is trained on is what is generated from, token for token.
    [test_row] = encoder.test_rows([example("Do cats sleep?")], [])
    assert test_row["input_ids"] == row["input_ids"][:first]
    assert tokenizer.decode(test_row["label_ids"][1]) == " False"


def test_an_answer_follows_a_line_end_at_once(tokenizer):
    [row] = Encoder(tokenizer, "Q: {text_input}\n", 64).train_rows([example("Do cats sleep?")], [])
    assert tokenizer.decode(row["input_ids"]) == "<s>Q: Do cats sleep?\nTrue, cats sleep.</s>"
    assert tokenizer.decode([t for t in row["labels"] if t != IGNORED]) == "True, cats sleep.</s>"


def test_batches_are_padded_right_to_train_and_left_to_generate(tokenizer):
    encoder = Encoder(tokenizer, "{text_input}", 64, labels=["True", "False, no"])
    examples = [example("Do cats sleep?"), example("Do cats and dogs and owls sleep at dawn?", "False, no.")]
    batch = Collator(tokenizer.pad_token_id)(encoder.train_rows(examples, []))
    for row, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        count = int(mask.sum())
        assert mask.tolist() == [1] * count + [0] * (len(mask) - count)
        assert (labels[count:] == IGNORED).all() and (row[count:] == tokenizer.pad_token_id).all()
    batch = Collator(tokenizer.pad_token_id)(encoder.test_rows(examples, []))
    assert all(mask.tolist() == sorted(mask.tolist()) for mask in batch["attention_mask"])
    assert batch["index"].tolist() == [0, 1]
    assert batch["label_ids"].shape[:2] == (2, 2) and (batch["label_ids"][:, 0] == IGNORED).any()


def test_long_prompts_stop_the_run_or_are_mended_and_counted(tokenizer):
    long = example("Do " + "cats " * 30 + "sleep?")
    short = example("Do cats sleep?")
    with pytest.raises(InputError, match=r"1 of 2 training prompts .* --max_length 16 .*--long_prompts"):
        Encoder(tokenizer, "{text_input}", 16).train_rows([short, long], [])
    for mode, rows, word in (("truncate", 2, "the end of their input is cut"), ("drop", 1, "dropped")):
        notes = []
        encoded = Encoder(tokenizer, "{text_input}", 16, mode).train_rows([short, long], notes)
        assert len(encoded) == rows and word in notes[0]
        assert all(len(row["input_ids"]) <= 16 and any(t != IGNORED for t in row["labels"]) for row in encoded)
    notes = []
    kept = Encoder(tokenizer, "{text_input}", 16, "drop").test_rows([long, short], notes)
    assert [row["index"] for row in kept] == [1] and "dropped" in notes[0]


def test_cut_answers_are_counted(tokenizer):
    notes = []
    long_answer = example("Do cats sleep?", "True, " + "cats " * 20)
    rows = Encoder(tokenizer, "{text_input}", 12).train_rows([long_answer], notes)
    assert len(rows[0]["input_ids"]) == 12 and "1 of 1 training answers cut" in notes[0]


def test_collator_keeps_dtype(tokenizer):
    encoder = Encoder(tokenizer, "{text_input}", 64)
    batch = Collator(0)(encoder.train_rows([example("Do cats sleep?")], []))
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
