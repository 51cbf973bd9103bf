"""What do ten posterior samples cost, against one pass and against ten passes?

    python benchmarks/sampling.py --base_model FOLDER_OF_MINILM [--data_path FOLDER_OF_SST2] [--threads 1] [--smoke]

BH-PEFT with Gaussian down matrices (--bayesian all: every matrix) on the encoder, with random up matrices so that the
noise reaches the output; the 872 sentences of SST-2's dev, in their order as stock evaluation takes them, and sorted by
length; one by one, and in batches of 64; in fp32 and in bf16, both ways alike. "one pass" is at the posterior mean;
"batched" is how the trainer samples (adapters/posterior.py: sampled); "one by one" a pass a sample under the very same
noise, whose logits must be the same but for rounding. Prints medians of --repeats turns in milliseconds, and of the
ratios to one pass within a turn (one by one: of one turn), and writes them to results/benchmarks/sampling.json
and a plot beside it. --smoke: one turn, nothing written.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import PreTrainedTokenizerBase  # noqa: E402

from bhpeft.adapters import attach_adapter, drawn_noise, posterior_noise  # noqa: E402
from bhpeft.adapters.bh_peft import gaussian_layers  # noqa: E402
from bhpeft.adapters.posterior import sampled  # noqa: E402
from bhpeft.arguments import AdapterArguments  # noqa: E402
from bhpeft.base_model import load_tokenizer, load_with_head  # noqa: E402
from bhpeft.environment import DTYPES, hardware, keep_freed_memory, library_versions, training_attention  # noqa: E402
from bhpeft.errors import InputError, run_main  # noqa: E402
from bhpeft.files import write_atomic  # noqa: E402
from bhpeft.tasks.known import read_known  # noqa: E402

SENTENCES = [
    "it 's a charming and often affecting journey .",
    "unflinchingly bleak and desperate",
    "the acting , costumes , music and sound are all astounding given the production 's austere locales .",
    "we root for ( clara and paul ) , even like them , though perhaps it 's an emotion closer to pity .",
]
SETTINGS = {
    "adapter_name": "bh-peft", "prefix_length": 10, "prefix_bottleneck_size": 2, "lora_rank": 4,
    "bn_reduction_factor": 32, "adapter_scaling": 1.0,
}  # fmt: skip
ORDERS = ("in their order", "by length")
# Of the samples' deviation: the order of sums differs between one large product and ten small ones.
TOLERANCE = {"no": 1e-3, "bf16": 0.5}


def logits_of(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    """(rows, C), of the head."""
    return model(**inputs).logits


@torch.no_grad()
def one_pass(model: torch.nn.Module, batches: list[dict]) -> list[torch.Tensor]:
    """(B, C) logits at the posterior mean, of each batch."""
    return [logits_of(model, inputs) for inputs in batches]


@torch.no_grad()
def batched(model: torch.nn.Module, batches: list[dict], samples: int) -> list[torch.Tensor]:
    """(S, B, C) logits of each batch, as the trainer answers."""
    noise, found = drawn_noise(model, samples), []
    for inputs in batches:
        with posterior_noise(model, samples, noise=noise):
            found.append(sampled(partial(logits_of, model), inputs, samples))
    return found


@torch.no_grad()
def sequential(model: torch.nn.Module, batches: list[dict], samples: int) -> list[torch.Tensor]:
    """The same, one pass a sample, as published code does it."""
    layers, found = gaussian_layers(model), []
    with posterior_noise(model, samples, seed=0) as noise:
        for inputs in batches:
            logits = []
            for s in range(samples):
                for layer, eps in zip(layers, noise, strict=True):
                    layer.eps = eps[s : s + 1]
                logits.append(logits_of(model, inputs))
            found.append(torch.stack(logits))
    return found


def timed(way: Callable[[], list[torch.Tensor]]) -> tuple[list[torch.Tensor], float]:
    """What it gives, and milliseconds. With one thread it is the time on the processor, which a busy machine lengthens
    less; else time on the clock."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    found = way()
    return found, 1000 * (clock() - started)


def measure(model: torch.nn.Module, batches: list[dict], samples: int, repeats: int, tolerance: float) -> dict:
    """Medians of times, and of ratios within a turn, over these batches; and how far the two ways' logits differ.

    Passes one by one are timed once, the others take turns behind one that does not count.

    Raises:
        InputError: the logits differ by more than rounding.
    """
    one_pass(model, batches)
    turns = []
    for _ in range(repeats + 1):
        _, mean = timed(lambda: one_pass(model, batches))
        together, all_samples = timed(lambda: batched(model, batches, samples))
        turns.append((mean, all_samples))
    apart, one_by_one = timed(lambda: sequential(model, batches, samples))
    together, apart = torch.cat(together, 1), torch.cat(apart, 1)
    difference, spread = (together - apart).abs().max().item(), together.std(dim=0).mean().item()
    if not difference <= tolerance * spread:
        raise InputError(f"samples drawn in one pass differ from those drawn one by one by {difference:.2g}")
    passes, sampled_times = zip(*turns[1:], strict=True)
    return {
        "one_pass_ms": statistics.median(passes),
        "batched_ms": statistics.median(sampled_times),
        "sequential_ms": one_by_one,
        "batched_ratio": statistics.median(b / a for a, b in turns[1:]),
        "sequential_ratio": one_by_one / statistics.median(passes),
        "rows": together.shape[1], "largest_difference": difference, "deviation_of_logits": spread,
    }  # fmt: skip


