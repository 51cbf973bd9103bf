"""Which of two runs is better on the same test rows, and whether that could be chance.

    difference   figure of B minus figure of A, 95 % percentile bootstrap over rows drawn in pairs      Efron 1979
    McNemar      b rows only A has right, c only B: under no difference c ~ Binomial(b + c, 1/2); two-sided, exact
                                                                                                    McNemar 1947
    Holm         the k-th smallest of m p-values times m - k + 1, made monotone                          Holm 1979

Test rows are the same where ids and labels are; the rows of B are put into the order of A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bhpeft.uncertainty import bootstrap_interval

EXACT = 2000  # discordant rows above which McNemar's p is the normal approximation's, with continuity correction


@dataclass(frozen=True)
class Difference:
    """B minus A of one figure, with the ends of its 95 % interval, in the figure's own unit."""

    figure: str
    value: float
    low: float
    high: float

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p of McNemar's test; 1 where no row tells the two apart.

    Args:
        only_a, only_b: rows that the one has right and the other wrong.
    """
    n = only_a + only_b
    if n == 0:
        return 1.0
    if n > EXACT:
        return math.erfc(max(0.0, abs(only_a - only_b) - 1) / math.sqrt(2 * n))
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def paired_difference(figure: str, a: Sequence[np.ndarray], b: Sequence[np.ndarray], of: Callable) -> Difference:
    """Difference of a figure of two runs over the same N rows.

    Args:
        a, b: arrays of N rows that the figure is made of, as many of each.
        of: figure of (R, N) weights and the arrays, (R,): a mean is `lambda w, x: w @ x / w.sum(axis=1)`.
    """
    count = len(a)

    def difference(weights, *arrays):
        return of(weights, *arrays[count:]) - of(weights, *arrays[:count])

    whole = np.ones((1, len(a[0])))
    low, high = bootstrap_interval(difference, [*a, *b], by_counts=True)
    return Difference(figure, float(difference(whole, *a, *b)[0]), low, high)


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, in the order given."""
    order = sorted(range(len(p)), key=p.__getitem__)
    adjusted, least = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = least
    return adjusted


def sentence(
    a: str, b: str, difference: Difference, unit: str, scale: float = 1.0, digits: int = 1, doubted: bool = False
) -> str:
    """As "B is better than A by 1.9 points (95 %: 0.4 to 3.4)."; or that the difference could be chance.

    Args:
        a, b: names of the runs.
        difference: B minus A, counted so that more is better.
        unit: what the numbers are, as "points".
        scale: what the difference is multiplied by.
        doubted: it could be chance whatever its own interval says: one of many comparisons.
    """
    value, low, high = (scale * number for number in (difference.value, difference.low, difference.high))
    if value < 0:
        a, b, value, low, high = b, a, -value, -high, -low
    ends = f"(95 %: {low:.{digits}f} to {high:.{digits}f})"
    if difference.shown and not doubted:
        return f"{b} is better than {a} by {value:.{digits}f} {unit} {ends}."
    if value == 0:
        return f"{b} and {a} are equal {ends}."
    return f"{b} is ahead of {a} by {value:.{digits}f} {unit}, which could be chance {ends}."
