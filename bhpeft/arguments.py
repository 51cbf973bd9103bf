"""The flags: dataclasses whose fields are flags, each refusing values that cannot be."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from bhpeft.errors import InputError, nearest
from bhpeft.tasks.templates import TEMPLATES

UNSET_OUTPUT_DIR = "trainer_output"  # what TrainingArguments puts where no --output_dir is given
ADAPTER_NAMES = ("bh-peft", "mam", "hybrid", "bayesian-lora", "lora", "qlora", "prompt-tuning")
LONG_PROMPTS = ("error", "truncate", "drop")
TASK_TYPES = ("classification", "regression", "multiple_choice", "generation")
HEADS = ("auto", "task", "lm")
PREDICT_BY = ("generate", "score")


def option(default, help: str, *aliases: str):  # noqa: A002 - `help` is argparse's own word
    """A dataclass field that is a flag: its default, its one-line help, and further names for it."""
    return field(default=default, metadata={"help": help, "aliases": list(aliases)})


@dataclass
class BaseModelArguments:
    """The frozen base model."""

    base_model: str | None = option(None, "hub id or folder of the base model (with --adapter_path: its own base)")
    revision: str = option("main", "revision of the base model on the hub")
    load_in_4bit: bool = option(False, "quantise the frozen weights to NF4 with double quantisation (bitsandbytes)")
    allow_full_precision: bool = option(False, "go on unquantised where 4-bit is asked for but cannot be had")
    attn_implementation: str | None = option(None, "eager, sdpa or flash_attention_2 (default: the model's own)")
    base_dropout: float | None = option(None, "dropout of the frozen base while training (default: the model's own)")
    head: str = option("auto", "task (a trained head), lm (labels as text), auto: encoders a head, causal models lm")

    def __post_init__(self):
        if self.base_dropout is not None and not 0 <= self.base_dropout < 1:
            raise InputError(f"--base_dropout {self.base_dropout}: must be at least 0 and below 1")
        if self.head not in HEADS:
            raise InputError(f"--head {self.head}: must be one of {', '.join(HEADS)}")


@dataclass
class AdapterArguments:
    """The adapter: what is trained."""

    adapter_name: str = option("lora", f"one of {', '.join(ADAPTER_NAMES)}")
    adapter_path: str | None = option(None, "folder of an existing adapter: test it, or continue training it")
    lora_rank: int = option(8, "rank r of the LoRA update (alpha / r) B A")
    lora_alpha: float = option(16.0, "alpha of the LoRA update (alpha / r) B A")
    lora_dropout: float = option(0.0, "dropout on the input of A while training")
    target_modules: list[str] | None = option(None, "names of the modules LoRA is added to (default: by architecture)")
    modules_to_save: list[str] | None = option(None, "modules of the base trained whole and saved beside the head")
    num_virtual_tokens: int = option(8, "prompt tuning: number of learned token embeddings before the input")
    prompt_init_text: str | None = option(
        "Determine whether the statement is true or false, and then provide reasoning:",
        "prompt tuning: text whose token embeddings the prompt starts from (empty: random tokens)",
    )

    sites: list[str] | None = option(None, "BH-PEFT: which of prefix, lora, adapter (default: the preset's)")
    prefix_length: int = option(30, "BH-PEFT: number of learned keys and values before each layer's own")
    prefix_bottleneck_size: int = option(8, "BH-PEFT: width of tanh(W_down E), from which the prefix is made")
    prefix_start: str = option("identity", "BH-PEFT: identity (gated, starts as no prefix) or random (the papers')")
    bn_reduction_factor: int = option(96, "BH-PEFT: hidden size / bottleneck of the parallel adapter")
    adapter_scaling: float = option(4.0, "BH-PEFT: scale s of the parallel adapter")
    bayesian: str | None = option(None, "BH-PEFT: Gaussian matrices: down, all or none (default: the preset's)")
    kl_weight: float = option(1.0, "weight of KL / training rows in the loss; 1 is the ELBO")
    prior_mu: float = option(0.0, "mean of the Gaussian prior")
    prior_sigma: float = option(0.1, "standard deviation of the Gaussian prior")

    def __post_init__(self):
        if self.adapter_name not in ADAPTER_NAMES:
            raise InputError(
                f"--adapter_name {self.adapter_name}: unknown adapter;{nearest(self.adapter_name, ADAPTER_NAMES)} "
                f"Known: {', '.join(ADAPTER_NAMES)}"
            )
        for name in ("lora_rank", "lora_alpha", "num_virtual_tokens", "prior_sigma", "adapter_scaling"):
            if not 0 < getattr(self, name) < math.inf:  # nan fails as well
                raise InputError(f"--{name} {getattr(self, name)}: must be above 0")
        for name in ("prefix_length", "prefix_bottleneck_size", "bn_reduction_factor"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.prefix_start not in ("identity", "random"):
            raise InputError(f"--prefix_start {self.prefix_start}: must be identity or random")
        if self.sites is not None and (not self.sites or set(self.sites) - {"prefix", "lora", "adapter"}):
            raise InputError(f"--sites {' '.join(self.sites)}: must be one or more of prefix, lora, adapter")
        if self.bayesian not in (None, "down", "all", "none"):
            raise InputError(f"--bayesian {self.bayesian}: must be down, all or none")
        if not math.isfinite(self.prior_mu):
            raise InputError(f"--prior_mu {self.prior_mu}: must be a number")
        if not 0 <= self.kl_weight < math.inf:
            raise InputError(f"--kl_weight {self.kl_weight}: must be 0 or more")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"--lora_dropout {self.lora_dropout}: must be at least 0 and below 1")


@dataclass
class DataArguments:
    """The rows, and how they become text."""

    dataset_name: str | None = option(None, "a known name, a hub id, or a .csv, .tsv, .jsonl or .parquet file")
    data_path: str | None = option(None, "folder of a known dataset in its own distribution layout (default: the hub)")
    test_file: str | None = option(None, "file of test rows (default: the dataset's own, else a slice is held out)")
    task_type: str | None = option(None, f"one of {', '.join(TASK_TYPES)} (default: the dataset's, or inferred)")
    labels: list[str] | None = option(None, "class names in order (default: the dataset's, or those found, sorted)")
    text_column: str = option("text_input", "column of the input text")
    label_column: str = option("text_label", "column of the expected answer")
    exemplars_per_generic: int = option(1, "generics: exemplars taken of each generic in each file; 0 takes all")
    data_fraction: float = option(1.0, "share of the data that is used at all, picked by --data_seed")
    test_fraction: float = option(0.1, "share held out for the test where there is no --test_file")
    validation_fraction: float = option(0.1, "share of the training data held out for --do_eval")
    max_train_samples: int | None = option(None, "use at most this many training rows")
    max_validation_samples: int | None = option(None, "use at most this many validation rows")
    max_test_samples: int | None = option(None, "use at most this many test rows")
    prompt_template: str = option(
        "{text_input}",
        "text given to the model, {text_input} and {instruction} standing for theirs; or a name: instruction, llama2, "
        "chat (the tokenizer's own)",
    )
    instruction: str | None = option(None, "what is asked for, where the template has {instruction} (default: by task)")
    answer_end: str | None = option(None, "what ends an answer: one token, as a line end (default: end-of-sequence)")
    predict_by: str = option("generate", "labels as text: generate (free text, may be irregular) or score (likeliest)")
    max_length: int = option(64, "most tokens of prompt and answer together")
    long_prompts: str = option("error", "prompts that leave no room for an answer: error, truncate or drop")
    max_new_tokens: int = option(30, "most tokens generated for an answer")
    posterior_samples: int = option(0, "score test rows under this many weights drawn from the posterior, too")

    def __post_init__(self):
        for name in ("data_fraction", "test_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be above 0 and at most 1")
        if not 0 <= self.validation_fraction < 1:
            raise InputError(f"--validation_fraction {self.validation_fraction}: must be at least 0 and below 1")
        for name in ("max_length", "max_new_tokens", "max_train_samples", "max_validation_samples", "max_test_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} {value}: must be at least 1")
        if self.posterior_samples < 0 or self.posterior_samples == 1:
            raise InputError(f"--posterior_samples {self.posterior_samples}: must be 0 (the mean alone), or 2 or more")
        if self.exemplars_per_generic < 0:
            raise InputError(f"--exemplars_per_generic {self.exemplars_per_generic}: must be 0 (all) or more")
        if self.long_prompts not in LONG_PROMPTS:
            raise InputError(f"--long_prompts {self.long_prompts}: must be one of {', '.join(LONG_PROMPTS)}")
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            raise InputError(
                f"--task_type {self.task_type}: unknown;{nearest(self.task_type, TASK_TYPES)} "
                f"Known: {', '.join(TASK_TYPES)}"
            )
        if self.predict_by not in PREDICT_BY:
            raise InputError(f"--predict_by {self.predict_by}: must be one of {', '.join(PREDICT_BY)}")
        if self.labels is not None and (len(set(self.labels)) < len(self.labels) or len(self.labels) < 2):
            raise InputError(f"--labels {' '.join(self.labels)}: must be two or more different names")
        if self.prompt_template not in TEMPLATES and "{text_input}" not in self.prompt_template:
            raise InputError(
                f"--prompt_template {self.prompt_template!r}: must contain {{text_input}}, or be one of "
                f"{', '.join(TEMPLATES)}"
            )


@dataclass
class OutputArguments:
    """Where results go. The run's name is the training flag `--run_name`."""

    results_dir: str = option("results", "folder of the results")
    overwrite: bool = option(False, "replace the results and the adapter of an earlier run of the same name")
    compare_base: bool = option(False, "answer the test rows with the frozen base as well, before training")
    smoke: bool = option(False, "a few rows and steps of the same run, to see that everything works")


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
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("seed", "data_seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 0 and below 2**32")
        for name in ("remove_unused_columns", "dataloader_drop_last"):
            if getattr(self, name):
                raise InputError(f"--{name}: not here; every row is answered, and rows hold what answering needs")
        super().__post_init__()
        missing = set(self.report_to) - set(get_available_reporting_integrations())
        if missing:
            raise InputError(f"--report_to {', '.join(sorted(missing))}: not installed; pip install it, or give none")


ARGUMENT_CLASSES = (BaseModelArguments, AdapterArguments, DataArguments, OutputArguments, TrainerArguments)
