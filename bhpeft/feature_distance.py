"""How far a row lies from the training rows, in the frozen base's own features: is it of another domain at all?

    f(x)    mean over the text's tokens of the last hidden states, the adapter off         (H,)
    d^2     sum_i (a_i . (f - m))^2 / v_i  +  |rest of f - m|^2 / v,   i = 1 .. K

m is the mean of the training rows' features, a_i and v_i the K first axes and variances of their covariance, v the mean
variance of the rest: the Mahalanobis distance (Lee et al. 2018, arXiv 1807.03888) under the covariance of probabilistic
PCA (Tipping and Bishop 1999), which a few thousand rows determine where H is thousands. The adapter is off because
training for a few labels collapses features that labels do not need (van Amersfoort et al. 2021, arXiv 2102.11409).

A label's probability cannot tell this: a model may be sure of nonsense. Neither can the distance tell which answers of
the domain's own rows are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bhpeft.config import Run
from bhpeft.errors import InputError
from bhpeft.tasks import Task
from bhpeft.tasks.example import pick
from bhpeft.tensor_files import TensorFile

FILE = "feature_distance.safetensors"  # in the adapter's folder
COLUMN = "feature_distance"  # of predictions
AXES = 64  # K, at most
ROWS = 5000  # training rows that it is fitted on, at most
LEAST = 8  # rows
TENSORS = ("mean", "axes", "variances", "rest")


@dataclass
class FeatureDistance:
    """The training rows' features, as far as a distance needs them.

    Attributes:
        mean: (H,).
        axes: (K, H), orthonormal rows.
        variances: (K,), above 0.
        rest: the mean variance along each other axis, above 0.
    """

    mean: np.ndarray
    axes: np.ndarray
    variances: np.ndarray
    rest: float

    def of(self, features) -> np.ndarray:
        """(N,) distances d of (N, H) features, 0 or more; about sqrt(H) for rows like the training rows."""
        off = np.asarray(features, dtype=float) - self.mean
        along = off @ self.axes.T
        rest = np.maximum((off**2).sum(1) - (along**2).sum(1), 0)
        return np.sqrt((along**2 / self.variances).sum(1) + rest / self.rest)

    def save(self, folder: str | Path) -> None:
        """Write it into an adapter's folder."""
        from safetensors.numpy import save_file

        tensors = zip(TENSORS, (self.mean, self.axes, self.variances, [self.rest]), strict=True)
        save_file({name: np.ascontiguousarray(x, dtype=np.float32) for name, x in tensors}, Path(folder) / FILE)


def check_distance(run: Run, task: Task) -> None:
    """Raise `InputError` where `--feature_distance` has nothing to measure from; before a model is loaded."""
    if not run.data.feature_distance:
        return
    if not run.training.do_train:
        if read_distance(run.adapter.adapter_path) is None:
            raise InputError(
                f"--feature_distance: {run.adapter.adapter_path} has no {FILE}; train the adapter with this flag, too"
            )
    elif len(task.train) < LEAST:
        raise InputError(f"--feature_distance: {len(task.train)} training rows; it needs {LEAST} at least")


def fit_distance(features, axes: int = AXES) -> FeatureDistance:
    """The distance to rows like these.

    Args:
        features: (N, H) of training rows.
        axes: K, at most; N / 4 and H - 1 bound it, too.

    Raises:
        ValueError: fewer than `LEAST` rows, or rows that are all one.
    """
    features = np.asarray(features, dtype=float)
    rows, width = features.shape
    if rows < LEAST:
        raise ValueError(f"a distance to training rows needs {LEAST} of them at least; here are {rows}")
    mean = features.mean(0)
    _, lengths, directions = np.linalg.svd(features - mean, full_matrices=False)
    variances = lengths**2 / (rows - 1)
    total = variances.sum()
    if not total > 0:
        raise ValueError("the training rows have all the same features")
    least = 1e-6 * total / width
    count = max(1, min(axes, rows // 4, width - 1))
    rest = max(variances[count:].sum() / (width - count), least)
    return FeatureDistance(mean, directions[:count], np.maximum(variances[:count], least), rest)


def read_distance(folder: str | Path) -> FeatureDistance | None:
    """What was saved into an adapter's folder, or None.

    Raises:
        InputError: the file is broken.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    file = TensorFile(path)
    try:
        mean, axes, variances, rest = (np.array(file[name], dtype=float) for name in TENSORS)
    except KeyError as error:
        raise InputError(f"{path}: holds no {error}; train the adapter again.") from None
    good = axes.ndim == 2 and axes.shape == (*variances.shape, *mean.shape) and rest.shape == (1,)
    if not good or not (variances > 0).all() or not rest[0] > 0 or not np.isfinite(axes).all():
        raise InputError(f"{path}: its tensors do not belong together; train the adapter again.")
    return FeatureDistance(mean, axes, variances, float(rest[0]))


def mean_features(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **further) -> torch.Tensor:
    """(B, H) means over tokens of the last hidden states, in float32, of a model whose adapter is off.

    Padding goes to the right first: models of absolute positions, GPT-2 say, count them from a row's beginning, padding
    or not, so that a row would have other features in each batch.

    Args:
        inputs: input_ids and attention_mask, (B, L), or (B, choices, L): then the mean over all choices' tokens.
        further: arguments of the model.
    """
    asked = {name: inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in inputs}
    order = asked["attention_mask"].argsort(dim=-1, descending=True, stable=True)
    asked = {name: value.gather(-1, order) for name, value in asked.items()}
    hidden = model(**asked, output_hidden_states=True, **further).hidden_states[-1].float()
    mask = asked["attention_mask"].to(hidden.device).float()
    rows = len(mask)
    hidden, mask = hidden.reshape(rows, -1, hidden.shape[-1]), mask.reshape(rows, -1, 1)
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


def chosen(rows: Sequence, seed: int) -> list:
    """At most `ROWS` of the rows, drawn by the seed, in their order."""
    if len(rows) <= ROWS:
        return list(rows)
    places = np.sort(np.random.default_rng(seed).choice(len(rows), ROWS, replace=False))
    return list(pick(rows, places.tolist()))
