"""The files of results/: what is written is what is read, older files are read right, broken ones named."""

import json
import math
import os
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bhpeft import files, results
from bhpeft.errors import InputError
from bhpeft.results import HumanScore, ModelOutput, RunFiles

# Any text UTF-8 can hold, leaning towards what could be mistaken for the format itself.
PIECES = st.sampled_from(
    [
        "<QUERY>",
        "<MODEL OUTPUT>",
        "<EXPECTED OUTPUT>",
        "\n",
        "\n\n",
        "\r\n",
        "\r",
        "\t",
        " ",
        "\\",
        '"',
        ",",
        ".,",
        "\t\t\t ",
        "\x00",
        "\x0b",
        "\u2028",
        "\ufeff",
        "é",
        "🐫",
        "index,",
    ]
)
ANY = st.characters(exclude_categories=["Cs"])
TEXTS = st.lists(PIECES | st.text(ANY, max_size=4), max_size=8).map("".join)
SCORES = st.sampled_from([None, 0, 1])
same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)


# -------------------------------------------------------------------------------------- model outputs


@same_folder
@given(st.lists(st.builds(ModelOutput, TEXTS, TEXTS, TEXTS), min_size=1, max_size=4))
@example([ModelOutput("", "", "")] * 2)
@example([ModelOutput("a\n<QUERY>\t\t\t b", "\n\\<MODEL OUTPUT>", "\n\n\\\\<EXPECTED OUTPUT>\n\n")] * 2)
def test_model_outputs_come_back_as_they_went(tmp_path, outputs):
    results.write_model_outputs(tmp_path / "run.txt", outputs)
    assert results.read_model_outputs(tmp_path / "run.txt") == outputs


def test_model_outputs_look_like_the_older_files(tmp_path):
    outputs = [ModelOutput("All frogs hop.", "False, not \\ all. \n\nTrue", "False, some do not hop.")]
    results.write_model_outputs(tmp_path / "run.txt", outputs * 2)
    block = (
        "<QUERY>\t\t\t All frogs hop.\n<MODEL OUTPUT>\t\t False, not \\ all. \n\nTrue\n"
        "<EXPECTED OUTPUT>\t False, some do not hop.\n\n"
    )
    assert (tmp_path / "run.txt").read_bytes().decode() == block * 2


def test_a_line_that_reads_as_a_tag_gets_one_backslash(tmp_path):
    results.write_model_outputs(tmp_path / "run.txt", [ModelOutput("q", "o\n<QUERY> again", "e")])
    assert "\n\\<QUERY> again\n" in (tmp_path / "run.txt").read_text()


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_the_last_block_may_lack_its_line_ends(tmp_path, end):
    text = "<QUERY>\t\t\t q\n<MODEL OUTPUT>\t\t o\n\no\n<EXPECTED OUTPUT>\t e" + end
    (tmp_path / "run.txt").write_text(text, newline="")
    assert results.read_model_outputs(tmp_path / "run.txt") == [ModelOutput("q", "o\n\no", "e")]


@pytest.mark.parametrize(("content", "line", "what"), [
    (b"", 1, "empty"),
    (b"\n \n", 1, "empty"),
    (b"\nhello\n<QUERY>\t\t\t q\n", 2, "before the first <QUERY>"),
    (b"no tags at all\n", 1, "before the first <QUERY>"),
    (b"<MODEL OUTPUT>\t\t o\n", 1, "found <MODEL OUTPUT> where <QUERY> must come"),
    (b"<QUERY>\t\t\t q\nq\n<EXPECTED OUTPUT>\t e\n\n", 3, "found <EXPECTED OUTPUT> where <MODEL OUTPUT>"),
    (b"<QUERY>\t\t\t q\n<MODEL OUTPUT>\t\t o\n<QUERY>\t\t\t r\n", 3, "found <QUERY> where <EXPECTED OUTPUT>"),
    (b"<QUERY>\t\t\t q\n<MODEL OUTPUT>\t\t o", 2, "ends where <EXPECTED OUTPUT> must come"),
    (b"<QUERY>\t\t\t q\n<MODEL OUTPUT>\t\t \xff\xfe\n", 2, "0xff is not UTF-8"),
])  # fmt: skip
def test_broken_model_outputs_are_named_with_their_line(tmp_path, content, line, what):
    path = tmp_path / "run.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(f"{path}:{line}:") + ".*" + re.escape(what)):
        results.read_model_outputs(path)


