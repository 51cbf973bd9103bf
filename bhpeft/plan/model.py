"""The run's model on the meta device: every shape and none of the numbers, so that 13 B parameters cost no memory.

The adapter is attached by the same code that attaches it in a run, so that what is counted is what will be trained.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from bhpeft.adapters import attach_adapter
from bhpeft.base_model import DROPOUTS, HEADS, UNQUANTISED, head_modules, is_encoder, parameter_counts, settle_head
from bhpeft.environment import DTYPES
from bhpeft.errors import InputError
from bhpeft.tasks.known import KNOWN

BLOCK, NESTED_BLOCK = 64, 256  # weights a scale of NF4; scales a scale of the second quantisation (bitsandbytes)

LABELLED = 8  # tokens of a label as text, and by how much rows of one batch differ in length: an estimate


@dataclass(frozen=True)
class Question:
    """What the model is asked, as far as the configuration alone tells.

    Attributes:
        head: "lm", or the task type of the model's own head.
        labels: number of classes or choices; 0 where there are none.
        labelled: most positions of a row that logits are computed at; None for all.
        assumed: what could not be known without reading the rows, in words, or "".
    """

    head: str
    labels: int
    labelled: int | None = None
    assumed: str = ""


@dataclass(frozen=True)
class Inventory:
    """What a model with its adapter is made of. Sizes are numbers of weights, one entry a parameter.

    Attributes:
        frozen: frozen weights that stay in the compute dtype even where the base is in 4 bit.
        linear: frozen weights of the linear layers that are quantised where the base is in 4 bit.
        trainable: weights of the adapter, and of a head that is trained with it.
        buffers: bytes of buffers: rotary frequencies, priors.
        counts: as of `parameter_counts`.
    """

    frozen: tuple[int, ...]
    linear: tuple[int, ...]
    trainable: tuple[int, ...]
    buffers: int
    counts: dict[str, int | float]

    @property
    def trained(self) -> int:
        """How many weights are trained."""
        return sum(self.trainable)

    def frozen_bytes(self, width: int, in_4bit: bool) -> int:
        """Bytes of all frozen weights, `width` bytes each where they are not quantised."""
        linear = sum(map(nf4_bytes, self.linear)) if in_4bit else width * sum(self.linear)
        return width * sum(self.frozen) + linear

    def shard_bytes(self, width: int, in_4bit: bool, ranks: int) -> int:
        """Bytes of one rank's part of the frozen weights under ZeRO-3, which cuts every parameter into equal parts.

        The scales of 4-bit weights are no parameters: every rank keeps all of them.
        """
        if not in_4bit:
            return width * sum(-(-size // ranks) for size in (*self.frozen, *self.linear))
        packed = sum(width * -(-math.ceil(size / 2 / width) // ranks) for size in self.linear)
        scales = sum(nf4_bytes(size) - math.ceil(size / 2) for size in self.linear)
        return width * sum(-(-size // ranks) for size in self.frozen) + packed + scales


def nf4_bytes(numel: int) -> int:
    """Bytes that bitsandbytes holds a matrix of `numel` weights in: NF4, the scales quantised again.

    Packed weights numel / 2; one byte of scale a block of 64; an fp32 scale of scales a block of 256 of them; the
    two tables of 16 and 256 fp32 values, and the fp32 mean of the scales. (Dettmers et al. 2023, section 3)
    """
    scales = -(-numel // BLOCK)
    return -(-numel // 2) + scales + 4 * -(-scales // NESTED_BLOCK) + 4 * (16 + 256 + 1)


def question_of(run, config: PretrainedConfig) -> Question:
    """The question, from flags and what is known of the dataset; no row is read.

    Raises:
        InputError: the task cannot be had with the model, as in a run.
    """
    known = KNOWN.get(run.data.dataset_name)
    task_type, labels, assumed = run.data.task_type, len(run.data.labels or ()), ""
    if known is not None:
        task_type, labels = task_type or known.task_type, labels or len(known.labels)
    if task_type is None:
        # Rows decide in a run; all that matters here is whether there is a head, and how wide it is.
        asked = run.base.head == "task" or (run.base.head == "auto" and is_encoder(config))
        task_type = "classification" if asked or labels else "generation"
        if asked and not labels:
            assumed = "2 classes (--labels or --task_type say otherwise)"
    if task_type in ("classification", "multiple_choice"):
        labels = labels or 2
    with_head = settle_head(run.base.head, config, task_type)
    labelled = LABELLED if labels and not with_head else None
    return Question(task_type if with_head else "lm", labels if task_type != "regression" else 0, labelled, assumed)


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """Within the block transformers does not know of the launcher's ZeRO-3, which would shard the meta model."""
    from transformers.integrations import deepspeed

    reference, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


