"""What a task is made of: examples, split so that nothing tested was trained on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from bhpeft.errors import InputError


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
    """

    name: str
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    task_type: str = "generation"
    labels: tuple[str, ...] = ()
    instruction: str | None = None
    notes: list[str] = field(default_factory=list)


def hold_out(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split into (kept, held out) by group: no group is on both sides.

    Args:
        fraction: share of the *groups* held out, at least one group where it is above 0.
        seed: decides which; the same for every rank.

    Raises:
        InputError: too few groups to have one on each side.
    """
    if fraction == 0:
        return list(examples), []
    groups = sorted({example.group for example in examples})
    count = max(1, round(fraction * len(groups)))
    if count >= len(groups):
        raise InputError(
            f"{len(groups)} distinct inputs: too few to hold out {fraction:g} of them; add rows, or give --test_file"
        )
    held = set(random.Random(seed).sample(groups, count))
    kept = [example for example in examples if example.group not in held]
    return kept, [example for example in examples if example.group in held]


def keep_fraction(examples: Sequence[Example], fraction: float, seed: int) -> list[Example]:
    """Keep a share of the groups, all examples of each."""
    if fraction == 1:
        return list(examples)
    groups = sorted({example.group for example in examples})
    kept = set(random.Random(seed).sample(groups, max(1, round(fraction * len(groups)))))
    return [example for example in examples if example.group in kept]


def at_most(examples: Sequence[Example], limit: int | None, seed: int) -> list[Example]:
    """A random `limit` of the examples, in their order; all of them where there is no limit."""
    if limit is None or limit >= len(examples):
        return list(examples)
    chosen = sorted(random.Random(seed).sample(range(len(examples)), limit))
    return [examples[i] for i in chosen]
