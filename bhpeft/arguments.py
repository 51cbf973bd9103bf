"""This project's own flags: dataclasses whose fields are flags, each refusing values that cannot be. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from bhpeft.errors import InputError, nearest
from bhpeft.tasks.card import TASK_TYPES
from bhpeft.tasks.templates import TEMPLATES

ADAPTER_NAMES = ("bh-peft", "mam", "hybrid", "bayesian-lora", "lora", "qlora", "prompt-tuning")
# Settings that one kind of adapter has and others have not; those not named here are BH-PEFT's.
_LORA = ("lora_rank", "lora_alpha", "lora_dropout", "target_modules")
ADAPTER_OWN = {"lora": _LORA, "qlora": _LORA, "prompt-tuning": ("num_virtual_tokens", "prompt_init_text")}
BH_PEFT_OWN = (
    *_LORA[:3], "prefix_length", "prefix_bottleneck_size", "prefix_start", "bn_reduction_factor", "adapter_scaling",
    "bayesian", "kl_weight", "prior_mu", "prior_sigma", "initial_sigma", "sites",
)  # fmt: skip
ALL_OWN = {*BH_PEFT_OWN, *(name for names in ADAPTER_OWN.values() for name in names)}
LONG_PROMPTS = ("error", "truncate", "drop")
HEADS = ("auto", "task", "lm")
PREDICT_BY = ("generate", "score")
CARRY = ("posterior", "weights", "l2", "none")
REPLAY = ("none", "partial", "full")
PARTS = ("train", "validation", "test", "ood")


def option(default, help: str, *aliases: str):  # noqa: A002 - `help` is argparse's own word
    """A dataclass field that is a flag: its default, its one-line help, and further names for it."""
    return field(default=default, metadata={"help": help, "aliases": list(aliases)})


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise `InputError` for settings that nothing can be sampled with."""
    if not 0 < temperature < math.inf:
        raise InputError(f"--temperature {temperature}: must be above 0")
    if top_k < 0:
        raise InputError(f"--top_k {top_k}: must be 0 (all tokens) or more")
    if not 0 < top_p <= 1:
        raise InputError(f"--top_p {top_p}: must be above 0 and at most 1")


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
    target_modules: list[str] | None = option(
        None, "names of the modules LoRA is added to, or all-linear (default: by architecture)"
    )
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
    initial_sigma: float = option(0.0025, "standard deviations of Gaussian weights start at half to all of it")

    def __post_init__(self):
        if self.adapter_name not in ADAPTER_NAMES:
            raise InputError(
                f"--adapter_name {self.adapter_name}: unknown adapter;{nearest(self.adapter_name, ADAPTER_NAMES)} "
                f"Known: {', '.join(ADAPTER_NAMES)}"
            )
        for name in (
            "lora_rank",
            "lora_alpha",
            "num_virtual_tokens",
            "prior_sigma",
            "initial_sigma",
            "adapter_scaling",
        ):
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
    validation_file: str | None = option(None, "file of validation rows, for --do_eval (default: a slice is held out)")
    ood_dataset_name: str | None = option(None, "rows of another domain, asked too: a known name, a hub id or a file")
    ood_data_path: str | None = option(None, "as --data_path, of --ood_dataset_name")
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
    max_ood_samples: int = option(1000, "use at most this many rows of --ood_dataset_name")
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
    context_turns: int | None = option(None, "conversations: most exchanges before a message (default: all that fit)")
    packing: bool = option(False, "train on the rows of a micro-batch end to end in one, without padding")
    do_sample: bool = option(False, "free text: answer the test rows a second time, by seeded sampling")
    temperature: float = option(1.0, "sampling: what the logits are divided by")
    top_k: int = option(0, "sampling: only the k likeliest tokens; 0 for all")
    top_p: float = option(1.0, "sampling: only the likeliest tokens that together have this probability")
    posterior_samples: int = option(0, "score test rows under this many weights drawn from the posterior, too")
    mc_dropout_samples: int = option(0, "score test rows this many times with dropout on, too")
    feature_distance: bool = option(
        False, "how far each answered row is from the training rows, in the base's features"
    )
    fit_temperature: bool = option(False, "divide scores by a temperature fitted on the validation rows (--do_eval)")

    def __post_init__(self):
        for name in ("data_fraction", "test_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be above 0 and at most 1")
        if not 0 <= self.validation_fraction < 1:
            raise InputError(f"--validation_fraction {self.validation_fraction}: must be at least 0 and below 1")
        for name in ("max_length", "max_new_tokens", *(f"max_{part}_samples" for part in PARTS)):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} {value}: must be at least 1")
        for name, none in (("posterior_samples", "the mean alone"), ("mc_dropout_samples", "dropout off")):
            if getattr(self, name) < 0 or getattr(self, name) == 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be 0 ({none}), or 2 or more")
        if self.posterior_samples and self.mc_dropout_samples:
            raise InputError("--posterior_samples and --mc_dropout_samples: samples of two kinds; give one of them")
        if self.context_turns is not None and self.context_turns < 0:
            raise InputError(f"--context_turns {self.context_turns}: must be 0 (none) or more")
        check_sampling(self.temperature, self.top_k, self.top_p)
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
    resume: bool = option(
        False, "go on with the run of this name where it stopped; from the start where it has not begun"
    )
    row_cache: str | None = option(
        None, "folder where rows are kept, read and tokenised once, or none (default: in the folder of datasets' cache)"
    )
    compare_base: bool = option(False, "answer the test rows with the frozen base as well, before training")
    smoke: bool = option(False, "a few rows and steps of the same run, to see that everything works")


