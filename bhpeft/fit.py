"""A training from its first step or from a checkpoint to the saved adapter, and what is said of how it went."""

from __future__ import annotations

import torch

from bhpeft.errors import RunError
from bhpeft.record import say
from bhpeft.sharded_state import trained
from bhpeft.training import AdapterTrainer, gathered
from bhpeft.watch import Watch, stuck


def fit(trainer: AdapterTrainer, checkpoint: str | None = None) -> None:
    """Train, and save the adapter. Every rank must call it, the weights whole: before DeepSpeed takes the model.

    Args:
        checkpoint: folder to go on from.

    Raises:
        Stopped: SIGTERM came; a checkpoint is saved.
        RunError: the loss or a gradient was not finite, or the weights are at the end what they were at first.
    """
    parameters = trained(trainer.model)
    before = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
    watch = Watch(trainer)
    trainer.add_callback(watch)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        watch.leave()
    if not moved(before, parameters):
        raise RunError(
            "not one of the adapter's weights has moved, so it is not saved: is --lr 0, or too small for the precision?"
        )
    if line := stuck(trainer.state.log_history):
        say(line)
    trainer.save_model()


def moved(before: dict[str, torch.Tensor], parameters: dict[str, torch.nn.Parameter]) -> bool:
    """Whether any weight is another than before, in the precision that it has now. Every rank must call it."""
    with gathered(list(parameters.values())):
        return any(
            not torch.equal(before[name].to(parameter.dtype), parameter.detach().cpu())
            for name, parameter in parameters.items()
        )
