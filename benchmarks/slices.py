"""Slices of SST-2 by seed: training and validation rows of GLUE's train that share no phrase, and GLUE's dev."""

from __future__ import annotations

import random
from pathlib import Path

from bhpeft.errors import InputError
from bhpeft.files import write_rows
from bhpeft.tasks.example import Example
from bhpeft.tasks.known import read_known

WORDS = 3  # shared texts of fewer words than this ("the film") give nothing away


def write_slices(
    data_path: Path,
    folder: Path,
    train_rows: int | None,
    validation_rows: int,
    seed: int,
    whole: bool = True,
    held_out_rows: int = 0,
) -> None:
    """Write train.csv, validation.csv (and its halves fit.csv, report.csv), held_out.csv and dev.csv into `folder`.

    GLUE's train holds sentences and phrases of them: a validation row that is part of a training row, or has one as its
    part, has been seen. So rows are drawn by seed, first those of training, then those of validation among the rest,
    leaving out whatever contains or is contained in a training text of `WORDS` words or more.

    Args:
        train_rows: None takes all that validation leaves: then validation is drawn first, and the training rows that
            share a text with it are dropped.
        whole: only rows that no other row of train contains count for validation: whole sentences, as dev's are.
        held_out_rows: drawn behind those of validation and as they are, for figures that nothing is tuned on.

    Raises:
        InputError: too few rows.
    """
    train = read_known("sst2", "train", str(data_path), [])
    dev = read_known("sst2", "test", str(data_path), [])
    tested = {example.group for example in dev}
    rows = [example for example in train if example.group not in tested]
    random.Random(seed).shuffle(rows)
    rows = list({example.group: example for example in rows}.values())
    joined = "\n".join(f" {example.group} " for example in rows)
    chosen = [] if train_rows is None else rows[:train_rows]
    phrases = _Phrases(chosen)
    kept, wanted = [], validation_rows + held_out_rows
    for example in rows[len(chosen) :]:
        if len(kept) == wanted:
            break
        if (not whole or _is_whole(example, joined)) and not phrases.share(example):
            kept.append(example)
    if len(kept) < wanted or not rows:
        raise InputError(
            f"{data_path}: {len(rows)} rows are too few for {train_rows or 'all'} to train on and {wanted} to keep "
            f"from it; {len(kept)} can be kept"
        )
    if train_rows is None:
        groups, phrases = {example.group for example in kept}, _Phrases(kept)
        chosen = [example for example in rows if example.group not in groups and not phrases.share(example)]
    validation, held_out, half = kept[:validation_rows], kept[validation_rows:], validation_rows // 2
    parts = {"train": chosen, "validation": validation, "fit": validation[:half], "report": validation[half:]}
    parts |= {"held_out": held_out} if held_out else {}
    for name, part in {**parts, "dev": dev}.items():
        write_rows(folder / f"{name}.csv", ["text_input", "text_label"], [(e.query, e.answer) for e in part])


def _is_whole(example: Example, joined: str) -> bool:
    text = f" {example.group} "
    return joined.find(text, joined.find(text) + 1) < 0


class _Phrases:
    """Texts as sequences of words, and which other texts contain one of them or are contained in one."""

    def __init__(self, examples: list[Example]):
        texts = [example.group.split() for example in examples]
        self.whole = {tuple(words) for words in texts if len(words) >= WORDS}
        self.lengths = sorted({len(words) for words in self.whole})
        self.parts: dict[tuple, list[str]] = {}  # the first words of each place -> the texts that have them there
        for words in texts:
            joined = f" {' '.join(words)} "
            for i in range(len(words) - WORDS + 1):
                self.parts.setdefault(tuple(words[i : i + WORDS]), []).append(joined)

    def share(self, example: Example) -> bool:
        words = example.group.split()
        for length in self.lengths:
            if any(tuple(words[i : i + length]) in self.whole for i in range(len(words) - length + 1)):
                return True
        text = f" {' '.join(words)} "
        return len(words) >= WORDS and any(text in other for other in self.parts.get(tuple(words[:WORDS]), ()))
