"""What a model answered, as reports take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bhpeft.results import ModelOutput


@dataclass
class Answered:
    """Answers to N test rows.

    Attributes:
        ids: of the examples.
        outputs: queries, answers as text, and expected answers.
        scores: (N, C) log-likelihoods of the labels or logits of the head; (N, 1) of the expected answer where there
            are no labels; (N, 1) numbers in the labels' own units for regression.
        generated: whether the texts were written by the model, or follow from the scores.
        tokens: (N,) lengths of the expected answers in tokens, where their likelihood is scored.
        mean, deviation: of the training rows' numbers, for regression.
        samples: (N, S, C) the scores under S weights drawn from the posterior, where that was asked for.
    """

    ids: Sequence[str]
    outputs: Sequence[ModelOutput]
    scores: np.ndarray
    generated: bool = True
    tokens: np.ndarray | None = None
    mean: float = 0.0
    deviation: float = 1.0
    samples: np.ndarray | None = None
