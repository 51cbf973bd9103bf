"""Judging explanations one at a time: what is asked next, what was answered, and the files that keep it.

A session asks two questions of each row, is the explanation factual and does it justify the answer, in an order
shuffled by a seed. Several runs are mixed and their names not shown, so that nobody can favour one. Every answer is
written at once; a later session with the same name goes on where this one stopped. Plain Python.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bhpeft.errors import InputError
from bhpeft.results import (
    HumanScore,
    annotation_file,
    read_human_evaluation,
    read_model_outputs,
    write_human_evaluation,
)

QUESTIONS = ("factual", "justifies")
WORDS = {"factual": "factual: is the explanation true?", "justifies": "justifies: does it support the answer?"}
KEYS = {"y": "yes", "n": "no", "s": "skip", "b": "back", "q": "quit"}


@dataclass(frozen=True)
class Place:
    """A question: the item's place in the session's order, and 0 for factual or 1 for justifies."""

    item: int
    question: int


@dataclass
class _Run:
    """One run's rows and their judgements; `index` of a score is the row's place in the run's outputs."""

    path: Path
    expected: list[str]
    scores: list[HumanScore]


class Session:
    """One annotator's judgements of the answers of one or several runs.

    Raises:
        InputError: the annotator's name or a file cannot be used, or a file of judgements is of other outputs.
    """

    def __init__(self, outputs: Sequence[str | Path], annotator: str, seed: int = 0, folder: str | Path | None = None):
        """
        Args:
            outputs: files of results/model_outputs/.
            annotator: 1 to 40 letters, digits, "_" or "-".
            seed: of the order, which is the same for the same runs.
            folder: where judgements go (default: human_evaluation/ beside the folder of the outputs).
        """
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", annotator):
            raise InputError(f"--annotator {annotator!r}: use 1 to 40 letters, digits, '_' or '-'.")
        names = [Path(path).stem for path in outputs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"two files of outputs are called {twice}; judge one of them at a time.")
        self.annotator = annotator
        paths = sorted(map(Path, outputs), key=lambda path: path.stem)
        self._runs = [_load(path, annotator, folder) for path in paths]
        self._order = [(r, i) for r, run in enumerate(self._runs) for i in range(len(run.scores))]
        random.Random(seed).shuffle(self._order)
        self._skipped: set[int] = set()
        judged = (item for item in range(len(self._order)) if self._complete(item))
        self._past = [Place(item, question) for item in judged for question in (0, 1)]
        self._now = self._next()

    # ------------------------------------------------------------------------------------- what is asked

    @property
    def place(self) -> Place | None:
        """The question that is open; None where there is none left."""
        return self._now

    @property
    def total(self) -> int:
        """How many rows there are, over all runs."""
        return len(self._order)

    @property
    def judged(self) -> int:
        """How many rows have both questions answered."""
        return sum(self._complete(item) for item in range(self.total))

    @property
    def files(self) -> list[Path]:
        """The files that keep the judgements, as far as there are any."""
        return [run.path for run in self._runs if run.path.exists()]

    def shown(self) -> dict[str, str | int | None]:
        """The open question's texts: query, output, expected, question, and the answer it has had (or None)."""
        score, expected = self._score(self._now.item), self._expected(self._now.item)
        question = QUESTIONS[self._now.question]
        return {
            "query": score.query,
            "output": score.output,
            "expected": expected,
            "question": WORDS[question],
            "answered": getattr(score, question),
        }

    # ------------------------------------------------------------------------------------- what is done

    def answer(self, yes: bool) -> None:
        """Answer the open question, write it down, and go on."""
        item, question = self._now.item, self._now.question
        run, row = self._order[item]
        scores = self._runs[run].scores
        _take_over(self._runs[run])
        scores[row] = replace(scores[row], **{QUESTIONS[question]: int(yes)})
        write_human_evaluation(self._runs[run].path, scores)
        self._past.append(self._now)
        self._now = Place(item, 1) if question == 0 else self._next()

    def skip(self) -> None:
        """Leave the open item as it is; the next session asks it again."""
        self._skipped.add(self._now.item)
        self._past.append(self._now)
        self._now = self._next()

    def back(self) -> bool:
        """Open the question before this one, judged in whichever session; whether there was one.

        Its answer stands until another takes its place.
        """
        if not self._past:
            return False
        self._now = self._past.pop()
        self._skipped.discard(self._now.item)
        return True

    def act(self, key: str) -> bool:
        """Do what a key of `KEYS` says; whether it was one that does something here ("q" is the caller's)."""
        if key == "b":
            return self.back()
        if self._now is None or key not in ("y", "n", "s"):
            return False
        if key == "s":
            self.skip()
        else:
            self.answer(key == "y")
        return True

    # ------------------------------------------------------------------------------------- within

    def _score(self, item: int) -> HumanScore:
        run, row = self._order[item]
        return self._runs[run].scores[row]

    def _expected(self, item: int) -> str:
        run, row = self._order[item]
        return self._runs[run].expected[row]

    def _complete(self, item: int) -> bool:
        score = self._score(item)
        return score.factual is not None and score.justifies is not None

    def _next(self) -> Place | None:
        """The first question in order that has no answer."""
        for item in range(self.total):
            if item not in self._skipped and not self._complete(item):
                return Place(item, 0 if self._score(item).factual is None else 1)
        return None


def _take_over(run: _Run) -> None:
    """Judgements that another session of the same annotator has written meanwhile; those at hand stay."""
    for known in read_human_evaluation(run.path) if run.path.exists() else []:
        here = run.scores[known.index]
        found = {name: getattr(known, name) for name in QUESTIONS if getattr(here, name) is None}
        run.scores[known.index] = replace(here, **found)


def _load(outputs: Path, annotator: str, folder: str | Path | None) -> _Run:
    rows = read_model_outputs(outputs)
    path = annotation_file(outputs, annotator, folder)
    scores = [HumanScore(i, row.query, row.output) for i, row in enumerate(rows)]
    if path.exists():
        for known in read_human_evaluation(path):
            here = scores[known.index] if 0 <= known.index < len(scores) else None
            if here is None or (here.query, here.output) != (known.query, known.output):
                raise InputError(
                    f"{path}: its row of index {known.index} is not that of {outputs}: judgements of other outputs; "
                    "move the file away, or name another --annotator."
                )
            scores[known.index] = known
    return _Run(path, [row.expected for row in rows], scores)
