"""Put an adapter on the frozen base: a new one by its flags, or an existing one from its folder."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel

from bhpeft.adapter_files import read_adapter_folder
from bhpeft.adapters.architectures import places_of
from bhpeft.adapters.bh_peft import PEFT_TYPE, PRESETS, BhPeftConfig
from bhpeft.adapters.stock import lora_config, prompt_tuning_config
from bhpeft.errors import InputError

OUTPUT_LAYER = re.compile(r"\.(score|classifier|classifier\.out_proj)\.weight$")
# What peft wraps a model in, by what it answers: it has no name for multiple choice, whose arguments it passes on.
PEFT_TASKS = {
    "lm": TaskType.CAUSAL_LM,
    "classification": TaskType.SEQ_CLS,
    "regression": TaskType.SEQ_CLS,
    "multiple_choice": None,
}


def adapter_config(arguments, config: PretrainedConfig, base_name: str, head: str = "lm") -> PeftConfig:
    """The `peft` configuration of `--adapter_name` with its flags.

    Args:
        arguments: an `AdapterArguments`.
        config: configuration of the base model.
        base_name: hub id or folder of the base model, whose tokenizer reads the initial prompt.
        head: "lm", or the task type of the model's own head.

    Raises:
        InputError: the architecture's places are not known, or a value cannot be.
    """
    if arguments.adapter_name == "prompt-tuning":
        if head != "lm":
            raise InputError(
                "--adapter_name prompt-tuning: here it speaks to language models, not to a trained head; give "
                "--head lm with a causal model, or another adapter"
            )
        made = prompt_tuning_config(arguments, base_name)
    elif arguments.adapter_name in PRESETS:
        made = bh_peft_config(arguments, config)
    else:
        made = lora_config(arguments, config)
    made.task_type = PEFT_TASKS[head]
    return made


def bh_peft_config(arguments, config: PretrainedConfig) -> BhPeftConfig:
    """BH-PEFT by a preset's name and its flags."""
    places_of(config)
    preset = dict(PRESETS[arguments.adapter_name])
    if arguments.bayesian is not None:
        preset["bayesian"] = arguments.bayesian
    if arguments.sites is not None:
        preset["sites"] = list(arguments.sites)
    names = {field.name for field in dataclasses.fields(BhPeftConfig)} - {"target_modules", "modules_to_save", *preset}
    flags = {name: value for name, value in vars(arguments).items() if name in names}
    return BhPeftConfig(**preset, **flags)


def is_bayesian(arguments) -> bool:
    """Whether an `AdapterArguments` asks for Gaussian weights."""
    preset = PRESETS.get(arguments.adapter_name)
    return preset is not None and (arguments.bayesian or preset["bayesian"]) != "none"


def has_prefix(arguments) -> bool:
    """Whether an `AdapterArguments` asks for BH-PEFT's prefix."""
    return "prefix" in (arguments.sites or PRESETS.get(arguments.adapter_name, {}).get("sites", ()))


def read_adapter_config(path: str) -> dict:
    """The saved configuration of an adapter folder.

    Raises:
        InputError: no such folder, no adapter in it, or an unreadable one.
    """
    config = read_adapter_folder(path)
    if config.get("peft_type") not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise InputError(
            f"{Path(path) / 'adapter_config.json'}: peft_type {config.get('peft_type')!r} is no adapter that peft or "
            "bhpeft knows; save the adapter again"
        )
    return config


