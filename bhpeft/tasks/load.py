"""A dataset by its name, split honestly: a labelled test that nothing is tuned on, and no input on two sides."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from bhpeft.errors import InputError, nearest
from bhpeft.tasks.example import Example, Task, at_most, hold_out, keep_fraction, same_input, where
from bhpeft.tasks.generics import LABELS as TRUE_FALSE
from bhpeft.tasks.generics import read_generics
from bhpeft.tasks.hub import read_hub
from bhpeft.tasks.known import KNOWN, read_known
from bhpeft.tasks.table import READERS, read_examples, stream_examples
from bhpeft.tasks.templates import label_instruction

KNOWN_DATASETS = ("generics", *KNOWN)
GROUPED = ("generics", "oasst1")  # whose groups are of several inputs: a generic's questions, a conversation's messages
Keep = Callable[[Iterable[Example]], Sequence[Example]]
MOST_LABELS = 50  # inferred: more different answers than this are no set of labels


@dataclass
class Source:
    """What a dataset is before it is split; `test` is None where it has no test rows of its own."""

    train: Sequence[Example]
    test: Sequence[Example] | None
    task_type: str | None = None
    labels: tuple[str, ...] = ()
    instruction: str | None = None


def read_source(arguments, notes: list[str], with_training: bool, keep: Keep = list) -> Source:
    """Read a dataset by name: a known one, a file, or a hub id.

    Args:
        arguments: a `DataArguments`.
        with_training: without it the training rows of a known dataset are not read.
        keep: puts training rows where they stay: in a list, or a `StoredExamples`.

    Raises:
        InputError: unknown dataset, or anything wrong with its files; file, row and mend are named.
    """
    name, columns = arguments.dataset_name, (arguments.text_column, arguments.label_column)
    if name == "generics":
        if not arguments.data_path:
            raise InputError("--data_path: missing; generics need the folder with negative.csv and positive.csv")
        source = Source(keep(read_generics(arguments.data_path, arguments.exemplars_per_generic)), None, "generation")
    elif name in KNOWN:
        known = KNOWN[name]
        test = read_known(name, "test", arguments.data_path, notes)
        needed = with_training or not test
        train = read_known(name, "train", arguments.data_path, notes, keep) if needed else []
        source = Source(train, test or None, known.task_type, known.labels, known.instruction)
    elif name.lower().endswith(tuple(READERS)):
        source = Source(keep(stream_examples(name, *columns)), None)
    elif "/" in name and not Path(name).is_file():
        source = Source(*read_hub(name, *columns))
    else:
        kinds = ", ".join(READERS)
        raise InputError(
            f"--dataset_name {name}: unknown.{nearest(name, KNOWN_DATASETS)} "
            f"Known: {', '.join(KNOWN_DATASETS)}; or a file ending in {kinds}, or a hub id as owner/name"
        )
    if arguments.test_file:
        source.test = read_examples(arguments.test_file, *columns)
    return source


def load_task(
    arguments,
    seed: int,
    with_validation: bool = False,
    with_training: bool = True,
    labels: tuple[str, ...] = (),
    whole: bool = True,
    keep: Keep = list,
) -> Task:
    """Read a dataset and split it: test first, then validation, each by group, before any row is used.

    Args:
        arguments: a `DataArguments`.
        seed: seed of the splits; equal on every rank.
        with_validation: hold out validation rows of the training data.
        with_training: without it nothing is held out: the dataset's test rows, or all rows where it has none.
        labels: class names that an adapter was trained with; their order is kept.
        whole: these are all training rows: one class alone is refused. Else `check_classes` is for the caller to call.
        keep: as of `read_source`; validation and test rows are lists in any case.

    Raises:
        InputError: as `read_source`, an answer that the task type does not allow, or too few rows to split.
    """
    name, notes = arguments.dataset_name, []
    source = read_source(arguments, notes, with_training, keep)
    examples = keep_fraction(source.train, arguments.data_fraction, seed)
    if not with_training:
        train, test = [], source.test if source.test is not None else examples
    elif source.test is not None:
        test = source.test
        tested = _groups_that_meet(name if arguments.test_file else "", examples, test)
        train = where(examples, lambda example: example.group not in tested)
        if len(train) < len(examples):
            notes.append(f"{len(examples) - len(train)} training rows also stand in the test rows: not trained on")
        if not train:
            raise InputError(f"{name}: every training row also stands in the test rows; nothing is left to train on")
    else:
        train, test = _held_out(name, examples, arguments.test_fraction, seed)

    validation: Sequence[Example] = []
    if with_validation and arguments.validation_file:
        train, validation = _read_validation(arguments, train, test, notes)

    task_type, found = _settle_task_type(arguments, source, (train, validation, test), notes)
    labels = tuple(labels or arguments.labels or source.labels or found)
    parts = {"training": train, "validation": validation, "test": test}
    files = {"training": name, "validation": arguments.validation_file, "test": arguments.test_file or name}
    labels = _check_answers(files, task_type, labels, parts, notes)

    if with_validation and not arguments.validation_file:
        if arguments.validation_fraction == 0 or not train:
            raise InputError("--do_eval: there are no validation rows; train, with --validation_fraction above 0")
        train, validation = _held_out(name, train, arguments.validation_fraction, seed)
    train = at_most(train, arguments.max_train_samples, seed)
    validation = list(at_most(validation, arguments.max_validation_samples, seed))
    test = list(at_most(test, arguments.max_test_samples, seed))
    if task_type == "classification":
        notes += [_balance(part, rows, labels) for part, rows in (("training", train), ("test", test)) if rows]
        if whole:
            check_classes(name, train)
    sides = f"no {'conversation' if name == 'oasst1' else 'input'} stands on two sides"
    if not with_training and source.test is None:
        sides = "rows that the adapter was trained on may be among them: --test_file names others"
    notes.append(f"{name}: {len(train)} training, {len(validation)} validation, {len(test)} test rows; {sides}")
    instruction = arguments.instruction or source.instruction
    if instruction is None and task_type == "classification":
        instruction = label_instruction(labels)
    return Task(name, train, validation, test, task_type, labels, instruction, notes)


def _held_out(
    name: str, examples: Sequence[Example], fraction: float, seed: int
) -> tuple[Sequence[Example], Sequence[Example]]:
    """As `hold_out`, with the dataset's name in its error."""
    try:
        return hold_out(examples, fraction, seed)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _groups_that_meet(name: str, examples: Iterable[Example], others: Sequence[Example]) -> set[str]:
    """The groups of `others`, and those of `examples` that have an input of theirs.

    They may be rows of a file, whose inputs are groups of their own.
    """
    groups = {example.group for example in others}
    if name not in GROUPED:
        return groups
    inputs = {same_input(example.query) for example in others}
    return groups | {example.group for example in examples if same_input(example.query) in inputs}


