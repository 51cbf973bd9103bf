"""How a task is put to a model: as text, or to a head of its own; and the card that says so in the adapter's folder."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from bhpeft.errors import InputError
from bhpeft.tasks.card import TaskCard
from bhpeft.tasks.conversation import DialogueEncoder, later_template
from bhpeft.tasks.dialogue import Reply
from bhpeft.tasks.encoding import Encoder
from bhpeft.tasks.example import Task
from bhpeft.tasks.head_encoding import HeadEncoder, Standardiser
from bhpeft.tasks.templates import resolve_template


def make_encoder(
    tokenizer: PreTrainedTokenizerBase, arguments, task: Task, with_head: bool, adapter_path: str | None = None
) -> Encoder | HeadEncoder:
    """The encoder for a task.

    Args:
        arguments: a `DataArguments`.
        adapter_path: an existing adapter, whose numbers stay standardised as they were.

    Raises:
        InputError: the template or the numbers cannot be had.
    """
    if not with_head:
        template = resolve_template(arguments.prompt_template, task.instruction, tokenizer)
        whole = task.task_type != "generation"
        length, long = arguments.max_length, arguments.long_prompts
        shared = (tokenizer, template, length, long, task.labels, whole, arguments.answer_end)
        first = (next(iter(part), None) for part in (task.test, task.train))  # those of a file are no replies
        if not any(isinstance(example, Reply) for example in first):
            return Encoder(*shared)
        card = TaskCard.read(adapter_path) if adapter_path else None
        if card is not None and card.later_template and card.prompt_template == template:
            later = card.later_template
        else:
            later = later_template(arguments.prompt_template, template, tokenizer)
        return DialogueEncoder(*shared, later, arguments.context_turns)
    standardiser = None
    if task.task_type == "regression":
        standardiser = _standardiser(task, adapter_path)
    return HeadEncoder(
        tokenizer, task.task_type, task.labels, arguments.max_length, arguments.long_prompts, standardiser
    )


def _standardiser(task: Task, adapter_path: str | None) -> Standardiser:
    card = TaskCard.read(adapter_path) if adapter_path else None
    if card is not None:
        return Standardiser(card.target_mean, card.target_deviation)
    if not task.train:
        raise InputError(
            f"--adapter_path {adapter_path}: its folder has no task.json, which says how its numbers were standardised"
        )
    return Standardiser.of(task.train)


def card_of(arguments, task: Task, encoder: Encoder | HeadEncoder, in_4bit: bool) -> TaskCard:
    """The card of an adapter that is trained for a task.

    Args:
        arguments: a `DataArguments`.
        in_4bit: whether the frozen weights are quantised.
    """
    with_head = isinstance(encoder, HeadEncoder)
    standardiser = encoder.standardiser if with_head else None
    return TaskCard(
        task_type=task.task_type,
        labels=list(task.labels),
        head=with_head,
        prompt_template=arguments.prompt_template if with_head else encoder.template,
        instruction=arguments.instruction,
        max_length=arguments.max_length,
        predict_by=arguments.predict_by,
        answer_end=arguments.answer_end,
        target_mean=standardiser.mean if standardiser else None,
        target_deviation=standardiser.deviation if standardiser else None,
        base_in_4bit=in_4bit,
        later_template=getattr(encoder, "later", None),
        context_turns=getattr(arguments, "context_turns", None),
    )
