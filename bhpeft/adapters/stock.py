"""Configurations of the adapters that stock `peft` has: LoRA, QLoRA and prompt tuning.

    LoRA:           W x + (alpha / r) B A x           Hu et al. 2022, arXiv 2106.09685; B starts at 0
    QLoRA:          the same beside NF4 weights W     Dettmers et al. 2023, arXiv 2305.14314
    prompt tuning:  f([P; embed(x)])                  Lester et al. 2021, arXiv 2104.08691; P starts from a text

An adapter trained with these loads in `peft` with nothing of ours installed.
"""

from __future__ import annotations

from peft import LoraConfig, PromptTuningConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import PretrainedConfig

from bhpeft.adapters.architectures import PLACES
from bhpeft.errors import InputError


def target_modules_for(config: PretrainedConfig) -> list[str]:
    """Names of the modules that LoRA is added to on an architecture, from peft's own table, else from ours.

    Raises:
        InputError: neither table has such an architecture; the mend is `--target_modules`.
    """
    table = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if config.model_type in table:
        return list(table[config.model_type])
    if config.model_type in PLACES:
        return list(PLACES[config.model_type].lora)
    raise InputError(
        f"architecture {config.model_type!r}: no known LoRA targets; name its attention projections yourself, "
        f"as --target_modules q_proj v_proj. Known: {', '.join(sorted({*table, *PLACES}))}"
    )


def lora_config(arguments, config: PretrainedConfig) -> LoraConfig:
    """LoRA on the architecture's attention projections, or on `--target_modules` ("all-linear": every linear layer but
    the head's)."""
    asked = arguments.target_modules
    return LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        # peft takes this word alone, not in a list.
        target_modules="all-linear" if asked == ["all-linear"] else asked or target_modules_for(config),
        # GPT-2's Conv1D keeps its weight transposed; peft's layers must know.
        fan_in_fan_out=config.model_type in ("gpt2",),
    )


def prompt_tuning_config(arguments, tokenizer_name: str) -> PromptTuningConfig:
    """`--num_virtual_tokens` learned embeddings, started from those of `--prompt_init_text`.

    A shorter text is repeated and a longer one cut, as peft does.
    """
    text = (arguments.prompt_init_text or "").strip()
    return PromptTuningConfig(
        num_virtual_tokens=arguments.num_virtual_tokens,
        prompt_tuning_init="TEXT" if text else "SAMPLE_VOCAB",
        prompt_tuning_init_text=text or None,
        tokenizer_name_or_path=tokenizer_name if text else None,
    )


def virtual_tokens(arguments) -> int:
    """Positions that the adapter takes up before the input."""
    return arguments.num_virtual_tokens if arguments.adapter_name == "prompt-tuning" else 0
