"""An adapter for those who do not have bhpeft: as stock LoRA, or merged into its base model.

    lora      BH-PEFT whose only site is LoRA -> stock peft LoRA at the posterior mean: A = mu of down, B = up, alpha, r
    merged    W + (alpha / r) B A -> a plain transformers model, without peft

A prefix and a parallel adapter stand beside the weights, not in them, and can become neither.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from bhpeft.adapters.architectures import PLACES
from bhpeft.adapters.attach import base_model_of, read_adapter_config, weight_shapes
from bhpeft.adapters.bh_peft import PEFT_TYPE
from bhpeft.base_model import load_config
from bhpeft.errors import InputError
from bhpeft.files import write_atomic

MODEL_CLASSES = {"CAUSAL_LM": AutoModelForCausalLM, "SEQ_CLS": AutoModelForSequenceClassification}
MERGE_DTYPES = ("float32", "float16", "bfloat16")
BESIDE = {
    "prefix": "the prefix adds keys and values to the attention",
    "adapter": "the parallel adapter adds a ReLU path beside the feed-forward block",
}
VIRTUAL_TOKENS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT")
HEADS = ("classifier", "classifier.out_proj", "score")  # last layers of classifiers: one row of weights a label
STALE = ("adapter_*", "model*.safetensors*", "pytorch_model*")  # what would be loaded in the new files' place
_PART = re.compile(
    r"base_model\.model\.(?P<module>.+)\.bh_parts\.(?:[^.]+\.)?(?P<matrix>down|up)"
    r"\.(?P<tensor>mu|weight|g|prior_mu|prior_sigma)"
)


def export_lora(adapter_path: str | Path, out: str | Path, overwrite: bool = False) -> list[str]:
    """Write a BH-PEFT adapter whose only site is LoRA as a stock peft LoRA folder, from its files alone.

    Gaussian matrices are replaced by their means, as in evaluation; trained heads are carried over.

    Args:
        adapter_path: the adapter's folder.
        out: folder to write; its name may be new, or that of an empty folder.
        overwrite: write into a folder that holds something.

    Returns:
        Full names of the modules that carry LoRA.

    Raises:
        InputError: the adapter cannot be read or is no such adapter, or `out` is in the way.
    """
    saved = read_adapter_config(str(adapter_path))
    kind = saved["peft_type"]
    if kind != PEFT_TYPE:
        raise InputError(f"{adapter_path}: peft_type {kind!r} is stock peft's own and needs no export; use it as it is")
    _refuse_sites(adapter_path, saved, "exported as LoRA", "stock LoRA has no place for it")
    weight_shapes(str(adapter_path))
    weights = stock_weights(load_file(Path(adapter_path) / "adapter_model.safetensors"), adapter_path)
    modules = _lora_modules(weights)
    with _new_folder(out, overwrite, adapter_path) as folder:
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = json.dumps(stock_config(saved, modules), indent=2, sort_keys=True)
        write_atomic(folder / "adapter_config.json", config + "\n")
    return modules


def stock_weights(saved: dict[str, torch.Tensor], source: str | Path) -> dict[str, torch.Tensor]:
    """Weights of a BH-PEFT adapter with LoRA alone under stock peft's names, at the posterior mean.

    Args:
        saved: as of the adapter's file.
        source: where they come from, for messages.

    Raises:
        InputError: there is no LoRA among them, half of one, or something that is not known.
    """
    weights = {}
    for name, tensor in saved.items():
        found = _PART.fullmatch(name)
        if found is None and ".bh_" in name:
            raise InputError(f"{source}: holds {name}, which is no LoRA weight; export it with the bhpeft it is from")
        if found is None:  # a head, under the name that stock peft saves it by
            weights[name] = tensor.contiguous()
        elif found["tensor"] in ("mu", "weight"):
            letter = {"down": "A", "up": "B"}[found["matrix"]]
            weights[f"base_model.model.{found['module']}.lora_{letter}.weight"] = tensor.contiguous()
    names = {letter: {n.split(".lora_")[0] for n in weights if f".lora_{letter}." in n} for letter in "AB"}
    if not names["A"] or names["A"] != names["B"]:
        raise InputError(f"{source}: its weights lack LoRA matrices; was saving cut short? Use another checkpoint")
    return weights


def stock_config(saved: dict[str, Any], modules: list[str]) -> dict[str, Any]:
    """The stock LoRA configuration that says what a saved BH-PEFT configuration says.

    Only what every version of peft knows is written. Modules go by full names: the end of a name could mean others too.
    """
    transposed = tuple("." + name for name in PLACES["gpt2"].lora)  # Conv1D
    alpha = float(saved["lora_alpha"])
    return {
        "peft_type": "LORA",
        "task_type": saved.get("task_type"),
        "auto_mapping": saved.get("auto_mapping"),
        "base_model_name_or_path": saved.get("base_model_name_or_path"),
        "revision": saved.get("revision"),
        "inference_mode": True,
        "r": saved["lora_rank"],
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": saved["lora_dropout"],
        "bias": "none",
        "init_lora_weights": True,
        "fan_in_fan_out": all(name.endswith(transposed) for name in modules),
        "target_modules": modules,
        "modules_to_save": saved.get("modules_to_save"),
    }


def merge_adapter(
    adapter_path: str | Path,
    out: str | Path,
    base_model: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    labels: Sequence[str] = (),
) -> list[str]:
    """Merge a LoRA adapter into its base model, and write a plain transformers folder with the tokenizer.

    Stock LoRA, QLoRA, and BH-PEFT with LoRA alone (at the posterior mean). The base is loaded whole, on the CPU, and
    never in 4 bit: merged weights rounded to 4 bit would lose most of what the adapter adds.

    Args:
        adapter_path: the adapter's folder.
        out: folder to write; its name may be new, or that of an empty folder.
        base_model: hub id or folder, unquantised (default: the one the adapter names).
        dtype: "float32", "float16" or "bfloat16", of the base as loaded and of the merged weights.
        overwrite: write into a folder that holds something.
        labels: names of a classifier's labels, in order, for the model's configuration.

    Returns:
        Notes of one line each, on what was done.

    Raises:
        InputError: the adapter cannot be merged or does not fit, the base is not found, or `out` is in the way.
    """
    if dtype not in MERGE_DTYPES:
        raise InputError(f"--dtype {dtype}: must be one of {', '.join(MERGE_DTYPES)}")
    saved = read_adapter_config(str(adapter_path))
    _check_mergeable(adapter_path, saved)
    shapes = weight_shapes(str(adapter_path))
    base_name = base_model or base_model_of(str(adapter_path))
    revision = None if base_model else saved.get("revision")
    config = load_config(base_name, revision or "main")
    if getattr(config, "quantization_config", None):
        raise InputError(f"--base_model {base_name}: stored quantised; give the model it was made of")
    notes = [
        f"merged into the unquantised weights of {base_name} in {dtype}; an adapter trained beside 4-bit weights "
        "(QLoRA) meets others here than it was trained on, and may answer a little differently"
    ]
    trained_on = saved.get("base_model_name_or_path")
    if trained_on and Path(trained_on).name != Path(base_name).name:
        notes.append(f"note: the adapter was trained on {trained_on}")

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_new_folder(out, overwrite, adapter_path, base_name))
        stock = adapter_path
        if saved["peft_type"] == PEFT_TYPE:
            stock = stack.enter_context(tempfile.TemporaryDirectory())
            export_lora(adapter_path, stock)
            shapes = weight_shapes(stock)
        base = _load_base(_model_class(adapter_path, saved), base_name, config, revision, dtype, shapes)
        model = _merged(base, stock, shapes, base_name, getattr(torch, dtype))
        if labels:
            model.config.id2label = dict(enumerate(labels))
            model.config.label2id = {label: i for i, label in enumerate(labels)}
        notes += _save_tokenizer(adapter_path, base_name, revision, model, folder)
        model.save_pretrained(folder)
    return notes


# ------------------------------------------------------------------------------------------------ refusals


def _refuse_sites(path: str | Path, saved: dict, done: str, why: str) -> None:
    """Raise `InputError` if a BH-PEFT adapter has a site beside LoRA."""
    others = [site for site in saved["sites"] if site in BESIDE]
    if others:
        reasons = " and ".join(BESIDE[site] for site in others)
        raise InputError(
            f"{path}: holds the sites {', '.join(saved['sites'])} and cannot be {done}: {reasons}, and {why}; "
            "load it with bhpeft installed, or train --adapter_name bayesian-lora"
        )


def _check_mergeable(path: str | Path, saved: dict) -> None:
    kind = saved["peft_type"]
    if kind == PEFT_TYPE:
        _refuse_sites(path, saved, "merged", "there is no weight to merge it into")
    elif kind in VIRTUAL_TOKENS:
        raise InputError(
            f"{path}: peft_type {kind!r} cannot be merged: it adds virtual tokens to the input, and there is no weight "
            "to merge them into; keep base and adapter apart"
        )
    elif kind != "LORA":
        raise InputError(f"{path}: peft_type {kind!r} cannot be merged here; only LoRA and QLoRA adapters can")
    _model_class(path, saved)


def _model_class(path: str | Path, saved: dict) -> Any:
    """The class that loads the base with its head: by the task's type, or as peft noted it where there is none."""
    task = saved.get("task_type")
    if task in MODEL_CLASSES:
        return MODEL_CLASSES[task]
    name = (saved.get("auto_mapping") or {}).get("base_model_class") if task is None else None
    named = getattr(transformers, name, None) if name else None
    if isinstance(named, type) and issubclass(named, PreTrainedModel):
        return named
    raise InputError(
        f"{path}: task_type {task!r} does not say which kind of model to merge into; known: {', '.join(MODEL_CLASSES)}"
    )


