"""Whether people who judged the same rows agree: raw agreement, Cohen's kappa, Krippendorff's alpha. Plain Python.

    p_o    share of rows on which two people say the same
    kappa  (p_o - p_e) / (1 - p_e), p_e = sum_c p_1(c) p_2(c)                             Cohen 1960
    alpha  1 - D_o / D_e over the coincidences of all values of a row, each row of m_u values weighted by 1 / (m_u - 1);
           D = 1 for values that differ, else 0; any number of people, values may be missing     Krippendorff 2011

Both are 1 for full agreement and 0 for that of chance. Where all values are the same there is nothing to disagree on:
both are NaN, and the raw agreement is to be read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

Values = Sequence[Hashable]  # one person's values of N rows in their order; None where there is none


def _both(a: Values, b: Values) -> list[tuple]:
    return [pair for pair in zip(a, b, strict=True) if None not in pair]


def raw_agreement(a: Values, b: Values) -> float:
    """Share of the rows judged by both on which they say the same; NaN where there are none."""
    both = _both(a, b)
    return sum(x == y for x, y in both) / len(both) if both else math.nan


def cohen_kappa(a: Values, b: Values) -> float:
    """Cohen's kappa over the rows judged by both; NaN where there are none, or all values are the same.

    Source: Cohen 1960, Educ. Psychol. Meas. 20, 37-46.
    """
    both = _both(a, b)
    if not both:
        return math.nan
    n = len(both)
    first, second = Counter(x for x, _ in both), Counter(y for _, y in both)
    by_chance = sum(first[value] * second[value] for value in first) / n**2
    return math.nan if by_chance == 1 else (sum(x == y for x, y in both) / n - by_chance) / (1 - by_chance)


def krippendorff_alpha(people: Sequence[Values]) -> float:
    """Krippendorff's alpha of nominal values; NaN where no row has two values, or all of these are the same.

    Source: Krippendorff 2011, Computing Krippendorff's Alpha-Reliability.
    """
    values: Counter = Counter()
    observed = 0.0
    for row in zip(*people, strict=True):
        counts = Counter(value for value in row if value is not None)
        m = counts.total()
        if m < 2:
            continue  # alone in its row: it can be paired with none
        values.update(counts)
        observed += sum(count * (m - count) for count in counts.values()) / (m - 1)
    n = values.total()
    expected = sum(count * (n - count) for count in values.values())
    return 1 - (n - 1) * observed / expected if expected else math.nan


def disagreements(people: Mapping[str, Values]) -> list[int]:
    """Places of the rows on which two people or more say different things."""
    rows = zip(*people.values(), strict=True)
    return [i for i, row in enumerate(rows) if len({value for value in row if value is not None}) > 1]
