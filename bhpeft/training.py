"""Training: `transformers.Trainer` with what it lacks: the KL term, answers, saving sharded adapters."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import GenerationConfig, Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from bhpeft.adapters.bh_peft import kl_divergence, kl_gradient_norm, mean_sigma, nll_gradient_norm
from bhpeft.adapters.carry import Anchor
from bhpeft.adapters.posterior import posterior_noise
from bhpeft.labelled_logits import at_labels, takes_positions, virtual_tokens_of
from bhpeft.mc_dropout import batch_seed, dropout_noise
from bhpeft.prediction import Answers, generate, label_log_likelihoods, seeded
from bhpeft.tasks.card import TaskCard


class AdapterTrainer(Trainer):
    """Trains the adapter of a frozen model, answers, and saves the adapter alone.

    Everything else (sharding, accumulation, checkpoints, logging, resuming) is the Trainer's.
    """

    generation_config: GenerationConfig | None = None  # None: labels are scored and no text is generated
    sampling_config: GenerationConfig | None = None  # beside it: texts are generated a second time, drawn
    kl_weight: float = 1.0
    posterior_samples: int = 0  # S > 0: rows to answer are scored under S weights drawn from the posterior as well
    mc_dropout_samples: int = 0  # S > 0: the same under S masks of dropout
    card: TaskCard | None = None  # written beside the adapter
    anchor: Anchor | None = None  # holds weights to those of the round before, by l2_weight / 2 |theta - theta_0|^2
    l2_weight: float = 0.0

    def __init__(self, *args, with_head: bool = False, **kwargs):
        """Args:
        with_head: the model answers by a head of its own. Its loss is the mean over a micro-batch: it takes no
            count of items, although the Trainer thinks so of every forward with **kwargs.
        """
        super().__init__(*args, **kwargs)
        self.with_head = with_head
        self.keeps_labelled = not with_head and takes_positions(self.model)
        if with_head:
            self.model_accepts_loss_kwargs = False
        self._terms: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._scale: torch.Tensor | None = None  # what the loss is multiplied by before its gradient is taken
        self._parts = 1  # of how many micro-steps a step's loss is the sum

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean NLL + kl_weight * KL / N + l2_weight / 2 |theta - theta_0|^2, N training rows: one scalar, one backward
        pass; the last two where there are Gaussian weights, and an anchor.

        With `kl_weight` 1 this is the negative ELBO per row (Blundell et al. 2015, equation 8, spread over batches).
        """
        if self.keeps_labelled and "labels" in inputs:
            inputs = at_labels(inputs, virtual_tokens_of(self.model)) | {"use_cache": False}
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        kl = kl_divergence(self.model) if model.training else None
        anchor = self.anchor if model.training else None
        if kl is None and anchor is None:
            return result
        nll, *outputs = result if return_outputs else (result,)
        # Where the NLL is divided by the tokens of all micro-steps of a step, the Trainer sums over them.
        summed = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        self._parts = self.current_gradient_accumulation_steps if summed else 1
        self._terms["nll"].append(nll.detach() * self._parts)
        loss = nll
        if kl is not None:
            if nll.requires_grad:
                nll.register_hook(self._note_scale)
            share = self.kl_weight / len(self.train_dataset)
            loss = loss + self._add("kl", kl, share).to(nll)
            self._terms["kl_grad_norm"].append(share * kl_gradient_norm(self.model))
            self._terms["sigma"].append(mean_sigma(self.model))
        if anchor is not None:
            loss = loss + self._add("l2", anchor.distance_square(), self.l2_weight / 2).to(nll)
        return (loss, *outputs) if return_outputs else loss

    def _add(self, name: str, value: torch.Tensor, weight: float) -> torch.Tensor:
        """A term of the loss of one micro-step, once its value and its part of the loss are noted for the log."""
        term = weight * value / self._parts
        self._terms[name].append(value.detach())
        self._terms[f"{name}_term"].append(term.detach())
        return term

    def _note_scale(self, gradient: torch.Tensor) -> None:
        self._scale = gradient.detach()

    def training_step(self, *args, **kwargs):
        """One micro-step; beside it the norm of the NLL's gradient by the Gaussian weights (this rank's rows).

        The loss is scaled for fp16 and divided over accumulated micro-steps: what flows back into the NLL is that
        factor, and is taken out again.
        """
        self._scale = None
        loss = super().training_step(*args, **kwargs)
        if self._scale is not None:
            self._terms["nll_grad_norm"].append(nll_gradient_norm(self.model) / self._scale * self._parts)
        return loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Beside the loss: NLL, KL (nats), its part of the loss, both gradients' norms by the Gaussian weights, and the
        mean sigma; the squared distance to the anchor and its part; each the mean over the micro-steps since the last
        log."""
        if "loss" in logs:
            for name, values in self._terms.items():
                logs[name] = round(torch.stack(values).mean().item(), 6)
            self._terms.clear()
        super().log(logs, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """For rows to answer (`test_rows` of an encoder) their index, tokens and scores; else as usual."""
        if "index" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        index = inputs.pop("index")
        outputs = [index]
        with torch.no_grad(), self.compute_loss_context_manager():
            if self.generation_config is not None:
                # Not through `model`, DeepSpeed's wrapper: it has no generate. The layers gather their shards.
                prompts = inputs["input_ids"], inputs["attention_mask"]
                outputs.append(generate(self.model, *prompts, self.generation_config))
                if self.sampling_config is not None:
                    with seeded(batch_seed(self.args.seed, index), index.device):
                        outputs.append(generate(self.model, *prompts, self.sampling_config))
            outputs.append(self._scores(model, inputs))
            if self.posterior_samples or self.mc_dropout_samples:
                outputs.append(self._sampled_scores(model, inputs, index))
        return None, tuple(outputs), None

    def _scores(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, C) logits of the head, or log-likelihoods of `label_ids`."""
        if self.with_head:
            return model(**inputs).logits.float()
        return label_log_likelihoods(model, inputs["input_ids"], inputs["attention_mask"], inputs["label_ids"])

    def _sampled_scores(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], index: torch.Tensor
    ) -> torch.Tensor:
        """(B, S, C) scores in one pass, under S weights (the same for every batch and rank) or S masks of dropout."""
        if count := self.posterior_samples:
            noise = posterior_noise(self.model, count, seed=self.args.seed)
        else:
            count = self.mc_dropout_samples
            noise = dropout_noise(self.model, batch_seed(self.args.seed, index))
        with noise:
            repeated = {name: value.repeat(count, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
            return self._scores(model, repeated).unflatten(0, (count, -1)).transpose(0, 1).contiguous()

    def answer(self, rows: Sequence[dict]) -> Answers:
        """Answer test rows on all ranks and gather the answers, in the rows' order.

        Args:
            rows: as of `test_rows` of an encoder.
        """
        index, *found = self.predict(rows).predictions
        # Ranks take equal numbers of rows, so some rows are answered twice, and rows of like length together: the
        # index brings each back to its place once.
        _, first = np.unique(index, return_index=True)
        if len(first) != len(rows):
            raise RuntimeError(f"{len(first)} of {len(rows)} test rows were answered")
        found = [part[first] for part in found]
        samples = found.pop() if self.posterior_samples or self.mc_dropout_samples else None
        scores = found.pop()
        tokens, drawn = (*found, None, None)[:2]
        return Answers(index[first], tokens, scores, samples, drawn)

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
        if self.card is not None and self.args.should_save:
            self.card.write(output_dir or self.args.output_dir)
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
        """Called by the Trainer."""
        self.function()
