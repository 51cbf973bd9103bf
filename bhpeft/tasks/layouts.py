"""The known datasets' own files -> rows in the columns of the dataset's hub copy, each with where it stands.

A row is a pair of its place ("train.tsv:5", as an error names it) and a mapping from column to value. Rows are
made one after the other, so that a file of millions of them is never whole in memory.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bhpeft.errors import InputError
from bhpeft.files import column_indices, read_text, records, stream_rows

Row = tuple[str, dict[str, Any]]


def column(row: dict[str, Any], name: str, where: str) -> Any:
    """One value of a row.

    Raises:
        InputError: the row has no such column.
    """
    if name not in row:
        raise InputError(f"{where}: no {name!r}; found: {', '.join(map(str, row))}; give the dataset's own layout")
    return row[name]


def text(row: dict[str, Any], name: str, where: str) -> str:
    """One text of a row, without the spaces around it.

    Raises:
        InputError: the row has no such column, or it holds no text.
    """
    value = column(row, name, where)
    if not isinstance(value, str):
        raise InputError(f"{where}: {name!r} holds {value!r:.40} instead of text; mend or remove this row")
    if not value.strip():
        raise InputError(f"{where}: {name!r} is empty; fill it or remove this row")
    return value.strip()


def class_name(row: dict[str, Any], labels: tuple[str, ...], where: str) -> str:
    """The name of the class whose index stands in a row's `label`.

    Raises:
        InputError: there is no such class; for -1, that the split has no labels.
    """
    value = str(column(row, "label", where)).strip()
    names = {str(i): label for i, label in enumerate(labels)}
    if value == "-1":
        raise InputError(
            f"{where}: label -1 stands for none, as in GLUE's test split; give a split with labels (of GLUE: dev)"
        )
    if value not in names:
        known = ", ".join(f"{i} ({label})" for i, label in names.items())
        raise InputError(f"{where}: label {value!r:.40} is none of {known}; mend or remove this row")
    return names[value]


def number_text(row: dict[str, Any], name: str, where: str) -> str:
    """A number of a row as text, whole ones without a fraction; `InputError` for anything not finite."""
    value = column(row, name, where)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where}: {name} {value!r:.40} is no finite number; mend or remove this row")
    return str(int(number)) if number.is_integer() else repr(number)


def names_in(folder: Path) -> str:
    """What stands in a folder, for an error: at most 20 names, sorted."""
    if not folder.is_dir():
        return "it is no folder" if folder.exists() else "no such folder"
    names = sorted(path.name for path in folder.iterdir())
    return f"found: {', '.join(names[:20]) or 'nothing'}{', ...' if len(names) > 20 else ''}"


def file_in(folder: Path, name: str) -> Path:
    """The named file of a folder.

    Raises:
        InputError: it is missing (what stands there is named) or empty.
    """
    file = folder / name
    if not file.is_file():
        raise InputError(f"--data_path {folder}: no {name} there ({names_in(folder)}); give the dataset's own folder")
    if file.stat().st_size == 0:
        raise InputError(f"{file}: is empty; fetch the file again")
    return file


def json_lines(file: Path) -> Iterator[Row]:
    """The objects of a .jsonl or .jsonl.gz file, one a line; blank lines are passed over.

    Raises:
        InputError: bytes that are not UTF-8, a line that is no JSON object, or a broken .gz file.
    """
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{file}:{number}"
                try:
                    content = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    row = json.loads(content) if content.strip() else None
                    if "\\u" in content:
                        json.dumps(row, ensure_ascii=False).encode()
                except UnicodeEncodeError as error:
                    half = error.object[error.start]
                    raise InputError(f"{where}: {half!a} is half a character; mend or remove this line") from None
                except UnicodeDecodeError as error:
                    byte = line[error.start]
                    raise InputError(f"{where}: byte {byte:#04x} is not UTF-8; save the file as UTF-8") from None
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{where}: no JSON ({error}); mend or remove this line") from None
                if not content.strip():
                    continue
                if not isinstance(row, dict):
                    raise InputError(f"{where}: a JSON {type(row).__name__} instead of an object; mend this line")
                yield where, row
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file}: cannot be read after line {number} ({error}); fetch the file again") from None


def sst2(folder: Path, split: str) -> Iterator[Row]:
    """GLUE's SST-2 folder: `train.tsv` and, for "test", `dev.tsv`; header `sentence<TAB>label`, no quoting.

    GLUE's own `test.tsv` has no labels and is never read.

    Raises:
        InputError: as `file_in`, `stream_rows` and `column_indices`.
    """
    file = file_in(folder, {"train": "train.tsv", "test": "dev.tsv"}[split])
    header, rows = stream_rows(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    sentence, label = column_indices(file, header, ["sentence", "label"])
    for line, fields in rows:
        yield f"{file}:{line}", {"sentence": fields[sentence], "label": fields[label]}


def ag_news(folder: Path, split: str) -> Iterator[Row]:
    """Zhang's AG News folder; text is title, space, description, as the hub has it.

    The layout marks line breaks inside a text with a backslash. The hub keeps these, and so they are kept here.
    """
    for where, label, (title, description) in _numbered_classes(file_in(folder, f"{split}.csv"), 4):
        yield where, {"text": f"{title} {description}", "label": label}


def amazon_polarity(folder: Path, split: str) -> Iterator[Row]:
    """Zhang's Amazon review polarity folder; escapes in the texts are kept, as on the hub."""
    for where, label, (title, content) in _numbered_classes(file_in(folder, f"{split}.csv"), 2):
        yield where, {"label": label, "title": title, "content": content}


