"""How accurate are the adapters on SST-2, with a real encoder, against stock peft LoRA and full fine-tuning?

    python benchmarks/accuracy.py --base_model FOLDER_OF_MINILM --data_path FOLDER_OF_SST2 [--methods bh-peft,lora]

One epoch of GLUE's 67,349 training rows, in bf16 (half the time of fp32 on CPUs that have it; --fp32); accuracy on the
872 rows of GLUE's dev, which nothing is tuned on. Adapters are trained by the project's own trainer with
recipes/bh_peft_minilm_sst2.yaml and what SETTINGS change in it; full fine-tuning, which it does not offer, by the same
Trainer on the same rows. Prints a table of each method over the seeds and writes results/benchmarks/accuracy.json
after every run. Runs that are in that file already are not repeated (--again repeats them), and none of another
precision or number of rows is lost. --max_train_samples 640 makes it a smoke test.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from transformers import AutoTokenizer, TrainingArguments, set_seed  # noqa: E402

import parameter_efficient_fine_tuning as trainer_script  # noqa: E402
from bhpeft.arguments import DataArguments  # noqa: E402
from bhpeft.base_model import load_with_head, parameter_counts  # noqa: E402
from bhpeft.environment import hardware, library_versions, set_precision, training_attention  # noqa: E402
from bhpeft.errors import InputError, run_main  # noqa: E402
from bhpeft.files import write_atomic  # noqa: E402
from bhpeft.tasks import load_task  # noqa: E402
from bhpeft.tasks.encoding import Collator  # noqa: E402
from bhpeft.tasks.head_encoding import HeadEncoder  # noqa: E402
from bhpeft.training import AdapterTrainer  # noqa: E402

RECIPE = ROOT / "recipes/bh_peft_minilm_sst2.yaml"
# What a method changes in the recipe, so that each trains at most 0.7 % besides the head.
SETTINGS = {
    "bh-peft": {},
    "mam": {"bn_reduction_factor": 16},
    "hybrid": {"lora_rank": 8},
    "bayesian-lora": {"lora_rank": 8},
    "lora": {"lora_rank": 8, "learning_rate": 1e-3, "per_device_train_batch_size": 32},  # stock peft, usual values
    "full": {"learning_rate": 1e-4, "per_device_train_batch_size": 32},
}


def run_adapter(method: str, seed: int, flags: argparse.Namespace) -> dict:
    """Train and test an adapter by the trainer itself; its record gives the figures."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--config", RECIPE, "--base_model", flags.base_model, "--data_path", flags.data_path]
        words += ["--adapter_name", method, "--seed", seed, "--run_name", "run", "--disable_tqdm", "true"]
        words += ["--results_dir", f"{folder}/results", "--output_dir", f"{folder}/adapter"]
        words += [] if flags.fp32 else ["--bf16"]
        words += [word for name, value in SETTINGS[method].items() for word in (f"--{name}", value)]
        if flags.max_train_samples:
            words += ["--max_train_samples", flags.max_train_samples]
        record = trainer_script.main([str(word) for word in words])
    return {
        "accuracy": record["metrics"]["accuracy"],
        "nll": record["metrics"]["nll"],
        "seconds": record["timings"]["train"],
        "percent": record["parameters"]["adapter_percent"],
    }


