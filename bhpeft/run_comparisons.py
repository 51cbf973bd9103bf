"""Runs that answered the same test rows, compared in sentences; the statistics are `significance.py`'s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from bhpeft import significance as sig
from bhpeft.report_data import Answers, RunFacts, answers_of, shared_rows

MOST_PAIRS = 10  # compared each with each; of more runs, the best with each of the others


@dataclass
class Comparison:
    """Two runs over the same test rows, in sentences."""

    a: str
    b: str
    rows: int
    sentences: list[str]
    accuracy: sig.Difference | None = None
    p: float | None = None
    adjusted: float | None = None


def _mean(weights, x):
    return weights @ x / weights.sum(axis=1)


def compare(a: str, b: str, first: Answers, second: Answers) -> Comparison:
    """Say which of two runs is better, and how sure that is."""
    found = Comparison(a, b, len(first.rows), [])
    of_a, of_b = first.arrays, second.arrays
    if first.kind == "labels":
        accuracy = sig.paired_difference("accuracy", [of_a["right"]], [of_b["right"]], _mean)
        only_a = int(((of_a["right"] == 1) & (of_b["right"] == 0)).sum())
        only_b = int(((of_b["right"] == 1) & (of_a["right"] == 0)).sum())
        found.p, found.accuracy = sig.mcnemar(only_a, only_b), accuracy
        found.sentences = [
            sig.sentence(a, b, accuracy, "points", 100),
            f"Of {found.rows:,} rows {only_a} only {a} has right, {only_b} only {b}; McNemar's exact test: "
            f"p = {found.p:.2g}.",
        ]
        if "nll" in of_a and "nll" in of_b:
            nll = sig.paired_difference("nll", [of_a["nll"]], [of_b["nll"]], lambda w, x: -_mean(w, x))
            found.sentences.append("By its probabilities (NLL): " + sig.sentence(a, b, nll, "nats", 1, 4))
    elif first.kind == "numbers":

        def minus_rmse(weights, x):
            return -np.sqrt(_mean(weights, x))

        rmse = sig.paired_difference("rmse", [of_a["squares"]], [of_b["squares"]], minus_rmse)
        found.sentences = ["By the root mean squared error: " + sig.sentence(a, b, rmse, "", 1, 4).replace("  ", " ")]
    else:
        if not np.array_equal(of_a["tokens"], of_b["tokens"]):
            found.sentences = [f"{a} and {b} split texts differently: their perplexities cannot be compared."]
            return found
        names = ["nll", "tokens"]

        def minus_perplexity(weights, nll, tokens):
            return -np.exp(weights @ nll / (weights @ tokens))

        arrays = ([x[name] for name in names] for x in (of_a, of_b))
        perplexity = sig.paired_difference("perplexity", *arrays, minus_perplexity)
        found.sentences = ["By perplexity: " + sig.sentence(a, b, perplexity, "", 1, 3).replace("  ", " ")]
    return found


def _loss(answers: Answers) -> float:
    arrays = answers.arrays
    if answers.kind == "labels":
        return -float(arrays["right"].mean())
    if answers.kind == "numbers":
        return float(arrays["squares"].mean())
    return float(arrays["nll"].sum() / arrays["tokens"].sum())


def comparisons(runs: Sequence[RunFacts]) -> list[Comparison]:
    """Runs that share their test rows, each with each, or the best with the others where that would be many."""
    groups: list[list[tuple[str, Answers]]] = []
    for run in runs:
        answers = answers_of(run)
        if answers is None:
            continue
        group = next((group for group in groups if shared_rows(group[0][1], answers)), None)
        if group is None:
            groups.append([(run.name, answers)])
        else:
            group.append((run.name, answers))
    found: list[Comparison] = []
    for group in groups:
        group.sort(key=lambda pair: (_loss(pair[1]), pair[0]))
        pairs = list(combinations(group, 2))
        if len(pairs) > MOST_PAIRS:
            pairs = [(group[0], other) for other in group[1:]]
        of_group = [compare(worse[0], better[0], worse[1], better[1]) for better, worse in pairs]
        tested = [c for c in of_group if c.p is not None]
        for comparison, p in zip(tested, sig.holm([c.p for c in tested]), strict=True):
            comparison.adjusted = p
            if len(tested) > 1:
                names = comparison.a, comparison.b
                comparison.sentences[0] = sig.sentence(*names, comparison.accuracy, "points", 100, doubted=p > 0.05)
                comparison.sentences[1] = (
                    comparison.sentences[1][:-1] + f", adjusted for {len(tested)} comparisons (Holm) {p:.2g}."
                )
        found += of_group
    return found
