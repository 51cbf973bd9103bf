"""How fast does it train, against what a user would pick instead? Ratios of one run, on one machine.

    python benchmarks/training.py --base_model FOLDER_OF_MINILM --data_path FOLDER_OF_SST2 \
        --tokenizer FOLDER_OF_GPT_NEOX_TOKENIZER [--parts encoder-8,encoder-32,labels] [--repeats 5]

The rival is `transformers.Trainer` with stock peft LoRA (rank 8 on query and value), its rows padded dynamically, the
same with rows grouped by length (in the order that ours has), the same in bf16, and the source projects' way: every row
padded, to 512 tokens for instructions, to the longest of 1,000 for SST-2. Ours is the project's own trainer, as its
script builds it.

    encoder-8, encoder-32   SST-2 on the encoder, batches of 8 and 32: LoRA, BH-PEFT; in fp32, and in bf16
    labels                  instruction -> label on a GPT-NeoX of 76 M random weights, batches of 8

Each figure is of a process of its own: a few steps to warm up, then timed steps. Methods take turns, --repeats times
over; the table gives medians, the ratio to the rival named in the part's head (median of the ratios within one turn),
the peak of resident memory, and what share of the matrix products per second that the process measures beside it the
step attains. All methods of a part train on the same rows. Losses are compared where batches are equal and nothing is
drawn (the encoder has dropout).
Writes results/benchmarks/training.json; parts measured before, with the same versions and hardware, stay in it.
--smoke: one turn of few steps, nothing written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bhpeft.errors import InputError, run_main  # noqa: E402
from bhpeft.files import write_atomic, write_rows  # noqa: E402

LORA = {"adapter_name": "lora", "lora_rank": 8, "lora_alpha": 16}
BH_PEFT = {
    "adapter_name": "bh-peft", "prefix_length": 10, "prefix_bottleneck_size": 2, "lora_rank": 4, "lora_alpha": 16,
    "bn_reduction_factor": 32, "adapter_scaling": 1,
}  # fmt: skip
GROUPED, RANDOM = {"sampling": "group_by_length"}, {"sampling": "random"}
ENCODER = {
    "stock": {"ours": False, **RANDOM},
    "stock, grouped": {"ours": False, **GROUPED},
    "stock, padded": {"ours": False, "padded": True, **RANDOM},
    "lora": {"ours": True, "adapter": LORA, **GROUPED},
    "bh-peft": {"ours": True, "adapter": BH_PEFT, **GROUPED},
    "lora, bf16": {"ours": True, "adapter": LORA, "bf16": True, **GROUPED},
    "bh-peft, bf16": {"ours": True, "adapter": BH_PEFT, "bf16": True, **GROUPED},
    "stock, bf16": {"ours": False, "bf16": True, **GROUPED},
}
LABELS = {
    "stock": {"ours": False, **RANDOM},
    "stock, grouped": {"ours": False, **GROUPED},
    "stock, padded": {"ours": False, "padded": True, "steps": 3, **RANDOM},
    "ours": {"ours": True, "adapter": LORA, **RANDOM},
    "ours, grouped": {"ours": True, "adapter": LORA, **GROUPED},
    "ours, checkpointed": {"ours": True, "adapter": LORA, "gradient_checkpointing": True, **RANDOM},
    "ours, bf16": {"ours": True, "adapter": LORA, "bf16": True, **RANDOM},
    "stock, bf16": {"ours": False, "bf16": True, **RANDOM},
}
# part: (methods, rival, batch, steps to warm up, timed steps). What is made for texts of a length is made when it is
# first met: a run of thousands of steps has met nearly all.
PARTS = {
    "encoder-8": (ENCODER, "stock, grouped", 8, 20, 60),
    "encoder-32": (ENCODER, "stock, grouped", 32, 3, 10),
    "labels": (LABELS, "stock", 8, 3, 6),
}
ROWS = 1000
TEMPLATE = (
    "### Instruction:\nClassify the sentiment of the following product review.\n\n### Input:\n{text}\n\n### Response:\n"
)


# ------------------------------------------------------------------------------------------- one measurement


def write_data(part: str, data_path: Path, file: Path) -> list[tuple[str, str]]:
    """The part's rows: sentences of SST-2's train; for instructions reviews of one to six of them."""
    from bhpeft.tasks.known import read_known

    examples = read_known("sst2", "train", str(data_path), [])
    draw = random.Random(0)
    draw.shuffle(examples)
    rows, i = [], 0
    while len(rows) < ROWS:
        count = draw.randint(1, 6) if part == "labels" else 1
        taken, i = examples[i : i + count], i + count
        rows.append((" . ".join(example.query for example in taken), taken[0].answer))
    write_rows(file, ["text_input", "text_label"], rows)
    asked_nothing = [("a row of the test , of which nothing is asked", "negative")]
    write_rows(file.with_name("test.csv"), ["text_input", "text_label"], asked_nothing)
    return rows


def make_causal(folder: Path, tokenizer_folder: Path, smoke: bool) -> Path:
    """A GPT-NeoX of random weights with the real tokenizer."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    file = next(iter(sorted(tokenizer_folder.glob("*tokenizer.json"))), None)
    if file is None:
        raise InputError(f"--tokenizer {tokenizer_folder}: no tokenizer.json in it")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>", pad_token="<|padding|>")
    torch.manual_seed(0)
    width, layers = (64, 2) if smoke else (512, 8)
    config = GPTNeoXConfig(
        vocab_size=50304, hidden_size=width, num_hidden_layers=layers, num_attention_heads=8,
        intermediate_size=4 * width, max_position_embeddings=512, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def stock_trainer(task: dict, arguments):
    """`Trainer` and peft as their documentation has them, on the same rows."""
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        DataCollatorWithPadding,
        Trainer,
        set_seed,
    )

    from bhpeft.length_groups import LengthGroups

    tokenizer = AutoTokenizer.from_pretrained(task["base_model"])
    texts = [tuple(row) for row in task["rows"]]
    set_seed(42)
    if task["part"] == "labels":
        model = AutoModelForCausalLM.from_pretrained(task["base_model"], dtype=torch.float32)
        lora = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", target_modules=["query_key_value"])
        rows = []
        for text, label in texts:
            prompt = tokenizer(TEMPLATE.format(text=text))["input_ids"]
            answer = tokenizer(label, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
        fill = {"padding": "max_length", "max_length": 512} if task.get("padded") else {}
        collator = DataCollatorForSeq2Seq(tokenizer, **fill)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(
            task["base_model"], num_labels=2, dtype=torch.float32
        )
        lora = LoraConfig(r=8, lora_alpha=16, task_type="SEQ_CLS", target_modules=["query", "value"])
        rows = [
            {**tokenizer(text, truncation=True, max_length=128), "labels": int(label == "positive")}
            for text, label in texts
        ]
        longest = max(len(row["input_ids"]) for row in rows)
        fill = {"padding": "max_length", "max_length": longest} if task.get("padded") else {}
        collator = DataCollatorWithPadding(tokenizer, **fill)
    model = get_peft_model(model, lora)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
    if task["sampling"] == "group_by_length":  # in the order that ours has, so that losses can be compared
        groups = LengthGroups(
            task["batch"], np.array([len(row["input_ids"]) for row in rows], np.int32), arguments.seed
        )
        trainer._get_train_sampler = lambda *_: groups
    return trainer


def own_trainer(task: dict, folder: Path, steps: int):
    """What the project's script trains with."""
    import parameter_efficient_fine_tuning as script
    from bhpeft.config import parse_arguments
    from bhpeft.environment import keep_freed_memory

    keep_freed_memory()
    settings = {
        **task["adapter"], "base_model": task["base_model"], "dataset_name": task["file"], "learning_rate": 1e-4,
        "max_length": 480 if task["part"] == "labels" else 128, "labels": ["negative", "positive"],
        "per_device_train_batch_size": task["batch"], "max_steps": steps, "train_sampling_strategy": task["sampling"],
        "output_dir": folder / "adapter", "results_dir": folder / "results", "run_name": "run", "save_strategy": "no",
        "disable_tqdm": True, "logging_steps": 1, "lr_scheduler_type": "linear", "seed": 42, "do_predict": False,
        "test_file": task["file"].replace("rows", "test"),
    }  # fmt: skip
    if task["part"] == "labels":
        settings["prompt_template"] = TEMPLATE.replace("{text}", "{text_input}")
    settings |= {name: True for name in ("bf16", "gradient_checkpointing") if task.get(name)}
    words = []
    for name, value in settings.items():
        words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    job = script.prepare(parse_arguments([str(word) for word in words]))
    return script.build_trainer(job, job.train_rows)


def measure(task: dict) -> dict:
    """Train for a few steps, in this process; its figures."""
    if task["ours"]:
        import bhpeft.late_compile  # noqa: F401  as the script begins, too
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import TrainerCallback, TrainingArguments

    from bhpeft.environment import peak_memory_mib

    torch.set_num_threads(task["threads"])
    behind = 1 + task["warm_up"]
    steps = behind + task["steps"]
    times: list[tuple[float, float]] = []
    tokens: list[int] = []
    onednn = torch.ops.mkldnn._linear_pointwise  # the flop counter does not know it: x (..., in), weight (out, in)
    count = {onednn: lambda x, weight, *rest, out_shape, **named: 2 * math.prod(x) * weight[0]}
    flops = FlopCounterMode(display=False, custom_mapping=count)

    class Clock(TrainerCallback):
        """The first step is counted, the next ones warm up, all others are timed."""

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                flops.__enter__()
            self.started = time.perf_counter(), time.process_time()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:  # the step is over
                flops.__exit__(None, None, None)
            now = time.perf_counter(), time.process_time()
            times.append((now[0] - self.started[0], now[1] - self.started[1]))

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        if task["ours"]:
            trainer = own_trainer(task, Path(folder), steps)
        else:
            arguments = TrainingArguments(
                output_dir=folder, max_steps=steps, per_device_train_batch_size=task["batch"], report_to="none",
                save_strategy="no", disable_tqdm=True, logging_steps=1, learning_rate=1e-4, use_cpu=True, seed=42,
                dataloader_pin_memory=False, train_sampling_strategy=task["sampling"], bf16=task.get("bf16", False),
            )  # fmt: skip
            trainer = stock_trainer(task, arguments)
        collate = trainer.data_collator

        def counted(rows):
            batch = collate(rows)
            tokens.append(int(batch["attention_mask"].sum()))
            return batch

        trainer.data_collator = counted
        trainer.add_callback(Clock())
        trainer.train()
    timed = times[behind:]
    seconds = sum(wall for wall, _ in timed)
    dtype = torch.bfloat16 if task.get("bf16") else torch.float32
    a, b = torch.randn(1024, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
    rates = []
    for product in (torch.matmul, lambda a, b: onednn(a, b, None, "none", [], "")):  # by MKL, by oneDNN
        for _ in range(10):
            started = time.perf_counter()
            product(a, b)
            rates.append(2 * 1024**3 / (time.perf_counter() - started))
    per_token = flops.get_total_flops() / tokens[0]
    seen = tokens[behind:steps]
    return {
        "samples_per_second": task["batch"] * len(timed) / seconds,
        "samples_per_cpu_second": task["batch"] * len(timed) / sum(cpu for _, cpu in timed),
        "tokens_per_second": sum(seen) / seconds,
        "peak_mib": peak_memory_mib()["host"],
        "share_of_peak": per_token * sum(seen) / seconds / max(rates),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


# -------------------------------------------------------------------------------------------- all of them


def in_process_of_its_own(task: dict, timeout: float) -> dict:
    """`measure` in a new process.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(task["threads"])}
    environment.pop("ACCELERATE_MIXED_PRECISION", None)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "task.json"
        file.write_text(json.dumps(task))
        words = [sys.executable, __file__, "--task", str(file)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        raise RuntimeError(f"{task['method']}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(part: str, turns: list[dict[str, dict]]) -> str:
    """Medians of a part's methods, and ratios to its rival."""
    methods, rival, batch, *_ = PARTS[part]
    lines = [f"{part}: batches of {batch}, ratios to {rival!r}"]
    lines += [
        f"{'':<16}{'rows/s':>9}{'ratio':>8}{'by CPU':>8}{'tokens/s':>10}{'peak MiB':>10}{'ratio':>7}{'of peak':>9}"
    ]
    for method in methods:
        if method not in turns[0]:
            continue
        found = [turn[method] for turn in turns]

        def median(name: str, found: list[dict] = found) -> float:
            return statistics.median(run[name] for run in found)

        def ratio(name: str, method: str = method) -> float:
            return statistics.median(turn[method][name] / turn[rival][name] for turn in turns)

        lines.append(
            f"{method:<16}{median('samples_per_second'):>9.1f}{ratio('samples_per_second'):>8.2f}"
            f"{ratio('samples_per_cpu_second'):>8.2f}{median('tokens_per_second'):>10.0f}{median('peak_mib'):>10.0f}"
            f"{ratio('peak_mib'):>7.2f}{median('share_of_peak'):>9.2f}"
        )
    for ours, stock in (("ours", "stock"), ("ours, grouped", "stock, grouped")):
        if ours in turns[0] and stock in turns[0]:
            pairs = zip(turns[0][ours]["losses"], turns[0][stock]["losses"], strict=False)
            apart = max(abs(a - b) for a, b in pairs)
            lines.append(f"losses of {ours!r} and {stock!r} differ by at most {apart:.2g}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict | None:
    """Measure the parts; return the record that is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", help="encoder, e.g. the folder of all-MiniLM-L6-v2")
    parser.add_argument("--data_path", type=Path, help="folder with SST-2's train.tsv")
    parser.add_argument("--tokenizer", type=Path, help="folder of the GPT-NeoX tokenizer")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--methods", help="of those of each part (default: all)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of each process (default: 1)")
    parser.add_argument("--smoke", action="store_true", help="one turn of few steps on a small model")
    parser.add_argument("--out", type=Path, default=ROOT / "results/benchmarks/training.json")
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if flags.task is not None:
        print(json.dumps(measure(json.loads(flags.task.read_text()))))
        return None
    parts = flags.parts.split(",")
    if set(parts) - set(PARTS):
        raise InputError(f"--parts {flags.parts}: must be of {', '.join(PARTS)}")
    if flags.data_path is None or any("encoder" in part for part in parts) and flags.base_model is None:
        raise InputError("--base_model and --data_path: give the encoder's folder and that of SST-2")
    if "labels" in parts and flags.tokenizer is None:
        raise InputError("--tokenizer: give the folder of the GPT-NeoX tokenizer, or leave out --parts labels")

    from bhpeft.environment import hardware, library_versions

    cpu = next((line for line in open("/proc/cpuinfo") if line.startswith("model name")), "unknown").split(":")[-1]
    place = {"versions": library_versions(), "hardware": hardware(), "cpu": cpu.strip(), "threads": flags.threads}
    before = json.loads(flags.out.read_text()) if flags.out.is_file() else {}
    same = {name: before.get(name) for name in place} == place
    record: dict = {"parts": before["parts"] if same else {}, **place}
    for part in parts:
        methods, rival, batch, warm_up, steps = PARTS[part]
        chosen = {name: methods[name] for name in methods if not flags.methods or name in flags.methods.split(";")}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.csv"
            rows = write_data(part, flags.data_path, file)
            base = flags.base_model
            if part == "labels":
                base = str(make_causal(Path(folder) / "model", flags.tokenizer, flags.smoke))
            common = {"part": part, "base_model": base, "file": str(file), "rows": rows, "batch": batch}
            turns = []
            for turn in range(1 if flags.smoke else flags.repeats):
                found = {}
                for method, settings in chosen.items():
                    print(f"{part}: {method}, turn {turn + 1}", file=sys.stderr, flush=True)
                    task = {**common, "method": method, "steps": steps, "warm_up": warm_up, **settings}
                    task |= {"steps": 2, "warm_up": 1} if flags.smoke else {}
                    found[method] = in_process_of_its_own({**task, "threads": flags.threads}, timeout=900)
                turns.append(found)
                record["parts"][part] = turns
                if not flags.smoke:
                    write_atomic(flags.out, json.dumps(record, indent=1) + "\n")
        if rival in chosen:
            print("\n" + table(part, turns), flush=True)
    return record


if __name__ == "__main__":
    run_main(main)
