"""The flags of training: those of `transformers.TrainingArguments`, with short names, defaults and checks of ours."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from bhpeft.arguments import OWN_CLASSES, option
from bhpeft.errors import InputError

UNSET_OUTPUT_DIR = "trainer_output"  # what TrainingArguments puts where no --output_dir is given
INSTEAD = {  # flags of TrainingArguments that are refused, and what does the same
    "push_to_hub": "publish the adapter's folder once you have read its card, with `hf upload`",
    "hub_token": "a token on the command line is read by others; set HF_TOKEN, or log in with `hf auth login`",
    "save_only_model": "a checkpoint holds what --resume needs; the adapter alone is in the run's own folder",
    "fsdp": "models are sharded by DeepSpeed ZeRO-3: accelerate launch --config_file ds_zero3_cpu.yaml",
}
OF_A_MODEL = ("galore", "apollo", "lomo")  # optimizers that are made for a model's layers


@dataclass
class TrainerArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the source projects' short names and this project's defaults."""

    output_dir: str | None = option(None, "folder of the adapter and its checkpoints (default: adapters/RUN_NAME)")
    do_train: bool = option(True, "train; with false the adapter of --adapter_path is only tested")
    do_eval: bool = option(False, "compute the loss on held-out validation rows")
    do_predict: bool = option(True, "answer the test rows and write them into the results")
    learning_rate: float = option(2e-4, "peak learning rate of AdamW", "--lr")
    per_device_train_batch_size: int = option(8, "rows per rank and micro-step in training", "--batch_size")
    per_device_eval_batch_size: int = option(16, "rows per rank and step in evaluation", "--eval_batch_size")
    num_train_epochs: float = option(3.0, "passes over the training rows", "--epochs")
    save_strategy: str = option("epoch", "when checkpoints are written: no, epoch or steps")
    save_total_limit: int | None = option(2, "checkpoints kept")
    remove_unused_columns: bool = option(False, "drop columns the model's forward does not take (rows have none)")
    logging_steps: float = option(10, "steps between two logged losses")
    report_to: str | None = option("none", "TensorBoard, W&B and others, by the names transformers uses")
    data_seed: int | None = option(42, "seed of the data's split, and of the order of rows")

    def __post_init__(self):
        if not 0 <= self.learning_rate < math.inf:
            raise InputError(f"--learning_rate {self.learning_rate}: must be 0 or more")
        for name in ("num_train_epochs", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"--{name} {getattr(self, name)}: must be 0 or more")
        if self.max_steps != -1 and self.max_steps < 1:
            raise InputError(f"--max_steps {self.max_steps}: must be at least 1 (default: as many as --epochs take)")
        for name in ("logging_steps", "save_steps"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"--{name} {getattr(self, name)}: must be above 0")
        for name, instead in INSTEAD.items():
            if getattr(self, name):
                raise InputError(f"--{name}: not here; {instead}")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("seed", "data_seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 0 and below 2**32")
        for name in ("remove_unused_columns", "dataloader_drop_last"):
            if getattr(self, name):
                raise InputError(f"--{name}: not here; every row is answered, and rows hold what answering needs")
        if not self.eval_do_concat_batches:
            raise InputError("--eval_do_concat_batches false: not here; answers are put in the rows' order whole")
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            self.metric_for_best_model = "eval_loss"
        if self.metric_for_best_model not in (None, "loss", "eval_loss"):
            raise InputError(
                f"--metric_for_best_model {self.metric_for_best_model}: checkpoints are told apart by their loss on "
                "validation rows alone; give eval_loss, or leave it out"
            )
        super().__post_init__()
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            if isinstance(getattr(self, name, None), str):
                raise InputError(f"--{name} {getattr(self, name)}: must be a mapping in JSON")
            if (getattr(self, name, None) or {}).get("use_reentrant"):
                raise InputError(
                    f"--{name} use_reentrant: not here; its first pass keeps no graph, so that the KL of Gaussian "
                    "weights would have no gradient; leave it out"
                )
        if isinstance(self.lr_scheduler_kwargs, str):
            raise InputError(f"--lr_scheduler_kwargs {self.lr_scheduler_kwargs}: must be a mapping in JSON")
        if self.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
            raise InputError("--use_liger_kernel: liger-kernel is not installed; pip install it, or leave it out")
        if self.eval_on_start and not self.do_eval:
            raise InputError("--eval_on_start: there are no validation rows; give --do_eval as well")
        missing = set(self.report_to) - set(get_available_reporting_integrations())
        if missing:
            raise InputError(f"--report_to {', '.join(sorted(missing))}: not installed; pip install it, or give none")

    def check_optimizer(self) -> None:
        """Make the optimizer and its schedule for one number, so that what they refuse is said before a model is
        loaded.

        Raises:
            InputError: they refuse their settings, or are not installed.
        """
        import torch
        from transformers import Trainer, get_scheduler

        flag = f"--optim {getattr(self.optim, 'value', self.optim)}"
        try:
            if any(name in flag for name in OF_A_MODEL):
                return
            make, settings = Trainer.get_optimizer_cls_and_kwargs(self)
            optimizer = make([torch.nn.Parameter(torch.zeros(1))], **settings)
            flag = f"--lr_scheduler_type {getattr(self.lr_scheduler_type, 'value', self.lr_scheduler_type)}"
            schedule = {"scheduler_specific_kwargs": self.lr_scheduler_kwargs}
            get_scheduler(self.lr_scheduler_type, optimizer, num_warmup_steps=1, num_training_steps=10, **schedule)
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{flag}: {reason}; give its settings, install it, or choose another") from error

    @property
    def n_gpu(self) -> int:
        """One GPU at most. The Trainer would put several into one process, by `torch.nn.DataParallel`, whose copies of
        the model would lose the KL; several are for `accelerate launch`, a process each."""
        return min(1, super().n_gpu)

    @property
    def idle_gpus(self) -> int:
        """GPUs that this process, launched alone, sees and does not use."""
        return max(0, super().n_gpu - 1)


ARGUMENT_CLASSES = (*OWN_CLASSES, TrainerArguments)