def _read_validation(
    arguments, train: Sequence[Example], test: Sequence[Example], notes: list[str]
) -> tuple[Sequence[Example], list[Example]]:
    """The training rows that do not stand in `--validation_file`, and its rows that do not stand in the test."""
    file, columns = arguments.validation_file, (arguments.text_column, arguments.label_column)
    rows = read_examples(file, *columns)
    tested = _groups_that_meet(arguments.dataset_name, rows, test)
    validation = [example for example in rows if example.group not in tested]
    if len(validation) < len(rows):
        notes.append(f"{len(rows) - len(validation)} validation rows also stand in the test rows: not used")
    validated = _groups_that_meet(arguments.dataset_name, train, validation)
    kept = where(train, lambda example: example.group not in validated)
    if len(kept) < len(train):
        notes.append(f"{len(train) - len(kept)} training rows also stand in the validation rows: not trained on")
    if not validation:
        raise InputError(f"--validation_file {file}: every row is also a test row; give others")
    if train and not kept:
        raise InputError(f"--validation_file {file}: holds every training row; give others, so that some are left")
    return kept, validation


def check_classes(name: str, train: Sequence[Example]) -> None:
    """Raise `InputError` if training rows, where there are any, all have one label."""
    if train and len({example.answer for example in train}) == 1:
        raise InputError(f"{name}: all {len(train)} training rows have the label {train[0].answer!r}; add others")


