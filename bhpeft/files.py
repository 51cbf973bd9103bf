"""Text and CSV files, read strictly and written whole: the ground that `results.py` and the scripts stand on.

Every write goes to a temporary file beside the target, is flushed to disk and then renamed over it, so
a reader sees the old file or the new one and never a half. Plain Python.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bhpeft.errors import InputError, nearest


def read_text(path: str | Path) -> str:
    """Return a UTF-8 file's text with its line ends as they are; a byte order mark is dropped."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path.") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise InputError(f"{path}:{line}: byte {byte:#04x} is not UTF-8; save the file as UTF-8.") from None


def read_json(path: str | Path, mend: str) -> Any:
    """Return what a JSON file holds, NaN and infinities as None.

    Raises:
        InputError: it cannot be read or is no JSON (file, line and `mend` are named).
    """
    text = read_text(path)
    try:
        return json.loads(text, parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg}); {mend}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise InputError(f"{path}: not JSON that can be read ({error}); {mend}") from None


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file whole or not at all; its folder is made, `InputError` where that cannot be done."""
    path = Path(os.path.realpath(path))  # through a link: replace what it points at
    try:
        data = content.encode("utf-8") if isinstance(content, str) else content
    except UnicodeEncodeError as error:
        line = content.count("\n", 0, error.start) + 1
        raise InputError(
            f"{path}:{line}: half a surrogate pair ({content[error.start]!a}) cannot be written "
            "as UTF-8; mend the text it comes from."
        ) from None
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(beside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); choose another folder or make room and permission."
        ) from None


def input_files(given: Sequence[str | Path], folder: Path, suffix: str) -> list[Path]:
    """Return the files a script reads: those given (a folder stands for its files), else all of `folder`."""
    files = []
    for path in [Path(path) for path in given] or [folder]:
        if path.is_dir():
            found = sorted(file for file in path.glob(f"*{suffix}") if file.is_file())
            if not found:
                raise InputError(f"{path}: no {suffix} file in this folder; name the files to read.")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            names = [file.name for file in path.parent.glob("*")] if path.parent.is_dir() else []
            raise InputError(f"{path}: no such file or folder; check the path.{nearest(path.name, names)}")
    return files


def read_rows(
    path: str | Path, delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL
) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return a CSV file's header and its rows, each with the line it begins on.

    Raises `InputError` for an empty file, broken quoting, or a row with more or fewer fields than the header.
    """
    header, rows = stream_rows(path, delimiter, quoting)
    return header, list(rows)


def stream_rows(
    path: str | Path, delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL
) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """As `read_rows`, the rows one after the other, so that they are never all in memory.

    What is wrong with a row is raised when it is come to.
    """
    found = records(path, delimiter, quoting)
    _, names = next(found, (1, None))
    if names is None:
        raise InputError(f"{path}: the file is empty; its first line must name the columns.")
    header = [name.strip() for name in names]
    if len(set(header)) < len(header):
        raise InputError(f"{path}:1: two columns have one name ({', '.join(header)}); rename one.")
    return header, _of_equal_length(path, header, found, delimiter, quoting != csv.QUOTE_NONE)


def _of_equal_length(
    path: str | Path, header: list[str], rows: Iterator[tuple[int, list[str]]], delimiter: str, quoted: bool
) -> Iterator[tuple[int, list[str]]]:
    for line, row in rows:
        if len(row) != len(header):
            mend = f"quote fields that hold {delimiter!r}" if quoted else "no field may hold a tab: save it as .csv"
            raise InputError(
                f"{path}:{line}: {len(row)} fields where the header has {len(header)} ({', '.join(header)}); {mend}."
            )
        yield line, row


def records(path: str | Path, delimiter: str, quoting: int = csv.QUOTE_MINIMAL) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV file one after the other, each with the line it begins on; the first may be a header.

    Raises:
        InputError: broken quoting, bytes that are not UTF-8 (with their line), or a file that cannot be read.
    """
    csv.field_size_limit(2**31 - 1)  # the default refuses texts over 131,072 characters
    line = 1
    try:
        with open(path, encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
            for fields in reader:
                if fields:
                    yield line, fields
                line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{line}: {error}; mend the quoting of this row.") from None
    except UnicodeDecodeError:
        read_text(path)  # raises, and knows the line
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path.") from None


def column_indices(path: str | Path, header: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return where the named columns stand in the header; `InputError` names the missing and the found."""
    for name in names:
        if name not in header:
            found = ", ".join(header)
            raise InputError(f"{path}: no column {name!r}; found: {found}.{nearest(name, header)}")
    return [header.index(name) for name in names]


def csv_line(values: Iterable[Any]) -> str:
    """Return one line of CSV; fields are quoted where they hold commas, quotes, line ends or outer spaces."""

    # csv.writer leaves a lone "\r" unquoted before Python 3.13 where lines end in "\n".
    def field(value: Any) -> str:
        text = "" if value is None else str(value)
        return '"' + text.replace('"', '""') + '"' if re.search(r'[,"\r\n]|^\s|\s$', text) else text

    return ",".join(map(field, values)) + "\n"


def write_rows(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file, whole or not at all; None becomes an empty field."""
    write_atomic(path, "".join(map(csv_line, [header, *rows])))
