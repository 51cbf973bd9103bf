"""Is the plan right? Planned against measured peak memory of real runs, on this machine, without a GPU.

    python benchmarks/planner.py [--runs fp32,bf16,checkpointing,zero3]

Each run trains for three steps a GPT-NeoX of 77 M random weights (hidden 512, 8 layers, vocabulary 50,304; made here)
with LoRA, on rows that fill --max_length, and reports the most memory each process held (resident set). The plan is
printed by the same command with --plan. The worst of the ranks counts. Prints a table and writes
results/benchmarks/planner.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bhpeft.environment import library_versions  # noqa: E402
from bhpeft.errors import InputError, run_main  # noqa: E402
from bhpeft.files import write_atomic  # noqa: E402

WORDS = ("river", "stone", "cloud", "tiger", "moon", "glass", "field", "apple", "yes", "no")
RUNS = {  # name: (ranks, flags)
    "fp32": (1, ["--batch_size", 8]),
    "bf16": (1, ["--bf16", "--batch_size", 8]),
    "checkpointing": (1, ["--batch_size", 8, "--gradient_checkpointing", "true"]),
    "zero3": (2, ["--batch_size", 8]),
}


def make_model(folder: Path, hidden: int = 512, layers: int = 8, vocabulary: int = 50304) -> Path:
    """A GPT-NeoX of random weights with a tokenizer of ten words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=8, intermediate_size=4 * hidden,
        vocab_size=vocabulary, max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(("<s>", "</s>", "<u>", *WORDS))}, "<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<u>", pad_token="</s>"
    ).save_pretrained(folder)
    return folder


def make_rows(file: Path, length: int) -> Path:
    """Rows of more words than fit, so that each fills --max_length."""
    with open(file, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["text_input", "text_label"])
        for i in range(80):
            words = [WORDS[(i * 7 + j * (1 + i % 5)) % 8] for j in range(length)]
            writer.writerow([" ".join(words), "yes" if i % 2 else "no"])
    return file


def trainer_words(model: Path, rows: Path, folder: Path, length: int, flags: list, ranks: int = 1) -> list[str]:
    """The command that trains for three steps."""
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "accelerate.commands.launch", "--config_file", ROOT / "ds_zero3_cpu.yaml"]
        launch += ["--num_processes", ranks]
    words = [*launch, ROOT / "parameter_efficient_fine_tuning.py", "--base_model", model, "--dataset_name", rows]
    words += ["--run_name", "run", "--results_dir", folder / "results", "--output_dir", folder / "adapter"]
    words += ["--max_length", length, "--long_prompts", "truncate", "--max_steps", 3, "--do_predict", "false"]
    words += ["--labels", "yes", "no"]  # without them a plan takes every token for labelled
    words += ["--save_strategy", "no", "--disable_tqdm", "true", *flags]
    return list(map(str, words))


def call(words: list[str], timeout: float) -> str:
    """Run a command, without network; raise `RuntimeError` with what it said if it fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment.setdefault("OMP_NUM_THREADS", "1")
    done = subprocess.run(
        words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def compare(model: Path, rows: Path, folder: Path, length: int, flags: list, ranks: int, timeout: float = 900) -> dict:
    """Planned and measured peak of one process, in MiB."""
    words = trainer_words(model, rows, folder, length, flags, ranks)
    call([*words, "--plan", "--plan_json", str(folder / "plan.json")], timeout)
    planned = json.loads((folder / "plan.json").read_text())["asked"]["host"]
    call([*words, "--overwrite"], timeout)
    record = json.loads((folder / "results/metrics/run.json").read_text())
    measured = max(peak["host"] for peak in record["hardware"]["peak_memory_mib"])
    total, process = (sum(planned.values()) / 2**20, planned["process"] / 2**20)
    return {"ranks": ranks, "planned": total, "measured": measured, "process": process, "parts": planned}


def table(runs: dict[str, dict]) -> str:
    head = f"{'run':<16}{'ranks':>6}{'planned MiB':>13}{'measured':>10}{'error':>8}"
    lines = [head + f"{'beyond libraries':>19}{'error':>8}"]
    for name, run in runs.items():
        planned, measured = (run[key] - run["process"] for key in ("planned", "measured"))
        line = f"{name:<16}{run['ranks']:>6}{run['planned']:>13.0f}{run['measured']:>10.0f}"
        line += f"{run['planned'] / run['measured'] - 1:>+8.1%}{planned:>10.0f}/{measured:<8.0f}"
        lines.append(line + f"{planned / measured - 1:>+8.1%}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default=",".join(RUNS))
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--out", type=Path, default=ROOT / "results/benchmarks/planner.json")
    flags = parser.parse_args()
    names = flags.runs.split(",")
    if set(names) - set(RUNS):
        raise InputError(f"--runs {flags.runs}: must be of {', '.join(RUNS)}")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "neox")
        rows = make_rows(Path(folder) / "rows.csv", flags.max_length)
        for name in names:
            ranks, words = RUNS[name]
            own = Path(folder) / name
            own.mkdir()
            found[name] = compare(model, rows, own, flags.max_length, words, ranks)
            print(table({name: found[name]}), flush=True)
            record = {"runs": found, "max_length": flags.max_length, "versions": library_versions()}
            write_atomic(flags.out, json.dumps(record, indent=2) + "\n")
    print("\n" + table(found))


if __name__ == "__main__":
    run_main(main)
