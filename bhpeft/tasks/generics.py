"""Generics ("Birds fly.") and their exemplars, made into true/false questions with an explanation.

An exception in `negative.csv` ("Penguins do not fly.") makes two questions, an instance in `positive.csv`
("Robins fly.") two more:

    All birds fly.      -> False, penguins do not fly.
    Not all birds fly.  -> True, penguins do not fly.
    Some birds fly.     -> True, some robins fly.
    No birds fly.       -> False, some robins fly.

The quantifier alone gives the label away; `util/dataset_analysis.py` and the run's `first_word_baseline` say so.
Data: Allaway et al. 2023 (EACL), arXiv 2205.11658; the questions are those of the llm-logic-experiments project.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from bhpeft.errors import InputError
from bhpeft.tasks.example import Example, same_input
from bhpeft.tasks.table import read_columns

LABELS = ("True", "False")
# file -> (word before the generic, opening of the answer) of each question
QUESTIONS = {
    "negative": (("All", "False, "), ("Not all", "True, ")),
    "positive": (("Some", "True, some "), ("No", "False, some ")),
}


def lower_first(text: str) -> str:
    """Lower the first letter, unless the first word is an acronym ("DVDs")."""
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]


def read_generics(folder: str | Path, exemplars_per_generic: int = 1) -> list[Example]:
    """Read `negative.csv` and `positive.csv` (header `generic,exemplar`) and make their questions.

    Args:
        exemplars_per_generic: how many exemplars of each generic, in file order, in each file; 0 takes all.

    Returns:
        Two examples for each exemplar taken. `group` is the generic, so that a split by group puts all
        questions about a generic, of either file, on one side.

    Raises:
        InputError: folder or file missing, or as `read_columns`.
    """
    folder = Path(folder)
    files = {kind: folder / f"{kind}.csv" for kind in QUESTIONS}
    for file in files.values():
        if not file.is_file():
            found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
            raise InputError(f"--data_path {folder}: no {file.name} there (found: {found}); generics need both files")
    examples = []
    for kind, questions in QUESTIONS.items():
        table = read_columns(files[kind], ["generic", "exemplar"])
        taken: Counter[str] = Counter()
        for i, (generic, exemplar) in enumerate(zip(table["generic"], table["exemplar"], strict=True)):
            generic, exemplar = lower_first(generic.strip()), lower_first(exemplar.strip())
            name_of_it = generic.casefold()
            if exemplars_per_generic and taken[name_of_it] >= exemplars_per_generic:
                continue
            taken[name_of_it] += 1
            for quantifier, opening in questions:
                name = f"{kind}-{i}-{quantifier.lower().replace(' ', '-')}"
                answer = opening + exemplar.removeprefix("some " if opening.endswith("some ") else "")
                examples.append(Example(name, f"{quantifier} {generic}", answer, same_input(generic)))
    return examples