def run_full(seed: int, flags: argparse.Namespace) -> dict:
    """Fine-tune every weight, on the rows and in the batches that the adapters see."""
    data = DataArguments(dataset_name="sst2", data_path=str(flags.data_path), max_length=128)
    data.max_train_samples = flags.max_train_samples
    task = load_task(data, 42)
    tokenizer = AutoTokenizer.from_pretrained(flags.base_model)
    encoder = HeadEncoder(tokenizer, task.task_type, task.labels, data.max_length)
    set_seed(seed)
    precision = "no" if flags.fp32 else "bf16"
    attention = training_attention(precision, data.max_length)
    how = {"attn_implementation": attention}  # weights stay in fp32, products are in bf16
    model, _ = load_with_head(str(flags.base_model), task.task_type, task.labels, tokenizer.pad_token_id, **how)
    model.requires_grad_(True)
    settings = SETTINGS["full"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, num_train_epochs=1, seed=seed, data_seed=42, lr_scheduler_type="linear",
            warmup_steps=0.06, train_sampling_strategy="group_by_length", save_strategy="no", report_to="none",
            disable_tqdm=True, dataloader_pin_memory=False, per_device_eval_batch_size=128,
            remove_unused_columns=False, logging_steps=200, **settings,
        )  # fmt: skip
        os.environ["ACCELERATE_MIXED_PRECISION"] = precision
        set_precision(arguments, precision)
        rows = encoder.train_rows(task.train, [])
        collator = Collator(tokenizer.pad_token_id)
        trainer = AdapterTrainer(
            model=model, args=arguments, train_dataset=rows, data_collator=collator, with_head=True
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        answers = trainer.answer(encoder.test_rows(task.test, []))
    right = [task.labels[i] == e.answer for i, e in zip(answers.scores.argmax(1), task.test, strict=True)]
    counts = parameter_counts(model)
    head = sum(parameter.numel() for name, parameter in model.named_parameters() if "classifier" in name)
    percent = 100 * (counts["trainable"] - head) / counts["all"]
    return {"accuracy": sum(right) / len(right), "nll": None, "seconds": seconds, "percent": percent}


def table(runs: list[dict]) -> str:
    """Mean and sample deviation of each method over its seeds, as text."""
    lines = [f"{'method':<16}{'seeds':>6}{'accuracy':>10}{'+-':>8}{'trained % besides head':>24}{'seconds':>9}"]
    for method in SETTINGS:
        group = [run for run in runs if run["method"] == method]
        if not group:
            continue
        values = [run["accuracy"] for run in group]
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-"
        seconds = statistics.mean(run["seconds"] for run in group)
        line = f"{method:<16}{len(group):>6}{statistics.mean(values):>10.4f}{spread:>8}{group[0]['percent']:>24.3f}"
        lines.append(f"{line}{seconds:>9.0f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True, help="encoder, e.g. the folder of all-MiniLM-L6-v2")
    parser.add_argument("--data_path", type=Path, required=True, help="folder with SST-2's train.tsv and dev.tsv")
    parser.add_argument("--methods", default=",".join(SETTINGS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--fp32", action="store_true", help="train in fp32")
    parser.add_argument("--out", type=Path, default=ROOT / "results/benchmarks/accuracy.json")
    parser.add_argument("--again", action="store_true", help="repeat runs that the output file holds already")
    flags = parser.parse_args()
    methods = flags.methods.split(",")
    if set(methods) - set(SETTINGS):
        raise InputError(f"--methods {flags.methods}: must be of {', '.join(SETTINGS)}")
    place = {"max_train_samples": flags.max_train_samples, "precision": "fp32" if flags.fp32 else "bf16"}
    known = json.loads(flags.out.read_text())["runs"] if flags.out.is_file() else []
    known = [{"precision": "fp32", **run} for run in known]
    runs = [run for run in known if place.items() <= run.items()]
    others = [run for run in known if run not in runs]
    for method in methods:
        for seed in map(int, flags.seeds.split(",")):
            before = [run for run in runs if run["method"] == method and run["seed"] == seed]
            if before and not flags.again:
                continue
            found = run_full(seed, flags) if method == "full" else run_adapter(method, seed, flags)
            runs = [run for run in runs if run not in before] + [{"method": method, "seed": seed, **place, **found}]
            record = {"runs": others + runs, "settings": SETTINGS}
            record |= {"versions": library_versions(), "hardware": hardware()}
            write_atomic(flags.out, json.dumps(record, indent=2) + "\n")
    print("\n" + table(runs))


if __name__ == "__main__":
    run_main(main)
