"""Figures of explanations that no person gives: closed forms, references, and what they say of the real outputs."""

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from bhpeft import explanation_metrics as em
from bhpeft.results import HumanScore, ModelOutput, read_human_evaluation, read_model_outputs


@pytest.mark.parametrize(("text", "reference", "f1"), [
    ("a b c d", "a b c d", 1.0),
    ("police killed the gunman", "police kill the gunman", 3 / 4),
    ("the gunman kill police", "police kill the gunman", 2 / 4),  # order counts
    ("a x b y c", "a b c", 2 * (3 / 5) * 1 / (3 / 5 + 1)),
    ("A, B!", "a b", 1.0),
    ("", "a", 0.0), ("a", "", 0.0), ("x", "y", 0.0),
])  # fmt: skip
def test_rouge_l_by_hand(text, reference, f1):
    assert em.rouge_l(text, reference) == pytest.approx(f1)


def test_rouge_l_is_that_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score is not installed")
    words = "a few words of a text in which words of a few kinds come again".split()
    rng = np.random.default_rng(0)
    theirs = scorer.RougeScorer(["rougeL"])
    for _ in range(50):
        a, b = (" ".join(rng.choice(words, size=rng.integers(1, 15))) for _ in range(2))
        assert em.rouge_l(a, b) == pytest.approx(theirs.score(b, a)["rougeL"].fmeasure)


@pytest.mark.parametrize(("text", "n", "share"), [
    ("a b a b a b", 2, 1 - 2 / 5), ("a b c d e", 4, 0.0), ("a a a a a a", 4, 1 - 1 / 3), ("a b", 4, 0.0), ("", 4, 0.0),
])  # fmt: skip
def test_repetition_by_hand(text, n, share):
    assert em.repetition(text, n) == pytest.approx(share)


@pytest.mark.parametrize(("query", "output", "agrees"), [
    ("All birds fly.", "False, penguins do not fly. Yes", 1),
    ("All birds fly.", "False, penguins fly.", 0),
    ("All birds fly.", "True, birds fly.", 1),
    ("All owls can fly.", "False, owls whose wings are broken cannot fly.", 1),
    ("Some birds fly.", "True, robins that do not sleep all night fly.", 1),  # it denies something else
    ("Some birds fly.", "True, robins don't fly.", 0),
    ("Not all birds fly.", "True, penguins do not fly.", 1),
    ("Not all birds fly.", "False, penguins do not fly.", 0),
    ("No birds swim.", "False, some penguins swim.", 1),
    ("No birds swim.", "True, birds do not swim.", 1),
    ("All cats have tails.", "False, manx cats have no tails.", 1),
    ("Birds do not fly.", "False, robins fly.", 1),
])  # fmt: skip
def test_polarity_is_that_of_the_answer(query, output, agrees):
    assert em.polarity(ModelOutput(query, output, "")) == agrees


@pytest.mark.parametrize("output", ["maybe", "", "True", "False. Because", "true or false, who knows"])
def test_no_polarity_where_there_is_no_telling(output):
    assert math.isnan(em.polarity(ModelOutput("All birds fly.", output, "")))


def test_correlation_is_scipys_spearman_with_an_interval_around_it():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 6, 300).astype(float)
    y = (x + rng.normal(size=300) * 3 > 2.5).astype(float)
    gone = np.where(rng.random(300) < 0.1, np.nan, x)
    scores = [None if i % 17 == 0 else int(v) for i, v in enumerate(y)]
    kept = [(a, b) for a, b in zip(gone, scores, strict=True) if b is not None and not math.isnan(a)]
    rho, low, high, count = em.correlation(list(gone), scores)
    assert count == len(kept)
    assert rho == pytest.approx(spearmanr(*zip(*kept, strict=True)).statistic, abs=1e-12)
    assert low < rho < high and 0.1 < high - low < 0.35
    assert all(map(math.isnan, em.correlation([1.0, 1.0], [0, 1])[:3]))


def test_every_metric_has_a_number_for_every_row():
    rows = [ModelOutput("All a fly.", "False, b do not fly.", "False, b do not fly."), ModelOutput("x", "", "")]
    found = em.automatic_scores(rows)
    assert set(found) == set(em.METRICS)
    assert [found[name][0] for name in ("polarity", "rouge_l", "chrf", "repetition")] == [1, 1, pytest.approx(100), 0]
    human = em.human_correlations(rows, [HumanScore(0, "", "", 1, 1), HumanScore(7, "", "", 1, 1)])
    assert human["polarity", "factual"][3] == 1  # a row that no output belongs to is left out


def test_the_real_explanations(shared_data):
    """What prompt-tuned LLaMA-2 wrote, and what a person thought of it: the figures of docs/methods.md."""
    outputs = read_model_outputs(shared_data / "seed_results/model_outputs/model4.txt")
    scores = read_human_evaluation(shared_data / "seed_results/human_evaluation/model4.csv")
    references = [em.polarity(ModelOutput(row.query, row.expected, "")) for row in outputs]
    assert sum(references) == 506  # the expected explanations all deny or affirm as they should
    found = em.automatic_scores(outputs)
    assert {name: round(em.mean(values), 3) for name, values in found.items()} == {
        "polarity": 0.976, "rouge_l": 0.656, "chrf": 60.905, "repetition": 0.014,
    }  # fmt: skip
    human = em.human_correlations(outputs, scores)
    rho, low, high, count = human["rouge_l", "factual"]
    assert (round(rho, 3), count) == (0.168, 506) and low > 0.05 and high < 0.3
    assert human["polarity", "factual"][0] == pytest.approx(0.109, abs=0.002)
