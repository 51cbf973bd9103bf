"""Rows that arrive in rounds: which are new, which of the past are trained on again, what each domain is tested on."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bhpeft.errors import InputError
from bhpeft.tasks.example import Example, Task
from bhpeft.tasks.load import check_classes, infer_task_type, load_task
from bhpeft.tasks.table import read_examples


@dataclass
class RoundPlan:
    """Which rows belong to which round; rounds are counted from 1.

    Attributes:
        new: for each round the places of its new rows in `task.train`, ascending.
        tests: for each round the places of its domain's own rows in `task.test`; empty where all rounds share one.
        files: for each round the file it is from; empty likewise.
    """

    new: list[list[int]]
    tests: list[list[int]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def replayed(self, number: int, replay: str, ratio: float, seed: int) -> list[int]:
        """Places of past rows that round `number` trains on again, ascending.

        Args:
            replay: "none", "full", or "partial": `ratio` of every past round, at least one row, drawn anew a round.
        """
        past = self.new[: number - 1] if replay != "none" else []
        if replay == "partial":
            past = [
                random.Random(f"{seed} {number} {before}").sample(rows, max(1, round(ratio * len(rows))))
                for before, rows in enumerate(past, 1)
            ]
        return sorted(place for rows in past for place in rows)

    def trained(self, task: Task, number: int, replay: str, ratio: float, seed: int) -> list[Example]:
        """The examples that round `number` trains on, new and old, in the order they have in `task.train`."""
        places = self.new[number - 1] + self.replayed(number, replay, ratio, seed)
        return [task.train[place] for place in sorted(places)]

    def known(self, number: int, most: int | None, seed: int) -> list[int]:
        """Places of the rows of round `number` that later rounds are asked about: all, or `most` of them, the same each
        time."""
        rows = self.new[number - 1]
        if most is None or most >= len(rows):
            return rows
        return sorted(random.Random(f"{seed} {number}").sample(rows, most))

    def at_first(self, task: Task) -> Task:
        """The task as the first round knows it: numbers are standardised by what has arrived, not by what will."""
        return replace(task, train=[task.train[place] for place in self.new[0]])

    def check_rows(self, task: Task, encoder, notes: list[str]) -> None:
        """Encode each round's new rows, so that one that cannot be trained on stops the run at once.

        Raises:
            InputError: as `encoder.train_rows`.
        """
        for number, places in enumerate(self.new, 1):
            found: list[str] = []
            encoder.train_rows([task.train[place] for place in places], found)
            notes += [f"round {number}: {note}" for note in found]


def load_in_rounds(
    rounds, arguments, seed: int, with_validation: bool, with_training: bool, labels: tuple[str, ...] = ()
) -> tuple[Task, RoundPlan]:
    """Read a dataset and say which of its training rows arrive when.

    Args:
        rounds: a `RoundArguments`.
        arguments, seed, with_validation, with_training, labels: as of `load_task`.

    Returns:
        The task, its training rows those of the rounds alone, and the plan.

    Raises:
        InputError: as `load_task`; or the rounds want more rows than there are.
    """
    if rounds.round_files:
        return load_domains(arguments, rounds.round_files, seed, with_validation, labels)
    return arrive(load_task(arguments, seed, with_validation, with_training, labels), rounds.sizes, seed)


def arrive(task: Task, sizes: Sequence[int], seed: int) -> tuple[Task, RoundPlan]:
    """Let training rows arrive in a shuffled order, `sizes[t]` of them in a round; the rest never does.

    Raises:
        InputError: there are fewer rows.
    """
    if sum(sizes) > len(task.train):
        raise InputError(
            f"--rounds {' '.join(map(str, sizes))}: {sum(sizes)} rows in all, and there are {len(task.train)} training "
            "rows; leave out the last rounds"
        )
    order = list(range(len(task.train)))
    random.Random(seed).shuffle(order)  # not `sample`: the first rounds are the same whatever rounds follow
    used = sorted(order[: sum(sizes)])
    place_of = {old: new for new, old in enumerate(used)}
    new, start = [], 0
    for size in sizes:
        new.append(sorted(place_of[old] for old in order[start : start + size]))
        start += size
    task = replace(task, train=[task.train[old] for old in used])
    task.notes.append(f"{sum(sizes)} of {len(order)} training rows arrive, in {len(sizes)} rounds")
    return task, RoundPlan(new)


def load_domains(
    arguments, files: Sequence[str], seed: int, with_validation: bool, labels: tuple[str, ...] = ()
) -> tuple[Task, RoundPlan]:
    """One task of several files, a round each; every file's own held-out slice is its domain's test.

    No input stands on two sides: what is tested in one file is trained on in none.

    Raises:
        InputError: as `load_task` for each file; or nothing is left of a file to train on.
    """
    columns = (arguments.text_column, arguments.label_column)
    everything = [example for file in files for example in read_examples(file, *columns)]
    task_type, found = infer_task_type(everything)
    if arguments.task_type or arguments.labels or labels:
        task_type = arguments.task_type or "classification"
    if task_type == "classification":
        labels = labels or tuple(arguments.labels or found or sorted({example.answer for example in everything}))
    settled = replace(arguments, task_type=task_type, labels=list(labels) or None)
    parts = [
        load_task(replace(settled, dataset_name=str(file)), seed, with_validation, True, labels, whole=False)
        for file in files
    ]
    notes = [f"round {number}: {note}" for number, part in enumerate(parts, 1) for note in part.notes]
    tested = {example.group for part in parts for example in part.test}
    validated = {example.group for part in parts for example in part.validation} - tested
    names = _names(files)
    joined: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    new, tests = [], []
    for name, file, part in zip(names, files, parts, strict=True):
        train = [e for e in part.train if e.group not in tested | validated]
        if len(train) < len(part.train):
            notes.append(f"{file}: {len(part.train) - len(train)} rows are held out in other files: not trained on")
        if not train:
            raise InputError(f"--round_files {file}: every row is held out in another file; none is left to train on")
        validation = [e for e in part.validation if e.group not in tested]
        new.append(_append(joined["train"], name, train))
        tests.append(_append(joined["test"], name, part.test))
        _append(joined["validation"], name, validation)
    if task_type == "classification":
        check_classes("--round_files", joined["train"])
    shared = parts[0].labels if len({part.labels for part in parts}) == 1 else ()
    instruction = parts[0].instruction
    task = Task(arguments.dataset_name or "+".join(names), **joined, task_type=task_type, labels=shared,
                instruction=instruction, notes=notes)  # fmt: skip
    return task, RoundPlan(new, tests, names)


def _append(rows: list[Example], name: str, more: Sequence[Example]) -> list[int]:
    """Add rows, their ids made unique by the name, and return their places."""
    start = len(rows)
    rows.extend(replace(example, id=f"{name}:{example.id}") for example in more)
    return list(range(start, len(rows)))


def _names(files: Sequence[str]) -> list[str]:
    """Short names of files: without folder and ending where that tells them apart, else as they were given."""
    stems = [Path(file).stem for file in files]
    counts = Counter(stems)
    return [stem if counts[stem] == 1 else str(file) for stem, file in zip(stems, files, strict=True)]
