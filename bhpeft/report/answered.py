"""What a model answered, as reports take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bhpeft.results import ModelOutput
from bhpeft.scores import entropy, probabilities
from bhpeft.uncertainty import predictive_mean, sample_measures


@dataclass
class Answered:
    """Answers to N test rows.

    Attributes:
        ids: of the examples.
        groups: theirs, what must not stand on both sides of a split: a conversation, say.
        outputs: queries, answers as text, and expected answers.
        scores: (N, C) log-likelihoods of the labels or logits of the head; (N, 1) of the expected answer where there
            are no labels; (N, 1) numbers in the labels' own units for regression.
        generated: whether the texts were written by the model, or follow from the scores.
        tokens: (N,) lengths of the expected answers in tokens, where their likelihood is scored.
        mean, deviation: of the training rows' numbers, for regression.
        samples: (N, S, C) the scores under S weights drawn from the posterior or S masks of dropout, where asked for.
        temperature: what scores are divided by before they become probabilities of labels.
        drawn: N texts sampled beside those of `outputs`, where that was asked for.
        distances: (N,) from the training rows in the frozen base's features, where that was asked for.
        noise_sd: deviation of the labels' own noise, in their units, where it is known, for regression.
        noise_samples: how many samples it was measured beside, where that is known.
    """

    ids: Sequence[str]
    outputs: Sequence[ModelOutput]
    scores: np.ndarray
    generated: bool = True
    tokens: np.ndarray | None = None
    mean: float = 0.0
    deviation: float = 1.0
    samples: np.ndarray | None = None
    temperature: float = 1.0
    noise_sd: float | None = None
    noise_samples: int | None = None
    drawn: Sequence[str] | None = None
    distances: np.ndarray | None = None
    groups: Sequence[str] | None = None

    def probabilities(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(N, C) probabilities of the labels, and name -> (N,) `max_prob`, `entropy` (nats) and, where there are
        samples, all of `sample_measures`.

        softmax(scores / temperature); of samples the mean of softmax(sample / temperature).
        """
        if self.samples is None:
            p, measures = probabilities(self.scores / self.temperature), {}
        else:
            p_s = probabilities(self.samples / self.temperature).transpose(1, 0, 2)  # (S, N, C)
            p, measures = predictive_mean(p_s), sample_measures(p_s)
        return p, {"max_prob": p.max(axis=1), "entropy": entropy(p)} | measures

    def numbers(self) -> tuple[np.ndarray, np.ndarray]:
        """(N,) predictions of numbers, the mean of the samples where there are some, and (N,) the samples' population
        deviation: the epistemic one, 0 without samples."""
        if self.samples is None:
            return self.scores[:, 0].astype(float), np.zeros(len(self.scores))
        return self.samples[:, :, 0].mean(axis=1), self.samples[:, :, 0].std(axis=1)