def test_missing_file_and_no_outputs_and_half_a_surrogate(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        results.read_model_outputs(tmp_path / "none.txt")
    with pytest.raises(InputError, match="no model outputs to write"):
        results.write_model_outputs(tmp_path / "run.txt", [])
    with pytest.raises(InputError, match="surrogate"):
        results.write_model_outputs(tmp_path / "run.txt", [ModelOutput("q", "\ud83d", "e")])
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------- human evaluation


@same_folder
@given(st.lists(st.builds(HumanScore, st.integers(-(10**6), 10**6), TEXTS, TEXTS, SCORES, SCORES), max_size=4))
@example([HumanScore(0, "\r", " ", None, 1), HumanScore(1, '"', "a\n\n,,", 0, None)])
@example([HumanScore(0, "x" * 200_000, "")])
def test_human_evaluation_comes_back_as_it_went(tmp_path, scores):
    results.write_human_evaluation(tmp_path / "run.csv", scores)
    assert results.read_human_evaluation(tmp_path / "run.csv") == scores


def test_human_evaluation_is_ordinary_csv(tmp_path):
    score = HumanScore(7, "All cats purr.", 'False, a "cat", in a film, does not purr.', 1)
    results.write_human_evaluation(tmp_path / "run.csv", [score])
    table = pd.read_csv(tmp_path / "run.csv")
    assert list(table.columns) == ["index", "query", "model output", "factual", "justifies"]
    assert table["model output"][0] == score.output and table["factual"][0] == 1 and math.isnan(table["justifies"][0])


def test_human_evaluation_after_a_spreadsheet(tmp_path):
    results.write_human_evaluation(tmp_path / "run.csv", [HumanScore(0, "a", "b", 1, 0), HumanScore(1, "c", "d")])
    pd.read_csv(tmp_path / "run.csv").to_csv(tmp_path / "run.csv", index=False)  # the scores are now 1.0, 0.0
    assert results.read_human_evaluation(tmp_path / "run.csv")[0] == HumanScore(0, "a", "b", 1, 0)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_older_human_evaluation(tmp_path, line_end):
    rows = ["8,All birds live on mountains.,False, birds, gulls, and ducks do not.,0,1,",
            "3,Some fish, like eels, swim.,True, some fish., they do,1,0,",
            "12,No lizards swim,some lizards, do swim,1,1",
            "", '5,All "cats" purr.,False, "big" cats do not.,1,1,']  # fmt: skip
    (tmp_path / "old.csv").write_text(line_end.join(rows), newline="")
    assert results.read_human_evaluation(tmp_path / "old.csv") == [
        HumanScore(8, "All birds live on mountains.", "False, birds, gulls, and ducks do not.", 0, 1),
        HumanScore(3, "Some fish, like eels, swim.", "True, some fish., they do", 1, 0),
        HumanScore(12, "No lizards swim", "some lizards, do swim", 1, 1),
        HumanScore(5, 'All "cats" purr.', 'False, "big" cats do not.', 1, 1),
    ]


@pytest.mark.parametrize(("content", "line", "what"), [
    ("", "", "empty"),
    ("4,All a.,False, b.,1,1,\n5,All a.,False, b.,2,1,\n", ":2", "factual is '2'"),
    ("4,All a.,False, b.,1,yes,\n", ":1", "justifies is 'yes'"),
    ("4,All a.,1,1,\n", ":1", "not a row of"),
    ("four,All a.,False, b.,1,1,\n", ":1", "not a row of"),
    ("index,query,model output,factual,justifies\n1,q,o,1,0\n2,q,o,1,-1\n", ":3", "justifies is '-1'"),
    ("index,query,model output,factual,justifies\n1,q,o,1\n", ":2", "4 fields where the header has 5"),
    ('index,query,model output,factual,justifies\n1,"q,o,1,1\n', ":2", "mend the quoting"),
    ("index,query,model_output,factual,justifies\n", "", "no column 'model output'; found: index, query"),
])  # fmt: skip
def test_broken_human_evaluation_is_named_with_its_row(tmp_path, content, line, what):
    path = tmp_path / "run.csv"
    path.write_text(content)
    with pytest.raises(InputError, match=re.escape(f"{path}{line}:") + ".*" + re.escape(what)):
        results.read_human_evaluation(path)


def test_a_score_that_is_no_score_is_not_written(tmp_path):
    with pytest.raises(InputError, match="index 3"):
        results.write_human_evaluation(tmp_path / "run.csv", [HumanScore(3, "q", "o", 2, 1)])
    assert not (tmp_path / "run.csv").exists()


# ---------------------------------------------------------------------------------------- predictions


def test_predictions_come_back_to_the_last_digit(tmp_path):
    p = np.random.default_rng(0).random(50)
    table = pd.DataFrame(
        {
            "id": range(50),
            "label": ["NA", 'no, \r"really"'] * 25,
            "prediction": ["None", "NA"] * 25,
            "prob_NA": p,
            "prob_no": 1 - p,
            "entropy": np.where(p > 0.5, np.nan, p),
            "sure": p > 0.9,
        }
    )
    results.write_predictions(tmp_path / "run.csv", table)
    pd.testing.assert_frame_equal(results.read_predictions(tmp_path / "run.csv"), table)


def test_predictions_order_columns_and_keep_written_numbers(tmp_path):
    table = pd.DataFrame(
        {
            "entropy": [0.5, 1e-300],
            "prob_1": [0.5, 1.0],
            "prediction": [0, 1],
            "prob_0": [0.5, 0.0],
            "label": [1, None],
            "id": ["007", "8"],
        }
    )
    results.write_predictions(tmp_path / "run.csv", table)
    again = results.read_predictions(tmp_path / "run.csv")
    assert list(again.columns) == ["id", "label", "prediction", "prob_1", "prob_0", "entropy"]
    assert list(again["id"]) == ["007", "8"] and again["entropy"][1] == 1e-300
    assert again["prediction"].dtype.kind == "i" and again["label"].isna().tolist() == [False, True]


@pytest.mark.parametrize(("content", "what"), [
    ("", "empty"),
    ("id,label,prob_a\n1,a,0.5\n", "no column 'prediction'; found: id, label, prob_a"),
    ("id,label,prediction,prob_a\n1,a,a,0.5\n2,a,a,half\n", ":3: prob_a is 'half'"),
    ("id,label,prediction,prob_a\n1,a,a,0.5\n2,a,a\n", ":3: 3 fields where the header has 4"),
    ("id,label,prediction,id\n1,a,a,2\n", "two columns have one name"),
])  # fmt: skip
def test_broken_predictions(tmp_path, content, what):
    (tmp_path / "run.csv").write_text(content)
    with pytest.raises(InputError, match=re.escape(what)):
        results.read_predictions(tmp_path / "run.csv")


# ------------------------------------------------------------------------- metrics, descriptions, runs


def record(name="demo", **changes):
    config = {
        "base_model": "gpt2",
        "adapter_name": "bh-peft",
        "lora_rank": 8,
        "dataset_name": "demo/data.csv",
    }
    return {
        "run_name": name,
        "metrics": {"accuracy": 0.9, "per_class": {"a": 1.0}},
        "config": config,
        "seed": 42,
        "versions": {"numpy": "2"},
        "hardware": {"device": "cpu"},
        "timings": {"train": 1.5},
        "rows": {"train": 100},
        "parameters": {"trainable": 1234, "all": 123400, "trainable_percent": 1.0},
        **changes,
    }


def test_metrics_come_back_and_are_strict_json(tmp_path):
    metrics = {"loss": math.nan, "f1": np.float32(0.5), "ece": -math.inf, "per_class": np.array([1, 2])}
    results.write_metrics(tmp_path / "run.json", record(metrics=metrics, config={"path": tmp_path, 3: (1, None)}))
    strict = json.loads((tmp_path / "run.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    again = results.read_metrics(tmp_path / "run.json")
    assert again == strict
    assert again["metrics"] == {"loss": None, "f1": 0.5, "ece": None, "per_class": [1, 2]}
    assert again["config"] == {"path": str(tmp_path), "3": [1, None]}
    assert again["schema_version"] == 1 and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", again["created"])
    results.write_metrics(tmp_path / "twice.json", again)
    assert results.read_metrics(tmp_path / "twice.json") == again


@pytest.mark.parametrize(("content", "what"), [
    ("{\n\"a\": }", ":2: not JSON"),
    ("[]", "schema_version is None"),
    ('{"schema_version": 2}', "schema_version is 2 and this code reads 1"),
    ('{"schema_version": 1, "metrics": {}}', "lacks run_name, config"),
])  # fmt: skip
def test_broken_metrics(tmp_path, content, what):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match=re.escape(what)):
        results.read_metrics(tmp_path / "run.json")
    with pytest.raises(InputError, match="lacks seed"):
        results.write_metrics(tmp_path / "new.json", {k: v for k, v in record().items() if k != "seed"})


def test_descriptions_replace_their_entry_and_leave_a_persons_words(tmp_path):
    path = tmp_path / "model_descriptions"
    path.write_bytes("My notes,\r\n  with é and no end".encode())
    results.describe_run(path, record("one"))
    path.write_bytes(path.read_bytes() + b"\nbetween the two\n\n\n")
    results.describe_run(path, record("one.two", metrics={"accuracy": 0.1}))
    before = path.read_bytes().decode()
    results.describe_run(path, record("one", metrics={"accuracy": 0.123456789, "nothing": math.nan}))
    after = path.read_bytes().decode()

    assert after.startswith("My notes,\r\n  with é and no end\n\n==== RUN one ====\n")
    assert after.count("==== RUN ") == after.count("==== END ") == 2
    assert before.partition("==== END one ====")[2] == after.partition("==== END one ====")[2]
    assert "base model:  gpt2\nadapter:     bh-peft (lora_rank=8)\ndataset:     demo/data.csv\n" in after
    assert "rows:        train 100\ntrainable:   1,234 of 123,400 parameters (1 %)\n" in after
    assert "metrics:     accuracy 0.123457\n" in after


def test_descriptions_with_a_lost_end_are_left_alone(tmp_path):
    path = tmp_path / "model_descriptions"
    path.write_text("==== RUN a ====\nno end\n==== RUN b ====\n==== END b ====\n==== END a ====\n")
    before = path.read_text()
    with pytest.raises(InputError, match=re.escape(f"{path}:1: this entry has no line '==== END a ===='")):
        results.describe_run(path, record("a"))
    assert path.read_text() == before


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "../x", "a b", "é", "x" * 101, "run\n", "a:b", "a.ood"])
def test_run_names_that_are_no_file_names(tmp_path, name):
    with pytest.raises(InputError, match="--run_name"):
        RunFiles(tmp_path, name)