# ------------------------------------------------------------------------------------------------- merging


def _lora_modules(names: dict[str, Any]) -> list[str]:
    """Full names of the modules that have a LoRA matrix, in order of depth."""

    def by_depth(name: str) -> list:
        return [part.zfill(6) for part in name.split(".")]

    found = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in names if ".lora_A." in name}
    return sorted(found, key=by_depth)


def _load_base(model_class: Any, name: str, config, revision: str | None, dtype: str, shapes: dict) -> PreTrainedModel:
    """Load the base with as many labels as the adapter's head has; a head that neither holds is refused."""
    trained = {key.removeprefix("base_model.model."): shape for key, shape in shapes.items()}
    head = next((trained[f"{layer}.weight"] for layer in HEADS if f"{layer}.weight" in trained), None)
    if head is not None and model_class is AutoModelForSequenceClassification and config.num_labels != head[0]:
        config.num_labels = head[0]
    try:
        model, loaded = model_class.from_pretrained(
            name,
            config=config,
            revision=revision or "main",
            dtype=getattr(torch, dtype),
            ignore_mismatched_sizes=True,  # a head with other labels, which the adapter replaces; all else is refused
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--base_model {name}: cannot be loaded ({reason})") from error
    absent = {*loaded["missing_keys"], *(key[0] for key in loaded["mismatched_keys"])} - set(trained)
    if absent:
        raise InputError(
            f"--base_model {name}: neither it nor the adapter holds {', '.join(sorted(absent)[:3])}, which the merged "
            "model needs; give the base model that the adapter was trained on"
        )
    return model


def _merged(base: PreTrainedModel, path: str | Path, shapes: dict, name: str, dtype: torch.dtype) -> PreTrainedModel:
    """Put the adapter on its base, see that every weight found its place, and merge."""
    try:
        model = PeftModel.from_pretrained(base, str(path), torch_device="cpu")
        wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
        stray = wanted ^ set(shapes)
        # Embeddings that were trained with it go by their own names: peft does not count them as the adapter's.
        stray -= set(model.state_dict()) - wanted
        if stray:
            raise ValueError(f"no match for {min(stray)}")
        return model.merge_and_unload(safe_merge=True).to(dtype)
    except (RuntimeError, ValueError, KeyError, NotImplementedError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[min(1, len(lines) - 1)].strip()  # the first line of torch's only says that something is wrong
        raise InputError(f"{path}: cannot be merged into {name} ({reason})") from error


def _save_tokenizer(
    adapter_path: str | Path, base_name: str, revision: str | None, model: PreTrainedModel, folder: Path
) -> list[str]:
    """Write the adapter's own tokenizer or else the base's; a note if there is none.

    A classifier reads the last token that is no padding: where the model does not know its padding, it is told.
    """
    own = (Path(adapter_path) / "tokenizer_config.json").is_file()
    source, revision = (str(adapter_path), None) if own else (base_name, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
        empty = not tokenizer("a b c", add_special_tokens=False)["input_ids"]
    except (OSError, ValueError, KeyError) as error:
        tokenizer, empty = None, str(error).strip().splitlines()[0]
    if empty:
        reason = "it is empty" if empty is True else empty
        return [f"note: the folder holds no tokenizer, for that of {source} cannot be loaded ({reason})"]
    if type(model).__name__.endswith("ForSequenceClassification"):
        pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
        model.config.pad_token_id = end if pad is None else pad
    tokenizer.save_pretrained(folder)
    return []


# -------------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def _new_folder(out: str | Path, overwrite: bool, *sources: str | Path) -> Iterator[Path]:
    """Give a folder beside `out` to write into; what it holds comes to stand in `out` when the block ends well.

    Files of `out` that a loader would take for the new ones' part are removed then; others stay.

    Raises:
        InputError: `out` is a file, holds something and must not be overwritten, or is one of the sources.
    """
    out = Path(out).resolve()
    if any(Path(source).is_dir() and Path(source).resolve() == out for source in sources):
        raise InputError(f"{out}: is the folder that is read from; choose another one")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; choose a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise InputError(f"{out}: the folder is not empty; choose another one or pass --overwrite")
    beside = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
        (beside / "new").mkdir()  # mkdtemp's own is closed to others
        yield beside / "new"
        out.mkdir(exist_ok=True)
        for pattern in STALE:
            for file in out.glob(pattern):
                if file.is_file():
                    file.unlink()
        for file in (beside / "new").iterdir():
            file.replace(out / file.name)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{out}: cannot be written ({reason}); choose another folder or make room and permission"
        ) from error
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