def read_texts(data_path: Path | None) -> list[str]:
    """The sentences of SST-2's dev, or a few of our own, many times over."""
    if data_path is None:
        return SENTENCES * 16
    return [example.query for example in read_known("sst2", "test", str(data_path), [])]


def load(base_model: str, bayesian: str, precision: str) -> tuple[PreTrainedTokenizerBase, torch.nn.Module]:
    """The tokenizer, and an adapted encoder as the trainer answers with it, with weights in which noise shows."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(base_model, generates=False)
    attention = training_attention(precision, 128, prefix=True)
    labels = ("negative", "positive")
    how = {"precision": precision, "attn_implementation": attention}
    base, _ = load_with_head(base_model, "classification", labels, tokenizer.pad_token_id, **how)
    model = attach_adapter(base, AdapterArguments(**SETTINGS, bayesian=bayesian), base_model, "classification").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".up." in name and name.endswith(("weight", "mu")):
                parameter.normal_(std=0.05)
            if name.endswith("gate"):
                parameter.fill_(0.5)
            if name.endswith(".g"):
                parameter.fill_(0.2)  # sigma 0.04
    return tokenizer, model


def draw(found: dict[str, dict]) -> bytes:
    """Time of all samples over that of one pass, drawn in one pass and one by one, PNG."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(7, 0.5 * len(found) + 1), layout="constrained")
    axes = canvas.subplots()
    for way, colour, shift in (("batched", "#2f6f9f", -0.2), ("sequential", "#9aa5b1", 0.2)):
        places = [place + shift for place in range(len(found))]
        label = {"batched": "together", "sequential": "one by one"}[way]
        axes.barh(places, [row[f"{way}_ratio"] for row in found.values()], 0.4, color=colour, label=label)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set(xlabel="time of all samples, in passes at the posterior mean")
    axes.grid(axis="x", color="0.9")
    axes.legend(frameon=False)
    png = io.BytesIO()
    canvas.savefig(png, format="png", dpi=120, metadata={"Software": None})
    return png.getvalue()


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True, help="encoder, e.g. the folder of all-MiniLM-L6-v2")
    parser.add_argument("--bayesian", choices=["down", "all"], default="down")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--data_path", type=Path, help="folder of SST-2 (default: 64 sentences of our own)")
    parser.add_argument("--rows", default="1,64", help="sizes of batches (default: 1,64)")
    parser.add_argument("--singles", type=int, default=109, help="rows asked one by one, at most (default: 109)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: all cores)")
    parser.add_argument("--precisions", default="no,bf16", help="of no (fp32) and bf16 (default: no,bf16)")
    parser.add_argument("--out", type=Path, default=ROOT / "results/benchmarks/sampling.json")
    parser.add_argument("--smoke", action="store_true")
    flags = parser.parse_args(argv)
    keep_freed_memory()
    torch.set_num_threads(flags.threads)
    texts = read_texts(flags.data_path)
    if flags.smoke:
        texts, flags.repeats = texts[:8], 1
    found = {}
    for precision in flags.precisions.split(","):
        if precision not in TOLERANCE:
            raise InputError(f"--precisions {flags.precisions}: must be of {', '.join(TOLERANCE)}")
        tokenizer, model = load(flags.base_model, flags.bayesian, precision)
        for count in map(int, flags.rows.split(",")):
            for order in ORDERS if count > 1 else ORDERS[:1]:
                asked = texts[:: math.ceil(len(texts) / flags.singles)] if count == 1 else texts
                asked = sorted(asked, key=len) if order == "by length" else asked
                parts = [asked[i : i + count] for i in range(0, len(asked), count)]
                batches = [dict(tokenizer(part, padding=True, return_tensors="pt")) for part in parts]
                with torch.autocast("cpu", DTYPES[precision], enabled=precision != "no"):
                    row = measure(model, batches, flags.samples, flags.repeats, TOLERANCE[precision])
                found[f"{'fp32' if precision == 'no' else precision}, rows_{count}, {order}"] = row
    width = max(map(len, found))
    heads = ("one pass", "batched", "one by one")
    print(" " * width + "".join(f"{head:>14}" for head in heads) + f"{'ratio':>8}{'ratio':>8}{'difference':>12}")
    for name, row in found.items():
        times = "".join(f"{row[f'{way}_ms']:>11.1f} ms" for way in ("one_pass", "batched", "sequential"))
        ratios = f"{row['batched_ratio']:>8.2f}{row['sequential_ratio']:>8.2f}{row['largest_difference']:>12.1e}"
        print(f"{name:<{width}}{times}{ratios}")
    settings = {"samples": flags.samples, "bayesian": flags.bayesian, "threads": flags.threads, **SETTINGS}
    record = {**found, "settings": settings, "versions": library_versions(), "hardware": hardware()}
    if not flags.smoke:
        write_atomic(flags.out, json.dumps(record, indent=2) + "\n")
        write_atomic(flags.out.with_suffix(".png"), draw(found))
        print(f"written: {flags.out}")
    return record


if __name__ == "__main__":
    run_main(main)