@dataclass
class RoundArguments:
    """Learning in rounds: rows that arrive bit by bit, and what a round leaves to the next."""

    rounds: list[str] | None = option(None, "numbers of new training rows, one a round: 10 20 40 (or 10,20,40)")
    round_files: list[str] | None = option(None, "in place of --rounds and --dataset_name: a file for each round")
    carry: str = option("posterior", "what the next round gets: posterior (as its prior), weights, l2 or none")
    replay: str = option("none", "rows of past rounds trained on again: none, partial or full")
    replay_ratio: float = option(0.2, "--replay partial: share of every past round, drawn anew each round")
    l2_weight: float = option(0.0, "weight w of w/2 |theta - theta_previous|^2; --carry posterior: of point weights")
    prior_widening: float = option(1.0, "--carry posterior: factor on the carried deviations, 1 or more")
    min_round_steps: int = option(0, "more epochs for small rounds, until they take this many optimizer steps")
    max_known_samples: int | None = option(None, "after a round ask about at most this many rows of each round so far")
    resume_rounds: bool = option(False, "go on with a run in rounds that was killed, where it stopped")

    @property
    def on(self) -> bool:
        """Whether there are rounds at all."""
        return bool(self.rounds or self.round_files)

    @property
    def sizes(self) -> list[int]:
        """Numbers of new rows, one a round."""
        return [int(size) for size in self.rounds or ()]

    def __post_init__(self):
        if self.rounds is not None:
            words = [word for text in self.rounds for word in str(text).replace(",", " ").split()]
            for word in words or [""]:
                if not word.isdecimal() or int(word) < 1:
                    raise InputError(f"--rounds {word}: must be numbers of rows, each at least 1, as 10 20 40")
            self.rounds = [int(word) for word in words]
        if self.rounds is not None and self.round_files is not None:
            raise InputError("--rounds and --round_files: give one of them; files bring their own numbers of rows")
        for name, known in (("carry", CARRY), ("replay", REPLAY)):
            if getattr(self, name) not in known:
                raise InputError(f"--{name} {getattr(self, name)}: must be one of {', '.join(known)}")
        if not 0 < self.replay_ratio <= 1:
            raise InputError(f"--replay_ratio {self.replay_ratio}: must be above 0 and at most 1")
        if not 0 <= self.l2_weight < math.inf:
            raise InputError(f"--l2_weight {self.l2_weight}: must be 0 or more")
        if self.carry == "l2" and not self.l2_weight:
            raise InputError("--carry l2: without --l2_weight above 0 it is --carry weights; give one of them")
        if self.carry in ("weights", "none") and self.l2_weight:
            raise InputError(f"--l2_weight: has no use with --carry {self.carry}; give --carry l2 or posterior")
        if not 1 <= self.prior_widening < math.inf:
            raise InputError(f"--prior_widening {self.prior_widening}: must be 1 or more")
        if self.prior_widening > 1 and self.carry != "posterior":
            raise InputError(f"--prior_widening: has no use with --carry {self.carry}; give --carry posterior")
        if self.min_round_steps < 0:
            raise InputError(f"--min_round_steps {self.min_round_steps}: must be 0 or more")
        if self.max_known_samples is not None and self.max_known_samples < 1:
            raise InputError(f"--max_known_samples {self.max_known_samples}: must be at least 1")


@dataclass
class PlanArguments:
    """What a run will need, said before it is run."""

    plan: bool = option(False, "print what memory and time the run needs, from its configuration alone, and stop")
    gpu_memory: float | None = option(None, "plan: GiB of each GPU (default: measured; without a GPU there is none)")
    cpu_memory: float | None = option(None, "plan: GiB of the host (default: measured)")
    link_gbps: float | None = option(None, "plan: GB/s from host to GPU (default: measured)")
    flops: float | None = option(None, "plan: FLOP/s of matrix products, as 3e14 (default: measured)")
    plan_ranks: list[int] | None = option(None, "plan: numbers of ranks to show (default: by GPUs, else 1 2 4)")
    plan_json: str | None = option(None, "plan: file to write it to as well, as JSON")

    def __post_init__(self):
        for name in ("gpu_memory", "cpu_memory", "link_gbps", "flops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"--{name} {value}: must be above 0")
        if self.plan_ranks is not None and min(self.plan_ranks, default=0) < 1:
            raise InputError(f"--plan_ranks {' '.join(map(str, self.plan_ranks))}: must be numbers, each at least 1")


OWN_CLASSES = (
    BaseModelArguments, AdapterArguments, DataArguments, OutputArguments, RoundArguments, PlanArguments,
)  # fmt: skip
