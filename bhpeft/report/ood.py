"""Whether a model is less sure of rows of another domain: AUROC of each of its measures of uncertainty."""

from __future__ import annotations

import pandas as pd

from bhpeft.uncertainty import auroc

NOT_MEASURES = ("id", "label", "prediction", "max_prob", "low_95", "high_95")


def ood_figures(inside: pd.DataFrame, outside: pd.DataFrame) -> dict:
    """AUROC of out-of-domain rows.

    Args:
        inside, outside: predictions of test rows and of rows of another domain by the same model.

    Returns:
        `rows` of the other domain, and an `auroc_<measure>` for each column that measures uncertainty: the chance that
        such a row is less sure than a test row; 0.5 says nothing.
    """
    names = [name for name in inside if name not in NOT_MEASURES and not name.startswith("prob_")]
    is_outside = [False] * len(inside) + [True] * len(outside)
    found: dict = {"rows": len(outside)}
    for name in names:
        found[f"auroc_{name}"] = auroc([*inside[name], *outside[name]], is_outside)
    return found


def ood_sentence(figures: dict) -> str:
    """One line of the figures."""
    values = [f"{name.removeprefix('auroc_')} {value:.3f}" for name, value in figures.items() if name != "rows"]
    text = f"AUROC of {figures['rows']} out-of-domain rows, by how unsure it is: "
    return text + (", ".join(values) or "nothing says how sure it is of numbers without --posterior_samples")