def _numbered_classes(file: Path, count: int) -> Iterator[tuple[str, int, list[str]]]:
    """Zhang's layout, without header: class from 1, title, text -> (place, class from 0, [title, text]).

    Source: Zhang, Zhao and LeCun 2015, "Character-level convolutional networks for text classification".
    """
    classes = [str(i + 1) for i in range(count)]
    for line, fields in records(file, ","):
        where = f"{file}:{line}"
        if len(fields) != 3:
            raise InputError(f"{where}: {len(fields)} fields instead of 3 (class, title, text); mend or quote this row")
        name = fields[0].strip()
        if name not in classes:
            raise InputError(
                f"{where}: class {name!r:.40} is none of {', '.join(classes)}; mend it, or remove the line if it is "
                "a header, which this layout has not"
            )
        yield where, classes.index(name), fields[1:]


def imdb(folder: Path, split: str) -> Iterator[Row]:
    """The aclImdb folder: one review a file, `{train,test}/{neg,pos}/*.txt`, by label and then by name.

    Raises:
        InputError: a folder is missing or holds no .txt file, or a file is not UTF-8.
    """
    for label, name in enumerate(("neg", "pos")):
        files = sorted((folder / split / name).glob("*.txt"))
        if not files:
            where = folder / split if (folder / split).is_dir() else folder
            raise InputError(f"--data_path {folder}: no {split}/{name}/*.txt there ({where}: {names_in(where)})")
        for file in files:
            yield str(file), {"text": read_text(file), "label": label}


def csqa(folder: Path, split: str) -> Iterator[Row]:
    """The CommonsenseQA folder: `{train,dev}_rand_split.jsonl`, whose questions are nested.

    Rows that are flat already, as the hub has them, are passed on. The test file has no answers and is never read.
    """
    file = file_in(folder, {"train": "train_rand_split.jsonl", "test": "dev_rand_split.jsonl"}[split])
    for where, row in json_lines(file):
        if isinstance(row.get("question"), dict):
            row = {**row, **_flat_question(row["question"], where)}
        yield where, row


def _flat_question(question: dict[str, Any], where: str) -> dict[str, Any]:
    choices = column(question, "choices", where)
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise InputError(f"{where}: 'choices' is no list of objects; mend or remove this row")
    return {
        "question": question.get("stem"),
        "question_concept": question.get("question_concept"),
        "choices": {name: [choice.get(name) for choice in choices] for name in ("label", "text")},
    }


def drug_reviews(folder: Path, split: str) -> Iterator[Row]:
    """The Drugs.com folder (UCI 462): `drugsCom{Train,Test}_raw.tsv`, fields quoted where needed.

    The first column is a row number whose name is empty, or left out of the header altogether. Reviews may hold
    line breaks.

    Raises:
        InputError: a column missing, or a row with more or fewer fields than the header.
    """
    file = file_in(folder, {"train": "drugsComTrain_raw.tsv", "test": "drugsComTest_raw.tsv"}[split])
    lines = records(file, "\t")
    header = [name.strip() for name in next(lines, (1, []))[1]]
    column_indices(file, header, ["review", "rating"])
    for i, (line, fields) in enumerate(lines):
        if i == 0 and len(fields) == len(header) + 1:
            header = ["", *header]  # the name of the row number is left out
        if len(fields) != len(header):
            raise InputError(
                f"{file}:{line}: {len(fields)} fields where the header has {len(header)}; quote fields that hold a tab"
            )
        yield f"{file}:{line}", dict(zip(header, fields, strict=True))
