"""Datasets of the hub: a known one's split, or any that has a column of inputs and a column of answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from bhpeft.errors import InputError
from bhpeft.tasks.example import Example, same_input
from bhpeft.tasks.layouts import Row, class_name, column, text


def with_place(rows: Iterable[dict[str, Any]], source: str) -> Iterator[Row]:
    """Each row with where it stands, for messages: "SOURCE row I", I from 0."""
    return ((f"{source} row {i}", row) for i, row in enumerate(rows))


def load_from_hub(hub_id: str, config: str | None, split: str | None, instead: str):
    """`datasets.load_dataset`, its many errors made one `InputError` that says what to do `instead`."""
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{hub_id}: the package datasets, which reads from the hub, is not installed; run pip install datasets, "
            f"or {instead}"
        ) from None
    try:
        return datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:  # of datasets, huggingface_hub, httpx or the network: no common ground
        name = f"{hub_id} {config}" if config else hub_id
        raise InputError(
            f"{name}: cannot be read from the hub ({type(error).__name__}: {error!s:.200}); connect to it, or {instead}"
        ) from error


def read_hub(
    hub_id: str, text_column: str, label_column: str
) -> tuple[list[Example], list[Example] | None, str | None, tuple[str, ...]]:
    """Read any dataset of the hub that has a split "train", a column of inputs and a column of answers.

    Returns:
        Training examples; those of "test", or of "validation" where the former is missing or unlabelled (all -1 or
        None), or None; "classification" and the class names where the hub knows them, else None and ().

    Raises:
        InputError: the hub out of reach, no such split or column, an empty text, or a row without label.
    """
    tables = load_from_hub(hub_id, None, None, "save it as .csv, .jsonl or .parquet and give that file")
    if "train" not in tables:
        raise InputError(f"{hub_id}: no split 'train'; found: {', '.join(tables)}; save one as a file and give that")
    labels = tuple(getattr(tables["train"].features.get(label_column), "names", None) or ())

    def examples(split: str) -> list[Example]:
        made = []
        for i, (where, row) in enumerate(with_place(tables[split], f"{hub_id}, {split}")):
            query, answer = text(row, text_column, where), column(row, label_column, where)
            if labels:
                answer = class_name({"label": answer}, labels, where)
            answer = text({label_column: "" if answer is None else str(answer)}, label_column, where)
            made.append(Example(f"{split}-{i}", query, answer, same_input(query)))
        return made

    labelled = [
        split
        for split in ("test", "validation")
        if split in tables
        and label_column in tables[split].column_names
        and not all(value in (-1, None) for value in tables[split][label_column])
    ]
    test = examples(labelled[0]) if labelled else None
    return examples("train"), test, "classification" if labels else None, labels