def test_a_run_is_not_overwritten_unasked(tmp_path):
    run = RunFiles(tmp_path / "results", "Run-1.b_2")
    run.check_free(overwrite=False)
    run.prepare()
    run.prepare()
    run.check_free(overwrite=False)
    results.describe_run(run.descriptions, record())  # shared by all runs: does not count
    run.check_free(overwrite=False)
    head = "index,query,model output,factual,justifies\n"
    assert run.left == []
    assert not run.plots.exists()  # a run that fails after this leaves no folder of its name
    run.plots.mkdir()
    for path in (run.model_outputs, run.human_evaluation, run.predictions, run.metrics, run.plots / "a.png"):
        path.write_text(head + "0,a,b,,\n")
        with pytest.raises(InputError, match=re.escape(f"{path} exists; choose another --run_name or pass")):
            run.check_free(overwrite=False)
        run.check_free(overwrite=True)
        assert run.left == [path] and not run.judged(path)
        path.unlink()
    for judged in ("0,a,b,1,\n", "0,a,b,0,0\n"):  # what a person gave is never replaced
        run.human_evaluation.write_text(head + judged)
        with pytest.raises(InputError, match="holds scores a person gave"):
            run.check_free(overwrite=True)


def test_folders_that_cannot_be_made(tmp_path):
    (tmp_path / "results").write_text("a file")
    with pytest.raises(InputError, match="choose another --results_dir"):
        RunFiles(tmp_path / "results", "run").prepare()


# ------------------------------------------------------------------------------------- atomic writing


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "run.txt"
    files.write_atomic(path, "old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as broken:
            broken.setattr(os, call, full_disk)
            with pytest.raises(InputError, match="No space left on device"):
                files.write_atomic(path, "new")
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]  # nothing half-written beside it


def test_a_write_follows_a_link_and_makes_folders(tmp_path):
    files.write_atomic(tmp_path / "deep" / "er" / "file", "old")
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er" / "file")
    files.write_atomic(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "deep" / "er" / "file").read_text() == "new"
    with pytest.raises(InputError, match="cannot be written"):
        files.write_atomic(tmp_path / "link" / "below", "a file is no folder")
