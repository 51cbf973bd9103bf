"""Measures of uncertainty, and of what they are worth. NumPy only.

Shapes: N rows, C labels, S posterior samples, B resamples. Entropies and divergences are in nats; a probability of 0
inside a logarithm counts as 1e-300. Every function raises ValueError for impossible input (wrong shapes, NaN, no rows).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from bhpeft.scores import entropy

FLOOR = 1e-300  # of a probability inside a logarithm
TOLERANCE = 1e-3  # of probabilities and their sums: they may come from half precision
BLOCK = 2**20  # cells of resamples held at a time


# --------------------------------------------------------------------------------------------- checks


def _values(name: str, values, rows: int | None = None, finite: bool = True) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name} must be one number a row, at least one; its shape is {values.shape}")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be numbers; they are {values.dtype}")
    values = values.astype(float)
    if rows is not None and len(values) != rows:
        raise ValueError(f"{name} has {len(values)} rows where the others have {rows}")
    if np.isnan(values).any() or (finite and not np.isfinite(values).all()):
        raise ValueError(f"{name} holds NaN or infinities")
    return values


def _shares(name: str, values) -> np.ndarray:
    values = _values(name, values)
    if values.min() < -TOLERANCE or values.max() > 1 + TOLERANCE:
        raise ValueError(f"{name} must lie in 0 to 1; found {values.min()} to {values.max()}")
    return np.clip(values, 0, 1)


def _truths(name: str, values, rows: int) -> np.ndarray:
    values = _values(name, values, rows)
    if not np.isin(values, (0, 1)).all():
        raise ValueError(f"{name} must be booleans, or 0 and 1")
    return values


def _distributions(p, dimensions: int) -> np.ndarray:
    p = np.asarray(p)
    shape = "(N, C)" if dimensions == 2 else "(S, N, C)"
    if p.ndim != dimensions or not p.size or p.dtype.kind not in "biuf":
        raise ValueError(f"probabilities must be {shape} numbers, at least one; the shape is {p.shape}")
    p = p.astype(float)
    if not np.isfinite(p).all():
        raise ValueError("probabilities hold NaN or infinities")
    if p.min() < -TOLERANCE or np.abs(p.sum(axis=-1) - 1).max() > TOLERANCE:
        raise ValueError("probabilities must not be negative, and those of a row must sum to 1")
    return p


def _classes(y, rows: int, classes: int) -> np.ndarray:
    y = np.asarray(y)
    if y.shape != (rows,) or y.dtype.kind not in "iu":
        raise ValueError(f"labels must be {rows} integers; found {y.dtype} of shape {y.shape}")
    if y.min() < 0 or y.max() >= classes:
        raise ValueError(f"labels must lie in 0 to {classes - 1}; found {y.min()} to {y.max()}")
    return y


def _gaussians(mean, sd, y, positive: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean = _values("mean", mean)
    sd, y = _values("sd", sd, len(mean)), _values("y", y, len(mean))
    if sd.min() < 0 or (positive and sd.min() == 0):
        raise ValueError(f"standard deviations must be {'positive' if positive else '0 or more'}; found {sd.min()}")
    return mean, sd, y


def _log(p: np.ndarray) -> np.ndarray:
    return np.log(np.clip(p, FLOOR, None))


# ------------------------------------------------------------------------ probabilities, calibration


def nll(p, y, average: bool = True) -> float | np.ndarray:
    """Negative log-likelihood.

    Args:
        p: (N, C) probabilities.
        y: (N,) integers, the labels' places.

    Returns:
        The mean over rows, or (N,) where `average` is False.
    """
    p = _distributions(p, 2)
    rows = -_log(p[np.arange(len(p)), _classes(y, *p.shape)])
    return float(rows.mean()) if average else rows


def brier(p, y, average: bool = True) -> float | np.ndarray:
    """Brier score: the squared distance of the probabilities from the label's one-hot vector, 0 to 2.

    The sum over all C labels, as Brier 1950 (Mon. Weather Rev. 78, 1-3) has it: with two labels it is twice the
    one-label form. Args and Returns as of `nll`.
    """
    p = _distributions(p, 2)
    rows = ((p - np.eye(p.shape[1])[_classes(y, *p.shape)]) ** 2).sum(axis=1)
    return float(rows.mean()) if average else rows


class ReliabilityBins(NamedTuple):
    """K bins of confidence: bin k holds the rows with edges[k] < confidence <= edges[k + 1], the first also 0.

    Attributes:
        edges: (K + 1,).
        confidence, accuracy: (K,) means over the bin's rows, NaN where it has none.
        count: (K,) rows.
    """

    edges: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


def _edges(confidence: np.ndarray, bins: int, scheme: str) -> np.ndarray:
    if bins < 1 or int(bins) != bins:
        raise ValueError(f"bins must be a whole number from 1 on; found {bins}")
    if scheme == "width":
        return np.linspace(0, 1, bins + 1)
    if scheme != "mass":
        raise ValueError(f"scheme must be 'width' or 'mass'; found {scheme!r}")
    last = -(-len(confidence) * np.arange(1, bins) // bins) - 1  # the last row of each bin but the last
    return np.unique(np.concatenate([[0], np.sort(confidence)[last], [1]]))


def reliability_bins(confidence, correct, bins: int = 15, scheme: str = "width") -> ReliabilityBins:
    """Accuracy beside confidence, by bins of confidence: what a reliability diagram shows.

    Args:
        confidence: (N,) probability of the answer.
        correct: (N,) whether it is right.
        scheme: "width", bins as wide as each other (Guo et al. 2017, arXiv 1706.04599); "mass", bins of as many rows
            (Nixon et al. 2019, arXiv 1904.01685). Rows of equal confidence share a bin, so that their order does not
            matter: where there are many such, "mass" makes fewer and uneven bins.
    """
    confidence = _shares("confidence", confidence)
    correct = _truths("correct", correct, len(confidence))
    edges = _edges(confidence, bins, scheme)
    place = np.searchsorted(edges[1:-1], confidence, side="left")
    count, *sums = (np.bincount(place, w, minlength=len(edges) - 1) for w in (None, confidence, correct))
    with np.errstate(invalid="ignore"):
        return ReliabilityBins(edges, sums[0] / count, sums[1] / count, count)


def ece(confidence, correct, bins: int = 15, scheme: str = "width") -> float:
    """Expected calibration error: the mean gap of accuracy and confidence over bins, weighted by their rows.

    Guo et al. 2017 ("width"), Nixon et al. 2019 ("mass"); Args as of `reliability_bins`. It is above 0 for a finite
    sample of a calibrated model too: see `ece_if_calibrated`.
    """
    found = reliability_bins(confidence, correct, bins, scheme)
    gaps = np.abs(found.accuracy - found.confidence)[found.count > 0]
    return float((gaps * found.count[found.count > 0]).sum() / found.count.sum())


def ece_if_calibrated(
    confidence, bins: int = 15, scheme: str = "width", n: int = 1000, level: float = 0.95, seed: int = 0
) -> float:
    """What the ECE would stay below, in `level` of the cases, if each answer were right with its very confidence.

    Consistency resampling (Broecker and Smith 2007, Weather Forecast. 22, 651-661; Vaicenavicius et al. 2019, arXiv
    1902.06977): confidences stay, right and wrong are drawn `n` times. An ECE above it is more than chance.
    """
    confidence = _shares("confidence", confidence)
    _check_resampling(n, level)
    edges = _edges(confidence, bins, scheme)
    confidence = np.sort(confidence)
    place = np.searchsorted(edges[1:-1], confidence, side="left")
    starts = np.flatnonzero(np.diff(place, prepend=-1))
    expected, rng, found = np.add.reduceat(confidence, starts), np.random.default_rng(seed), []
    for size in _blocks(n, len(confidence)):
        correct = (rng.random((size, len(confidence))) < confidence).astype(float)
        found.append(np.abs(np.add.reduceat(correct, starts, axis=1) - expected).sum(axis=1) / len(confidence))
    return float(np.quantile(np.concatenate(found), level))


# ------------------------------------------------------------------------------- measures of samples


def predictive_mean(p_s) -> np.ndarray:
    """(N, C): the mean of (S, N, C) probabilities over the samples."""
    return _distributions(p_s, 3).mean(axis=0)


def predictive_entropy(p_s) -> np.ndarray:
    """(N,): entropy of the mean prediction, all uncertainty. Args: (S, N, C) probabilities."""
    return entropy(predictive_mean(p_s))


def expected_entropy(p_s) -> np.ndarray:
    """(N,): mean entropy of the samples, the part that a better known model would keep (Depeweg et al. 2018, arXiv
    1710.07283). Args: (S, N, C) probabilities."""
    return entropy(_distributions(p_s, 3)).mean(axis=0)


def mutual_information(p_s) -> np.ndarray:
    """(N,): mutual information of label and weights, predictive minus expected entropy; BALD (Houlsby et al. 2011,
    arXiv 1112.5745).

    It is also the mean of KL(sample || mean): 0 where all samples agree, at most log C. Args: (S, N, C) probabilities.
    """
    return np.maximum(predictive_entropy(p_s) - expected_entropy(p_s), 0)


def variance(p_s) -> np.ndarray:
    """(N,): variance of a label's probability over the samples (divided by S), the mean over labels. Gal et al. 2017,
    arXiv 1703.02910, take standard deviations in place of variances. Args: (S, N, C) probabilities."""
    return _distributions(p_s, 3).var(axis=0).mean(axis=-1)


def kl_to_mean(p_s) -> np.ndarray:
    """(N,): mean over samples of KL(mean || sample), the reverse mutual information (Malinin and Gales 2021, arXiv
    2002.07650).

    The other direction, KL(sample || mean), is `mutual_information`; the two sum to the mean KL between two samples
    drawn independently. This one weighs a label that a sample all but rules out far more, and has no upper bound.
    Args: (S, N, C) probabilities.
    """
    p_s = _distributions(p_s, 3)
    mean = p_s.mean(axis=0)
    return np.maximum((mean * (_log(mean) - _log(p_s).mean(axis=0))).sum(axis=-1), 0)


def max_prob_sd(p_s) -> np.ndarray:
    """(N,): standard deviation over samples, divided by S as `variance` is, of the probability of the label that the
    mean prediction gives most. Args: (S, N, C) probabilities.

    S - 1 would be for samples drawn independently; posterior samples come in pairs of opposite noise (`drawn_noise`),
    whose mean is, as far as the noise moves it linearly, no estimate but exact.
    """
    p_s = _distributions(p_s, 3)
    likeliest = p_s.mean(axis=0).argmax(axis=1)
    return p_s[:, np.arange(p_s.shape[1]), likeliest].std(axis=0)


def one_minus_max_prob(p) -> np.ndarray:
    """(N,): 1 minus the likeliest label's probability, of (N, C) probabilities (Hendrycks and Gimpel 2017, arXiv
    1610.02136)."""
    return 1 - _distributions(p, 2).max(axis=1)


def sample_measures(p_s) -> dict[str, np.ndarray]:
    """All measures of (S, N, C) probabilities: name -> (N,), as columns of predictions hold them; `entropy` is that of
    the mean prediction."""
    return {
        "entropy": predictive_entropy(p_s),
        "expected_entropy": expected_entropy(p_s),
        "mutual_information": mutual_information(p_s),
        "variance": variance(p_s),
        "kl_to_mean": kl_to_mean(p_s),
        "max_prob_sd": max_prob_sd(p_s),
    }


# ------------------------------------------------------------------------------- selective prediction


def _tied(uncertainty, correct, counts=None) -> tuple[np.ndarray, np.ndarray]:
    """Right and wrong rows at each distinct uncertainty, ascending: two (G,) or, with (B, N) counts, two (B, G)."""
    uncertainty = _values("uncertainty", uncertainty, finite=False)
    correct = _truths("correct", correct, len(uncertainty))
    order = np.argsort(uncertainty, kind="stable")
    ordered = uncertainty[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    weights = np.ones(len(order)) if counts is None else counts[..., order]
    right = np.add.reduceat(weights * correct[order], starts, axis=-1)
    return right, np.add.reduceat(weights, starts, axis=-1) - right


def _aurc(right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    # Within a group of m rows, e of them wrong, behind a rows with E wrong, the expected risk at a + j is
    # (E + e j / m) / (a + j); its sum over j = 1 .. m is e + (E - e a / m) (H(a + m) - H(a)), H the harmonic numbers.
    size = right + wrong
    ends = np.cumsum(size, axis=-1)
    before, errors = ends - size, np.cumsum(wrong, axis=-1) - wrong
    rows = int(ends.flat[-1])
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, rows + 1))])
    spread = harmonic[ends.astype(int)] - harmonic[before.astype(int)]
    share = wrong / np.maximum(size, 1)
    return np.clip((wrong + (errors - share * before) * spread).sum(axis=-1) / rows, 0, 1)


def _auroc(negative: np.ndarray, positive: np.ndarray) -> np.ndarray:
    below = np.cumsum(negative, axis=-1) - negative / 2
    pairs = negative.sum(axis=-1) * positive.sum(axis=-1)
    return np.where(pairs > 0, (positive * below).sum(axis=-1) / np.maximum(pairs, 1), np.nan)


def kept_rows(rows: int, fraction: float) -> int:
    """How many of `rows` are left without floor(fraction rows) of them, at least one; fraction from 0 to below 1."""
    if not 0 <= fraction < 1:
        raise ValueError(f"a fraction to reject must be a number from 0 to below 1; found {fraction}")
    return max(1, rows - math.floor(fraction * rows + 1e-9))  # 0.29 * 100 is 28.999...


def _accuracy_of_kept(right: np.ndarray, wrong: np.ndarray, kept: np.ndarray) -> np.ndarray:
    ends, sums = (np.insert(np.cumsum(x, axis=-1), 0, 0, axis=-1) for x in (right + wrong, right))
    if right.ndim == 1:
        return np.interp(kept, ends, sums) / kept
    return np.stack([np.interp(kept, e, s) for e, s in zip(ends, sums, strict=True)]) / kept


def risk_coverage(uncertainty, correct) -> tuple[np.ndarray, np.ndarray]:
    """The risk-coverage curve (El-Yaniv and Wiener 2010, JMLR 11; Geifman and El-Yaniv 2017, arXiv 1705.08500).

    Args:
        uncertainty: (N,), higher is less sure; infinities are allowed.
        correct: (N,) whether the answer is right.

    Returns:
        coverages: (N,) 1/N, 2/N, ... 1.
        risks: (N,) share of wrong answers among that many of the surest. Rows of equal uncertainty count in random
            order: it is the expected share, and the order of rows does not matter.
    """
    right, wrong = _tied(uncertainty, correct)
    rows = np.arange(1, int(right.sum() + wrong.sum()) + 1)
    return rows / rows[-1], 1 - _accuracy_of_kept(right, wrong, rows)


def aurc(uncertainty, correct) -> float:
    """Area under the risk-coverage curve: the mean of its N risks (Geifman et al. 2019, arXiv 1805.08206).

    Lower is better. It depends on the accuracy: of two models the one that errs less may have the lower AURC without
    knowing better when it errs; `auroc` does not. Args as of `risk_coverage`; equal uncertainties in expectation.
    """
    return float(_aurc(*_tied(uncertainty, correct)))


def accuracy_after_rejecting(uncertainty, correct, fractions: Sequence[float]) -> np.ndarray:
    """(F,): accuracy of what is left without the least sure floor(fraction N) rows, for F fractions from 0 to below 1.

    Args as of `risk_coverage`; equal uncertainties in expectation over random order.
    """
    right, wrong = _tied(uncertainty, correct)
    rows = int(right.sum() + wrong.sum())
    return _accuracy_of_kept(right, wrong, np.array([kept_rows(rows, f) for f in fractions], dtype=int))


def auroc(scores, positive) -> float:
    """Area under the ROC curve: the chance that a positive row scores higher than a negative one, ties a half.

    The rank statistic of Mann and Whitney (Hanley and McNeil 1982, Radiology 143, 29-36). Of uncertainty, with wrong
    answers or out-of-domain rows as the positives, 0.5 is chance. NaN where there are no positives or no negatives.

    Args:
        scores: (N,); infinities are allowed.
        positive: (N,) booleans.
    """
    positives, negatives = _tied(scores, positive)
    return float(_auroc(negatives, positives))


def selective_figures(uncertainty, correct, fractions: Sequence[float] = (), counts=None) -> np.ndarray:
    """AURC, AUROC of errors and accuracies after rejecting F fractions in one go, of many resamples if wanted.

    Args:
        uncertainty, correct, fractions: as of `risk_coverage` and `accuracy_after_rejecting`.
        counts: (B, N) how often each row is in each of B resamples of N rows, as `bootstrap_interval` has them.

    Returns:
        (2 + F,), or (B, 2 + F).
    """
    rows = len(np.atleast_1d(uncertainty))
    if counts is not None and (np.ndim(counts) != 2 or np.shape(counts)[1] != rows):
        raise ValueError(f"counts must be (B, {rows}); the shape is {np.shape(counts)}")
    right, wrong = _tied(uncertainty, correct, counts)
    found = np.stack([_aurc(right, wrong), _auroc(right, wrong)], axis=-1)
    kept = np.array([kept_rows(rows, f) for f in fractions], dtype=int)
    return np.concatenate([found, _accuracy_of_kept(right, wrong, kept)], axis=-1)


# ----------------------------------------------------------------------------------------- regression


def total_deviation(epistemic, noise_sd: float, noise_samples: int | None = None) -> np.ndarray:
    """(N,): deviation of labels around their predictions, sqrt(epistemic^2 + noise_sd^2).

    Args:
        epistemic: (N,) deviations of the samples.
        noise_sd: of what is not the samples', as residuals on validation rows gave it.
        noise_samples: with how many samples. Without any, 0, noise_sd holds all there is, the epistemic part of a
            typical row too, which is not added again; None: not known, taken for some.
    """
    epistemic = np.asarray(epistemic, dtype=float)
    return np.hypot(0 if noise_samples == 0 else epistemic, np.full(epistemic.shape, float(noise_sd)))


def interval_coverage(mean, sd, y, level: float = 0.95, average: bool = True) -> float | np.ndarray:
    """Share of rows inside the central `level` interval of N(mean, sd^2), which should be `level`.

    Args:
        mean, sd, y: (N,); sd 0 or more.
        level: between 0 and 1.

    Returns:
        The share, or (N,) booleans where `average` is False.
    """
    mean, sd, y = _gaussians(mean, sd, y)
    if not 0 < level < 1:
        raise ValueError(f"a level must lie between 0 and 1; found {level}")
    inside = np.abs(y - mean) <= NormalDist().inv_cdf((1 + level) / 2) * sd
    return float(inside.mean()) if average else inside


def crps_gaussian(mean, sd, y, average: bool = True) -> float | np.ndarray:
    """Continuous ranked probability score of N(mean, sd^2), in units of y (Gneiting and Raftery 2007, J. Am. Stat.
    Assoc. 102, 359-378, section 4.2); |y - mean| where sd is 0.

    sd (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)), z = (y - mean) / sd. Args and Returns as of `interval_coverage`.
    """
    mean, sd, y = _gaussians(mean, sd, y)
    z = np.divide(y - mean, sd, out=np.zeros_like(y), where=sd > 0)
    two_sided = np.array([math.erf(x) for x in z / math.sqrt(2)])  # 2 Phi(z) - 1
    rows = sd * (z * two_sided + 2 * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) - 1 / math.sqrt(math.pi))
    rows = np.where(sd > 0, rows, np.abs(y - mean))
    return float(rows.mean()) if average else rows


def nll_gaussian(mean, sd, y, average: bool = True) -> float | np.ndarray:
    """Negative log-density of y under N(mean, sd^2), sd above 0. Args and Returns as of `interval_coverage`."""
    mean, sd, y = _gaussians(mean, sd, y, positive=True)
    rows = 0.5 * ((y - mean) / sd) ** 2 + np.log(sd) + 0.5 * math.log(2 * math.pi)
    return float(rows.mean()) if average else rows


def crps_samples(samples, y, average: bool = True) -> float | np.ndarray:
    """CRPS of the empirical distribution of samples: E|X - y| - E|X - X'| / 2 (Gneiting and Raftery 2007,
    section 4.2).

    Args:
        samples: (S, N).
        y: (N,).

    Returns:
        The mean over rows, or (N,) where `average` is False.
    """
    samples = np.asarray(samples)
    if samples.ndim != 2 or not samples.size or samples.dtype.kind not in "biuf":
        raise ValueError(f"samples must be (S, N) numbers, at least one; the shape is {samples.shape}")
    y = _values("y", y, samples.shape[1])
    if not np.isfinite(samples).all():
        raise ValueError("samples hold NaN or infinities")
    s = len(samples)
    weights = (2 * np.arange(1, s + 1) - s - 1) / s**2  # over sorted samples: half the mean difference of two of them
    rows = np.abs(samples - y).mean(axis=0) - weights @ np.sort(samples.astype(float), axis=0)
    return float(rows.mean()) if average else rows


# ------------------------------------------------------------------------------------------ bootstrap


def _check_resampling(n: int, level: float) -> None:
    if n < 1 or not 0 < level < 1:
        raise ValueError(f"resamples must be 1 or more and the level between 0 and 1; found {n} and {level}")


def _blocks(n: int, rows: int) -> list[int]:
    size = max(1, BLOCK // rows)
    return [min(size, n - start) for start in range(0, n, size)]


def bootstrap_interval(
    function: Callable,
    arrays: Sequence,
    n: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    by_counts: bool = False,
) -> tuple:
    """Percentile bootstrap over rows (Efron and Tibshirani 1993, chapter 13).

    It is too narrow for figures at the end of their range, and off for those with a bias, as the ECE: see
    `ece_if_calibrated` for that.

    Args:
        function: takes the resampled arrays and gives a number or (K,) numbers. With `by_counts` it is called for many
            resamples at once, with (B, N) counts of how often each row was drawn and the arrays as they are, and gives
            (B,) or (B, K): a mean is then `counts @ rows / N`, and `selective_figures` takes counts.
        arrays: each with N rows along its first axis.

    Returns:
        low and high: floats, or (K,) each. Resamples where a figure is NaN are left out for it; all NaN gives NaN.
    """
    arrays = [np.asarray(array) for array in arrays]
    if not arrays or any(array.ndim == 0 for array in arrays) or len({len(array) for array in arrays}) > 1:
        raise ValueError(f"arrays must share their number of rows; the shapes are {[a.shape for a in arrays]}")
    rows = len(arrays[0])
    if not rows:
        raise ValueError("there are no rows to draw from")
    _check_resampling(n, level)
    rng, found = np.random.default_rng(seed), []
    for size in _blocks(n, rows):
        drawn = rng.integers(rows, size=(size, rows)) + rows * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * rows).reshape(size, rows)
        if by_counts:
            found.append(np.asarray(function(counts.astype(float), *arrays), dtype=float))
        else:  # the order of rows does not matter
            places = (np.repeat(np.arange(rows), count) for count in counts)
            found.append(np.array([function(*(array[i] for array in arrays)) for i in places], dtype=float))
    values = np.concatenate(found)
    ends = np.full((2, *values.shape[1:]), np.nan)
    known = ~np.isnan(values).all(axis=0)
    ends[:, known] = np.nanquantile(values[:, known], [(1 - level) / 2, (1 + level) / 2], axis=0)
    return (float(ends[0]), float(ends[1])) if ends.ndim == 1 else (ends[0], ends[1])
