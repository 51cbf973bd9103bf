"""An adapter's folder, looked at before anything is loaded: its files are there, whole, and what they say to be."""

from __future__ import annotations

from pathlib import Path

from bhpeft.errors import InputError
from bhpeft.files import read_json
from bhpeft.tensor_files import TensorFile

RUNS_CODE = ("megatron_config", "tokenizer_kwargs")  # of a saved configuration: imports by name, trust_remote_code
SAVED_KINDS = {  # of a saved configuration's fields, where a wrong one would be found out late
    **dict.fromkeys(("r", "lora_rank", "prefix_length", "num_virtual_tokens", "bn_reduction_factor"), int),
    **dict.fromkeys(
        ("lora_alpha", "lora_dropout", "adapter_scaling", "prior_mu", "prior_sigma", "initial_sigma"), int | float
    ),
    **dict.fromkeys(("base_model_name_or_path", "prompt_tuning_init_text", "bayesian", "task_type", "peft_type"), str),
    **dict.fromkeys(("sites", "modules_to_save"), list),
}


def adapter_weights(folder: str | Path) -> Path:
    """The file of an adapter's weights.

    Raises:
        InputError: there is none, or only a pickle, which may run code when it is read, and never is here.
    """
    folder = Path(folder)
    file = folder / "adapter_model.safetensors"
    if file.is_file():
        return file
    if (folder / "adapter_model.bin").is_file():
        raise InputError(
            f"{folder}: its weights are adapter_model.bin, a pickle, which may run code and is not read here; ask for "
            "the adapter as adapter_model.safetensors"
        )
    raise InputError(f"{folder}: the folder holds no adapter_model.safetensors; was saving cut short?")


def read_adapter_folder(path: str | Path) -> dict:
    """The saved configuration of an adapter folder.

    Raises:
        InputError: no such folder, no adapter in it, or a file of it that cannot be read.
    """
    file = Path(path) / "adapter_config.json"
    if not Path(path).is_dir():
        raise InputError(f"--adapter_path {path}: no such folder")
    if not file.is_file():
        raise InputError(f"--adapter_path {path}: the folder holds no adapter_config.json; give the adapter's folder")
    try:
        adapter_weights(path)
    except InputError as error:
        raise InputError(f"--adapter_path {error}") from None
    config = read_json(file, "save the adapter again")
    if not isinstance(config, dict):
        raise InputError(f"{file}: is no configuration; save the adapter again")
    for name, value in config.items():
        kind = SAVED_KINDS.get(name)
        if kind and value is not None and not isinstance(value, kind):
            raise InputError(f"{file}: {name} is {value!r:.60}; save the adapter again")
    if asked := [name for name in RUNS_CODE if config.get(name)]:
        raise InputError(
            f"{file}: {asked[0]} has peft import or hand on what a stranger names; not followed here: remove it"
        )
    return config


def check_adapter_folder(path: str | Path) -> None:
    """Raise `InputError` for what can be wrong with an adapter's folder and be seen before torch is imported."""
    read_adapter_folder(path)
    TensorFile(adapter_weights(path))
