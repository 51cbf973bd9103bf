"""bhpeft/uncertainty.py against closed forms, scikit-learn, SciPy and brute force; properties that must hold."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, stats
from scipy.special import logsumexp
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss, roc_auc_score

from bhpeft import temperature
from bhpeft import uncertainty as un


def softmax(logits):
    return np.exp(logits - logsumexp(logits, axis=-1, keepdims=True))


def made_up(rows=200, classes=4, samples=6, seed=0, spread=2.0):
    rng = np.random.default_rng(seed)
    p_s = softmax(rng.normal(0, spread, (samples, rows, classes)))
    return p_s, rng.integers(classes, size=rows)


# ------------------------------------------------------------------------ probabilities, calibration


def test_nll_and_brier():
    p_s, y = made_up()
    p = p_s.mean(axis=0)
    assert un.nll(p, y) == pytest.approx(log_loss(y, p, labels=range(4)))
    by_hand = [sum((p[i, c] - (y[i] == c)) ** 2 for c in range(4)) for i in range(len(y))]
    assert un.brier(p, y, average=False) == pytest.approx(by_hand)
    assert un.brier(p, y) == pytest.approx(np.mean(by_hand))
    assert un.nll(p, y, average=False).mean() == pytest.approx(un.nll(p, y))
    assert un.nll(np.array([[1, 0]], dtype=np.float32), [1]) == pytest.approx(-math.log(1e-300))
    assert un.brier([[0.0, 1.0]], [0]) == 2 and un.brier([[0.0, 1.0]], [1]) == 0


def test_bins_of_equal_width_as_scikit_learn():
    rng = np.random.default_rng(1)
    confidence, correct = rng.random(500), rng.random(500) < 0.6
    accuracy, mean = calibration_curve(correct, confidence, n_bins=15, strategy="uniform")
    found = un.reliability_bins(confidence, correct)
    assert found.count.sum() == 500 and len(found.edges) == 16
    assert found.accuracy == pytest.approx(accuracy) and found.confidence == pytest.approx(mean)
    weights = np.histogram(confidence, 15, (0, 1))[0] / 500
    assert un.ece(confidence, correct) == pytest.approx((weights * np.abs(accuracy - mean)).sum())


def test_ends_of_bins_belong_to_the_lower_bin_and_empty_bins_are_nan():
    found = un.reliability_bins([0.0, 0.5, 0.75, 1.0], [0, 1, 1, 1], bins=4)
    assert found.count.tolist() == [1, 1, 1, 1]
    found = un.reliability_bins([0.9, 1.0], [True, False], bins=2)
    assert found.count.tolist() == [0, 2] and math.isnan(found.accuracy[0])
    assert un.ece([0.9, 1.0], [True, False], bins=2) == pytest.approx(0.45)


def test_bins_of_equal_mass():
    confidence = np.random.default_rng(2).random(90)
    found = un.reliability_bins(confidence, confidence > 0.5, 15, "mass")
    assert found.count.tolist() == [6] * 15
    assert un.reliability_bins(np.arange(1, 8) / 8, [1] * 7, 3, "mass").count.tolist() == [3, 2, 2]
    tied = un.reliability_bins([0.7] * 9 + [0.9], [1] * 10, 5, "mass")
    assert tied.count[tied.count > 0].tolist() == [9, 1]
    assert un.reliability_bins([0.3], [1], 15, "mass").count.sum() == 1  # more bins than rows


def test_ece_of_a_calibrated_and_of_an_overconfident_model():
    rng = np.random.default_rng(3)
    confidence = rng.uniform(0.5, 1, 40000)
    calibrated = rng.random(40000) < confidence
    for scheme in ("width", "mass"):
        assert un.ece(confidence, calibrated, 15, scheme) < 0.015
        bound = un.ece_if_calibrated(confidence, 15, scheme, n=100)
        assert 0.001 < bound < 0.02
        assert un.ece(confidence, rng.random(40000) < confidence - 0.1, 15, scheme) > 5 * bound
    assert un.ece([0.9] * 10, [1] * 6 + [0] * 4) == pytest.approx(0.3)  # says 0.9, right in 0.6


def test_ece_if_calibrated_holds_in_its_share_of_cases():
    rng = np.random.default_rng(4)
    confidence = rng.uniform(0.5, 1, 300)
    bound = un.ece_if_calibrated(confidence, n=2000, level=0.9)
    below = [un.ece(confidence, rng.random(300) < confidence) <= bound for _ in range(1000)]
    assert 0.87 < np.mean(below) < 0.93


# ------------------------------------------------------------------------------- measures of samples


def test_measures_of_samples_against_scipy():
    p_s, _ = made_up()
    mean = p_s.mean(axis=0)
    found = un.sample_measures(p_s)
    assert un.predictive_mean(p_s) == pytest.approx(mean)
    assert found["entropy"] == pytest.approx(stats.entropy(mean, axis=1))
    assert found["expected_entropy"] == pytest.approx(stats.entropy(p_s, axis=2).mean(axis=0))
    forward = np.mean([stats.entropy(p, mean, axis=1) for p in p_s], axis=0)
    backward = np.mean([stats.entropy(mean, p, axis=1) for p in p_s], axis=0)
    assert found["mutual_information"] == pytest.approx(forward)  # the identity of the docstring
    assert found["kl_to_mean"] == pytest.approx(backward)
    pairs = np.mean([stats.entropy(a, b, axis=1) for a in p_s for b in p_s], axis=0)
    assert found["mutual_information"] + found["kl_to_mean"] == pytest.approx(pairs)
    assert found["variance"] == pytest.approx(np.mean([p_s[:, :, c].var(axis=0) for c in range(4)], axis=0))
    assert un.one_minus_max_prob(mean) == pytest.approx(1 - mean.max(axis=1))


def test_samples_that_agree_and_that_contradict():
    agree = np.repeat([[[0.2, 0.8]]], 3, axis=0)
    for name in ("mutual_information", "variance", "kl_to_mean"):
        assert un.sample_measures(agree)[name] == pytest.approx([0], abs=1e-12)
    contradict = un.sample_measures(np.array([[[1, 0]], [[0, 1]]], dtype=np.float32))  # zeros, single precision
    assert contradict["mutual_information"] == pytest.approx([math.log(2)])
    assert contradict["expected_entropy"] == pytest.approx([0]) and contradict["variance"] == pytest.approx([0.25])
    assert np.isfinite(contradict["kl_to_mean"]).all() and contradict["kl_to_mean"] > 100


SAMPLES = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(2, 5), st.integers(0, 2**32 - 1))


@given(SAMPLES, st.floats(0.01, 30))
@settings(deadline=None, max_examples=60)
def test_bounds_of_measures(shape, spread):
    s, n, c, seed = shape
    rng = np.random.default_rng(seed)
    p_s = softmax(rng.normal(0, spread, (s, n, c)))
    found = un.sample_measures(p_s)
    for values in found.values():
        assert values.shape == (n,) and (values >= 0).all()
    assert (found["mutual_information"] <= min(math.log(c), math.log(s)) + 1e-9).all()
    assert (found["mutual_information"] <= found["entropy"] + 1e-9).all()
    assert (found["variance"] <= 0.25 + 1e-9).all()
    order, labels = rng.permutation(s), rng.permutation(c)
    again = un.sample_measures(p_s[order][:, :, labels])
    for name, values in found.items():
        assert again[name] == pytest.approx(values, rel=1e-9, abs=1e-9)


# ------------------------------------------------------------------------------- selective prediction


def aurc_by_definition(correct_in_order):
    return np.mean([1 - np.mean(correct_in_order[:k]) for k in range(1, len(correct_in_order) + 1)])


def test_risk_coverage_without_ties():
    coverages, risks = un.risk_coverage([0.4, 0.1, 0.3, 0.2], [0, 1, 1, 0])
    assert coverages.tolist() == [0.25, 0.5, 0.75, 1]
    assert risks == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert un.aurc([0.4, 0.1, 0.3, 0.2], [0, 1, 1, 0]) == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 4)


@pytest.mark.parametrize("seed", range(6))
def test_ties_by_brute_force_over_permutations(seed):
    rng = np.random.default_rng(seed)
    n = 6
    uncertainty, correct = rng.integers(0, 3, n), rng.random(n) < 0.5
    orders = [o for o in itertools.permutations(range(n)) if (np.diff(uncertainty[list(o)]) >= 0).all()]
    curves = np.array([[1 - correct[list(o[:k])].mean() for k in range(1, n + 1)] for o in orders])
    assert un.aurc(uncertainty, correct) == pytest.approx(
        np.mean([aurc_by_definition(correct[list(o)]) for o in orders])
    )
    assert un.risk_coverage(uncertainty, correct)[1] == pytest.approx(curves.mean(axis=0))
    fractions = [0, 0.2, 0.5, 0.9]  # of 6 rows 0, 1, 3, 5 go
    expected = 1 - curves.mean(axis=0)[[5, 4, 2, 0]]
    assert un.accuracy_after_rejecting(uncertainty, correct, fractions) == pytest.approx(expected)


def test_rejecting_counts_whole_rows():
    correct = np.arange(100) >= 29
    uncertainty = -np.arange(100)
    found = un.accuracy_after_rejecting(uncertainty, correct, [0, 0.285, 0.29, 0.9])  # 0.29 * 100 is 28.999...
    assert found == pytest.approx([0.71, 71 / 72, 1, 1])
    assert un.accuracy_after_rejecting([1.0], [1], [0.999]).tolist() == [1]
    assert un.accuracy_after_rejecting([1.0], [1], []).shape == (0,)


@pytest.mark.parametrize("levels", [3, 10**6])
def test_auroc_as_scikit_learn(levels):
    rng = np.random.default_rng(levels)
    scores, positive = rng.integers(0, levels, 300) / 7, rng.random(300) < 0.3
    assert un.auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    infinite = np.where(scores == scores.max(), np.inf, scores)
    assert un.auroc(infinite, positive) == pytest.approx(roc_auc_score(positive, scores))


def test_auroc_of_one_class_is_nan():
    assert math.isnan(un.auroc([1, 2], [True, True])) and math.isnan(un.auroc([1, 2], [False, False]))


ROWS = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=40)


@given(ROWS, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=100)
def test_properties_of_selective_figures(rows, random):
    uncertainty, correct = (np.array(column) for column in zip(*rows, strict=True))
    errors, n = int((~correct).sum()), len(rows)
    area = un.aurc(uncertainty, correct)
    coverages, risks = un.risk_coverage(uncertainty, correct)
    assert area == pytest.approx(risks.mean(), abs=1e-12) and risks[-1] == pytest.approx(errors / n)
    best, worst = np.sort(~correct), np.sort(~correct)[::-1]
    assert un.aurc(~correct, correct) == pytest.approx(aurc_by_definition(~best))
    assert aurc_by_definition(~best) - 1e-9 <= area <= aurc_by_definition(~worst) + 1e-9
    assert un.aurc(np.zeros(n), correct) == pytest.approx(errors / n)  # nothing known: the error rate
    shuffled = rows.copy()
    random.shuffle(shuffled)
    again = [np.array(column) for column in zip(*shuffled, strict=True)]
    fractions = [0.1, 0.5]
    figures = un.selective_figures(uncertainty, correct, fractions)
    assert un.selective_figures(*again, fractions) == pytest.approx(figures, nan_ok=True)
    assert un.selective_figures(3 * uncertainty**3 - 1, correct, fractions) == pytest.approx(figures, nan_ok=True)
    assert figures[1] == pytest.approx(un.auroc(uncertainty, ~correct), nan_ok=True)
    assert figures[2:] == pytest.approx(un.accuracy_after_rejecting(uncertainty, correct, fractions))


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40), st.integers(1, 20))
@settings(deadline=None, max_examples=100)
def test_ece_lies_between_0_and_1_and_knows_no_order(rows, bins):
    confidence, correct = (np.array(column) for column in zip(*rows, strict=True))
    for scheme in ("width", "mass"):
        value = un.ece(confidence, correct, bins, scheme)
        assert 0 <= value <= 1 + 1e-12
        assert un.ece(confidence[::-1], correct[::-1], bins, scheme) == pytest.approx(value, abs=1e-12)
        assert value >= abs(confidence.mean() - correct.mean()) - 1e-9
        assert un.reliability_bins(confidence, correct, bins, scheme).count.sum() == len(rows)
        assert 0 <= un.ece_if_calibrated(confidence, bins, scheme, n=20) <= 1 + 1e-12


@given(ROWS, st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_figures_of_resamples_are_those_of_the_drawn_rows(rows, seed):
    uncertainty, correct = (np.array(column) for column in zip(*rows, strict=True))
    drawn = np.random.default_rng(seed).integers(len(rows), size=(3, len(rows)))
    counts = np.stack([np.bincount(d, minlength=len(rows)) for d in drawn])
    found = un.selective_figures(uncertainty, correct, [0.2], counts)
    for values, d in zip(found, drawn, strict=True):
        assert values == pytest.approx(un.selective_figures(uncertainty[d], correct[d], [0.2]), nan_ok=True)


# -------------------------------------------------------------------------------- temperature scaling


@pytest.mark.parametrize(("scale", "classes"), [(0.3, 2), (1.0, 4), (3.0, 5), (40.0, 3)])
def test_temperature_as_scipy_minimises(scale, classes):
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 2, (2000, classes))
    y = np.array([rng.choice(classes, p=p) for p in softmax(logits)])

    def loss(log_t):
        scaled = scale * logits / math.exp(log_t)
        return float((logsumexp(scaled, axis=1) - scaled[np.arange(len(y)), y]).mean())

    best = optimize.minimize_scalar(loss, bounds=(-4, 4.6), method="bounded", options={"xatol": 1e-9})
    found = temperature.fit_temperature(scale * logits, y)
    assert math.log(found) == pytest.approx(best.x, abs=1e-5)
    assert found == pytest.approx(scale, rel=0.15)  # the labels were drawn at temperature 1
    assert un.nll(temperature.apply_temperature(scale * logits, found), y) == pytest.approx(best.fun)
    assert temperature.fit_temperature(np.log(softmax(scale * logits)), y) == pytest.approx(found)  # shifts do nothing


def test_temperature_where_there_is_none():
    low, high = temperature.TEMPERATURES
    assert temperature.fit_temperature([[3.0, 0.0], [0.0, 1.0]], [0, 1]) == pytest.approx(low)  # all right
    assert temperature.fit_temperature([[3.0, 0.0], [0.0, 1.0]], [1, 0]) == pytest.approx(high)  # all wrong
    assert temperature.fit_temperature([[3000.0, 0.0], [0.0, 1000.0]], [0, 1]) == pytest.approx(low)
    assert list(map(temperature.at_an_end, (low, 0.02, 1.0, 50.0, high))) == [True, False, False, False, True]
    logits = np.random.default_rng(3).normal(0, 4, (200, 5)) + 100
    for right, ends in ((logits, (True, False)), (-logits, (False, True))):
        for found in (temperature.fit_temperature(right, logits.argmax(1)),
                      temperature.fit_sample_temperature(np.stack([right, 2 * right]), logits.argmax(1))):  # fmt: skip
            assert (found < 1 and temperature.at_an_end(found), found > 1 and temperature.at_an_end(found)) == ends
    assert temperature.fit_temperature(np.zeros((3, 2)), [0, 1, 0]) == 1


# ----------------------------------------------------------------------------------------- regression


@pytest.mark.parametrize(("mean", "sd", "y"), [(0, 1, 0), (1, 2, 4), (-3, 0.5, -3.2), (0, 1, -6)])
def test_crps_by_numerical_integration(mean, sd, y):
    below = integrate.quad(lambda x: stats.norm.cdf(x, mean, sd) ** 2, mean - 40 * sd, y, limit=200)[0]
    above = integrate.quad(lambda x: stats.norm.sf(x, mean, sd) ** 2, y, mean + 40 * sd, limit=200)[0]
    assert un.crps_gaussian([mean], [sd], [y]) == pytest.approx(below + above, rel=1e-6)
    assert un.nll_gaussian([mean], [sd], [y]) == pytest.approx(-stats.norm.logpdf(y, mean, sd))
    draws = stats.norm.ppf((np.arange(4000) + 0.5) / 4000, mean, sd)[:, None]
    assert un.crps_samples(draws, [y]) == pytest.approx(below + above, abs=0.002 * sd)


def test_crps_of_samples_by_definition():
    rng = np.random.default_rng(6)
    samples, y = rng.normal(size=(5, 7)), rng.normal(size=7)
    spread = np.abs(samples[:, None] - samples[None]).mean(axis=(0, 1)) / 2
    expected = np.abs(samples - y).mean(axis=0) - spread
    assert un.crps_samples(samples, y, average=False) == pytest.approx(expected)
    assert un.crps_samples(samples[:1], y) == pytest.approx(np.abs(samples[0] - y).mean())


def test_certain_numbers():
    assert un.crps_gaussian([1, 2], [0, 0], [1, 4], average=False).tolist() == [0, 2]
    assert un.interval_coverage([1, 2], [0, 0], [1, 4], 0.5) == 0.5
    with pytest.raises(ValueError, match="positive"):
        un.nll_gaussian([1, 2], [0, 1], [1, 4])


def test_coverage_of_gaussian_intervals():
    rng = np.random.default_rng(7)
    mean, sd = rng.normal(size=20000), rng.uniform(0.5, 2, 20000)
    y = rng.normal(mean, sd)
    for level in (0.5, 0.9, 0.95):
        assert un.interval_coverage(mean, sd, y, level) == pytest.approx(level, abs=0.01)
        z = stats.norm.ppf((1 + level) / 2)
        assert un.interval_coverage(mean, sd, y, level) == np.mean(np.abs(y - mean) <= z * sd)


# ------------------------------------------------------------------------------------------ bootstrap


def test_bootstrap_of_a_mean():
    x = np.random.default_rng(8).normal(5, 2, 400)
    low, high = un.bootstrap_interval(np.mean, [x], n=2000)
    half = 1.96 * x.std() / math.sqrt(len(x))
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.03)
    by_counts = un.bootstrap_interval(lambda counts, x: counts @ x / len(x), [x], n=2000, by_counts=True)
    assert by_counts == pytest.approx((low, high))  # the same resamples
    assert un.bootstrap_interval(np.mean, [x], seed=1) != un.bootstrap_interval(np.mean, [x], seed=2)


def test_bootstrap_of_several_figures_and_arrays(monkeypatch):
    rng = np.random.default_rng(9)
    uncertainty, correct = rng.integers(0, 20, 60), rng.random(60) < 0.7
    arrays = [uncertainty, correct]
    singly = un.bootstrap_interval(lambda u, c: un.selective_figures(u, c, [0.1]), arrays, n=50)
    monkeypatch.setattr(un, "BLOCK", 7 * 60)  # blocks of 7, the last of 1
    at_once = un.bootstrap_interval(lambda k, u, c: un.selective_figures(u, c, [0.1], k), arrays, n=50, by_counts=True)
    assert np.array(at_once) == pytest.approx(np.array(singly)) and singly[0].shape == (3,)
    assert (singly[0] <= un.selective_figures(*arrays, [0.1])).all()


def test_bootstrap_leaves_nan_out():
    few = [np.arange(5), np.array([1, 1, 1, 1, 0])]  # some resamples hold no error
    low, high = un.bootstrap_interval(lambda u, c: un.auroc(u, 1 - c), few, n=200)
    assert 0 <= low <= high <= 1
    assert all(map(math.isnan, un.bootstrap_interval(lambda x: math.nan, [[1, 2]], n=5)))


# --------------------------------------------------------------------------------------- bad input


P, Y = [[0.5, 0.5], [0.2, 0.8]], [0, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: un.nll([0.5, 0.5], [0]), r"\(N, C\)"),
        (lambda: un.nll(np.zeros((0, 2)), []), "at least one"),
        (lambda: un.nll([[0.5, math.nan]], [0]), "NaN"),
        (lambda: un.nll([[0.5, 0.6]], [0]), "sum to 1"),
        (lambda: un.nll([[-0.5, 1.5]], [0]), "negative"),
        (lambda: un.nll(P, [0]), "2 integers"),
        (lambda: un.nll(P, [0.0, 1.0]), "integers"),
        (lambda: un.brier(P, [0, 2]), "0 to 1"),
        (lambda: un.brier(P, [-1, 0]), "0 to 1"),
        (lambda: un.ece([], []), "at least one"),
        (lambda: un.ece([0.5], [1, 0]), "rows"),
        (lambda: un.ece([1.5], [1]), "0 to 1"),
        (lambda: un.ece([0.5], [0.3]), "booleans"),
        (lambda: un.ece([0.5], [1], 0), "bins"),
        (lambda: un.ece([0.5], [1], 15, "none"), "scheme"),
        (lambda: un.ece_if_calibrated([0.5], n=0), "resamples"),
        (lambda: un.mutual_information(P), r"\(S, N, C\)"),
        (lambda: un.kl_to_mean([[[0.5, math.inf]]]), "NaN or infinities"),
        (lambda: un.one_minus_max_prob([["a", "b"]]), "numbers"),
        (lambda: un.risk_coverage([math.nan], [1]), "NaN"),
        (lambda: un.aurc([0.1, 0.2], [1]), "rows"),
        (lambda: un.aurc([[0.1, 0.2]], [1, 0]), "one number a row"),
        (lambda: un.accuracy_after_rejecting([0.1], [1], [1.0]), "below 1"),
        (lambda: un.accuracy_after_rejecting([0.1], [1], [-0.1]), "below 1"),
        (lambda: un.auroc(["a"], [1]), "numbers"),
        (lambda: un.selective_figures([1, 2], [1, 0], (), np.ones((3, 3))), "counts"),
        (lambda: temperature.fit_temperature([[1.0, math.inf]], [0]), "NaN or infinities"),
        (lambda: temperature.fit_temperature([1.0], [0]), r"\(N, C\)"),
        (lambda: temperature.apply_temperature([[1.0, 2.0]], 0), "positive"),
        (lambda: un.interval_coverage([1], [1], [1], 1), "level"),
        (lambda: un.interval_coverage([1], [-1], [1], 0.5), "0 or more"),
        (lambda: un.crps_gaussian([1, 2], [1], [1]), "rows"),
        (lambda: un.crps_gaussian([1], [1], [math.nan]), "NaN"),
        (lambda: un.crps_samples([1.0], [1]), r"\(S, N\)"),
        (lambda: un.crps_samples([[math.nan]], [1]), "NaN"),
        (lambda: un.bootstrap_interval(np.mean, [[1], [1, 2]]), "share"),
        (lambda: un.bootstrap_interval(np.mean, []), "share"),
        (lambda: un.bootstrap_interval(np.mean, [[]]), "no rows"),
        (lambda: un.bootstrap_interval(np.mean, [[1]], level=1), "level"),
    ],
)
def test_impossible_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
