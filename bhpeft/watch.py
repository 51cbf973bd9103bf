"""What is looked at after every step: whether the run was told to stop, and whether its numbers are numbers."""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from bhpeft.checkpoints import newest
from bhpeft.environment import wait_for_all
from bhpeft.errors import RunError, Stopped

if TYPE_CHECKING:
    from bhpeft.training import AdapterTrainer

SKIPS = 15  # steps in a row that the fp16 scaler may skip: from 2^16 it has then come down to 2
LOGGED = 8  # losses from which on a loss that does not fall is worth a word
ROWS = 8  # of a bad batch that are named


class Watch(TrainerCallback):
    """Ends training at the end of a step, on all ranks at once, for either of two reasons.

    SIGTERM, on any rank: a checkpoint is saved, then `Stopped`.
    A loss or a gradient that is not finite: `RunError`, and nothing of the step is saved. Under fp16 a gradient may
    overflow, `SKIPS` times in a row at most: its scaler skips the step and comes down.
    """

    def __init__(self, trainer: AdapterTrainer):
        self.trainer = trainer
        self.told = self.stopping = False
        self.skipped = 0
        self.before = None  # the handler of SIGTERM outside of training

    def on_train_begin(self, args, state, control, **kwargs):
        """From here on SIGTERM is heeded at the end of a step."""
        self.told = self.stopping = False
        self.skipped = 0
        self.before = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number, frame) -> None:
        self.told = True

    def leave(self) -> None:
        """SIGTERM does again what it did before training."""
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
            self.before = None

    def on_step_begin(self, args, state, control, **kwargs):
        """Called by the Trainer before the first micro-step of a step."""
        self.trainer.step_loss = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        """Called by the Trainer before it logs, evaluates and saves."""
        loss, gradient = not math.isfinite(self.trainer.step_loss), self._bad_gradient()
        told, loss, gradient = any_rank([self.told, loss, gradient], args.device)
        if loss or gradient:
            raise RunError(self._what_went_wrong(loss))
        if told:
            self.stopping = control.should_save = True
            control.should_evaluate = args.load_best_model_at_end and control.should_evaluate

    def on_save(self, args, state, control, **kwargs):
        """Called by the Trainer once a checkpoint is written."""
        if self.stopping:
            wait_for_all()
            where = f"{args.output_dir}/checkpoint-{state.global_step}"
            raise Stopped(f"SIGTERM at step {state.global_step}; saved {where}: the same command with --resume goes on")

    def _bad_gradient(self) -> bool:
        """Whether this step's gradient is not finite, and not for the fp16 scaler to deal with."""
        trainer = self.trainer
        skipped = trainer.accelerator.optimizer_step_was_skipped
        if not skipped and math.isfinite(trainer.step_gradient):
            self.skipped = 0
            return False
        self.skipped += 1
        return not trainer.args.fp16 or self.skipped > SKIPS

    def _what_went_wrong(self, loss: bool) -> str:
        trainer = self.trainer
        what = "the loss" if loss else "the gradient"
        often = f" for the {self.skipped}th time in a row" if self.skipped > 1 else ""
        bad = not loss or not math.isfinite(trainer.step_loss)
        rows = gather_object(rows_of(trainer) if bad else [])
        more = f" and {len(rows) - ROWS} more" if len(rows) > ROWS else ""
        checkpoint, _ = newest(Path(trainer.args.output_dir))
        return (
            f"{what} is not finite at step {trainer.state.global_step}{often}, with training rows "
            f"{'; '.join(rows[:ROWS])}{more}. Nothing of it is saved; last good checkpoint: {checkpoint or 'none'}. "
            "Look at the rows, or lower --lr"
        )


def any_rank(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Each flag, True where it is on any rank. Every rank must call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return list(flags)
    both = torch.tensor(flags, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in both.tolist()]


def rows_of(trainer: AdapterTrainer) -> list[str]:
    """The training rows of this rank's micro-batch: their places, counted from 0, and how their texts begin."""
    texts = [tuple(tokens) for tokens in texts_of(trainer.step_inputs)]
    places: dict[tuple[int, ...], int | str] = dict.fromkeys(texts, "?")
    for place, row in enumerate(trainer.train_dataset):
        nested = isinstance(row["input_ids"][0], list)
        for ids in row["input_ids"] if nested else [row["input_ids"]]:
            if tuple(ids) in places:
                places[tuple(ids)] = place
    found = {}
    for tokens in texts:
        text = trainer.processing_class.decode(tokens, skip_special_tokens=True)
        found.setdefault(places[tokens], " ".join(text.split())[:40])
    return [f"{place} {text!r}" for place, text in found.items()]


def texts_of(inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    """The token ids of each text of a batch, padding left out, packed rows apart."""
    ids = inputs["input_ids"].flatten(0, -2)  # (B, L), or (B * choices, L)
    if "attention_mask" in inputs:
        masks = inputs["attention_mask"].flatten(0, -2).bool()
        return [row[mask].tolist() for row, mask in zip(ids, masks, strict=True)]
    starts = (inputs["position_ids"].flatten() == 0).nonzero().flatten()[1:].tolist()
    return [part.tolist() for part in ids.flatten().tensor_split(starts)]


def stuck(history: Sequence[dict]) -> str | None:
    """A line on a loss that never fell: the mean of its last quarter is no lower than that of its first."""
    losses = [entry["loss"] for entry in history if "loss" in entry]
    part = len(losses) // 4
    if len(losses) < LOGGED:
        return None
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    if last < first:
        return None
    return f"the loss has not fallen: {first:.4g} at the beginning, {last:.4g} at the end; try another --lr"
