"""An adapter's folder, or a base model alone -> a `ChatModel`: checked by what is on disk first, then loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bhpeft.adapters import adopt_settings, attach_adapter, base_model_of, check_adapter, virtual_tokens
from bhpeft.arguments import AdapterArguments
from bhpeft.base_model import check_4bit, load_base_model, load_config, load_tokenizer, settle_head
from bhpeft.chat import ChatModel
from bhpeft.errors import InputError
from bhpeft.tasks.card import TaskCard
from bhpeft.tasks.conversation import DialogueEncoder, later_template
from bhpeft.tasks.templates import resolve_template
from bhpeft.tensor_files import check_weights

PLAIN = "User: {text_input}\nAssistant:"  # where neither adapter nor tokenizer say how they are spoken to


@dataclass
class ChatArguments:
    """Whom to talk to.

    Attributes:
        adapter_path: folder of the adapter; None for a base model alone.
        base_model: hub id or folder (default: the adapter's own).
        base_only: leave the adapter out; it still says what the base is and how it is spoken to.
        precision: "no" (fp32), "fp16" or "bf16", of the base.
        load_in_4bit: quantise the base, also where the adapter does not say so.
        allow_full_precision: load the base whole where the adapter was trained on one in 4 bit.
        prompt_template, instruction: as the trainer's flags (default: the adapter's; else the tokenizer's own chat
            template; else `PLAIN`).
        context_turns: most exchanges before a message (default: the adapter's; none for one that was trained on
            messages alone).
    """

    adapter_path: str | None = None
    base_model: str | None = None
    base_only: bool = False
    precision: str = "no"
    load_in_4bit: bool = False
    allow_full_precision: bool = False
    prompt_template: str | None = None
    instruction: str | None = None
    context_turns: int | None = None


def open_chat(asked: ChatArguments) -> ChatModel:
    """Load what was asked for, on the GPU if there is one.

    Raises:
        InputError: no adapter there, one that does not speak, or one of another base model.
    """
    if asked.adapter_path is None and asked.base_model is None:
        raise InputError("--adapter_path: missing; give the folder of an adapter, or --base_only with --base_model")
    arguments, card = None, None
    if asked.adapter_path is not None:
        arguments = AdapterArguments(adapter_path=asked.adapter_path)
        adopt_settings(arguments)
        card = TaskCard.read(asked.adapter_path)
        if card is not None and card.head:
            raise InputError(
                f"--adapter_path {asked.adapter_path}: was trained for {card.task_type} with a head of its own, and "
                f"writes no text; ask it with demo/classify.py --adapter_path {asked.adapter_path}"
            )
    base_name = asked.base_model or base_model_of(asked.adapter_path)
    config = load_config(base_name)
    settle_head("lm", config, "generation")
    if arguments is not None:
        check_adapter(arguments, config, base_name)
    tokenizer = load_tokenizer(base_name)
    encoder = speaking(asked, card, tokenizer)
    check_weights(base_name)
    in_4bit = asked.load_in_4bit or bool(card and card.base_in_4bit and not asked.allow_full_precision)
    if in_4bit:
        check_4bit()

    model = load_base_model(base_name, asked.precision, in_4bit)
    adapted = arguments is not None and not asked.base_only
    if adapted:
        model = attach_adapter(model, arguments, base_name)
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and adapted:
        positions -= virtual_tokens(arguments)
    name = arguments.adapter_name if adapted else None
    return ChatModel(model, encoder, base_name, name, asked.adapter_path if adapted else None, positions)


def speaking(asked: ChatArguments, card: TaskCard | None, tokenizer) -> DialogueEncoder:
    """How a conversation becomes tokens: as the adapter was trained, or as was asked.

    Raises:
        InputError: the template cannot be had.
    """
    if asked.instruction and asked.prompt_template is None and card is not None:
        raise InputError(
            "--instruction: the adapter was trained with a text of its own around each message; give --prompt_template "
            "as well to put another in its place"
        )
    instruction = asked.instruction or (card and card.instruction)
    if asked.prompt_template is None and card is not None:
        first = name = card.prompt_template
    else:
        name = asked.prompt_template or ("chat" if getattr(tokenizer, "chat_template", None) else PLAIN)
        if name not in ("instruction", "llama2", "chat") and "{text_input}" not in name:
            raise InputError(f"--prompt_template {name!r}: must have {{text_input}}, or be instruction, llama2, chat")
        first = resolve_template(name, instruction or "Reply as a helpful assistant.", tokenizer)
    later = card.later_template if card and asked.prompt_template is None else None
    later = later or later_template(name, first, tokenizer)
    turns = asked.context_turns
    if turns is None and card is not None:
        turns = card.context_turns if card.later_template else 0  # it has only ever seen a message alone
    end = card.answer_end if card else None
    return DialogueEncoder(tokenizer, first, 2**62, answer_end=end, later=later, context_turns=turns)
