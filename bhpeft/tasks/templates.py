"""Text around an input: named templates, and the tokenizer's own chat template.

`{text_input}` stands for the input, `{instruction}` for what is asked. The named ones are the layouts of the source
projects: Alpaca's (project 3) and LLaMA-2-chat's (project 5; Touvron et al. 2023, arXiv 2307.09288, appendix A.3.3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bhpeft.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = {
    "instruction": "### Instruction:\n{instruction}\n\n### Input:\n{text_input}\n\n### Response:\n",
    "llama2": "[INST] <<SYS>>\n{instruction}\n<</SYS>>\n\n{text_input} [/INST]",
    "chat": "chat",  # rendered by the tokenizer
}


def resolve_template(template: str, instruction: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text around `{text_input}`, with the instruction filled in.

    Args:
        template: a name of `TEMPLATES`, or the text itself.
        instruction: what is asked for.

    Raises:
        InputError: "chat" and a tokenizer without a chat template, or an instruction is wanted and there is none.
    """
    text = TEMPLATES.get(template, template)
    if text == "chat":
        return _chat_template(instruction, tokenizer)
    if "{instruction}" in text:
        if not instruction:
            raise InputError(f"--prompt_template {template}: it has {{instruction}}; say with --instruction what to do")
        text = text.replace("{instruction}", instruction)
    return text


def _chat_template(instruction: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "--prompt_template chat: the base model's tokenizer has no chat template; give instruction, llama2, or a "
            "text with {text_input}"
        )
    turn = {"role": "user", "content": "{text_input}"}
    turns = [{"role": "system", "content": instruction}, turn] if instruction else [turn]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may refuse a system turn, by an error of jinja2's
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--prompt_template chat: the tokenizer's template refuses these turns ({reason})") from error
    bos = tokenizer.bos_token
    return text.removeprefix(bos) if bos and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else text


def label_instruction(labels: tuple[str, ...]) -> str:
    """What is asked where nobody said it: one of the labels."""
    return f"Classify the text as one of: {', '.join(labels)}."