def _settle_task_type(
    arguments, source: Source, parts: Sequence[Sequence[Example]], notes: list[str]
) -> tuple[str, tuple[str, ...]]:
    """The task type, and the answers found where they are labels."""
    if arguments.labels and arguments.task_type is None and not source.task_type:
        return "classification", ()
    if source.task_type:
        if arguments.task_type not in (None, source.task_type):
            raise InputError(f"--task_type {arguments.task_type}: {arguments.dataset_name} is {source.task_type}")
        return source.task_type, ()
    inferred, found = infer_task_type(chain(*parts))
    if arguments.task_type is None:
        first = next(chain(*parts), None)
        if first is not None and all(example.answer == first.answer for example in chain(*parts)):
            raise InputError(
                f"{arguments.dataset_name}: all {sum(map(len, parts))} rows have the answer {first.answer!r:.60}: "
                "there is nothing to learn; add others, or give --task_type"
            )
    if arguments.task_type == "classification" and not found:
        found = tuple(sorted({example.answer for example in chain(*parts)}))
        if len(found) > MOST_LABELS and not arguments.labels:
            raise InputError(
                f"--task_type classification: {len(found)} different answers; if they really are labels, name them "
                "with --labels"
            )
    if arguments.task_type is None:
        shown = f" with the labels {', '.join(found)}" if found else " of free text" if inferred == "generation" else ""
        notes.append(f"{arguments.dataset_name}: taken as {inferred}{shown}; --task_type and --labels overrule this")
    return arguments.task_type or inferred, found


def infer_task_type(examples: Iterable[Example]) -> tuple[str, tuple[str, ...]]:
    """What the answers look like: labels (few, short, each more than once), numbers, or text.

    Returns:
        The task type, and for classification the sorted labels.
    """
    answers: Counter[str] = Counter()  # of at most one answer more than can be labels
    numbers = True
    for example in examples:
        numbers = numbers and _number(example.answer)
        if len(answers) <= MOST_LABELS:
            answers[example.answer] += 1
        elif not numbers:
            return "generation", ()
    short = all(len(answer.split()) <= 4 for answer in answers)
    if short and 2 <= len(answers) <= MOST_LABELS and min(answers.values()) > 1:
        return "classification", tuple(sorted(answers, key=lambda a: (0, float(a), a) if _number(a) else (1, 0, a)))
    return ("regression" if numbers else "generation"), ()


def _number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _check_answers(
    files: dict[str, str],
    task_type: str,
    labels: tuple[str, ...],
    parts: dict[str, Sequence[Example]],
    notes: list[str],
) -> tuple[str, ...]:
    """The labels, once every answer is known to be one of them, or a number where numbers are wanted."""
    if task_type == "generation":
        return answer_labels(list(parts.values()), notes)
    for part, examples in parts.items():
        for example in examples:
            if task_type == "multiple_choice" and (not example.choices or example.answer not in labels):
                raise InputError(
                    f"{files[part]}: {part} row {example.id}: has no choices, or no right one of "
                    f"{', '.join(labels)}; multiple choice is read from --dataset_name csqa"
                )
            if task_type == "regression" and not _number(example.answer):
                raise InputError(
                    f"{files[part]}: {part} row {example.id}: {example.answer!r} is no number, and the task is "
                    "regression; mend the row, or give --task_type"
                )
            if task_type == "classification" and example.answer not in labels:
                hint = (
                    ". -1 marks rows without a label, as in GLUE's own test: give labelled rows"
                    if example.answer == "-1"
                    else "; mend the row, or give --labels"
                )
                raise InputError(
                    f"{files[part]}: {part} row {example.id}: unknown label {example.answer!r}; known: "
                    f"{', '.join(labels)}{hint}"
                )
    return () if task_type == "regression" else labels


def _balance(part: str, examples: Sequence[Example], labels: tuple[str, ...]) -> str:
    counts = Counter(example.answer for example in examples)
    return f"{part} rows by label: " + ", ".join(f"{label} {counts[label]}" for label in labels)


def answer_labels(parts: Sequence[Sequence[Example]], notes: list[str]) -> tuple[str, ...]:
    """("True", "False") if every answer opens with one of them, else (); a note if it is nearly so."""
    known = {label.casefold() for label in TRUE_FALSE}
    first, others, count = None, 0, sum(map(len, parts))
    for example in chain(*parts):
        if example.answer.split(maxsplit=1)[0].strip(".,:;!").casefold() not in known:
            first, others = first or example, others + 1
    if 0 < others < count / 2:
        notes.append(
            f"{others} of {count} answers open with neither True nor False (first: row {first.id}, "
            f"{first.answer[:30]!r}): answers are compared word for word, without true/false accuracy"
        )
    return () if others else TRUE_FALSE
