"""Examples in a file in place of memory: read one after the other, and chosen by their places.

The file is Arrow's, in batches of `TOGETHER` rows. It is read, not mapped: pages of a mapped file that was gone over
once would count as the process's memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from bhpeft.tasks.dialogue import Reply
from bhpeft.tasks.example import Example, chunks

TOGETHER = 1000
TEXTS = ("id", "query", "answer", "group")
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in TEXTS),
        ("choices", pa.list_(pa.string())),
        ("history", pa.list_(pa.list_(pa.string()))),  # null: an `Example`, not a `Reply`
    ]
)


def write_examples(examples: Iterable[Example], file: Path) -> StoredExamples:
    """Write examples into a file, as they come, and give them back as it holds them.

    Raises:
        UnicodeEncodeError: a text holds half a character.
    """
    count = 0
    with pa.OSFile(str(file), "wb") as target, pa.ipc.new_file(target, SCHEMA) as writer:
        for some in chunks(examples, TOGETHER):
            columns = {name: [getattr(example, name) for example in some] for name in TEXTS}
            columns["choices"] = [example.choices for example in some]
            columns["history"] = [getattr(example, "history", None) for example in some]
            writer.write_batch(pa.RecordBatch.from_pydict(columns, SCHEMA))
            count += len(some)
    return StoredExamples(file, np.arange(count, dtype=np.uint32))


def read_examples(file: Path) -> Iterator[Example]:
    """All examples of a file that `write_examples` has written, one after the other."""
    with pa.OSFile(str(file), "rb") as source, pa.ipc.open_file(source) as reader:
        for batch in range(reader.num_record_batches):
            yield from _examples(reader.get_batch(batch))


class StoredExamples(Sequence):
    """Examples of a file, all or some, in its order. In memory are 4 bytes a row, and one batch while they are read."""

    def __init__(self, file: Path, places: np.ndarray):
        """Args:
        file: as `write_examples` writes it.
        places: of the examples in the file, ascending.
        """
        self.file, self.places = file, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return StoredExamples(self.file, self.places[index])
        return next(iter(StoredExamples(self.file, self.places[[index]])))

    def __iter__(self) -> Iterator[Example]:
        if not len(self):
            return
        batches = self.places // TOGETHER
        wanted, starts = np.unique(batches, return_index=True)
        with pa.OSFile(str(self.file), "rb") as source, pa.ipc.open_file(source) as reader:
            for batch, places in zip(wanted.tolist(), np.split(self.places, starts[1:]), strict=True):
                yield from _examples(reader.get_batch(batch).take(pa.array(places - batch * TOGETHER)))

    def select(self, indices: Iterable[int]) -> StoredExamples:
        """Those at ascending indices of these."""
        return StoredExamples(self.file, self.places[np.fromiter(indices, np.uint32)])


def _examples(rows: pa.RecordBatch) -> Iterator[Example]:
    return map(_example, *(rows.column(name).to_pylist() for name in SCHEMA.names))


def _example(
    name: str, query: str, answer: str, group: str, choices: list[str], history: list[list[str]] | None
) -> Example:
    if history is None:
        return Example(name, query, answer, group, tuple(choices))
    return Reply(name, query, answer, group, tuple(choices), tuple(map(tuple, history)))
