"""How long until something happens? A refused flag, --help, and the first optimizer step, against stock Trainer + peft.

    python benchmarks/startup.py --base_model FOLDER_OF_MINILM --data_path FOLDER_OF_SST2 [--repeats 5]

    refused flag    a mistyped flag, to the line that says so
    help            all flags, which needs transformers imported
    stock import    what the rival imports before it can begin: transformers.Trainer and peft
    first start     the trainer on all rows of SST-2, to the loss of its first step; no rows kept yet
    second start    the same again: rows are found, neither read nor tokenised
    in memory       the same with --row_cache none, as it was before
    stock, first    datasets, Trainer and peft as their documentation has them, LoRA on the same rows; `datasets` keeps
    stock, second   what it has read and tokenised, too

Seconds on the clock from the start of a process, methods in turns, --repeats times over; medians, and the ratio to the
rival named in the table (median of the ratios within one turn). Files are in the kernel's cache from the second turn
on. Writes results/benchmarks/startup.json and startup.png. --smoke: one turn, nothing written.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import processes  # noqa: E402
from bhpeft.errors import run_main  # noqa: E402
from bhpeft.files import write_atomic  # noqa: E402

TIMEOUT = 600  # seconds a process may take
FIRST_STEP = "{'loss'"  # how the Trainer's log begins
RIVALS = {
    "refused flag": "stock import", "help": "stock import", "first start": "stock, first",
    "second start": "stock, second", "in memory": "stock, first",
}  # fmt: skip
SETTINGS = {
    "adapter_name": "lora", "lora_rank": 8, "lora_alpha": 16, "dataset_name": "sst2", "max_length": 128,
    "long_prompts": "truncate", "per_device_train_batch_size": 8, "learning_rate": 1e-4, "max_steps": 1,
    "logging_steps": 1, "do_predict": False, "max_test_samples": 8, "save_strategy": "no", "disable_tqdm": True,
    "run_name": "run",
}  # fmt: skip


def train_stock(base_model: str, data_path: str) -> None:
    """One step of `Trainer` and peft on SST-2's folder, its rows read, tokenised and kept by `datasets`."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(base_model)
    file = str(Path(data_path) / "train.tsv")
    rows = load_dataset("csv", data_files=file, split="train", sep="\t", quoting=3)
    rows = rows.map(
        lambda some: tokenizer([text.strip() for text in some["sentence"]], truncation=True, max_length=128),
        batched=True, remove_columns=["sentence"],
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(base_model, num_labels=2, dtype=torch.float32)
    model = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, task_type="SEQ_CLS", target_modules=["query", "value"])
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=1, per_device_train_batch_size=8, report_to="none", save_strategy="no",
            disable_tqdm=True, logging_steps=1, learning_rate=1e-4, use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(
            model=model, args=arguments, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer)
        ).train()


def until_first_step(words: list[str], forget: Path | None = None, **environment: str) -> dict:
    """Seconds to the loss of the first step, and the most memory, of a training.

    Args:
        forget: a folder to remove before: what an earlier start has kept.

    Raises:
        RuntimeError: it failed, or said no loss.
    """
    if forget is not None:
        shutil.rmtree(forget, ignore_errors=True)
    done = processes.execute(words, TIMEOUT, FIRST_STEP, OMP_NUM_THREADS="1", **environment).checked()
    if done.marked is None:
        raise RuntimeError(f"no loss was said: {done.output[-3000:]}")
    return {"seconds": done.marked, "peak_mib": done.peak_mib}


def until_end(words: list[str], code: int) -> dict:
    """Seconds to the end of a command that has to end with this exit code."""
    done = processes.execute(words, TIMEOUT, OMP_NUM_THREADS="1")
    if done.code != code:
        raise RuntimeError(f"exit code {done.code} in place of {code}: {done.output[-3000:]}")
    return {"seconds": done.seconds, "peak_mib": done.peak_mib}


