"""Predictions of K models of the same rows as those of one: a deep ensemble (Lakshminarayanan et al. 2017).

    p = mean_k p_k                                     arXiv 1612.01474

The K members stand where posterior samples stand: the same measures say how far they disagree. NumPy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bhpeft.errors import InputError
from bhpeft.files import column_indices, read_rows, write_rows
from bhpeft.results import PREDICTION_COLUMNS
from bhpeft.scores import entropy
from bhpeft.uncertainty import TOLERANCE, predictive_mean, sample_measures


def read_member(path: Path) -> tuple[list[str], list[tuple[str, str]], np.ndarray]:
    """(labels, (id, label) of each of N rows, (N, C) probabilities) of a predictions file.

    Raises:
        InputError: no `prob_` columns, no rows, or numbers that are no probabilities.
    """
    header, rows = read_rows(path)
    places = column_indices(path, header, PREDICTION_COLUMNS[:2])
    columns = [i for i, name in enumerate(header) if name.startswith("prob_")]
    if not columns:
        raise InputError(f"{path}: no prob_<label> columns; an ensemble is made of probabilities of labels.")
    if not rows:
        raise InputError(f"{path}: a header and no rows; name a file that has rows.")
    p = []
    for line, row in rows:
        try:
            p.append([float(row[i]) for i in columns])
        except ValueError:
            raise InputError(f"{path}:{line}: a prob_ column holds no number; predict it again.") from None
        if not (min(p[-1]) >= -TOLERANCE and abs(sum(p[-1]) - 1) <= TOLERANCE):  # nan fails as well
            raise InputError(f"{path}:{line}: the prob_ columns are no probabilities (they sum to {sum(p[-1]):.6g}).")
    labels = [header[i].removeprefix("prob_") for i in columns]
    return labels, [(row[places[0]], row[places[1]]) for _, row in rows], np.array(p)


def combine(paths: Sequence[Path], out: Path) -> None:
    """Write the ensemble of K >= 2 predictions files: id, label, prediction, probabilities, measures.

    The prediction is the likeliest label of the mean. Rows may stand in another order in each file; the first's counts.

    Raises:
        InputError: fewer than two files, other labels, ids, or expected labels than the first file's.
    """
    if len(paths) < 2:
        raise InputError("an ensemble has two members or more; name two or more files of predictions.")
    labels, rows, first = read_member(paths[0])
    _once(paths[0], rows)
    members = [first]
    for path in paths[1:]:
        own_labels, own_rows, p = read_member(path)
        if sorted(own_labels) != sorted(labels):
            raise InputError(f"{path}: labels {', '.join(own_labels)}, and {paths[0]} has {', '.join(labels)}.")
        place = _once(path, own_rows)
        for identity, label in rows:
            if identity not in place:
                raise InputError(f"{path}: no row {identity!r}, which {paths[0]} has; answer the same rows.")
            if own_rows[place[identity]][1] != label:
                other = own_rows[place[identity]][1]
                raise InputError(f"{path}: row {identity!r} has the label {other!r}, and {label!r} in {paths[0]}.")
        if len(own_rows) > len(rows):
            raise InputError(f"{path}: {len(own_rows)} rows, and {paths[0]} has {len(rows)}; answer the same rows.")
        order = [own_labels.index(label) for label in labels]
        members.append(p[[place[identity] for identity, _ in rows]][:, order])

    p_s = np.stack(members)
    mean = predictive_mean(p_s)
    measures = {"max_prob": mean.max(axis=1), "entropy": entropy(mean)} | sample_measures(p_s)
    header = [*PREDICTION_COLUMNS, *(f"prob_{label}" for label in labels), *measures]
    columns = [*mean.T.tolist(), *(values.tolist() for values in measures.values())]
    predicted = [labels[i] for i in mean.argmax(axis=1)]
    write_rows(out, header, zip(*zip(*rows, strict=True), predicted, *columns, strict=True))


def _once(path: Path, rows: list[tuple[str, str]]) -> dict[str, int]:
    place = {identity: i for i, (identity, _) in enumerate(rows)}
    if len(place) < len(rows):
        ids = [identity for identity, _ in rows]
        twice = next(identity for identity in ids if ids.count(identity) > 1)
        raise InputError(f"{path}: two rows have the id {twice!r}; ids must tell rows apart.")
    return place
