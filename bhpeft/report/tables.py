"""Tables for the terminal: figures side by side, and some answers beside the expected ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bhpeft.results import ModelOutput


def figures_table(columns: dict[str, dict], rows: Sequence[tuple[str, str]]) -> str:
    """Figures of several runs side by side, as text.

    Args:
        columns: heading -> figures.
        rows: (name, words) of the figures to show; those that no column has are left out.
    """
    lines = [" " * 34 + "".join(f"{heading:>16}" for heading in columns)]
    for key, name in rows:
        if any(key in figures for figures in columns.values()):
            lines.append(f"{name:<34}" + "".join(f"{_number(figures.get(key)):>16}" for figures in columns.values()))
    return "\n".join(lines)


def _number(value: float | int | Sequence[float] | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, Sequence):  # an interval
        digits = 3 if max(map(abs, value)) < 1 else 2
        return " - ".join(f"{end:.{digits}f}" for end in value)
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def samples_table(outputs: Sequence[ModelOutput], before: Sequence[ModelOutput] | None = None, count: int = 6) -> str:
    """A few answers beside the expected ones, spread evenly over the rows."""
    lines = []
    for i in np.linspace(0, len(outputs) - 1, min(count, len(outputs))).round().astype(int):
        lines.append(f"  {_one_line(outputs[i].query)}")
        if before:
            lines.append(f"      base      {_one_line(before[i].output)}")
        lines.append(f"      answer    {_one_line(outputs[i].output)}")
        lines.append(f"      expected  {_one_line(outputs[i].expected)}")
    return "\n".join(lines)


def _one_line(text: str, width: int = 90) -> str:
    text = " ".join(text.split()) or "(nothing)"
    return text if len(text) <= width else text[: width - 1] + "…"