def methods(base_model: str, data_path: Path, folder: Path) -> dict[str, Callable[[], dict]]:
    """What is measured, by name, in the order of one turn."""
    trainer, kept = [sys.executable, str(processes.TRAINER)], folder / "cache"
    own = {"output_dir": folder / "adapter", "results_dir": folder / "results", "overwrite": True}
    own |= {**SETTINGS, "base_model": base_model, "data_path": data_path}
    cached = [*trainer, *processes.as_flags({**own, "row_cache": kept})]
    uncached = [*trainer, *processes.as_flags({**own, "row_cache": "none"})]
    stock = [sys.executable, __file__, "--stock", "--base_model", base_model, "--data_path", str(data_path)]
    theirs = folder / "stock"
    imports = [sys.executable, "-c", "from transformers import Trainer; import peft"]
    return {
        "refused flag": functools.partial(until_end, [*trainer, "--lora_rnak", "8"], 2),
        "help": functools.partial(until_end, [*trainer, "--help"], 0),
        "stock import": functools.partial(until_end, imports, 0),
        "in memory": functools.partial(until_first_step, uncached),
        "first start": functools.partial(until_first_step, cached, kept),
        "second start": functools.partial(until_first_step, cached),
        "stock, first": functools.partial(until_first_step, stock, theirs, HF_DATASETS_CACHE=str(theirs)),
        "stock, second": functools.partial(until_first_step, stock, HF_DATASETS_CACHE=str(theirs)),
    }


def summary(found: dict[str, list[dict]]) -> dict[str, dict]:
    """Median seconds and memory of each method, its rival, and the median ratio of the seconds to it."""
    medians = {}
    for name, runs in found.items():
        medians[name] = {"seconds": statistics.median(run["seconds"] for run in runs)}
        peaks = [run["peak_mib"] for run in runs if run["peak_mib"] is not None]
        medians[name]["peak_mib"] = statistics.median(peaks) if peaks else None
        if name in RIVALS:
            pairs = zip(runs, found[RIVALS[name]], strict=True)
            ratio = statistics.median(mine["seconds"] / its["seconds"] for mine, its in pairs)
            medians[name] |= {"rival": RIVALS[name], "ratio": ratio}
    return medians


def table(medians: dict[str, dict]) -> str:
    """The summary as text."""
    lines = [f"{'':<16}{'seconds':>9}{'peak MiB':>10}{'ratio':>8}  to"]
    for name, found in medians.items():
        peak = "-" if found["peak_mib"] is None else f"{found['peak_mib']:.0f}"
        behind = f"{found['ratio']:>8.2f}  {found['rival']}" if "ratio" in found else ""
        lines.append(f"{name:<16}{found['seconds']:>9.2f}{peak:>10}{behind}")
    return "\n".join(lines)


def draw(found: dict[str, list[dict]]) -> bytes:
    """Medians as bars, each turn as a mark, PNG."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(7, 0.36 * len(found) + 1), layout="constrained")
    axes = canvas.subplots()
    for place, (name, runs) in enumerate(found.items()):
        seconds = [run["seconds"] for run in runs]
        axes.barh(place, statistics.median(seconds), color="#9aa5b1" if "stock" in name else "#2f6f9f")
        axes.plot(seconds, [place] * len(seconds), "|", color="black", markersize=8)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set(xlabel="seconds from the start of the process")
    axes.grid(axis="x", color="0.9")
    png = io.BytesIO()
    canvas.savefig(png, format="png", dpi=120, metadata={"Software": None})
    return png.getvalue()


def main(argv: list[str] | None = None) -> dict | None:
    """Measure; return the record that is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True, help="encoder, e.g. the folder of all-MiniLM-L6-v2")
    parser.add_argument("--data_path", type=Path, required=True, help="folder with SST-2's train.tsv and dev.tsv")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="one turn")
    parser.add_argument("--out", type=Path, default=ROOT / "results/benchmarks/startup.json")
    parser.add_argument("--stock", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if flags.stock:
        train_stock(flags.base_model, str(flags.data_path))
        return None

    from bhpeft.environment import hardware, library_versions

    with tempfile.TemporaryDirectory() as folder:
        chosen = methods(flags.base_model, flags.data_path, Path(folder))
        found = processes.in_turns("startup", chosen, 1 if flags.smoke else flags.repeats)
    medians = summary(found)
    print(table(medians), flush=True)
    record = {"medians": medians, "turns": found, "versions": library_versions(), "hardware": hardware()}
    if not flags.smoke:
        write_atomic(flags.out, json.dumps(record, indent=1) + "\n")
        write_atomic(flags.out.with_suffix(".png"), draw(found))
    return record


if __name__ == "__main__":
    run_main(main)
