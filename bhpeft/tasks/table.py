"""Rows from files: .csv, .tsv, .jsonl and .parquet, with a column of inputs and a column of answers."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from bhpeft.errors import InputError
from bhpeft.tasks.example import Example

READERS = {
    ".csv": lambda file: pd.read_csv(file, dtype=str, keep_default_na=False),
    ".tsv": lambda file: pd.read_csv(file, dtype=str, keep_default_na=False, sep="\t", quoting=3),  # 3: no quotes
    ".jsonl": lambda file: pd.read_json(file, lines=True, dtype=False),
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
    if not file.is_file():
        raise InputError(f"{file}: no such file; give an existing one of {', '.join(READERS)}")
    if file.suffix not in READERS:
        raise InputError(f"{file}: cannot read {file.suffix or 'a file without ending'}; give {', '.join(READERS)}")
    try:
        table = READERS[file.suffix](file)
    except pd.errors.EmptyDataError as error:
        raise InputError(f"{file}: is empty; give a header line and rows") from error
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
        blank = table[name].isna() | (table[name].astype(str).str.strip() == "")
        if blank.any():
            row = int(blank.to_numpy().argmax()) + 1
            raise InputError(f"{file}: row {row} after the header has an empty {name!r}; fill or remove it")
    return table.astype(str)


def read_examples(file: str | Path, text_column: str, label_column: str) -> list[Example]:
    """Examples of a file; rows with the same input form one group.

    Raises:
        InputError: as `read_columns`.
    """
    table = read_columns(file, [text_column, label_column])
    rows = zip(table[text_column], table[label_column], strict=True)
    return [Example(str(i), text.strip(), label.strip(), text.strip()) for i, (text, label) in enumerate(rows)]
