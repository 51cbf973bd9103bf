"""Temperature scaling: scores divided by one number T, fitted on rows that are not the test's (Guo et al. 2017).

    p = softmax(z / T)                     of posterior samples z_s:  p = mean_s softmax(z_s / T)

NumPy only. Shapes and errors as in `uncertainty.py`.
"""

from __future__ import annotations

import math

import numpy as np

from bhpeft.scores import probabilities
from bhpeft.uncertainty import _classes, nll

TEMPERATURES = (1e-2, 1e2)  # the range that is searched
GRID = 81  # temperatures that are tried where the NLL need not be convex
GOLDEN = (math.sqrt(5) - 1) / 2


def _logits(logits) -> np.ndarray:
    logits = np.asarray(logits)
    if logits.ndim != 2 or not logits.size or logits.dtype.kind not in "biuf":
        raise ValueError(f"logits must be (N, C) numbers, at least one; the shape is {logits.shape}")
    if not np.isfinite(logits).all():
        raise ValueError("logits hold NaN or infinities")
    return logits.astype(float)


def fit_temperature(logits, y) -> float:
    """The temperature T that makes the mean NLL of softmax(logits / T) least (Guo et al. 2017, section 4.2).

    The NLL is convex in 1 / T, so its derivative by 1 / T, mean(E_p[logits] - logits[y]), changes sign once: bisection
    on log T finds where, in `TEMPERATURES`. An end of that range means that there is no least (every answer right, or
    no better than chance); logits that are all equal leave it at 1. Fit on rows that are not the test rows.

    Args:
        logits: (N, C), or log-probabilities.
        y: (N,) integers, the labels' places.
    """
    logits = _logits(logits)
    at_label = logits[np.arange(len(logits)), _classes(y, *logits.shape)]

    if not np.ptp(logits, axis=1).any():
        return 1.0

    def slope(temperature: float) -> float:
        return float(((probabilities(logits / temperature) * logits).sum(axis=1) - at_label).mean())

    low, high = (math.log(t) for t in TEMPERATURES)
    middle = 0.0
    for _ in range(60):
        low, high = (middle, high) if slope(math.exp(middle)) > 0 else (low, middle)
        middle = (low + high) / 2
    return math.exp(middle)


def at_an_end(temperature: float) -> bool:
    """Whether a fitted temperature is an end of `TEMPERATURES`, up to 0.1 %: then the NLL has no least in between."""
    low, high = TEMPERATURES
    return temperature < 1.001 * low or temperature > high / 1.001


def apply_temperature(logits, temperature: float) -> np.ndarray:
    """(N, C) probabilities softmax(logits / temperature), of (N, C) logits or log-probabilities."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"a temperature must be positive and finite; found {temperature}")
    return probabilities(_logits(logits) / temperature)


def fit_sample_temperature(samples, y) -> float:
    """The temperature T that makes the NLL of mean_s softmax(samples / T) least, within `TEMPERATURES`.

    The NLL of a mean of softmaxes need not be convex in 1 / T: T is the best of a grid, even in log T, made finer by
    golden-section search beside it. For one sample it is that of `fit_temperature`.

    Args:
        samples: (S, N, C) logits or log-probabilities under S samples of the weights.
        y: (N,) integers, the labels' places.
    """
    samples = np.asarray(samples)
    if samples.ndim != 3 or not samples.size:
        raise ValueError(f"logits must be (S, N, C) numbers, at least one; the shape is {samples.shape}")
    samples = _logits(samples.reshape(-1, samples.shape[-1])).reshape(samples.shape)
    if not np.ptp(samples, axis=-1).any():
        return 1.0

    def loss(log_t: float) -> float:
        return nll(probabilities(samples / math.exp(log_t)).mean(axis=0), y)

    grid = np.linspace(*map(math.log, TEMPERATURES), GRID)
    best = int(np.argmin([loss(log_t) for log_t in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)]
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = loss(left), loss(right)
    while high - low > 1e-6:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = loss(right)
    return math.exp((low + high) / 2)
