"""Tokenised training rows in a file: written as they come, mapped, and given out one at a time as plain lists."""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa

from bhpeft.tasks.example import chunks

TOGETHER = 1000  # rows put into Arrow's form at a time
ROWS, LENGTHS = "rows.arrow", "lengths.npy"


class TokenRows:
    """Rows as of `encoder.train_rows`, mapped from a folder that `write_tokens` has written.

    Attributes:
        lengths: (rows,) int32, the tokens of each; mapped as well.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        with open(folder / ROWS, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._table = pa.ipc.open_stream(pa.py_buffer(self._map)).read_all()
        self.lengths = np.load(folder / LENGTHS, mmap_mode="r")

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, place: int) -> dict:
        row = {name: self._table.column(name)[place].as_py() for name in self._table.column_names}
        # Linux maps a megabyte and more around a place that is read, so that forty rows would bring the file of a
        # million into this process's memory. They stay in the kernel's, for all ranks, and cost microseconds again.
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
        return row

    def __reduce__(self):
        return TokenRows, (self.folder,)


def tokens_of(row: dict) -> int:
    """How many tokens a row is padded by: those of its text, or of the longest of its choices."""
    ids = row["input_ids"]
    return max(map(len, ids)) if isinstance(ids[0], list) else len(ids)


def write_tokens(rows: Iterable[dict], folder: Path) -> None:
    """Write tokenised rows, of which there is one at least, as they come, and how long each is."""
    lengths, rows = array("i"), iter(rows)
    first = next(rows)
    schema = pa.schema([(name, _type_of(value)) for name, value in first.items()])
    with pa.OSFile(str(folder / ROWS), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for some in chunks(chain([first], rows), TOGETHER):
            lengths.extend(map(tokens_of, some))
            writer.write_batch(pa.RecordBatch.from_pylist(some, schema))
    np.save(folder / LENGTHS, np.array(lengths, np.int32))


def _type_of(value: list | int | float) -> pa.DataType:
    """Of tokens int32, in one list or, where there are choices, in several; of a target int64 or float64."""
    if isinstance(value, list):
        return pa.list_(_type_of(value[0]) if value and isinstance(value[0], list) else pa.int32())
    return pa.float64() if isinstance(value, float) else pa.int64()
