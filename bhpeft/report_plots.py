"""Plots as SVG that stands inside a page: its colours are the page's, light or dark, and its texts stay texts."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bhpeft.uncertainty_report import STYLES

INK, SOFT = "#010203", "#666666"
# What is drawn in these colours is drawn in the page's: CSS variables of templates/report.html.
COLOURS = {
    INK: "var(--ink)", "#000000": "var(--ink)", "#333333": "var(--ink)", SOFT: "var(--soft)", "#bfbfbf": "var(--line)",
    "#0072b2": "var(--c1)", "#d55e00": "var(--c2)", "#009e73": "var(--c3)", "#cc79a7": "var(--c4)",
}  # fmt: skip
RC: dict[str, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "bhpeft", "text.parse_math": False, "figure.facecolor": "none",
    "axes.facecolor": "none", "savefig.facecolor": "none", "text.color": INK, "axes.edgecolor": SOFT,
    "axes.labelcolor": INK, "axes.titlecolor": INK, "xtick.color": INK, "ytick.color": INK, "legend.labelcolor": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "font.size": 10,
}  # fmt: skip


@contextmanager
def page_style() -> Iterator[None]:
    """matplotlib's settings for plots of a page; figures are to be made and turned into SVG inside."""
    import matplotlib

    with matplotlib.rc_context(RC):
        yield


def as_svg(canvas, key: str, words: str) -> str:
    """A figure as an <svg> element.

    Args:
        key: letters, digits and "-": what the element's ids begin with, so that no two of a page are the same.
        words: what the plot shows, for those who do not see it.
    """
    from html import escape

    data = io.StringIO()
    canvas.savefig(data, format="svg", metadata={"Date": None, "Creator": None})
    svg = data.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{key}-", svg)
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, variable)
    box = re.search(r'viewBox="[^"]*"', svg)[0]
    opening = f'<svg {box} role="img" aria-label="{escape(words)}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return opening + svg[svg.index(">", svg.index("<svg")) + 1 :].strip()


def lines(curves: dict[str, tuple[Sequence, Sequence]], title: str, x: str, y: str = "", log: bool = False):
    """A figure of curves: name -> (x, y), each with a style of its own."""
    canvas, axes = _one()
    for i, (name, (xs, ys)) in enumerate(curves.items()):
        style = dict(STYLES[i % len(STYLES)])
        marker = style.pop("marker")
        few = len(xs) <= 12
        axes.plot(xs, ys, label=name, linewidth=1.6, marker=marker if few else "", markersize=5, **style)
    axes.set(title=title, xlabel=x, ylabel=y)
    if log:
        from matplotlib.ticker import FuncFormatter, NullFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if len(curves) > 1:
        axes.legend(loc="best", frameon=False)
    return canvas


def intervals(rows: Sequence[tuple[str, float, float | None, float | None]], x: str):
    """A figure of one point a run with its 95 % interval, from top to bottom."""
    canvas, axes = _one(height=max(1.6, 0.9 + 0.36 * len(rows)))
    for place, (_, value, low, high) in enumerate(rows):
        if low is not None:
            axes.plot([low, high], [place, place], color=STYLES[0]["color"], linewidth=2)
        axes.plot([value], [place], marker="o", color=STYLES[0]["color"], markersize=6)
    axes.set_yticks(range(len(rows)), [name if len(name) < 26 else name[:25] + "…" for name, *_ in rows])
    axes.set(xlabel=x, ylim=(len(rows) - 0.5, -0.5))
    axes.grid(axis="x", color="#bfbfbf", linewidth=0.6)
    return canvas


def scatter(x: Sequence[float], y: Sequence[float], title: str):
    """A figure of predictions over labels."""
    canvas, axes = _one(height=3.6)
    ends = [min(*x, *y), max(*x, *y)]
    axes.plot(ends, ends, color=SOFT, linewidth=1, linestyle=":")
    axes.scatter(x[:2000], y[:2000], s=12, alpha=0.6, color=STYLES[0]["color"], edgecolors="none")
    axes.set(title=title, xlabel="label", ylabel="prediction")
    return canvas


def _one(width: float = 5.0, height: float = 3.2):
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(width, height), layout="constrained")
    return canvas, canvas.subplots()
