"""Training: `transformers.Trainer` with what it lacks: the KL term, answers, saving sharded adapters."""

from __future__ import annotations

import contextlib
import gc
import math
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import DynamoBackend, gather_object
from transformers import GenerationConfig, Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from bhpeft.adapters.bh_peft import (
    gaussian_layers,
    kl_divergence,
    kl_gradient_norm,
    mean_sigma,
    nll_gradient_norm,
)
from bhpeft.adapters.carry import Anchor
from bhpeft.adapters.posterior import drawn_noise, posterior_noise, sampled
from bhpeft.checkpoints import PARTIAL, STATE, keep_last, move_into, seal, writing
from bhpeft.feature_distance import FeatureDistance, mean_features
from bhpeft.labelled_logits import at_labels, labelled_alone, takes_positions, virtual_tokens_of
from bhpeft.length_groups import LengthGroups
from bhpeft.mc_dropout import batch_seed, dropout_noise
from bhpeft.prediction import Answers, generate, label_log_likelihoods, seeded
from bhpeft.sharded_state import load_sharded, save_sharded
from bhpeft.tasks.card import TaskCard
from bhpeft.tasks.token_rows import tokens_of

SCHEDULER = "scheduler.pt"


class AdapterTrainer(Trainer):
    """Trains the adapter of a frozen model, answers, and saves the adapter alone.

    Everything else (sharding, accumulation, checkpoints, logging, resuming) is the Trainer's.
    """

    generation_config: GenerationConfig | None = None  # None: labels are scored and no text is generated
    sampling_config: GenerationConfig | None = None  # beside it: texts are generated a second time, drawn
    kl_weight: float = 1.0
    posterior_samples: int = 0  # S > 0: rows to answer are scored under S weights drawn from the posterior as well
    mc_dropout_samples: int = 0  # S > 0: the same under S masks of dropout
    feature_distance: FeatureDistance | None = None  # of the training rows: rows to answer get theirs
    card: TaskCard | None = None  # written beside the adapter
    anchor: Anchor | None = None  # holds weights to those of the round before, by l2_weight / 2 |theta - theta_0|^2
    l2_weight: float = 0.0
    settings: dict | None = None  # what the run's result depends on, written into its checkpoints
    groups: LengthGroups | None = None  # what puts rows of like length together
    step_loss: float = 0.0  # of the last micro-step, or of the first of a step that was not finite: for `Watch`
    step_gradient: float = 0.0  # norm
    step_inputs: dict[str, torch.Tensor]

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
        self.gaussian = gaussian_layers(self.model)  # each step needs both lists: the model is gone over once
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._weights: int | None = None
        self._gathers_features = False
        self._noise: list[torch.Tensor] | None = None  # of the posterior samples, while rows are answered
        self._terms: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._scale: torch.Tensor | None = None  # what the loss is multiplied by before its gradient is taken
        self._parts = 1  # of how many micro-steps a step's loss is the sum

    def _get_train_sampler(self, train_dataset=None):
        """As the Trainer's; grouped by length, in an order that resuming and other ranks meet again."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths = getattr(rows, "lengths", None)
        if lengths is None:
            lengths = np.array([tokens_of(row) for row in rows], np.int32)
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.groups = LengthGroups(together, lengths, seed)
        return self.groups

    def train(self, *args, **kwargs):
        """As the Trainer's. Python's collector leaves out the million objects that were there before: going over them
        again and again was up to a twentieth of a small model's time."""
        gc.collect()
        gc.freeze()
        self.model.zero_grad = self._drop_gradients
        try:
            return super().train(*args, **kwargs)
        finally:
            del self.model.zero_grad
            gc.unfreeze()

    def _drop_gradients(self) -> None:
        for parameter in self.trained:
            parameter.grad = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean NLL + kl_weight * KL / N + l2_weight / 2 |theta - theta_0|^2, N training rows: one scalar, one backward
        pass; the last two where there are Gaussian weights, and an anchor.

        With `kl_weight` 1 this is the negative ELBO per row (Blundell et al. 2015, equation 8, spread over batches).
        """
        if self.keeps_labelled and "labels" in inputs and self.label_smoother is None:  # it wants logits as labels lie
            inputs = at_labels(inputs, virtual_tokens_of(self.model)) | {"use_cache": False}
        # The choices of a question, (B, choices, L), are scored by one weight, as they are where it is sampled.
        together = inputs["input_ids"].shape[1] if inputs["input_ids"].dim() == 3 else 1
        for layer in self.gaussian:
            layer.rows_an_example = together
        # Compiled, by --torch_compile or by accelerate's own configuration, the model would be so anew for each number
        # of labelled positions.
        compiled = self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
        with contextlib.nullcontext(inputs) if compiled else labelled_alone(self.model, inputs) as inputs:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        kl = kl_divergence(self.gaussian) if model.training else None
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
            self._terms["kl_grad_norm"].append(share * kl_gradient_norm(self.gaussian))
            self._terms["sigma"].append(mean_sigma(self.gaussian))
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

    def training_step(self, model, inputs, *args, **kwargs):
        """One micro-step; beside it the norm of the NLL's gradient by the Gaussian weights (this rank's rows).

        The loss is scaled for fp16 and divided over accumulated micro-steps: what flows back into the NLL is that
        factor, and is taken out again.
        """
        self._scale = None
        loss = super().training_step(model, inputs, *args, **kwargs)
        if math.isfinite(self.step_loss):
            self.step_loss, self.step_inputs = loss.item(), inputs
        if self._scale is not None:
            self._terms["nll_grad_norm"].append(nll_gradient_norm(self.gaussian) / self._scale * self._parts)
        return loss

    # The Trainer goes over all modules of the model for any of these (and for zero_grad), in every step.

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        """6 x tokens x weights but those of embeddings (Kaplan et al. 2020, arXiv 2001.08361), as the Trainer's."""
        if self._weights is None:
            self._weights = self.model.num_parameters(exclude_embeddings=True)
        return 6 * inputs["input_ids"].numel() * self._weights

    def _clip_grad_norm(self, model):
        return self.accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm)

    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)
        self.step_gradient = 0.0 if norm is None else float(norm)
        return norm

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
            if self._gathers_features:
                return None, (index, self._features(model, inputs)), None
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
            if self.feature_distance is not None:
                distances = self.feature_distance.of(self._features(model, inputs).cpu().numpy())
                outputs.append(torch.from_numpy(distances).to(index.device))
        return None, tuple(outputs), None

    def _scores(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, C) logits of the head, or log-likelihoods of `label_ids`."""
        if self.with_head:
            return model(**inputs).logits.float()
        return label_log_likelihoods(model, inputs["input_ids"], inputs["attention_mask"], inputs["label_ids"])

    def _features(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, H) of the frozen base: a pass of its own, the adapter off."""
        further = {"logits_to_keep": 1} if self.keeps_labelled else {}
        with self.model.disable_adapter():
            return mean_features(model, inputs, **further)

    def _sampled_scores(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], index: torch.Tensor
    ) -> torch.Tensor:
        """(B, S, C) scores under S weights (the same for every batch and rank) or S masks of dropout."""
        if count := self.posterior_samples:
            if self._noise is None:
                self._noise = drawn_noise(self.model, count, self.args.seed)
            with posterior_noise(self.model, count, noise=self._noise):
                return sampled(lambda part: self._scores(model, part), inputs, count).transpose(0, 1).contiguous()
        count = self.mc_dropout_samples
        with dropout_noise(self.model, batch_seed(self.args.seed, index)):
            repeated = {name: value.repeat(count, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
            return self._scores(model, repeated).unflatten(0, (count, -1)).transpose(0, 1).contiguous()

    def answer(self, rows: Sequence[dict]) -> Answers:
        """Answer test rows on all ranks and gather the answers, in the rows' order.

        Args:
            rows: as of `test_rows` of an encoder.
        """
        index, *found = self._in_order(rows)
        distances = found.pop() if self.feature_distance is not None else None
        samples = found.pop() if self.posterior_samples or self.mc_dropout_samples else None
        scores = found.pop()
        tokens, drawn = (*found, None, None)[:2]
        return Answers(index, tokens, scores, samples, drawn, distances)

    def features(self, rows: Sequence[dict]) -> np.ndarray:
        """(N, H) features of the frozen base (`feature_distance.py`), of rows as `answer` takes them, on all ranks."""
        self._gathers_features = True
        try:
            return self._in_order(rows)[1]
        finally:
            self._gathers_features = False

    def _in_order(self, rows: Sequence[dict]) -> list[np.ndarray]:
        """What `prediction_step` gives for rows to answer, gathered: ranks take equal numbers of rows, so some rows are
        answered twice, and rows of like length together; the index, which comes first, puts each in its place once."""
        try:
            index, *found = self.predict(rows).predictions
        finally:
            self._noise = None
        _, first = np.unique(index, return_index=True)
        if len(first) != len(rows):
            raise RuntimeError(f"{len(first)} of {len(rows)} test rows were answered")
        return [index[first], *(part[first] for part in found)]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter as a PEFT folder. Every rank must call it.

        Under ZeRO-3 a rank holds shards: the trainable weights are gathered first, and every rank runs peft's
        saving code, because that runs the prompt encoder, whose forward pass is itself collective. Rank 0 writes.
        """
        target = Path(output_dir or self.args.output_dir)
        beside = target / PARTIAL
        if self.args.should_save:
            shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with gathered(trainable), writing(target):
            self.model.save_pretrained(
                str(beside),
                is_main_process=self.args.should_save,
                save_embedding_layers=False,  # the base is frozen; looking whether it is would ask the hub
            )
        if self.args.should_save:
            with writing(target):
                if self.card is not None:
                    self.card.write(beside)
                move_into(beside, target)
        self.accelerator.wait_for_everyone()

    # What follows is the Trainer's own way of saving and resuming, but for three things: a checkpoint is written beside
    # and sealed, ZeRO-3's part of it is whole, and rank 0 alone writes.

    def _save_checkpoint(self, model, trial) -> None:
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        beside = folder / PARTIAL
        if self.args.should_save:
            shutil.rmtree(beside, ignore_errors=True)
        self.args.output_dir = str(beside)
        try:
            with writing(folder / name):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(folder)
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder / name)
        if self.args.should_save:
            with writing(folder / name):
                self.state.save_to_json(str(beside / name / STATE))
                seal(beside / name, folder / name, self.settings)
                beside.rmdir()
            keep_last(folder, self.state.global_step, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_deepspeed_zero3_enabled():
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_sharded(self.model_wrapped, output_dir, self.args.should_save)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _save_rng_state(self, output_dir: str) -> None:
        with tempfile.TemporaryDirectory() as own:
            super()._save_rng_state(own)
            states = gather_object([(file.name, file.read_bytes()) for file in Path(own).iterdir()])
        if self.args.should_save:
            for name, state in states:
                (Path(output_dir) / name).write_bytes(state)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        whole = resume_from_checkpoint if is_deepspeed_zero3_enabled() else None
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None if whole else resume_from_checkpoint)
        if whole:
            load_sharded(self.model_wrapped, whole)
            self.lr_scheduler.load_state_dict(torch.load(Path(whole) / SCHEDULER, weights_only=True))
        return prepared

    def _load_best_model(self) -> None:
        if is_deepspeed_zero3_enabled():
            load_sharded(self.model_wrapped, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _run_epoch(self, *args, epoch: int, **kwargs) -> None:
        if self.groups is not None:  # accelerate's set_epoch does not reach a sampler behind its shards
            self.groups.epoch = epoch
        if self.state.global_step >= self.state.max_steps:  # resumed behind the last; the Trainer would take another
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, epoch=epoch, **kwargs)


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
