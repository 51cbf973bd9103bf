"""Figures of explanations that no person has to give: beside the human scores, never in their place.

    polarity    whether the explanation affirms or denies as its own answer does. A denial is expected where exactly one
                of the two holds: the answer is false, the query itself denies ("No ...", "Not ..."). An explanation
                denies where a word as "not" or "no" stands right before the words it shares with the query's end
                ("All owls can fly." - "owls whose wings are broken cannot fly"), or anywhere if it shares none.
    ROUGE-L     F1 of the longest common subsequence of words with the reference                         Lin 2004
    chrF        F2 of character n-grams, 1 to 6, with the reference, from 0 to 100               Popovic 2015, sacrebleu
    repetition  1 - distinct / all word n-grams of the whole output, n = 4                        Welleck et al. 2020

But for the repetition the explanation is what follows "True" or "False", up to the first full stop, as people are shown
it. Words are runs of letters and digits in lower case. Plain Python but for chrF and the correlation (NumPy).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from bhpeft.metrics import first_word, truth_of
from bhpeft.results import HumanScore, ModelOutput

METRICS = {
    "polarity": "agrees with its own answer",
    "rouge_l": "ROUGE-L with the reference",
    "chrf": "chrF with the reference",
    "repetition": "repeated 4-grams",
}
DENIALS = frozenset(
    "not no never none cannot nobody nothing neither nor without cant dont doesnt isnt arent wont".split()
)
NEAR = 3  # words before the shared end in which a denial counts


def words(text: str) -> list[str]:
    """Words in lower case; "don't" is one word, "dont"."""
    return re.findall(r"[^\W_]+", re.sub(r"(\s(?=['\u2019]s\b))?['\u2019]", "", text.lower()))


def explanation_of(text: str) -> str:
    """What follows an opening "True" or "False", up to the first full stop."""
    first = text.partition(".")[0]
    return re.sub(r"^\W*(true|false)\b[\s,:;-]*", "", first, flags=re.IGNORECASE).strip()


def denies(explanation: str, query: str) -> bool:
    """Whether an explanation denies what the query says, by its words; see the head of this file."""
    said, asked = words(explanation), words(query)
    shared = 0
    while shared < min(len(said), len(asked)) and _stem(said[-1 - shared]) == _stem(asked[-1 - shared]):
        shared += 1
    before = said[: len(said) - shared][-NEAR:] if shared else said
    return any(word in DENIALS for word in before)


def _stem(word: str) -> str:
    return word.removesuffix("s") if len(word) > 3 else word


def polarity(row: ModelOutput) -> float:
    """1 where the explanation affirms or denies as its own answer does, 0 where not; NaN where there is none to tell.

    There is none where the output says neither true nor false, or both as often, or explains nothing.
    """
    answer, explanation = truth_of(row.output), explanation_of(row.output)
    if answer == "tie" or not words(explanation):
        return math.nan
    query_denies = first_word(row.query) in ("no", "not") or bool(DENIALS & set(words(row.query)))
    return float(denies(explanation, row.query) == ((answer == "false") != query_denies))


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of words; 0 where either has none.

    Source: Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries.
    """
    a, b = words(text), words(reference)
    if not a or not b:
        return 0.0
    row = [0] * (len(b) + 1)
    for word in a:
        corner = 0
        for j, other in enumerate(b, 1):
            corner, row[j] = row[j], corner + 1 if word == other else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b))


def repetition(text: str, n: int = 4) -> float:
    """Share of word n-grams that repeat an earlier one; 0 for texts of fewer than n words.

    Source: Welleck et al. 2020, arXiv 1908.04319 (seq-rep-n).
    """
    found = words(text)
    grams = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def automatic_scores(outputs: Sequence[ModelOutput]) -> dict[str, list[float]]:
    """Every metric of each of N outputs: name -> N numbers, NaN where there is none to give."""
    from sacrebleu.metrics import CHRF

    chrf = CHRF()
    pairs = [(explanation_of(row.output), explanation_of(row.expected)) for row in outputs]
    return {
        "polarity": [polarity(row) for row in outputs],
        "rouge_l": [rouge_l(*pair) for pair in pairs],
        "chrf": [chrf.sentence_score(text, [reference]).score for text, reference in pairs],
        "repetition": [repetition(row.output) for row in outputs],
    }


def mean(values: Sequence[float]) -> float:
    """Mean of the values that are there; NaN where none is."""
    there = [value for value in values if not math.isnan(value)]
    return sum(there) / len(there) if there else math.nan


def correlation(values: Sequence[float], scores: Sequence[float | None]) -> tuple[float, float, float, int]:
    """Spearman's rank correlation of a metric with people's scores, over the rows that have both.

    Returns:
        rho, the ends of its 95 % interval (percentile bootstrap over rows, ranks kept), and the number of rows; NaN
        where either is the same in all rows.
    """
    import numpy as np

    from bhpeft.uncertainty import bootstrap_interval

    pairs = [(v, s) for v, s in zip(values, scores, strict=True) if s is not None and not math.isnan(v)]
    if len({v for v, _ in pairs}) < 2 or len({s for _, s in pairs}) < 2:
        return math.nan, math.nan, math.nan, len(pairs)
    x, y = (_ranks(np.array(column, dtype=float)) for column in zip(*pairs, strict=True))
    low, high = bootstrap_interval(_weighted_correlation, [x, y], by_counts=True)
    return float(_weighted_correlation(np.ones((1, len(x))), x, y)[0]), low, high, len(pairs)


def _ranks(values):
    """Ranks from 0, tied values sharing their mean rank."""
    import numpy as np

    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[place]


def _weighted_correlation(weights, x, y):
    """(R,) Pearson correlations of x and y, (N,), under (R, N) weights; NaN where a variance is 0."""
    import numpy as np

    total = weights.sum(axis=1)
    mx, my = weights @ x / total, weights @ y / total
    covariance = weights @ (x * y) / total - mx * my
    variances = (weights @ x**2 / total - mx**2) * (weights @ y**2 / total - my**2)
    ranks = len(x)
    there = variances > (1e-9 * ranks**2) ** 2
    return np.where(there, covariance / np.sqrt(np.where(there, variances, 1)), np.nan)


def human_correlations(outputs: Sequence[ModelOutput], scores: Sequence[HumanScore]) -> dict:
    """Correlation of each metric with factual, justifies and their mean: (metric, score) -> as of `correlation`."""
    automatic = automatic_scores(outputs)
    rows = [row for row in scores if 0 <= row.index < len(outputs)]
    human = {
        "factual": [row.factual for row in rows],
        "justifies": [row.justifies for row in rows],
        "overall": [None if None in (r.factual, r.justifies) else (r.factual + r.justifies) / 2 for r in rows],
    }
    return {
        (metric, score): correlation([values[row.index] for row in rows], given)
        for metric, values in automatic.items()
        for score, given in human.items()
    }
