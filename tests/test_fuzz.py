"""Readers and writers against any text and any bytes: what is written is read again, what is broken is told.

100 examples a test, the same in every run; BHPEFT_FUZZ_EXAMPLES=2000 takes that many, others each time.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import bad_world
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as save_tensors

from bhpeft import results
from bhpeft.adapter_files import check_adapter_folder, read_adapter_folder
from bhpeft.combine import read_member
from bhpeft.errors import InputError
from bhpeft.files import csv_line, read_rows, write_atomic
from bhpeft.flags import command_words
from bhpeft.report_data import gather
from bhpeft.results import HumanScore, ModelOutput
from bhpeft.tasks.card import TaskCard
from bhpeft.tasks.layouts import json_lines
from bhpeft.tasks.table import read_columns, read_examples
from bhpeft.tensor_files import TensorFile
from bhpeft.uncertainty_report import read_uncertainty

EXAMPLES = int(os.environ.get("BHPEFT_FUZZ_EXAMPLES", "0"))
PIECES = [
    "<QUERY>", "<MODEL OUTPUT>", "<EXPECTED OUTPUT>", "\\<QUERY>", "\n", "\n\n", "\r\n", "\r", "\t", "\t\t\t ", " ",
    "\\", '"', '""', "'", ",", ".,", ";", "\x00", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\ufeff",
    "\u00a0", "é", "🐫", "index,", "id,label", "nan", "inf", "1.0", "007", "1e5", "True", "None", "NA", "-", "=1+1",
    "{", "}", "[", "prob_",
]  # fmt: skip
TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=6).map("".join)
ANY = st.lists(st.one_of(TEXT, st.sampled_from(["\ud83d", "\udc2b", "\ud800\udc00"])), max_size=3).map("".join)
CELL = st.one_of(TEXT, st.integers(-5, 5).map(str), st.floats(allow_nan=False).map(str))
SCORE = st.sampled_from([None, 0, 1])


@pytest.fixture
def fuzz(record_property) -> Callable:
    """`fuzz(strategy, check)` calls `check` with many examples; their number is written into the report."""

    def run(strategy: st.SearchStrategy, check: Callable) -> None:
        count = 0

        @settings(
            max_examples=EXAMPLES or 100,
            derandomize=not EXAMPLES,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def once(value):
            nonlocal count
            count += 1
            check(value)

        once()
        record_property("examples", count)

    return run


def can_be_written(*texts: str) -> bool:
    """Whether UTF-8 can hold the texts: none has half a surrogate pair."""
    try:
        "".join(f"{text}|" for text in texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def same_or_told(path: Path, write: Callable, read: Callable, value, texts: list[str]) -> None:
    """What was written is what is read; or nothing was written, because a text cannot be, and that was said."""
    path.unlink(missing_ok=True)
    try:
        write(path, value)
    except InputError as error:
        assert not can_be_written(*texts) and "surrogate" in str(error) and not path.exists()
    else:
        assert can_be_written(*texts) and read(path) == value


# ------------------------------------------------------------------------------- what is written is read


def test_model_outputs(fuzz, tmp_path):
    def check(outputs):
        texts = [text for output in outputs for text in (output.query, output.output, output.expected)]
        same_or_told(tmp_path / "a.txt", results.write_model_outputs, results.read_model_outputs, outputs, texts)

    fuzz(st.lists(st.builds(ModelOutput, ANY, ANY, ANY), min_size=1, max_size=4), check)


def test_human_evaluation(fuzz, tmp_path):
    def check(scores):
        texts = [text for score in scores for text in (score.query, score.output)]
        same_or_told(tmp_path / "a.csv", results.write_human_evaluation, results.read_human_evaluation, scores, texts)

    fuzz(st.lists(st.builds(HumanScore, st.integers(-(10**17), 10**17), ANY, ANY, SCORE, SCORE), max_size=4), check)


def test_older_human_evaluation(fuzz, tmp_path):
    """Unquoted rows: a query that ends with its first ".,", and an output that may hold any commas and quotes."""
    line = TEXT.map(lambda text: "".join(text.replace("\r", "").split("\n")))
    query = line.map(lambda text: text.replace(".,", "") + ".")

    def check(rows):
        path = tmp_path / "old.csv"
        path.write_bytes("\n".join(f"{i},{q},{o},{a},{b}," for i, q, o, a, b in rows).encode())
        expected = [HumanScore(i, q, o, a, b) for i, q, o, a, b in rows]
        assert results.read_human_evaluation(path) == expected

    score = st.sampled_from([0, 1])
    fuzz(st.lists(st.tuples(st.integers(0, 999), query, line, score, score), min_size=1, max_size=4), check)


def test_predictions(fuzz, tmp_path):
    """Texts come back as the same texts, or as the numbers that are written just so; only "" may become NaN."""

    def check(table):
        path = tmp_path / "a.csv"
        path.unlink(missing_ok=True)
        names = ["id", "label", "prediction"]
        frame = pd.DataFrame(table, columns=names, dtype=object)
        frame["prob_a"] = np.linspace(0, 1, len(frame)) / 3
        try:
            results.write_predictions(path, frame)
        except InputError:
            assert not can_be_written(*(text for row in table for text in row)) and not path.exists()
            return
        again = results.read_predictions(path)
        columns = [["" if pd.isna(value) else str(value) for value in again[name]] for name in names]
        assert list(zip(*columns, strict=True)) == table and again["prob_a"].tolist() == frame["prob_a"].tolist()

    column = st.one_of(st.tuples(CELL, CELL, CELL), st.tuples(ANY, ANY, ANY), st.tuples(*[st.just("nan")] * 3))
    fuzz(st.lists(column, min_size=1, max_size=4), check)


def test_metrics(fuzz, tmp_path):
    leaf = st.one_of(st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(allow_infinity=False), ANY)
    value = st.recursive(leaf, lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(ANY, x, max_size=3)))

    def strict(value):
        if isinstance(value, dict):
            return {key: strict(item) for key, item in value.items()}
        if isinstance(value, list):
            return [strict(item) for item in value]
        return None if value != value else value

    def check(metrics):
        groups = dict.fromkeys(("config", "versions", "hardware", "timings", "parameters"), {})
        record = {"run_name": "a", "created": "now", "metrics": metrics, "seed": 1, **groups}
        text = json.dumps(record, ensure_ascii=False)
        expected = {"schema_version": 1, **strict(record)}
        write = lambda path, _: results.write_metrics(path, record)  # noqa: E731
        same_or_told(tmp_path / "a.json", write, results.read_metrics, expected, [text])

    fuzz(st.dictionaries(ANY, value, max_size=4), check)


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_rows_of_data(kind, fuzz, tmp_path):
    """Every kind of file gives the very texts that it was given; of blank ones the row is named."""
    names = ["text_input", "text_label"]

    def check(rows):
        path = tmp_path / f"a{kind}"
        if kind == ".csv":
            write_atomic(path, "".join(map(csv_line, [names, *rows])))
        elif kind == ".jsonl":
            write_atomic(path, "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
        else:
            pd.DataFrame(rows, columns=names).to_parquet(path)
        blank = next((i for i, row in enumerate(rows, 1) if not all(text.strip() for text in row)), None)
        if blank is None:
            assert [tuple(row) for row in read_columns(path, names).to_numpy()] == rows
            return
        with pytest.raises(InputError, match="row [0-9]+ after the header has an empty"):
            read_columns(path, names)

    fuzz(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), check)


def test_csv_is_what_other_programs_read(fuzz, tmp_path):
    def check(rows):
        text = "".join(map(csv_line, rows))
        assert list(csv.reader(io.StringIO(text, newline=""))) == rows
        assert pd.read_csv(io.StringIO(text, newline=""), header=None, dtype=str, keep_default_na=False,
                           lineterminator=None).shape[1] == len(rows[0])  # fmt: skip

    text = TEXT.map(lambda text: text.replace("\x00", ""))
    fuzz(st.lists(st.lists(text, min_size=2, max_size=2), min_size=1, max_size=4), check)


# -------------------------------------------------------------------------- any bytes: a result, or a clear error


def settled(read: Callable[[Path], object]) -> Callable[[Path], None]:
    """What is read, written, and read again is the same: nothing was lost or made up at the first reading."""
    writers = {
        results.read_model_outputs: results.write_model_outputs,
        results.read_human_evaluation: results.write_human_evaluation,
        results.read_metrics: results.write_metrics,
    }

    def run(path: Path) -> None:
        found = read(path)
        write = writers.get(read)
        if write is not None and found:
            again = path.with_name(f"again{path.suffix}")
            write(again, found)
            assert read(again) == found

    return run


def read_tensors(path: Path) -> None:
    file = TensorFile(path)
    for name in file.names:
        file.shape(name)
        file[name]


def in_folder(read: Callable, name: str, **others: bytes) -> Callable[[Path], object]:
    """A reader of a folder in which the bytes are one file."""

    def run(path: Path) -> object:
        folder = path.parent / "folder"
        folder.mkdir(exist_ok=True)
        for other, content in others.items():
            (folder / other.replace("__", ".")).write_bytes(content)
        (folder / name).write_bytes(path.read_bytes())
        return read(folder)

    return run


TENSORS = save_tensors({"a.weight": np.ones((2, 3), dtype=np.float32), "b": np.zeros(4, dtype=np.float16)})
RECORD = {"schema_version": 1, "run_name": "x", "created": "now", "seed": 1, "metrics": {"a": 0.5},
          **dict.fromkeys(("config", "versions", "hardware", "timings", "parameters"), {})}  # fmt: skip
ROWS = bad_world.DATA["rows.csv"]
LORA = json.dumps(bad_world.LORA).encode()
KNOWN = {"lora_rank", "run_name", "labels", "config"}
READERS: dict[str, tuple[str, Callable, list]] = {  # name -> (suffix, reader, good contents to start from)
    "model_outputs": (".txt", settled(results.read_model_outputs), [bad_world.GOOD_ANSWERS * 2]),
    "human_evaluation": (".csv", settled(results.read_human_evaluation),
                         [bad_world.SCORED + "0,q,o,1,0\n", "4,All a b.,False, c.,1,0,\n5,No d,e,,1\n"]),
    "predictions": (".csv", results.read_predictions, [bad_world.ANSWERS["results/predictions/old.csv"]]),
    "uncertainty": (".csv", read_uncertainty, [bad_world.ANSWERS["results/predictions/old.csv"]]),
    "ensemble member": (".csv", read_member, [bad_world.ANSWERS["results/predictions/old.csv"]]),
    "metrics": (".json", settled(results.read_metrics), [json.dumps(RECORD)]),
    "descriptions": ("", results.check_descriptions, ["mine\n\n==== RUN a ====\nx\n==== END a ====\n"]),
    "csv": (".csv", lambda path: read_examples(path, "text_input", "text_label"), [ROWS]),
    "tsv": (".tsv", lambda path: read_examples(path, "text_input", "text_label"), [str(ROWS).replace(",", "\t")]),
    "jsonl": (".jsonl", lambda path: read_examples(path, "text_input", "text_label"),
              ['{"text_input": "a", "text_label": "b"}\n' * 2]),
    "jsonl.gz": (".jsonl.gz", lambda path: list(json_lines(path)), [b"\x1f\x8b\x08\x00\x00\x00\x00\x00"]),
    "parquet": (".parquet", lambda path: read_examples(path, "text_input", "text_label"), ["PARQUET"]),
    "table": (".csv", read_rows, [ROWS]),
    "recipe": (".yaml", lambda path: command_words(["--config", str(path)], KNOWN),
               ["lora_rank: 8\nlabels: [a, 'b']\nrun_name: x # y\n"]),
    "task card": ("", in_folder(TaskCard.read, "task.json"), [json.dumps(bad_world.CARD)]),
    "adapter's configuration": ("", in_folder(read_adapter_folder, "adapter_config.json",
                                              adapter_model__safetensors=TENSORS), [LORA]),
    "adapter's weights": ("", in_folder(check_adapter_folder, "adapter_model.safetensors", adapter_config__json=LORA),
                          [TENSORS]),
    "tensors": ("", read_tensors, [TENSORS]),
}  # fmt: skip


def broken(contents: list) -> st.SearchStrategy[bytes]:
    """Any bytes; or a good file with pieces cut out, put in and doubled."""
    if contents == ["PARQUET"]:
        contents = [pd.DataFrame({"text_input": ["a", "b"], "text_label": ["x", "y"]}).to_parquet()]
    whole = [content if isinstance(content, bytes) else content.encode() for content in contents]
    pieces = [piece.encode() for piece in PIECES] + [b"\xff", b"\xe9", b"\xed\xa0\x80", b"9" * 5000, b"[" * 3000, b"-1"]
    piece = st.one_of(st.sampled_from(pieces), st.binary(max_size=4))
    change = st.tuples(st.floats(0, 1), st.integers(0, 12), piece)

    def changed(content: bytes, changes: list) -> bytes:
        for share, cut, put in changes:
            at = int(share * len(content))
            content = content[:at] + put + content[at + cut :]
        return content

    cut_short = st.builds(lambda content, share: content[: int(share * len(content))], st.sampled_from(whole),
                          st.floats(0, 1))  # fmt: skip
    mended = st.builds(changed, st.sampled_from(whole), st.lists(change, min_size=1, max_size=4))
    return st.one_of(st.binary(max_size=60), cut_short, mended)


@pytest.mark.parametrize("name", READERS)
def test_any_bytes_are_read_or_told(name, fuzz, tmp_path):
    suffix, read, contents = READERS[name]
    outcomes = set()

    def check(content):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(content)
        try:
            read(path)
        except InputError as error:
            assert len(str(error).splitlines()) == 1 and str(tmp_path) in str(error)
            outcomes.add("told")
        else:
            outcomes.add("read")
        for file in tmp_path.glob("folder/*"):
            file.unlink()

    fuzz(broken(contents), check)
    assert "told" in outcomes  # the examples do reach what is broken


def test_headers_of_tensors_that_lie(fuzz, tmp_path):
    number = st.one_of(st.integers(-2, 30), st.sampled_from([2**31, 2**63, "6", None, 1.5]))
    entry = st.fixed_dictionaries({
        "dtype": st.sampled_from(["F32", "F16", "BF16", "U8", "F8_E4M3", "", 3]),
        "shape": st.one_of(st.lists(number, max_size=3), number),
        "data_offsets": st.one_of(st.lists(number, min_size=2, max_size=2), st.lists(number, max_size=3), number),
    })  # fmt: skip

    def check(header):
        text = json.dumps(header).encode()
        path = tmp_path / "a.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(24))
        with contextlib.suppress(InputError):
            read_tensors(path)

    fuzz(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), st.one_of(entry, number), max_size=2), check)


def test_any_bytes_in_results_cost_their_own_part_of_the_report(fuzz, tmp_path):
    good = tmp_path / "metrics/good.json"
    results.write_metrics(good, {**RECORD, "run_name": "good"})
    kinds = {"model_outputs/a.txt": "model_outputs", "human_evaluation/a.csv": "human_evaluation",
             "predictions/a.csv": "predictions", "metrics/a.json": "metrics"}  # fmt: skip

    def check(found):
        place, content = found
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        assert "good" in [run.name for run in gather(tmp_path).runs]
        path.unlink()

    fuzz(st.one_of([st.tuples(st.just(place), broken(READERS[name][2])) for place, name in kinds.items()]), check)
