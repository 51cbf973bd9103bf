"""What grows with what? Memory and speed of real runs by rows, ranks, width of the model and size of the adapter.

    python benchmarks/scaling.py --base_model FOLDER_OF_MINILM --data_path FOLDER_OF_SST2 [--parts rows] [--repeats 3]

    rows       SST-2's training rows, and ten times as many (each sentence nine times over, made different): with all
               rows in memory, at the first start, which makes the files that rows are kept in, and at the second,
               which finds them; and the second with rows grouped by length
    ranks      1 and 2 processes under ZeRO-3 with offload, ds_zero3_cpu.yaml, equal rows a rank
    widths     encoders of the base's architecture, random weights, hidden 128 to 768, 4 layers, LoRA of rank 8
    adapters   LoRA of rank 4 to 256 on every linear layer of the base

Each figure is of a run of the trainer, 20 steps of 8 rows, in processes of its own, methods taking turns --repeats
times over. Memory is the most that a process held, resident, seen from outside; over ranks the largest.
Prints medians and ratios; writes results/benchmarks/scaling.json and scaling.png. --smoke: one turn of few rows and
steps, nothing written.
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
from bhpeft.errors import InputError, run_main  # noqa: E402
from bhpeft.files import write_atomic  # noqa: E402

BATCH, STEPS, TIMES = 8, 20, 10
TIMEOUT = 900  # seconds a run may take
LORA = {"adapter_name": "lora", "lora_rank": 8, "lora_alpha": 16}
COMMON = {
    "per_device_train_batch_size": BATCH, "learning_rate": 1e-4, "max_length": 128, "long_prompts": "truncate",
    "do_predict": False, "max_test_samples": 8, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
    "dataset_name": "sst2", "run_name": "run", "overwrite": True,
}  # fmt: skip
FIGURES = ("peak_mib", "rows_per_second", "load_seconds")
BASES = {"rows": "in memory, x1", "ranks": "1", "widths": "128", "adapters": "4"}  # what ratios are to
SAID = {"ranks": "ranks", "widths": "hidden size", "adapters": "rank of LoRA"}


def write_many(data_path: Path, folder: Path, times: int, limit: int | None) -> Path:
    """A folder as SST-2's with its training rows `times` over, none like another, and its dev rows.

    Args:
        limit: take only this many of its training rows.
    """
    header, *lines = (data_path / "train.tsv").read_text(encoding="utf-8").splitlines()
    folder.mkdir(parents=True)
    (folder / "dev.tsv").write_bytes((data_path / "dev.tsv").read_bytes())
    with open(folder / "train.tsv", "w", encoding="utf-8") as file:
        file.write(header + "\n")
        for time in range(times):
            for line in lines[:limit]:
                sentence, label = line.rsplit("\t", 1)
                file.write(f"{sentence.strip()}{f' {time}' if time else ''}\t{label}\n")
    return folder


def make_encoder(base_model: str, folder: Path, width: int) -> Path:
    """An encoder of the base's architecture and tokenizer, of another width, with random weights."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    config = AutoConfig.from_pretrained(base_model)
    config.hidden_size, config.intermediate_size = width, 4 * width
    config.num_attention_heads, config.num_hidden_layers = width // 32, 4
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_model).save_pretrained(folder)
    return folder


def measure(settings: dict, ranks: int | None = None) -> dict:
    """Run the trainer once; `FIGURES`, rows, ranks, what share of the parameters was trained, and the losses.

    Args:
        ranks: under ZeRO-3; None without a launcher.
    """
    launch = [sys.executable]
    if ranks is not None:
        launch = [
            "accelerate",
            "launch",
            "--config_file",
            str(ROOT / "ds_zero3_cpu.yaml"),
            "--num_processes",
            str(ranks),
        ]
        launch += ["--main_process_port", "0"]
    with tempfile.TemporaryDirectory() as folder:
        own = {"output_dir": f"{folder}/adapter", "results_dir": f"{folder}/results"}
        words = [*launch, str(processes.TRAINER), *processes.as_flags({**COMMON, **settings, **own})]
        finished = processes.execute(words, TIMEOUT, OMP_NUM_THREADS="1").checked()
        record = processes.record_of(Path(folder) / "results", "run")
    last = next(entry for entry in reversed(record["history"]) if "train_samples_per_second" in entry)
    inside = max(rank["host"] for rank in record["hardware"]["peak_memory_mib"])
    return {
        "peak_mib": inside if finished.peak_mib is None else finished.peak_mib,
        "rows_per_second": last["train_samples_per_second"],
        "load_seconds": record["timings"]["load"],
        "rows": record["rows"]["train"],
        "ranks": record["hardware"]["ranks"],
        "trainable_percent": record["parameters"]["trainable_percent"],
        "losses": [entry["loss"] for entry in record["history"] if "loss" in entry],
    }


