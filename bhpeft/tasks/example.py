"""What a task is made of: examples, split so that nothing tested was trained on."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from bhpeft.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One question and its expected answer.

    `group` names what must not stand on both sides of a split: the generic a statement was made
    from, a conversation, or the input text itself. `answer` is text for every task: a label's name, a number
    as it was read, the letter of the right choice; `choices` are the texts to choose from, in order.
    """

    id: str
    query: str
    answer: str
    group: str
    choices: tuple[str, ...] = ()


def same_input(text: str) -> str:
    """What two inputs share that are the same but for case and spaces: the usual `group`."""
    return " ".join(text.casefold().split())


@dataclass
class Task:
    """Examples of one dataset, split, with what is known of their answers.

    Attributes:
        task_type: "classification", "multiple_choice", "regression" or "generation".
        labels: classification: the class names, in the order of their indices; multiple choice: the letters;
            generation: words that every answer opens with, if there are such, so that their probabilities
            can be compared.
        instruction: what is asked for, in words, for templates that say so.
        train: a list, or read from a file as it is gone over: see `stored.py`.
        digest: as of `digest_of`, where it is known already.
    """

    name: str
    train: Sequence[Example]
    validation: list[Example]
    test: list[Example]
    task_type: str = "generation"
    labels: tuple[str, ...] = ()
    instruction: str | None = None
    notes: list[str] = field(default_factory=list)
    digest: str | None = None


def digest_of(task: Task, new: list[list[int]] | None = None) -> str:
    """16 hex digits of all test and training rows and labels, in their order.

    Args:
        new: of rows that arrive in rounds, as of `RoundPlan`.
    """
    if task.digest is not None and new is None:
        return task.digest
    found = hashlib.sha256()

    def rows(examples: Iterable[Example]) -> None:
        for i, example in enumerate(examples):
            text = ("[" if i == 0 else ", ") + json.dumps((example.query, example.answer))
            found.update(text.encode())
        found.update(b"], " if examples else b"[], ")

    found.update(b"[")
    rows(task.test)
    rows(task.train)
    found.update(f"{json.dumps(new)}, {json.dumps(list(task.labels))}]".encode())
    return found.hexdigest()[:16]


def chunks(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Values one after the other, in lists of `size`, the last of which may be shorter."""
    values = iter(values)
    while chunk := list(islice(values, size)):
        yield chunk


def pick(examples: Sequence[Example], places: Iterable[int]) -> Sequence[Example]:
    """The examples at ascending places, kept as they are: in memory, or in their file."""
    select = getattr(examples, "select", None)
    return [examples[place] for place in places] if select is None else select(places)


def where(examples: Sequence[Example], wanted: Callable[[Example], bool]) -> Sequence[Example]:
    """The examples that are wanted, kept as they are."""
    return pick(examples, (place for place, example in enumerate(examples) if wanted(example)))


def hold_out(examples: Sequence[Example], fraction: float, seed: int) -> tuple[Sequence[Example], Sequence[Example]]:
    """Split into (kept, held out) by group: no group is on both sides.

    Args:
        fraction: share of the *groups* held out, at least one group where it is above 0.
        seed: decides which; the same for every rank.

    Raises:
        InputError: too few groups to have one on each side.
    """
    if fraction == 0:
        return examples, []
    groups = sorted({example.group for example in examples})
    count = max(1, round(fraction * len(groups)))
    if count >= len(groups):
        raise InputError(
            f"{len(groups)} distinct inputs: too few to hold out {fraction:g} of them; add rows, or give --test_file"
        )
    held = set(random.Random(seed).sample(groups, count))
    kept = where(examples, lambda example: example.group not in held)
    return kept, where(examples, lambda example: example.group in held)


def keep_fraction(examples: Sequence[Example], fraction: float, seed: int) -> Sequence[Example]:
    """Keep a share of the groups, all examples of each."""
    if fraction == 1:
        return examples
    groups = sorted({example.group for example in examples})
    kept = set(random.Random(seed).sample(groups, max(1, round(fraction * len(groups)))))
    return where(examples, lambda example: example.group in kept)


def at_most(examples: Sequence[Example], limit: int | None, seed: int) -> Sequence[Example]:
    """A random `limit` of the examples, in their order; all of them where there is no limit."""
    if limit is None or limit >= len(examples):
        return examples
    return pick(examples, sorted(random.Random(seed).sample(range(len(examples)), limit)))
