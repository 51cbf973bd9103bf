"""One picture of what an adapter has learned; see `interpret.py`."""

from __future__ import annotations

import io
from collections.abc import Sequence

from bhpeft.interpret import Near, Posterior, Update, by_layer
from bhpeft.uncertainty_report import STYLES


def draw(near: Sequence[Near], updates: Sequence[Update], posteriors: Sequence[Posterior]) -> bytes:
    """A PNG with a panel for each kind of thing there is."""
    from matplotlib.figure import Figure

    panels = [panel for panel, there in ((_near, near), (_updates, updates), (_snr, posteriors), (_kl, posteriors))
              if there]  # fmt: skip
    canvas = Figure(figsize=(5.4 * len(panels), 4.2), layout="constrained")
    for axes, panel in zip(canvas.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes, {_near: near, _updates: updates}.get(panel, posteriors))
    data = io.BytesIO()
    canvas.savefig(data, format="png", dpi=130, metadata={"Software": None})
    return data.getvalue()


def _near(axes, near: Sequence[Near]) -> None:
    best = [token.tokens[0] for token in near]
    axes.barh(range(len(near)), [cosine for _, cosine in best], color=STYLES[0]["color"])
    axes.set_yticks(range(len(near)), [repr(word)[:24] for word, _ in best], parse_math=False, fontsize=8)
    axes.set(xlabel="cosine", title="Token nearest to each virtual token", ylim=(len(near) - 0.5, -0.5), xlim=(0, 1))


def _updates(axes, updates: Sequence[Update]) -> None:
    names = list(dict.fromkeys(update.module for update in updates))
    for i, name in enumerate(names):
        points = [(-1 if u.layer is None else u.layer, u.norm) for u in updates if u.module == name]
        axes.plot(*zip(*points, strict=True), label=name, markersize=5, fillstyle="none", **STYLES[i % len(STYLES)])
    axes.set(xlabel="layer (-1: in none)", ylabel="|(alpha / r) B A|", title="LoRA updates", ylim=(0, None))
    axes.legend(fontsize=8, frameon=False)


def _sites(axes, posteriors: Sequence[Posterior], column: int) -> None:
    rows = list(by_layer(posteriors))
    for i, site in enumerate(dict.fromkeys(row[1] for row in rows)):
        points = [(-1 if row[0] is None else row[0], row[column]) for row in rows if row[1] == site]
        axes.plot(*zip(*points, strict=True), label=site, markersize=5, fillstyle="none", **STYLES[i % len(STYLES)])
    axes.set(xlabel="layer (-1: shared by all)")
    axes.legend(frameon=False)


def _snr(axes, posteriors: Sequence[Posterior]) -> None:
    _sites(axes, posteriors, 2)
    axes.axhline(1, color="0.4", linewidth=1, linestyle=":")
    axes.set(ylabel="median |mu| / sigma", title="Signal to noise of the weights")
    axes.set_yscale("log")


def _kl(axes, posteriors: Sequence[Posterior]) -> None:
    _sites(axes, posteriors, 3)
    axes.set(ylabel="nats", title="KL of posterior and prior", ylim=(0, None))