def methods_of(part: str, flags: argparse.Namespace, folder: Path) -> dict[str, Callable[[], dict]]:
    """What a part measures, by name."""
    few = flags.smoke
    common = {"base_model": flags.base_model, "max_steps": 2 if few else STEPS, **LORA}
    limit = 300 if few else None
    once = str(write_many(flags.data_path, folder / "x1", 1, limit))
    common |= {"data_path": once, "row_cache": str(folder / "cache")}
    if part == "rows":
        found = {}
        for times in (1, TIMES):
            data = once if times == 1 else str(write_many(flags.data_path, folder / "many", times, limit))
            files = {"data_path": data, "row_cache": str(folder / f"cache-{times}")}
            grouped = {} if few else {"grouped": {"train_sampling_strategy": "group_by_length"}}
            kinds = {"in memory": {"row_cache": "none"}, "first start": {}, "second start": {}, **grouped}
            for name, changes in kinds.items():
                found[f"{name}, x{times}"] = functools.partial(
                    _first_or_not, name == "first start", {**common, **files, **changes}
                )
        return found
    if part == "ranks":
        return {str(ranks): functools.partial(measure, common, ranks) for ranks in (1, 2)}
    if part == "widths":
        widths = (128, 256) if few else (128, 256, 512, 768)
        models = {width: make_encoder(flags.base_model, folder / str(width), width) for width in widths}
        return {str(w): functools.partial(measure, {**common, "base_model": model}) for w, model in models.items()}
    adapter = {**common, "target_modules": "all-linear"}
    sizes = (4, 16) if few else (4, 16, 64, 256)
    return {str(rank): functools.partial(measure, {**adapter, "lora_rank": rank}) for rank in sizes}


def _first_or_not(first: bool, settings: dict) -> dict:
    """`measure`; a first start finds no files of rows, in whatever turn."""
    if first:
        shutil.rmtree(settings["row_cache"], ignore_errors=True)
    return measure(settings)


def median(runs: list[dict], name: str) -> float:
    """Of one figure over the turns."""
    return statistics.median(run[name] for run in runs)


def table(part: str, found: dict[str, list[dict]]) -> str:
    """Medians of a part, and ratios to the first of its kind."""
    lines = [f"{part:<22}{'peak MiB':>10}{'ratio':>8}{'rows/s':>10}{'ratio':>8}{'load s':>9}{'trained %':>11}"]
    for name, runs in found.items():
        base = found[name.replace(f"x{TIMES}", "x1") if part == "rows" else BASES[part]]
        ratios = [median(runs, figure) / median(base, figure) for figure in FIGURES[:2]]
        lines.append(
            f"{name:<22}{median(runs, 'peak_mib'):>10.0f}{ratios[0]:>8.3f}{median(runs, 'rows_per_second'):>10.1f}"
            f"{ratios[1]:>8.2f}{median(runs, 'load_seconds'):>9.1f}{median(runs, 'trainable_percent'):>11.2f}"
        )
    return "\n".join(lines)


def draw(record: dict) -> bytes:
    """A panel a part, PNG: memory by rows; rows a second by all else."""
    from matplotlib.figure import Figure

    parts = record["parts"]
    canvas = Figure(figsize=(3.6 * len(parts), 3.2), layout="constrained")
    for axes, (part, found) in zip(canvas.subplots(1, len(parts), squeeze=False)[0], parts.items(), strict=True):
        if part == "rows":
            for kind in dict.fromkeys(name.split(",")[0] for name in found):
                pair = [found[f"{kind}, x{times}"] for times in (1, TIMES)]
                rows = [median(runs, "rows") for runs in pair]
                axes.plot(rows, [median(runs, "peak_mib") for runs in pair], "o-", label=kind)
            axes.set(xscale="log", xlabel="training rows", ylabel="peak memory, MiB", title="memory by rows")
            axes.set_xticks(rows, [f"{count:,.0f}" for count in rows])
            axes.minorticks_off()
            axes.legend(fontsize=7)
        else:
            axes.plot(list(found), [median(runs, "rows_per_second") for runs in found.values()], "o-")
            axes.set(xlabel=SAID[part], ylabel="rows a second", title=f"speed by {SAID[part]}")
        axes.set_ylim(0, 1.1 * axes.dataLim.y1)
        axes.grid(color="0.9")
    png = io.BytesIO()
    canvas.savefig(png, format="png", dpi=120, metadata={"Software": None})
    return png.getvalue()


def main(argv: list[str] | None = None) -> dict:
    """Measure the parts; return the record that is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True, help="encoder, e.g. the folder of all-MiniLM-L6-v2")
    parser.add_argument("--data_path", type=Path, required=True, help="folder with SST-2's train.tsv and dev.tsv")
    parser.add_argument("--parts", default=",".join(BASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="one turn of few rows and steps")
    parser.add_argument("--out", type=Path, default=ROOT / "results/benchmarks/scaling.json")
    flags = parser.parse_args(argv)
    parts = flags.parts.split(",")
    if set(parts) - set(BASES):
        raise InputError(f"--parts {flags.parts}: must be of {', '.join(BASES)}")

    from bhpeft.environment import hardware, library_versions

    record: dict = {"parts": {}, "versions": library_versions(), "hardware": hardware(), "batch": BATCH, "steps": STEPS}
    for part in parts:
        with tempfile.TemporaryDirectory() as folder:
            methods = methods_of(part, flags, Path(folder))
            record["parts"][part] = processes.in_turns(part, methods, 1 if flags.smoke else flags.repeats)
        print("\n" + table(part, record["parts"][part]), flush=True)
        if not flags.smoke:
            write_atomic(flags.out, json.dumps(record, indent=1) + "\n")
            write_atomic(flags.out.with_suffix(".png"), draw(record))
    return record


if __name__ == "__main__":
    run_main(main)
