"""Rows end to end in one, without padding: the same loss from fewer tokens.

    [a1 a2 a3] [b1 b2]  ->  [a1 a2 a3 b1 b2],  positions [0 1 2 0 1]

transformers reads the borders off positions that begin again, and masks each row off from the others; with sdpa and
eager attention, and so with the prefix, which every token sees, the logits are those of the rows alone. Attention is
computed over the whole and masked: what is saved is the padding, in all other layers. With rows grouped by length there
is little padding to begin with.
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from bhpeft.errors import InputError
from bhpeft.tasks.encoding import IGNORED, Collator

# Architectures on which tests hold packed rows to the same logits as rows alone. Others may know no borders, silently.
MODEL_TYPES = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2")


def check_packing(run, config: PretrainedConfig, bayesian: bool, with_head: bool) -> None:
    """Raise `InputError` where `--packing` is asked for and rows end to end are not the rows alone.

    Args:
        run: a `Run`.
        config: of the base model.
    """
    if not run.data.packing:
        return
    if with_head:
        raise InputError("--packing: a head answers a whole text, so texts stand alone; leave it out")
    if config.model_type not in MODEL_TYPES:
        raise InputError(f"--packing: is known to be exact for {', '.join(MODEL_TYPES)}, not for {config.model_type}")
    if run.adapter.adapter_name == "prompt-tuning":
        raise InputError("--packing: virtual tokens stand before one text each; leave it out")
    if bayesian:
        raise InputError("--packing: Gaussian weights are drawn once a row, and rows would share a draw; leave it out")


class PackingCollator(Collator):
    """Training rows -> one row; rows to answer as `Collator` has them."""

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor | bool]:
        if "labels" not in rows[0]:
            return super().__call__(rows)
        ids = [token for row in rows for token in row["input_ids"]]
        # A row's first token is foreseen by none: what stands before it is another row.
        labels = [label for row in rows for label in [IGNORED, *row["labels"][1:]]]
        positions = [i for row in rows for i in range(len(row["input_ids"]))]
        batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
        # With a cache transformers would look for no borders, and every row would see those before it.
        return {name: torch.tensor([values]) for name, values in batch.items()} | {"use_cache": False}
