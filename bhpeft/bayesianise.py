"""Make a trained LoRA Gaussian, its spread searched on held-out rows; the method is `adapters/training_free.py`'s."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from peft import PeftModel
from safetensors.torch import load_file, save_file

from bhpeft.adapters import adopt_settings, attach_adapter, base_model_of, check_adapter
from bhpeft.adapters.bh_peft import gaussian_layers
from bhpeft.adapters.training_free import check_free, check_sites, largest_sigma, rescale_sigma, write_gaussian
from bhpeft.arguments import AdapterArguments, DataArguments
from bhpeft.base_model import check_positions, load_base_model, load_config, load_tokenizer, load_with_head
from bhpeft.errors import InputError
from bhpeft.feature_distance import FILE as DISTANCE
from bhpeft.scores import probabilities
from bhpeft.scoring import score
from bhpeft.tasks import Task
from bhpeft.tasks.card import FILE, TaskCard
from bhpeft.tasks.example import Example, at_most
from bhpeft.tasks.question import make_encoder
from bhpeft.tasks.table import read_examples
from bhpeft.uncertainty import nll

CRITERIA = {"accuracy": 0.01, "nll": 0.01}  # and how much each may get worse by default (share of rows; nats)


def bayesianise(
    adapter_path: str | Path,
    out: str | Path,
    file: str | Path,
    base_model: str | None = None,
    criterion: str = "accuracy",
    tolerance: float | None = None,
    samples: int = 10,
    max_rows: int = 500,
    seed: int = 42,
    columns: tuple[str, str] = ("text_input", "text_label"),
    say: Callable[[str], None] = lambda line: None,
) -> float:
    """Write the adapter `out`: the trained LoRA with Gaussian A', as spread as the rows of `file` allow.

    Args:
        adapter_path: a LoRA that this project trained for classification (its folder has a card).
        file: rows with labels that it was not trained on; at most `max_rows` of them, by `seed`, are asked.
        base_model: hub id or folder (default: the one the adapter names).
        criterion: "accuracy" or "nll" of the mean over `samples`, which may get worse by `tolerance` (default:
            `CRITERIA`) against the LoRA as it was.
        columns: of inputs and labels in `file`.
        say: takes a line at a time.

    Returns:
        sigma_q.

    Raises:
        InputError: the adapter or the rows are not as they must be.
    """
    card = TaskCard.read(adapter_path)
    if card is None or card.task_type != "classification":
        raise InputError(f"{adapter_path}: has no {FILE} of a classification; give an adapter that was trained for one")
    tolerance = CRITERIA[criterion] if tolerance is None else tolerance
    examples = at_most(read_examples(file, *columns), max_rows, seed)
    unknown = next((example for example in examples if example.answer not in card.labels), None)
    if unknown is not None:
        raise InputError(f"{file}: row {unknown.id}: unknown label {unknown.answer!r}; known: {', '.join(card.labels)}")
    out = Path(out)
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:  # whole or not at all
        made = Path(beside) / "adapter"
        write_gaussian(adapter_path, made, 1.0)  # sigma is scaled below
        dataclasses.replace(card, score_temperature=None, score_temperature_samples=0).write(made)
        model, rows, pad = _load(made, adapter_path, card, base_model, examples)
        sigma_q = _search(model, rows, pad, card, examples, criterion, tolerance, samples, seed, say)
        weights = load_file(made / "adapter_model.safetensors")
        weights = {k: v * sigma_q**0.5 if k.endswith(".down.g") else v for k, v in weights.items()}
        save_file(weights, made / "adapter_model.safetensors", metadata={"format": "pt"})
        if (distance := Path(adapter_path) / DISTANCE).is_file():  # of the frozen base, so it stays what it is
            shutil.copy(distance, made / DISTANCE)
        made.replace(out)
    return sigma_q


def _search(
    model: PeftModel,
    rows: list[dict],
    pad: int,
    card: TaskCard,
    examples: list[Example],
    criterion: str,
    tolerance: float,
    samples: int,
    seed: int,
    say: Callable[[str], None],
) -> float:
    """The largest sigma_q that the rows bear; arguments as of `bayesianise`."""
    y = np.array([card.labels.index(example.answer) for example in examples])

    def worth(samples: int) -> float:
        p = probabilities(score(model, rows, pad, 128, samples, seed)).mean(axis=0)
        return -nll(p, y) if criterion == "nll" else float((p.argmax(axis=1) == y).mean())

    point, current = worth(0), 1.0
    say(f"{criterion} of the point weights on {len(y)} rows: {abs(point):.4f}")

    def cost(sigma_q: float) -> float:
        nonlocal current
        rescale_sigma(model, sigma_q / current)
        current = sigma_q
        found = worth(samples)
        say(f"sigma_q {sigma_q:.5f}: {abs(found):.4f}")
        return point - found

    return largest_sigma(cost, tolerance)


def _load(
    out: str | Path, adapter_path: str | Path, card: TaskCard, base_model: str | None, examples
) -> tuple[PeftModel, list[dict], int]:
    """The model with the Gaussian adapter, the encoded rows, and the padding token."""
    arguments = AdapterArguments(adapter_path=str(out))
    adopt_settings(arguments)
    base_name = base_model or base_model_of(str(out))
    config = load_config(base_name)
    head = card.task_type if card.head else "lm"
    check_adapter(arguments, config, base_name, head)
    tokenizer = load_tokenizer(base_name, generates=not card.head)
    names = ("prompt_template", "instruction", "max_length", "answer_end", "predict_by")
    data = DataArguments(**{name: getattr(card, name) for name in names}, long_prompts="truncate")
    task = Task("held-out rows", [], [], examples, card.task_type, tuple(card.labels))
    encoder = make_encoder(tokenizer, data, task, card.head, str(out))
    check_positions(config, data.max_length)
    how = ("no", card.base_in_4bit)
    if card.head:
        base, _ = load_with_head(base_name, card.task_type, card.labels, tokenizer.pad_token_id, *how)
    else:
        base = load_base_model(base_name, *how)
    model = attach_adapter(base, arguments, base_name, head).eval()
    if not gaussian_layers(model):
        raise InputError(f"{adapter_path}: none of its LoRA stands where bhpeft's stands; train it as by default")
    check_sites(model, adapter_path)
    return model, encoder.test_rows(examples, []), tokenizer.pad_token_id
