"""Logits at labelled positions alone: an answer of two tokens needs two rows of logits, not one for every token.

Of a causal model with V tokens in its vocabulary, the logits of (B, L) tokens are B L V numbers, several times over: as
computed, in float32 for the loss, and their gradient. With V = 50,000 that is more than all layers together. Where
labels stand at the end of each row, all but a few of them are thrown away. transformers' `logits_to_keep` names the
positions to compute, the same for all rows of a batch, and `shift_labels` what each foresees (`at_labels`). Where rows
end at different places, most of those have no label still: the output matrix gets the rest (`labelled_alone`).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import nn

IGNORED = -100


def takes_positions(model: nn.Module) -> bool:
    """Whether a model can be told at which positions to compute logits."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def virtual_tokens_of(model: nn.Module) -> int:
    """How many learned tokens the model puts before each row: prompt tuning's, else 0."""
    return getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0


def at_labels(batch: dict[str, torch.Tensor], virtual_tokens: int = 0) -> dict[str, torch.Tensor]:
    """A batch whose loss comes of the logits it needs, and is the same.

    Args:
        batch: with `labels` (B, L), -100 where there is none; a label is foreseen by the position before it.
        virtual_tokens: how many the model puts before each row.

    Returns:
        The batch with `logits_to_keep` (K,), all positions that foresee a label of any row, and `shift_labels` (B, K).
    """
    following = nn.functional.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]
    places = (following != IGNORED).any(0).nonzero()[:, 0]
    if not len(places):
        return batch
    return {**batch, "logits_to_keep": places + virtual_tokens, "shift_labels": following[:, places].contiguous()}


@contextlib.contextmanager
def labelled_alone(model: nn.Module, batch: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Within the block the model's output matrix multiplies nothing but the N positions that foresee a label.

    Args:
        batch: as of `at_labels`.

    Yields:
        The batch with `shift_labels` (1, N), whose loss is the same; the logits that come with it are (1, N, V).
    """
    labels = batch.get("shift_labels")
    if labels is None:
        yield batch
        return
    places = (labels.flatten() != IGNORED).nonzero()[:, 0]

    def choose(module: nn.Module, args: tuple) -> tuple:
        return (args[0].flatten(0, 1)[places][None], *args[1:])  # (B, K, H) -> (1, N, H)

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hook = base.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        yield {**batch, "shift_labels": labels.flatten()[places][None]}
    finally:
        hook.remove()