def meta_model(
    run, config: PretrainedConfig, base_name: str, question: Question, dtype: torch.dtype
) -> tuple[nn.Module, Inventory]:
    """The frozen base with the run's adapter on it, on the meta device, and what it is made of.

    Args:
        run: a `Run`.
        dtype: of the frozen weights.

    Raises:
        InputError: the adapter does not go with the architecture, as in a run.
    """
    settings: dict = {}
    if question.head in ("classification", "regression"):
        settings["num_labels"] = question.labels or 1
        settings["problem_type"] = "regression" if question.head == "regression" else "single_label_classification"
    if run.base.base_dropout is not None:
        settings |= {name: run.base.base_dropout for name in DROPOUTS if getattr(config, name, None) is not None}
    config = type(config).from_dict({**config.to_dict(), **settings})
    if question.head != "lm" and config.pad_token_id is None:
        config.pad_token_id = 0
    auto = AutoModelForCausalLM if question.head == "lm" else HEADS[question.head]
    with whole_weights(), torch.device("meta"):
        base = _from_config(auto, config, dtype, run.base.attn_implementation)
        base.requires_grad_(False)
        quantised = linear_layers(base, with_head=question.head != "lm")
        train_too = list(run.adapter.modules_to_save or [])
        if run.adapter.adapter_path:  # peft saves the names that heads have in any architecture
            names = {part for name, _ in base.named_modules() for part in (name, name.rpartition(".")[2])}
            train_too = [name for name in train_too if name in names]
        if question.head != "lm":
            train_too = head_modules(base, _missing(base, base_name)) + train_too
        # A new adapter of the same shape: what an existing one holds, or a prompt starts from, changes no size.
        adapter = dataclasses.replace(run.adapter, adapter_path=None, prompt_init_text="")
        model = attach_adapter(base, adapter, base_name, question.head, train_too)
    weights = {id(weight) for weight in quantised}
    frozen, linear, trainable = [], [], []
    for parameter in model.parameters():
        into = trainable if parameter.requires_grad else linear if id(parameter) in weights else frozen
        into.append(parameter.numel())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    return model, Inventory(tuple(frozen), tuple(linear), tuple(trainable), buffers, parameter_counts(model))


def check_names(run, config: PretrainedConfig, base_name: str, question: Question) -> None:
    """Names of the base's modules and of its attention, that flags give, tried on a model without numbers.

    Raises:
        InputError: `--target_modules`, `--modules_to_save` or `--attn_implementation` name nothing that there is.
    """
    given = run.adapter.target_modules or run.adapter.modules_to_save or run.base.attn_implementation
    if given and not run.adapter.adapter_path:
        meta_model(run, config, base_name, question, DTYPES[run.precision])


def _from_config(auto, config: PretrainedConfig, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    try:
        return auto.from_config(config, dtype=dtype, attn_implementation=attention)
    except (ValueError, ImportError) as error:
        if attention is None:
            raise
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--attn_implementation {attention}: {reason}") from error


def linear_layers(base: nn.Module, with_head: bool) -> list[nn.Parameter]:
    """Weights of the layers that transformers quantises: all linear ones but the output's, and but a head's."""
    skipped = UNQUANTISED if with_head else get_keys_to_not_convert(base)
    kinds = (nn.Linear, Conv1D)
    named = base.named_modules()
    return [m.weight for name, m in named if type(m) in kinds and should_convert_module(name, skipped)]


def _missing(base: nn.Module, base_name: str) -> set[str]:
    """Weights of the model that its folder's files lack: begun afresh in a run. Empty where there are no files."""
    folder, stored = Path(base_name), set()
    for file in folder.glob("*.safetensors") if folder.is_dir() else ():
        with safe_open(file, "pt") as weights:
            stored |= set(weights.keys())
    if folder.is_dir() and (index := folder / "model.safetensors.index.json").is_file():
        stored |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    prefix = f"{base.base_model_prefix}."
    bare = {key.removeprefix(prefix) for key in stored}
    return {key for key in base.state_dict() if stored and key.removeprefix(prefix) not in bare}