def weight_shapes(path: str) -> dict[str, list[int]]:
    """Shapes of an adapter's weights, read from the file's header alone.

    Raises:
        InputError: the file is cut short or no safetensors file.
    """
    file = Path(path) / "adapter_model.safetensors"
    try:
        with safe_open(file, "pt") as weights:
            return {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: cannot be read ({error}); was saving cut short? Use another checkpoint") from error


def name_of(saved: dict) -> str:
    """The `--adapter_name` that a saved configuration amounts to."""
    if saved["peft_type"] == PEFT_TYPE:
        for name, preset in PRESETS.items():
            if set(preset["sites"]) == set(saved["sites"]) and preset["bayesian"] == saved["bayesian"]:
                return name
        return "bh-peft"
    return {"PROMPT_TUNING": "prompt-tuning"}.get(saved["peft_type"], saved["peft_type"].lower().replace("_", "-"))


def adopt_settings(arguments) -> None:
    """Set `AdapterArguments` to what the adapter at `--adapter_path` really is, so that records say the truth.

    "qlora" stays where it was asked for: a LoRA adapter does not say whether its base was in 4 bit.
    """
    saved = read_adapter_config(arguments.adapter_path)
    name = name_of(saved)
    arguments.adapter_name = "qlora" if name == "lora" and arguments.adapter_name == "qlora" else name
    for theirs, ours in {"r": "lora_rank", "prompt_tuning_init_text": "prompt_init_text"}.items():
        if theirs in saved:
            setattr(arguments, ours, saved[theirs])
    for field in dataclasses.fields(arguments):
        if field.name in saved and field.name != "adapter_path":
            setattr(arguments, field.name, saved[field.name])


def base_model_of(adapter_path: str) -> str:
    """Hub id or folder of the base model an adapter was trained on."""
    name = read_adapter_config(adapter_path).get("base_model_name_or_path")
    if not name:
        raise InputError(f"--adapter_path {adapter_path}: it does not name its base model; give --base_model")
    return name


def check_adapter(
    arguments, config: PretrainedConfig, base_name: str, head: str = "lm", labels: int | None = None
) -> None:
    """Everything about an adapter that can be wrong and be seen without the base model's weights.

    Args:
        labels: number of classes, where the task has some.

    Raises:
        InputError: unknown targets, a folder that holds no adapter, or one of another base model.
    """
    if arguments.adapter_path is None:
        adapter_config(arguments, config, base_name, head)
        return
    saved = read_adapter_config(arguments.adapter_path)
    if saved.get("task_type") not in (None, PEFT_TASKS[head]):
        has = next((name for name, task in PEFT_TASKS.items() if task == saved["task_type"]), saved["task_type"])
        raise InputError(
            f"--adapter_path {arguments.adapter_path}: trained for {has} (lm: answers as text), and the run is for "
            f"{head}; give the --task_type and --head it was trained with"
        )
    trained_on = base_model_of(arguments.adapter_path)
    shapes = weight_shapes(arguments.adapter_path)
    for name, shape in shapes.items():
        if head == "classification" and labels and OUTPUT_LAYER.search(name) and shape[0] != labels:
            raise InputError(
                f"--adapter_path {arguments.adapter_path}: its head tells {shape[0]} labels apart, and the task has "
                f"{labels}; give the data or the --labels it was trained for"
            )
    prompt = shapes.get("prompt_embeddings")
    if prompt and prompt[1] != config.hidden_size:
        raise InputError(
            f"--adapter_path {arguments.adapter_path}: virtual tokens of width {prompt[1]}, and {base_name} has width "
            f"{config.hidden_size}; give --base_model {trained_on}"
        )
    # A base keeps its name when its folder moves or it comes from the hub: only the last part has to agree.
    if Path(trained_on).name != Path(base_name).name:
        raise InputError(
            f"--adapter_path {arguments.adapter_path}: trained on base model {trained_on!r}, not {base_name!r}; "
            f"give --base_model {trained_on}"
        )


def attach_adapter(
    base: PreTrainedModel, arguments, base_name: str, head: str = "lm", train_too: Sequence[str] = ()
) -> PeftModel:
    """Return the base model with an adapter on it; the adapter's weights are fp32 and alone trainable.

    It must come before DeepSpeed wraps the model: then the adapter's weights are still whole on every rank.

    Args:
        base: the frozen model.
        arguments: an `AdapterArguments`.
        base_name: hub id or folder of the base, written into the adapter's folder.
        head: "lm", or the task type of the model's own head.
        train_too: names of the base's modules that are trained and saved with the adapter: the head.

    Raises:
        InputError: the existing adapter's weights do not fit the base model.
    """
    if arguments.adapter_path is None:
        try:
            config = adapter_config(arguments, base.config, base_name, head)
            missing = [name for name in train_too if not any(n.endswith(name) for n, _ in base.named_modules())]
            if missing:
                raise InputError(f"--modules_to_save {' '.join(missing)}: the base model has no such module")
            config.modules_to_save = list(dict.fromkeys(train_too)) or None
            model = get_peft_model(base, config)
        except InputError:
            raise
        except ValueError as error:  # peft's own check of --target_modules
            named = " ".join(arguments.target_modules or [])
            flag = f"--target_modules {named}" if named else f"--adapter_name {arguments.adapter_name}"
            raise InputError(f"{flag}: {error}") from error
    else:
        model = _load_adapter(base, arguments.adapter_path, base_name)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.register_forward_pre_hook(_cast_input, with_kwargs=True)
            place = name.removeprefix("base_model.model.")
            if place.startswith(f"{base.base_model_prefix}.") and "pooler" not in place:  # no head: the base goes on
                module.register_forward_hook(_cast_output)
    return model


def _cast_input(module: ModulesToSaveWrapper, inputs: tuple, named: dict) -> tuple[tuple, dict]:
    """What comes from a half-precision base, in the dtype of the module, which is trained in fp32."""
    used = module.original_module if module.disable_adapters else module.modules_to_save[module.active_adapters[0]]
    dtype = next(used.parameters()).dtype
    return _cast(inputs, dtype), {name: _cast(value, dtype) for name, value in named.items()}


def _cast_output(module: ModulesToSaveWrapper, inputs: tuple, output):
    """What goes back into a half-precision base, in its dtype: accelerate's autocast covers training, and not
    `generate`."""
    return _cast(output, next(module.original_module.parameters()).dtype)


def _cast(value, dtype: torch.dtype):
    """Numbers with a point, also in tuples, in this dtype; all else as it is."""
    if type(value) is tuple:
        return tuple(_cast(part, dtype) for part in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _load_adapter(base: PreTrainedModel, path: str, base_name: str) -> PeftModel:
    prompt_learning = PeftConfig.from_pretrained(path).is_prompt_learning
    try:
        # peft refuses to load a prompt as trainable; loaded as it is, it is made trainable below.
        model = PeftModel.from_pretrained(base, path, is_trainable=not prompt_learning)
    except (RuntimeError, ValueError, KeyError) as error:
        lines = str(error).strip().splitlines()
        reason = lines[min(1, len(lines) - 1)].strip()  # the first line of torch's only says that something is wrong
        raise InputError(f"--adapter_path {path}: does not fit {base_name} ({reason})") from error
    if prompt_learning:
        # Also for a test alone: in inference mode peft reads the embedding's weight directly, and under ZeRO-3 only
        # the forward pass of its module makes it whole.
        model.active_peft_config.inference_mode = False
        model.prompt_encoder.requires_grad_(True)
    else:
        _check_places(model, path, base_name)
    return model


def _check_places(model: PeftModel, path: str, base_name: str) -> None:
    """Raise `InputError` unless each weight of the adapter's file has a place in the model, and each place a weight:
    peft passes over what a base of another depth has too many or too few of."""
    # As state_dict() names them, without what 4-bit weights would put beside themselves.
    state = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    found = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    file = set(weight_shapes(path))
    trained = {name for name, tensor in found.items() if tensor.requires_grad}  # buffers may be made anew
    # Embeddings that were trained with it go by their own names: peft does not count them as the adapter's.
    stray = (trained - file) | (file - set(found) - set(state))
    if stray:
        raise InputError(
            f"--adapter_path {path}: does not fit {base_name}: {min(stray)} is only in one of the two; give the base "
            "that it was trained on"
        )
