"""Rows from files: .csv, .tsv, .jsonl and .parquet, with a column of inputs and a column of answers."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

from bhpeft.errors import InputError
from bhpeft.files import stream_rows
from bhpeft.tasks.example import Example, same_input
from bhpeft.tasks.layouts import json_lines

NO_ROWS = "{file}: has a header and no rows; give it at least one"
EMPTY = "{file}: row {row} after the header has an empty {name!r}; fill or remove it"
LAYOUTS = {".csv": {}, ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE}}  # read one row after the other


def _read_text_table(file: Path) -> pd.DataFrame:
    header, rows = stream_rows(file, **LAYOUTS[file.suffix.lower()])
    return pd.DataFrame([fields for _, fields in rows], columns=header, dtype=str)


READERS = {
    ".csv": _read_text_table,
    ".tsv": _read_text_table,
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
    kind = _kind_of_file(file)
    try:
        table = READERS[kind](file)
    except InputError:
        raise
    except (ValueError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{file}: cannot be read as {file.suffix} ({error})") from error
    _check_columns(file, columns, table.columns)
    if table.empty:
        raise InputError(NO_ROWS.format(file=file))
    table = table[columns]
    for name in columns:
        nested = table[name].map(lambda value: not pd.api.types.is_scalar(value)).to_numpy()
        if nested.any():
            raise InputError(f"{file}: row {nested.argmax() + 1} has no text in {name!r} but a list or mapping")
        blank = table[name].isna() | (table[name].astype(str).str.strip() == "")
        if blank.any():
            row = int(blank.to_numpy().argmax()) + 1
            raise InputError(EMPTY.format(file=file, row=row, name=name))
        kinds = table[name].map(_kind)
        if kinds.nunique() > 1:
            row = int((kinds != kinds.iloc[0]).to_numpy().argmax())
            raise InputError(
                f"{file}: row {row + 1} has the {kinds.iloc[row]} {str(table[name].iloc[row])[:40]!r} in {name!r}, "
                f"where the rows before have a {kinds.iloc[0]}; make them one kind"
            )
    return table.astype(str)


def _kind_of_file(file: Path) -> str:
    """The ending of a file that can be read, a key of `READERS`; `InputError` for any other."""
    if file.is_dir():
        raise InputError(f"{file}: is a folder; give a file in it, of {', '.join(READERS)}")
    if not file.is_file():
        raise InputError(f"{file}: no such file; give an existing one of {', '.join(READERS)}")
    kind = file.suffix.lower()
    if kind not in READERS:
        raise InputError(f"{file}: cannot read {file.suffix or 'a file without ending'}; give {', '.join(READERS)}")
    if file.stat().st_size == 0:
        raise InputError(f"{file}: is empty; give a header line and rows")
    return kind


def _check_columns(file: Path, wanted: list[str], found: Iterable[str]) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError(
            f"{file}: no column {', '.join(map(repr, missing))}; found: {', '.join(map(str, found))}. "
            "Name yours with --text_column and --label_column"
        )


def _kind(value) -> str:
    if isinstance(value, bool):
        return "truth value"
    return "text" if isinstance(value, str) else "number"


def read_examples(file: str | Path, text_column: str, label_column: str) -> list[Example]:
    """Examples of a file; rows with the same input, case and spaces aside, form one group.

    Raises:
        InputError: as `read_columns`.
    """
    return list(stream_examples(file, text_column, label_column))


def stream_examples(file: str | Path, text_column: str, label_column: str) -> Iterator[Example]:
    """As `read_examples`, one after the other: a .csv or .tsv file is never whole in memory."""
    if text_column == label_column:
        raise InputError(f"--text_column and --label_column are both {text_column!r}: the answer would be the input")
    file, columns = Path(file), [text_column, label_column]
    if _kind_of_file(file) in LAYOUTS:
        pairs = _stream_columns(file, columns)
    else:
        pairs = read_columns(file, columns).itertuples(index=False, name=None)
    for i, (text, label) in enumerate(pairs):
        yield Example(str(i), text.strip(), label.strip(), same_input(text))


def _stream_columns(file: Path, columns: list[str]) -> Iterator[list[str]]:
    """The values of the named columns of a .csv or .tsv file, row after row; errors as of `read_columns`."""
    header, rows = stream_rows(file, **LAYOUTS[file.suffix.lower()])
    _check_columns(file, columns, header)
    places = [header.index(name) for name in columns]
    number = 0
    for number, (_, fields) in enumerate(rows, 1):
        values = [fields[place] for place in places]
        for name, value in zip(columns, values, strict=True):
            if not value.strip():
                raise InputError(EMPTY.format(file=file, row=number, name=name))
        yield values
    if not number:
        raise InputError(NO_ROWS.format(file=file))
