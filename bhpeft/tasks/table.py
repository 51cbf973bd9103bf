"""Rows from files: .csv, .tsv, .jsonl and .parquet, with a column of inputs and a column of answers."""

from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd

from bhpeft.errors import InputError
from bhpeft.files import read_rows
from bhpeft.tasks.example import Example, same_input
from bhpeft.tasks.layouts import json_lines


def _read_text_table(file: Path, **layout) -> pd.DataFrame:
    header, rows = read_rows(file, **layout)
    return pd.DataFrame([fields for _, fields in rows], columns=[name.strip() for name in header], dtype=str)


READERS = {
    ".csv": _read_text_table,
    ".tsv": lambda file: _read_text_table(file, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".jsonl": lambda file: pd.DataFrame([row for _, row in json_lines(file)], dtype=object),
    ".parquet": pd.read_parquet,
}


def read_columns(file: str | Path, columns: list[str]) -> pd.DataFrame:
    """Read the named columns of a file as text, rows in order.

    Returns:
        A frame of strings with just these columns.

    Raises:
        InputError: no such file, an unknown kind, no rows, a column missing (the ones found are named),
            or an empty cell (file and row).
    """
    file = Path(file)
    if file.is_dir():
        raise InputError(f"{file}: is a folder; give a file in it, of {', '.join(READERS)}")
    if not file.is_file():
        raise InputError(f"{file}: no such file; give an existing one of {', '.join(READERS)}")
    kind = file.suffix.lower()
    if kind not in READERS:
        raise InputError(f"{file}: cannot read {file.suffix or 'a file without ending'}; give {', '.join(READERS)}")
    if file.stat().st_size == 0:
        raise InputError(f"{file}: is empty; give a header line and rows")
    try:
        table = READERS[kind](file)
    except InputError:
        raise
    except (ValueError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{file}: cannot be read as {file.suffix} ({error})") from error
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise InputError(
            f"{file}: no column {', '.join(map(repr, missing))}; found: {', '.join(map(str, table.columns))}. "
            "Name yours with --text_column and --label_column"
        )
    if table.empty:
        raise InputError(f"{file}: has a header and no rows; give it at least one")
    table = table[columns]
    for name in columns:
        nested = table[name].map(lambda value: not pd.api.types.is_scalar(value)).to_numpy()
        if nested.any():
            raise InputError(f"{file}: row {nested.argmax() + 1} has no text in {name!r} but a list or mapping")
        blank = table[name].isna() | (table[name].astype(str).str.strip() == "")
        if blank.any():
            row = int(blank.to_numpy().argmax()) + 1
            raise InputError(f"{file}: row {row} after the header has an empty {name!r}; fill or remove it")
        kinds = table[name].map(_kind)
        if kinds.nunique() > 1:
            row = int((kinds != kinds.iloc[0]).to_numpy().argmax())
            raise InputError(
                f"{file}: row {row + 1} has the {kinds.iloc[row]} {str(table[name].iloc[row])[:40]!r} in {name!r}, "
                f"where the rows before have a {kinds.iloc[0]}; make them one kind"
            )
    return table.astype(str)


def _kind(value) -> str:
    if isinstance(value, bool):
        return "truth value"
    return "text" if isinstance(value, str) else "number"


def read_examples(file: str | Path, text_column: str, label_column: str) -> list[Example]:
    """Examples of a file; rows with the same input, case and spaces aside, form one group.

    Raises:
        InputError: as `read_columns`.
    """
    if text_column == label_column:
        raise InputError(f"--text_column and --label_column are both {text_column!r}: the answer would be the input")
    table = read_columns(file, [text_column, label_column])
    rows = zip(table[text_column], table[label_column], strict=True)
    return [Example(str(i), text.strip(), label.strip(), same_input(text)) for i, (text, label) in enumerate(rows)]
