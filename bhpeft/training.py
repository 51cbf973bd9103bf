"""Training: `transformers.Trainer` with what it lacks: the KL term, answers, saving sharded adapters."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import GenerationConfig, Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from bhpeft.adapters.bh_peft import kl_divergence, mean_sigma
from bhpeft.prediction import generate, label_log_likelihoods


@dataclass
class Answers:
    """What the model answered to the test rows, in their order, complete on every rank.

    Attributes:
        index: (N,) which example each row is.
        tokens: (N, max_new_tokens) generated token ids.
        log_likelihoods: (N, C) of each label as the opening of the answer, or None without labels.
    """

    index: np.ndarray
    tokens: np.ndarray
    log_likelihoods: np.ndarray | None


class AdapterTrainer(Trainer):
    """Trains the adapter of a frozen model, answers, and saves the adapter alone.

    Everything else (sharding, accumulation, checkpoints, logging, resuming) is the Trainer's.
    """

    generation_config: GenerationConfig
    kl_weight: float = 1.0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._terms: dict[str, list[torch.Tensor]] = defaultdict(list)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean NLL + kl_weight * KL / N, N training rows: one scalar, one backward pass.

        With `kl_weight` 1 this is the negative ELBO per row (Blundell et al. 2015, equation 8, spread over batches).
        """
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        kl = kl_divergence(self.model) if model.training else None
        if kl is None:
            return result
        nll, *outputs = result if return_outputs else (result,)
        term = self.kl_weight * kl / len(self.train_dataset)
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            # Here the Trainer sums over micro-steps, as the NLL is divided by the tokens of all of them already.
            term = term / self.current_gradient_accumulation_steps
        self._terms["kl"].append(kl.detach())
        self._terms["kl_term"].append(term.detach())
        self._terms["sigma"].append(mean_sigma(self.model))
        loss = nll + term.to(nll)
        return (loss, *outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Beside the loss: KL (nats), its part of the loss, and the mean sigma, since the last log."""
        if "loss" in logs:
            for name, values in self._terms.items():
                logs[name] = round(torch.stack(values).mean().item(), 6)
            self._terms.clear()
        super().log(logs, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """For rows to answer (`Encoder.test_rows`) their index, generated tokens and label scores; else as usual."""
        if "index" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        with self.compute_loss_context_manager():
            # Not through `model`, DeepSpeed's wrapper: it has no generate. The layers gather their shards themselves.
            tokens = generate(self.model, ids, mask, self.generation_config)
            outputs = [inputs["index"], tokens]
            if "label_ids" in inputs:
                outputs.append(label_log_likelihoods(model, ids, mask, inputs["label_ids"]))
        return None, tuple(outputs), None

    def answer(self, rows: Sequence[dict]) -> Answers:
        """Answer test rows on all ranks and gather the answers.

        Args:
            rows: as of `Encoder.test_rows`.
        """
        index, tokens, *scores = self.predict(rows).predictions
        # Ranks take equal numbers of rows, so some rows are answered twice: keep each once.
        _, first = np.unique(index, return_index=True)
        if len(first) != len(rows):
            raise RuntimeError(f"{len(first)} of {len(rows)} test rows were answered")
        return Answers(index[first], tokens[first], scores[0][first] if scores else None)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter as a PEFT folder. Every rank must call it.

        Under ZeRO-3 a rank holds shards: the trainable weights are gathered first, and every rank runs peft's
        saving code, because that runs the prompt encoder, whose forward pass is itself collective. Rank 0 writes.
        """
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with gathered(trainable):
            self.model.save_pretrained(
                output_dir or self.args.output_dir,
                is_main_process=self.args.should_save,
                save_embedding_layers=False,  # the base is frozen; looking whether it is would ask the hub
            )
        self.accelerator.wait_for_everyone()


@contextlib.contextmanager
def gathered(parameters: Sequence[torch.nn.Parameter]):
    """Make sharded parameters whole on every rank for the length of the block; do nothing without ZeRO-3."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


class BeforeTraining(TrainerCallback):
    """Calls a function once the model is wrapped and sharded, before the first step."""

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def on_train_begin(self, args, state, control, **kwargs):
        self.function()
