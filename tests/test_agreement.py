"""Agreement of annotators: equal to scikit-learn's kappa and to the published examples of Krippendorff's alpha."""

import math
import random

import pytest
from sklearn.metrics import cohen_kappa_score

from bhpeft.agreement import cohen_kappa, disagreements, krippendorff_alpha, raw_agreement


def values(text: str) -> list:
    return [None if word == "." else int(word) for word in text.split()]


@pytest.mark.parametrize("kinds", [2, 3, 5])
def test_kappa_is_scikit_learns(kinds):
    rng = random.Random(kinds)
    for _ in range(20):
        a = [rng.randrange(kinds) for _ in range(40)]
        b = [x if rng.random() < 0.6 else rng.randrange(kinds) for x in a]
        assert cohen_kappa(a, b) == pytest.approx(cohen_kappa_score(a, b), abs=1e-12)
        assert raw_agreement(a, b) == sum(x == y for x, y in zip(a, b, strict=True)) / 40


def test_kappa_is_over_the_rows_of_both():
    a, b = values("1 0 1 . 1 0 . 1"), values("1 . 0 1 1 0 . 0")
    both = [(1, 1), (1, 0), (1, 1), (0, 0), (1, 0)]
    assert cohen_kappa(a, b) == pytest.approx(cohen_kappa_score(*zip(*both, strict=True)))
    assert raw_agreement(a, b) == 3 / 5


def test_where_nothing_can_be_said():
    assert math.isnan(cohen_kappa([1, 1], [1, 1])) and math.isnan(krippendorff_alpha([[1, 1], [1, 1]]))
    assert math.isnan(cohen_kappa([1, None], [None, 1])) and math.isnan(raw_agreement([None], [1]))
    assert math.isnan(krippendorff_alpha([[1, None], [None, 0]]))
    assert cohen_kappa([1, 0], [0, 1]) == -1


def test_alpha_of_two_observers_of_krippendorff_2011():
    """Section A: binary data of Meg and Owen, alpha 0.095."""
    meg, owen = values("0 1 0 0 0 0 0 0 1 0"), values("1 1 1 0 0 1 0 0 0 0")
    assert krippendorff_alpha([meg, owen]) == pytest.approx(0.095, abs=5e-4)


def test_alpha_of_four_observers_with_missing_values_of_krippendorff_2011():
    """Section C: nominal data of four observers, twelve units, alpha 0.743; its closed form by coincidences."""
    people = [
        values("1 2 3 3 2 1 4 1 2 . . ."),
        values("1 2 3 3 2 2 4 1 2 5 . 3"),
        values(". 3 3 3 2 3 4 2 2 5 1 ."),
        values("1 2 3 3 2 4 4 1 2 5 1 ."),
    ]
    found = krippendorff_alpha(people)
    assert found == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(people[::-1]) == pytest.approx(found)
    assert krippendorff_alpha([row + [None] for row in people]) == pytest.approx(found)  # a row nobody judged


def test_disagreements_are_found_by_row():
    people = {"a": values("1 0 1 . ."), "b": values("1 1 . 0 ."), "c": values("1 0 1 1 .")}
    assert disagreements(people) == [1, 3]
