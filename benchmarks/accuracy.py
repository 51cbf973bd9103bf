"""How accurate are the adapters on SST-2, with a real encoder, against stock peft LoRA and full fine-tuning?

    python benchmarks/accuracy.py --base_model FOLDER_OF_MINILM --data_path FOLDER_OF_SST2 [--methods bh-peft,lora]

One epoch of GLUE's 67,349 training rows, batches of similar length, padded to their longest row; accuracy on the 872
rows of GLUE's dev, which nothing is tuned on. Prints a table of each method's mean over the seeds and writes
results/benchmarks/accuracy.json. --max_train_samples 640 makes it a smoke test.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig, TaskType, get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)

from bhpeft.adapters import BhPeftConfig  # noqa: E402
from bhpeft.adapters.bh_peft import PRESETS  # noqa: E402
from bhpeft.base_model import parameter_counts  # noqa: E402
from bhpeft.environment import hardware, library_versions  # noqa: E402
from bhpeft.errors import run_main  # noqa: E402
from bhpeft.files import write_atomic  # noqa: E402
from bhpeft.tasks.table import read_columns  # noqa: E402
from bhpeft.training import AdapterTrainer  # noqa: E402

# What each method trains with. Stock LoRA's and full fine-tuning's rates are usual ones; the others are not tuned yet.
RATES = {"lora": 1e-3, "full": 1e-4, "bh-peft": 2e-3, "mam": 2e-3, "hybrid": 2e-3, "bayesian-lora": 2e-3}
SITES = {"prefix_length": 10, "bn_reduction_factor": 8, "lora_rank": 4, "lora_alpha": 8.0}


def build(method: str, base_model: str, settings: dict):
    """The base model with the method's adapter and a trainable head; all of it trainable for "full"."""
    model = AutoModelForSequenceClassification.from_pretrained(base_model, num_labels=2)
    if method == "full":
        return model
    if method == "lora":  # stock peft, rank 8 on query and value
        return get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16))
    return get_peft_model(model, BhPeftConfig(task_type=TaskType.SEQ_CLS, **PRESETS[method], **{**SITES, **settings}))


def run(method: str, seed: int, flags: argparse.Namespace, train: list[dict], dev: list[dict], tokenizer) -> dict:
    """Train one method with one seed and return its figures."""
    set_seed(seed)
    model = build(method, flags.base_model, json.loads(flags.settings))
    counts = parameter_counts(model)
    head = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "classifier" in n)
    arguments = TrainingArguments(
        output_dir=str(ROOT / "adapters" / "benchmark"),
        per_device_train_batch_size=flags.batch_size,
        per_device_eval_batch_size=128,
        num_train_epochs=1,
        learning_rate=flags.lr or RATES[method],
        lr_scheduler_type="linear",
        warmup_steps=0.06,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        logging_steps=200,
        report_to="none",
        seed=seed,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        bf16=flags.bf16,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = AdapterTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    trainer.kl_weight = flags.kl_weight
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    labels = np.array([row["labels"] for row in dev])
    logits = trainer.predict([{k: v for k, v in row.items() if k != "labels"} for row in dev]).predictions
    return {
        "method": method,
        "seed": seed,
        "accuracy": float((logits.argmax(1) == labels).mean()),
        "seconds": seconds,
        "trainable_percent_without_head": 100 * (counts["trainable"] - head) / counts["all"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True, help="encoder, e.g. the folder of all-MiniLM-L6-v2")
    parser.add_argument("--data_path", type=Path, required=True, help="folder with SST-2's train.tsv and dev.tsv")
    parser.add_argument("--methods", default=",".join([*PRESETS, "lora", "full"]))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--lr", type=float, help="for all methods (default: each its own)")
    parser.add_argument("--kl_weight", type=float, default=1.0)
    parser.add_argument("--settings", default="{}", help="JSON of BhPeftConfig fields")
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--bf16", action="store_true")
    flags = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(flags.base_model)

    def rows(name: str) -> list[dict]:
        table = read_columns(flags.data_path / f"{name}.tsv", ["sentence", "label"])
        ids = tokenizer(table["sentence"].tolist(), truncation=True, max_length=128)["input_ids"]
        return [{"input_ids": i, "labels": int(label)} for i, label in zip(ids, table["label"], strict=True)]

    train, dev = rows("train"), rows("dev")
    if flags.max_train_samples:
        train = train[: flags.max_train_samples]
    found = []
    for method in flags.methods.split(","):
        for seed in map(int, flags.seeds.split(",")):
            found.append(run(method, seed, flags, train, dev, tokenizer))
            print(json.dumps(found[-1]), flush=True)
    print("\nmean and sample deviation over the seeds")
    print(f"{'method':<16}{'accuracy':>10}{'+-':>8}{'trained %':>12}{'seconds':>10}")
    for method in flags.methods.split(","):
        group = [row for row in found if row["method"] == method]
        values = [row["accuracy"] for row in group]
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        seconds = statistics.mean(row["seconds"] for row in group)
        share = group[0]["trainable_percent_without_head"]
        print(f"{method:<16}{statistics.mean(values):>10.4f}{spread:>8.4f}{share:>12.3f}{seconds:>10.0f}")
    record = {
        "runs": found,
        "flags": {k: str(v) for k, v in vars(flags).items() if k not in ("base_model", "data_path")},
    }
    record |= {"train_rows": len(train), "versions": library_versions(), "hardware": hardware()}
    write_atomic(ROOT / "results/benchmarks/accuracy.json", json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
