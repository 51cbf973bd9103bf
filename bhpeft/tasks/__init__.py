"""The tasks: rows -> examples, split honestly -> tensors. They know nothing of adapters."""

from __future__ import annotations

from bhpeft.errors import InputError, nearest
from bhpeft.tasks.example import Example, Task, at_most, hold_out, keep_fraction
from bhpeft.tasks.generics import LABELS as TRUE_FALSE
from bhpeft.tasks.generics import read_generics
from bhpeft.tasks.table import READERS, read_examples

KNOWN_DATASETS = ("generics",)

__all__ = ["Example", "Task", "load_task"]


def load_task(arguments, seed: int, with_validation: bool = False, with_training: bool = True) -> Task:
    """Read a dataset and split it: test first, then validation, each by group, before any row is used.

    Args:
        arguments: a `DataArguments`.
        seed: seed of the splits; equal on every rank.
        with_validation: hold out validation rows of the training data.
        with_training: without it nothing is held out: all rows, or those of the test file, are test rows.

    Raises:
        InputError: unknown dataset, or anything wrong with its files; file, row and mend are named.
    """
    name = arguments.dataset_name
    if name == "generics":
        if not arguments.data_path:
            raise InputError("--data_path: missing; generics need the folder with negative.csv and positive.csv")
        examples = read_generics(arguments.data_path, arguments.exemplars_per_generic)
    elif name.lower().endswith(tuple(READERS)):
        examples = read_examples(name, arguments.text_column, arguments.label_column)
    else:
        kinds = ", ".join(READERS)
        raise InputError(
            f"--dataset_name {name}: unknown.{nearest(name, KNOWN_DATASETS)} "
            f"Known: {', '.join(KNOWN_DATASETS)}, or a file ending in {kinds}"
        )
    notes = []
    examples = keep_fraction(examples, arguments.data_fraction, seed)
    if not with_training:
        train, test = [], examples
        if arguments.test_file:
            test = read_examples(arguments.test_file, arguments.text_column, arguments.label_column)
    elif arguments.test_file:
        train = examples
        test = read_examples(arguments.test_file, arguments.text_column, arguments.label_column)
        tested = {example.query for example in test}
        train = [example for example in train if example.query not in tested]
        if len(train) < len(examples):
            notes.append(f"{len(examples) - len(train)} training rows also stand in the test file: not trained on")
        if not train:
            raise InputError(f"{name}: every row also stands in {arguments.test_file}; nothing is left to train on")
    else:
        train, test = hold_out(examples, arguments.test_fraction, seed)
    validation: list[Example] = []
    if with_validation:
        if arguments.validation_fraction == 0 or not train:
            raise InputError("--do_eval: there are no validation rows; train, with --validation_fraction above 0")
        train, validation = hold_out(train, arguments.validation_fraction, seed)
    task = Task(
        name=name,
        train=at_most(train, arguments.max_train_samples, seed),
        validation=validation,
        test=at_most(test, arguments.max_test_samples, seed),
        labels=answer_labels(train + test, notes),
        notes=notes,
    )
    notes.append(
        f"{name}: {len(task.train)} training, {len(task.validation)} validation, {len(task.test)} test rows; "
        "no input stands on two sides"
    )
    return task


def answer_labels(examples: list[Example], notes: list[str]) -> tuple[str, ...]:
    """("True", "False") if every answer opens with one of them, else (); a note if it is nearly so."""
    known = {label.casefold() for label in TRUE_FALSE}
    others = [e for e in examples if e.answer.split(maxsplit=1)[0].strip(".,:;!").casefold() not in known]
    if others and len(others) < len(examples) / 2:
        notes.append(
            f"{len(others)} of {len(examples)} answers open with neither True nor False (first: row {others[0].id}, "
            f"{others[0].answer[:30]!r}): answers are compared word for word, without true/false accuracy"
        )
    return () if others else TRUE_FALSE
