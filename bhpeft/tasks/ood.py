"""Rows of another domain, which a trained model is asked as well: does it know that it does not know them?"""

from __future__ import annotations

import dataclasses

from bhpeft.errors import InputError
from bhpeft.tasks.example import Example, Task, at_most, same_input
from bhpeft.tasks.load import read_source
from bhpeft.tasks.table import READERS, read_columns


def read_ood(arguments, task: Task, seed: int) -> list[Example]:
    """Inputs of `--ood_dataset_name`, at most `--max_ood_samples` of them, picked by `seed`.

    The test rows of a dataset that has some, else all its rows; of a file its column of inputs alone. Their answers are
    left empty.

    Args:
        arguments: a `DataArguments`.
        task: what the model answers.

    Raises:
        InputError: as `read_source`; or rows that the model cannot be asked.

    Returns:
        Examples; none where no `--ood_dataset_name` is given.
    """
    name = arguments.ood_dataset_name
    if name is None:
        return []
    if task.task_type == "multiple_choice":
        raise InputError(f"--ood_dataset_name {name}: multiple choice has no other dataset with choices; leave it out")
    if task.task_type == "generation" and not task.labels:
        raise InputError(f"--ood_dataset_name {name}: free text has no measure of uncertainty here; leave it out")
    if name.lower().endswith(tuple(READERS)):
        texts = read_columns(name, [arguments.text_column])[arguments.text_column]
        rows = [Example(str(i), text.strip(), "", same_input(text)) for i, text in enumerate(texts)]
    else:
        changes = {"dataset_name": name, "data_path": arguments.ood_data_path, "test_file": None}
        try:
            source = read_source(dataclasses.replace(arguments, **changes), [], with_training=False)
        except InputError as error:
            raise InputError(f"--ood_dataset_name: {error}") from error
        rows = source.train if source.test is None else source.test
    rows = [dataclasses.replace(row, answer="", choices=()) for row in rows]
    return at_most(rows, arguments.max_ood_samples, seed)


def encode_ood(encoder, examples: list[Example], notes: list[str]) -> list[dict]:
    """As of `encoder.test_rows`, saying whose rows they are; [] of no examples."""
    if not examples:
        return []
    mine: list[str] = []
    placeholder = encoder.labels[0] if encoder.labels else "0"  # room is left for an answer, and none is read
    try:
        rows = encoder.test_rows([dataclasses.replace(e, answer=placeholder) for e in examples], mine)
    except InputError as error:
        raise InputError(f"--ood_dataset_name: {error}") from error
    notes += [f"out-of-domain rows: {note}" for note in mine]
    notes.append(f"{len(rows)} rows of another domain are asked as well")
    return rows
