"""Accuracy of true/false answers and of their explanations, with intervals and baselines. Plain Python.

The task is that of the generics: the query states "All birds fly.", the answer begins "True, ..." or
"False, ...". Figures are fractions of rows in [0, 1]; a figure over no rows is NaN.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from statistics import NormalDist
from typing import NamedTuple

from bhpeft.results import HumanScore, ModelOutput

KINDS = {"all": "neg", "not": "neg", "some": "pos", "no": "pos"}  # first word of the query -> exemplar
Pair = tuple[str, str]  # query, answer


def truth_of(output: str, full: bool = False) -> str:
    """Return "true" or "false", whichever the text holds more often, else "tie".

    The text is cut at its first full stop unless `full`. Occurrences are counted as parts of words too
    ("untrue" holds a "true"), as the source project counts (llm-logic-experiments, accuracy_evaluation.py):
    generated tokens often lack the space before the answer.
    """
    text = (output if full else output.partition(".")[0]).lower()
    true, false = text.count("true"), text.count("false")
    return "true" if true > false else "false" if false > true else "tie"


def first_word(text: str) -> str:
    """Return the first word in lower case without its punctuation, or "" if there is none."""
    match = re.search(r"\w+", text)
    return match[0].lower() if match else ""


def first_word_truth(output: str) -> str:
    """Return "true" or "false" if that is the first word of the text, else "irregular"."""
    word = first_word(output)
    return word if word in ("true", "false") else "irregular"


def expected_truth(text: str) -> str:
    """Return the truth an expected answer states: its first word's, or else `truth_of` the whole text.

    The first word comes first because an explanation may hold the other word ("False, not all are true flies.").
    """
    truth = first_word_truth(text)
    return truth_of(text, full=True) if truth == "irregular" else truth


def exemplar_kind(query: str) -> str | None:
    """Return "neg" for queries "All ..." and "Not all ...", "pos" for "Some ..." and "No ...", else None.

    A negative exemplar is an exception that makes "All ..." false; a positive one makes "Some ..." true.
    """
    return KINDS.get(first_word(query))


class AccuracyCounts(NamedTuple):
    """Rows by outcome: correct + tie + incorrect = total; accuracy = correct / total."""

    correct: int
    tie: int
    incorrect: int
    total: int
    accuracy: float


def accuracy_counts(
    outputs: Iterable[ModelOutput], full: bool = False, kind: str | None = None, strict: bool = False
) -> AccuracyCounts:
    """Compare each output's truth with that of its expected text.

    `kind` "neg" or "pos" counts only the rows of that `exemplar_kind`. `strict` lets the first word
    decide (`first_word_truth`) in place of `truth_of`. An output without a truth is a tie, never correct; a row
    whose expected text states none (`expected_truth`) is never correct.
    """
    correct = tie = total = 0
    for row in outputs:
        if kind is not None and exemplar_kind(row.query) != kind:
            continue
        truth = first_word_truth(row.output) if strict else truth_of(row.output, full)
        total += 1
        if truth not in ("true", "false"):
            tie += 1
        elif truth == expected_truth(row.expected):
            correct += 1
    return AccuracyCounts(correct, tie, total - correct - tie, total, correct / total if total else math.nan)


def wilson_interval(successes: float, total: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval for a proportion, (nan, nan) when `total` is 0.

    Raises ValueError unless 0 <= successes <= total and 0 < level < 1. Source: Wilson 1927, J. Am. Stat.
    Assoc. 22, 209-212.
    """
    if not 0 <= successes <= total or not 0 < level < 1:
        raise ValueError(f"no interval for {successes} of {total} at level {level}")
    if total == 0:
        return math.nan, math.nan
    z = NormalDist().inv_cdf((1 + level) / 2)
    p, shrink = successes / total, 1 + z * z / total
    middle = (p + z * z / (2 * total)) / shrink
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / shrink
    return (middle - half if successes else 0.0), (middle + half if successes < total else 1.0)


def first_word_baseline(train_pairs: Iterable[Pair], test_pairs: Iterable[Pair]) -> float:
    """Return the accuracy on test that the first word of the query alone would give.

    Pairs are (query, answer); those whose answer has no `expected_truth` are left out. Each first word predicts
    the majority truth it has in train, an unseen or evenly split word the majority overall. The same list given
    twice yields the in-sample figure; NaN where either is empty.
    """
    seen: dict[str, Counter] = defaultdict(Counter)
    overall: Counter = Counter()
    for query, truth in _with_truth(train_pairs):
        seen[first_word(query)][truth] += 1
        overall[truth] += 1
    test = list(_with_truth(test_pairs))
    if not overall or not test:
        return math.nan

    def majority(counts: Counter, otherwise: str) -> str:
        return otherwise if counts["true"] == counts["false"] else max(counts, key=counts.__getitem__)

    default = majority(overall, "true")
    guesses = {word: majority(counts, default) for word, counts in seen.items()}
    return sum(guesses.get(first_word(query), default) == truth for query, truth in test) / len(test)


def _with_truth(pairs: Iterable[Pair]) -> Iterable[Pair]:
    labelled = ((query, expected_truth(answer)) for query, answer in pairs)
    return (pair for pair in labelled if pair[1] != "tie")


class ExplanationScores(NamedTuple):
    """Means of the human scores over the judged rows; overall is the mean of both scores."""

    overall: float
    factual: float
    justifies: float
    judged: int
    not_judged: int


def explanation_scores(rows: Iterable[HumanScore], kind: str | None = None) -> ExplanationScores:
    """Average the human scores, over rows of one `exemplar_kind` if given.

    A row counts as judged when both its scores are given; all three means are over the judged rows.
    """
    rows = [row for row in rows if kind is None or exemplar_kind(row.query) == kind]
    judged = [row for row in rows if row.factual is not None and row.justifies is not None]
    factual, justifies = sum(row.factual for row in judged), sum(row.justifies for row in judged)
    n = len(judged)
    if not n:
        return ExplanationScores(math.nan, math.nan, math.nan, 0, len(rows))
    return ExplanationScores((factual + justifies) / (2 * n), factual / n, justifies / n, n, len(rows) - n)


def explanation_intervals(scores: ExplanationScores) -> dict[str, tuple[float, float]]:
    """95 % Wilson intervals of overall, factual and justifies, each over the judged rows.

    Overall is a mean of two scores a row, which vary no more than one score would: its interval is on the safe side.
    """
    if not scores.judged:
        return {name: (math.nan, math.nan) for name in scores._fields[:3]}
    means = zip(scores._fields[:3], scores[:3], strict=True)
    return {name: wilson_interval(value * scores.judged, scores.judged) for name, value in means}
