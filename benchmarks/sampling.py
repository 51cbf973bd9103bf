"""What do ten posterior samples cost, drawn in one batched pass, against one pass and against ten passes?

    python benchmarks/sampling.py --base_model FOLDER_OF_MINILM [--samples 10] [--smoke]

BH-PEFT with Gaussian down matrices (--bayesian all: every matrix) on the encoder, with random up matrices so that the
noise reaches the output. Ten sequential passes under the very same noise must give the same logits but for rounding.
Prints the fastest of --repeats in milliseconds and ratios to one pass at the posterior mean, for one sentence and for a
batch of 32, and writes them to results/benchmarks/sampling.json. --smoke: few repeats, nothing written.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from bhpeft.adapters import attach_adapter, posterior_noise, posterior_samples  # noqa: E402
from bhpeft.adapters.bh_peft import gaussian_layers  # noqa: E402
from bhpeft.arguments import AdapterArguments  # noqa: E402
from bhpeft.base_model import load_tokenizer, load_with_head  # noqa: E402
from bhpeft.environment import hardware, library_versions  # noqa: E402
from bhpeft.errors import InputError, run_main  # noqa: E402
from bhpeft.files import write_atomic  # noqa: E402

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
TOLERANCE = 1e-3  # of the samples' deviation: the order of sums differs between one large product and ten small ones


@torch.no_grad()
def sequential(model: torch.nn.Module, inputs: dict, noise: list[torch.Tensor]) -> torch.Tensor:
    """(S, B, C) logits, one pass a sample.

    Args:
        noise: a (S, out, in) tensor for each Gaussian matrix.
    """
    layers, logits = gaussian_layers(model), []
    try:
        for s in range(len(noise[0])):
            for layer, eps in zip(layers, noise, strict=True):
                layer.eps = eps[s : s + 1]
            logits.append(model(**inputs).logits)
    finally:
        for layer in layers:
            layer.eps = None
    return torch.stack(logits)


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Fastest of several calls, in milliseconds, after one that does not count: what other programs disturb least.

    With one thread it is the time on the processor, which a busy machine does not lengthen; else time on the clock.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    function()
    times = []
    for _ in range(repeats):
        started = clock()
        function()
        times.append(1000 * (clock() - started))
    return min(times)


def measure(model: torch.nn.Module, inputs: dict, samples: int, repeats: int) -> dict:
    """Times and ratios for one batch, and the largest difference of the two ways' logits.

    Raises:
        InputError: they differ by more than rounding.
    """
    with posterior_noise(model, samples, seed=0) as noise:
        noise = [eps.clone() for eps in noise]
    batched = posterior_samples(model, inputs, samples, seed=0)
    one_by_one = sequential(model, inputs, noise)
    difference, spread = (batched - one_by_one).abs().max().item(), batched.std(dim=0).mean().item()
    if not difference <= TOLERANCE * spread:
        raise InputError(f"samples drawn in one pass differ from those drawn one by one by {difference:.2g}")
    with torch.no_grad():
        found = {
            "one_pass_ms": milliseconds(lambda: model(**inputs).logits, repeats),
            "batched_ms": milliseconds(lambda: posterior_samples(model, inputs, samples, seed=0), repeats),
            "sequential_ms": milliseconds(lambda: sequential(model, inputs, noise), repeats),
        }
    found["batched_ratio"] = found["batched_ms"] / found["one_pass_ms"]
    found["sequential_ratio"] = found["sequential_ms"] / found["one_pass_ms"]
    return {**found, "largest_difference": difference, "deviation_of_logits": spread}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True, help="encoder, e.g. the folder of all-MiniLM-L6-v2")
    parser.add_argument("--bayesian", choices=["down", "all"], default="down")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--rows", default="1,32", help="sizes of batches (default: 1,32)")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--out", type=Path, default=ROOT / "results/benchmarks/sampling.json")
    parser.add_argument("--smoke", action="store_true")
    flags = parser.parse_args(argv)
    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(flags.base_model, generates=False)
    base, _ = load_with_head(flags.base_model, "classification", ("negative", "positive"), tokenizer.pad_token_id)
    arguments = AdapterArguments(**SETTINGS, bayesian=flags.bayesian)
    model = attach_adapter(base, arguments, flags.base_model, "classification").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".up." in name and name.endswith(("weight", "mu")):
                parameter.normal_(std=0.05)
            if name.endswith("gate"):
                parameter.fill_(0.5)
            if name.endswith(".g"):
                parameter.fill_(0.2)  # sigma 0.04
    found, counts = {}, [int(count) for count in flags.rows.split(",")]
    for count in counts:
        texts = [SENTENCES[i % len(SENTENCES)] for i in range(count)]
        inputs = dict(tokenizer(texts, padding=True, return_tensors="pt"))
        found[f"rows_{count}"] = measure(model, inputs, flags.samples, 2 if flags.smoke else flags.repeats)
    print(f"{'rows':>5}{'one pass':>11}{'batched':>11}{'one by one':>12}{'ratio':>8}{'ratio':>8}{'difference':>12}")
    for count, row in zip(counts, found.values(), strict=True):
        times = f"{row['one_pass_ms']:>8.1f} ms{row['batched_ms']:>8.1f} ms{row['sequential_ms']:>9.1f} ms"
        ratios = f"{row['batched_ratio']:>8.2f}{row['sequential_ratio']:>8.2f}{row['largest_difference']:>12.1e}"
        print(f"{count:>5}{times}{ratios}")
    settings = {"samples": flags.samples, "bayesian": flags.bayesian, "threads": flags.threads, **SETTINGS}
    record = {**found, "settings": settings, "versions": library_versions(), "hardware": hardware()}
    if not flags.smoke:
        write_atomic(flags.out, json.dumps(record, indent=2) + "\n")
        print(f"written: {flags.out}")
    return record


if __name__ == "__main__":
    run_main(main)
