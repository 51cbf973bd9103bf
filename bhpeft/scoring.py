"""Scores of texts by a model that no trainer holds: for the demo, and for searches on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from peft import PeftModel

from bhpeft.adapters import drawn_noise, posterior_noise
from bhpeft.adapters.posterior import sampled
from bhpeft.prediction import label_log_likelihoods
from bhpeft.tasks.encoding import Collator


def _scores(model: PeftModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return label_log_likelihoods(model, **batch) if "label_ids" in batch else model(**batch).logits


def score(
    model: PeftModel, rows: Sequence[dict], pad_token_id: int, batch_size: int, samples: int = 0, seed: int = 0
) -> np.ndarray:
    """Scores of N texts under S weights, or under the weights as they are (S is 1 then).

    Args:
        rows: as of `test_rows` of an encoder.
        batch_size: rows a forward pass, each sample counted.
        samples: drawn from the posterior, the same for every batch; 0: none.

    Returns:
        (S, N, C) logits of the head, or log-likelihoods of the labels where rows have `label_ids`.
    """
    collate, device = Collator(pad_token_id), next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]), reverse=True)  # texts of like length
    step = max(1, batch_size // max(samples, 1))
    noise, parts = drawn_noise(model, samples, seed) if samples else None, []
    for start in range(0, len(rows), step):
        batch = collate([rows[i] for i in order[start : start + step]])
        batch = {name: value.to(device) for name, value in batch.items() if name != "index"}
        with torch.no_grad(), posterior_noise(model, samples, noise=noise) if samples else nullcontext():
            found = sampled(partial(_scores, model), batch, samples) if samples else _scores(model, batch)[None]
        parts.append(found.float().cpu().numpy().astype(np.float64))
    together = np.concatenate(parts, axis=1)
    scores = np.empty_like(together)
    scores[:, order] = together
    return scores
