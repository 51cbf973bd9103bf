"""What is behind the last attention, at labelled positions alone: two tokens of an answer need two rows of logits.

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

from bhpeft.adapters.architectures import PLACES, layers_of

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

    So does its last feed-forward block, or few more, where they are less than half of all (`last_block_at`).

    Args:
        batch: as of `at_labels`.

    Yields:
        The batch with `shift_labels` (1, N), whose loss is the same; the logits that come with it are (1, N, V), and
        hidden states of the last layer mean nothing elsewhere.
    """
    labels = batch.get("shift_labels")
    if labels is None:
        yield batch
        return
    labelled = labels != IGNORED
    places = labelled.flatten().nonzero()[:, 0]

    def choose(module: nn.Module, args: tuple) -> tuple:
        return (args[0].flatten(0, 1)[places][None], *args[1:])  # (B, K, H) -> (1, N, H)

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with contextlib.ExitStack() as hooks:
        hooks.callback(base.get_output_embeddings().register_forward_pre_hook(choose).remove)
        few = int(labelled.sum(1).max())
        if 2 * few <= batch["labels"].shape[1]:  # else little would be spared
            # Of each row, in any order, its labelled positions, and so many others that all rows have equally many.
            chosen = labelled.to(torch.uint8).topk(few, 1).indices
            hooks.enter_context(last_block_at(base, batch["logits_to_keep"][chosen]))
        yield {**batch, "shift_labels": labels.flatten()[places][None]}


@contextlib.contextmanager
def last_block_at(base: nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """Within the block the last layer's feed-forward block gets some positions of each row, and gives zero elsewhere.

    Not where layers are computed again in the backward pass, which comes later, or in architectures whose feed-forward
    block is not one module. Dropout in it draws other numbers.

    Args:
        base: a causal model without what peft puts around it.
        positions: (B, K), those of a row all different.
    """
    places = PLACES.get(base.config.model_type)
    if places is None or len(places.feed_forward) > 1 or (layer := layers_of(base)[-1]).gradient_checkpointing:
        yield
        return
    length = 0

    def gather(module: nn.Module, args: tuple) -> tuple:  # (B, L, H) -> (B, K, H)
        nonlocal length
        length = args[0].shape[1]
        return (args[0].gather(1, positions[..., None].expand(-1, -1, args[0].shape[2])), *args[1:])

    def scatter(module: nn.Module, args: tuple, found: torch.Tensor) -> torch.Tensor:  # and back
        whole = found.new_zeros(found.shape[0], length, found.shape[2])
        return whole.scatter(1, positions[..., None].expand_as(found), found)

    block = layer.get_submodule(places.feed_forward[0])
    hooks = [block.register_forward_pre_hook(gather), block.register_forward_hook(scatter)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
