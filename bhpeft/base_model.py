"""The frozen base model: found and checked by its configuration alone, then loaded sharded, 4-bit or whole."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from bhpeft.environment import DTYPES
from bhpeft.errors import InputError


def load_config(name: str, revision: str = "main") -> PretrainedConfig:
    """Read a base model's configuration: the check that it exists, which costs no weights.

    Args:
        name: hub id or folder.

    Raises:
        InputError: there is no such folder or hub id, or it holds no configuration.
    """
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        hint = " It is an adapter: give it as --adapter_path" if (Path(name) / "adapter_config.json").is_file() else ""
        raise InputError(f"--base_model {name}: the folder holds no config.json.{hint}")
    try:
        return AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise InputError(f"--base_model {name}: no such folder, nor on the hub ({first_line})") from error


def load_tokenizer(name: str, revision: str = "main") -> PreTrainedTokenizerBase:
    """Load a base model's tokenizer, with a padding token.

    Where the tokenizer has none, the end-of-sequence token pads: padding is masked everywhere and
    gets no label, so which token it is changes nothing, and the embedding keeps its size.

    Raises:
        InputError: no tokenizer there, or an empty one (transformers 5 makes an empty one from loose files).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise InputError(f"--base_model {name}: its tokenizer cannot be loaded ({first_line})") from error
    if not tokenizer("a b c", add_special_tokens=False)["input_ids"]:
        raise InputError(f"--base_model {name}: its tokenizer is empty; give a folder with tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise InputError(f"--base_model {name}: its tokenizer has no end-of-sequence token, which ends an answer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_positions(config: PretrainedConfig, needed: int) -> None:
    """Raise `InputError` if the longest text, answer and virtual tokens counted, has more tokens than positions."""
    room = getattr(config, "max_position_embeddings", None)
    if room is not None and needed > room:
        raise InputError(
            f"--max_length, --max_new_tokens and --num_virtual_tokens: together up to {needed} tokens, and the base "
            f"model has {room} positions; lower --max_length"
        )


def quantisation_config(precision: str) -> BitsAndBytesConfig:
    """NF4 with double quantisation, as QLoRA (Dettmers et al. 2023, arXiv 2305.14314, section 3).

    The packed 4-bit weights are stored in the compute dtype: ZeRO-3 shards every parameter of one dtype
    in one buffer, and bitsandbytes' default uint8 could not be sharded with the rest.
    """
    dtype = DTYPES[precision]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def check_4bit() -> None:
    """Quantise a few numbers for real: the only proof that bitsandbytes works on this machine.

    Raises:
        InputError: it is not installed, or it fails on this device.
    """
    mend = "install or mend bitsandbytes, or pass --allow_full_precision to go on without 4 bit"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"4-bit weights were asked for and bitsandbytes is not installed: {mend}")
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        device = "cuda" if torch.cuda.is_available() else "cpu"
        weights = torch.linspace(-1, 1, 256, device=device)
        packed, state = quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
        worst = (dequantize_4bit(packed, state) - weights).abs().max().item()
    except Exception as error:
        raise InputError(f"4-bit weights were asked for and bitsandbytes fails here ({error}): {mend}") from error
    if not worst < 0.2:  # NF4's widest gap between two levels is 0.30 of the block's largest weight
        raise InputError(f"4-bit weights were asked for and bitsandbytes quantises wrongly here: {mend}")


def load_base_model(
    name: str,
    precision: str = "no",
    in_4bit: bool = False,
    revision: str = "main",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model with every weight frozen.

    Under ZeRO-3 each rank keeps its shard alone, from the first weight on (`zero3_init_flag`). 4-bit weights are
    the exception: transformers loads them whole on every rank, and DeepSpeed shards them when it takes the model.
    `TrainingArguments` must exist before: they tell transformers about the launcher's DeepSpeed settings.

    Args:
        name: hub id or folder.
        precision: "no" (fp32), "fp16" or "bf16": dtype of the frozen weights and of 4-bit compute.
        in_4bit: quantise linear layers to NF4.

    Raises:
        RuntimeError: ZeRO-3 is on and weights are whole, or 4-bit was asked for and nothing was quantised.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=DTYPES[precision],
            attn_implementation=attn_implementation,
            quantization_config=quantisation_config(precision) if in_4bit else None,
        )
    except (ValueError, ImportError) as error:
        if attn_implementation is None:
            raise
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--attn_implementation {attn_implementation}: {reason}") from error
    model.requires_grad_(False)
    if in_4bit:
        layers = _layers_4bit(model)
        if not layers:
            raise RuntimeError(f"{name}: asked for 4-bit weights, yet no layer was quantised")
        for layer in layers:
            # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a layer's weights in place at its first forward in
            # evaluation mode and notes so in the quantisation state. Under ZeRO-3 the repacked copy is freed after the
            # forward and the shard comes back in the old layout: silently wrong from then on. (modules.py, forward)
            layer.support_avx512bf16_for_cpu = False
    if is_deepspeed_zero3_enabled() and not in_4bit and not is_sharded(model):
        raise RuntimeError(f"{name}: ZeRO-3 is on, yet its weights are whole; is zero3_init_flag true?")
    return model


def _layers_4bit(model: torch.nn.Module) -> list[torch.nn.Module]:
    # peft names its LoRA layer over them alike, so the library decides as well as the name.
    modules = model.modules()
    return [m for m in modules if type(m).__name__ == "Linear4bit" and type(m).__module__.startswith("bitsandbytes")]


def count_4bit_layers(model: torch.nn.Module) -> int:
    """Number of linear layers that bitsandbytes holds in 4 bit."""
    return len(_layers_4bit(model))


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether ZeRO-3 holds every parameter of the model as a shard.

    A sharded parameter carries `ds_tensor`, this rank's part; `ds_numel` counts the whole.
    """
    return all(hasattr(parameter, "ds_tensor") for parameter in model.parameters())


def parameter_counts(model: torch.nn.Module) -> dict[str, int | float]:
    """Trainable and all parameters of a model, sharded or not, 4-bit or not.

    4-bit layers pack two or more weights into one stored number: their true size is that of the layer.
    """
    trainable = everything = 0
    packed = {id(layer.weight): layer.in_features * layer.out_features for layer in _layers_4bit(model)}
    for parameter in model.parameters():
        count = packed.get(id(parameter)) or getattr(parameter, "ds_numel", parameter.numel())
        everything += count
        if parameter.requires_grad:
            trainable += count
    return {"trainable": trainable, "all": everything, "trainable_percent": 100 * trainable / max(everything, 1)}
