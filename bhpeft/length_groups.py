"""Rows of like length together, as transformers' `LengthGroupedSampler` puts them, in an order by seed and epoch.

shuffled; cut into 50 batches' worth, each sorted by length, longest first; the longest of all at the very front

The parent shuffles by torch's global generator. That is at another place where a run goes on in the middle of an epoch,
which would then meet some rows twice and others never; and on each rank, once dropout has drawn for batches of other
widths, although ranks must cut one and the same order into their shares.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

AT_A_TIME = 4096  # places made Python's integers


class LengthGroups(LengthGroupedSampler):
    """As its parent, with `lengths` an array, (rows,) int32, no list of all places, and an order of its own.

    Attributes:
        seed: of the run's data.
        epoch: counted from 0; to be set before each.
    """

    def __init__(self, batch_size: int, lengths: np.ndarray, seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def __iter__(self) -> Iterator[int]:
        rows, lengths = len(self.lengths), self.lengths
        together = self.batch_size * (min(rows // (self.batch_size * 4), 50) or 1)
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(rows, generator=generator).numpy()
        for start in range(0, rows, together):
            part = order[start : start + together]
            order[start : start + together] = part[np.argsort(-lengths[part], kind="stable")]
        longest = together * int(np.argmax(lengths[order[::together]]))
        order[[0, longest]] = order[[longest, 0]]
        return (place for start in range(0, rows, AT_A_TIME) for place in order[start : start + AT_A_TIME].tolist())
