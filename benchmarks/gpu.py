"""What one NVIDIA GPU gives: memory and step times of 13 B parameters, offloaded, in 4 bit and whole, beside the plan.

    python benchmarks/gpu.py [--parts rates,zero3-bf16]      # under 9 minutes, no download
    python benchmarks/gpu.py --smoke                         # every part at toy size, on a CPU

    rates                 matrix products in fp16 and bf16, host to GPU from pinned and from pageable memory
    zero3-fp16, -bf16     ZeRO-3 with offload as ds_zero3_cpu.yaml has it, LLaMA-2-13B shape, LoRA on a frozen base
    zero3-bf16-tuned      the same with pinned host weights, a small bucket for the adapter's gradients, longer
                          prefetch, fewer parameters kept
    qlora-13b, lora-13b   the same shape whole on the GPU: NF4, and bf16
    bh-peft               BH-PEFT against LoRA, on the shape of a model of 1.1 B
    sampling              ten posterior samples in one pass against one deterministic pass
    stock                 our trainer against stock Trainer + peft, on rows of unequal length

    knobs                 not by default: zero3-bf16, and each of these alone (KNOBS in gpu_parts.py)

Weights are random, for neither memory nor time depends on their values. Each part is a process of its own with a limit
of time, so that one that fails, or finds a library missing, does not take the rest. Prints a table and writes
results/benchmarks/gpu.json after every part.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_parts import KNOB_PARTS, PARTS, settings_of  # noqa: E402
from bhpeft.errors import InputError, run_main  # noqa: E402
from bhpeft.files import write_atomic  # noqa: E402

TOTAL = 530  # seconds for all parts together


def run_part(name: str, smoke: bool, limit: float, rates: dict | None = None) -> dict:
    """Run a part in a process of its own.

    Returns:
        What it found; or {"failed": last line of what it said}, {"failed": "over its limit of N s"}, or
        {"missing": a library}.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        words = [sys.executable, __file__, "--run_part", name, "--out", str(out)] + (["--smoke"] if smoke else [])
        words += ["--rates", json.dumps(rates)] if rates else []
        # The interpreter's own ninja: another one would compile DeepSpeed's optimizer again.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if smoke:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        started = time.perf_counter()
        with open(Path(folder) / "said", "w+", encoding="utf-8", errors="replace") as said:
            # A session of its own: what it starts (a compiler, say) ends with it.
            process = subprocess.Popen(words, env=environment, stdout=said, stderr=said, start_new_session=True)
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
                return {"failed": f"over its limit of {limit:.0f} s", "seconds": limit}
            said.seek(0)
            lines = said.read().strip().splitlines() or ["nothing said"]
        seconds = time.perf_counter() - started
        if not out.is_file():
            return {"failed": lines[-1][-300:], "said": lines[-15:], "seconds": seconds}
        return {**json.loads(out.read_text()), "seconds": seconds}


def attempt(part, settings, rates: dict | None) -> dict:
    """What a part found, or what kept it from finding anything: a library that is missing, or too little memory."""
    try:
        return part(settings, rates)
    except ImportError as error:
        return {"missing": error.name or str(error)}
    except RuntimeError as error:
        if "out of memory" not in str(error).lower():
            raise
        return {"failed": f"out of GPU memory: {str(error).splitlines()[0][:200]}"}


def run_here(name: str, smoke: bool, rates: dict | None, out: Path) -> None:
    """The inside of a part's process, which ends with it."""
    write_atomic(out, json.dumps(attempt({**PARTS, **KNOB_PARTS}[name], settings_of(smoke), rates)))
    os._exit(0)  # DeepSpeed's process group would wait for a farewell of nobody


def table(found: dict[str, dict]) -> str:
    """Parts and their figures, one line each figure."""
    lines = []
    for name, figures in found.items():
        state = figures.get("failed") or (f"needs {figures['missing']}" if "missing" in figures else "")
        lines.append(f"{name:<20}{figures.get('seconds', 0):>7.0f} s  {state}")
        for key, value in figures.items():
            if isinstance(value, (int, float)) and key != "seconds":
                lines.append(f"    {key:<44}{value:>14,.4g}")
            elif isinstance(value, str) and key not in ("failed", "missing"):
                lines.append(f"    {key:<44}{value:>14}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--smoke", action="store_true", help="toy sizes, on the CPU")
    parser.add_argument("--out", type=Path, help="default: results/benchmarks/gpu.json; with --smoke nothing is kept")
    parser.add_argument("--run_part", help=argparse.SUPPRESS)
    parser.add_argument("--rates", type=json.loads, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.run_part:
        return run_here(flags.run_part, flags.smoke, flags.rates, flags.out)
    parts = {**PARTS, **KNOB_PARTS}
    names = flags.parts.replace("knobs", ",".join(["zero3-bf16", *KNOB_PARTS])).split(",")
    if set(names) - set(parts):
        raise InputError(f"--parts {flags.parts}: must be of {', '.join([*PARTS, 'knobs'])}")
    out = flags.out or (None if flags.smoke else ROOT / "results/benchmarks/gpu.json")
    found, started = {}, time.perf_counter()
    for name in names:
        left = TOTAL - (time.perf_counter() - started)
        if left < 10:
            found[name] = {"failed": "no time left"}
            continue
        limit = left if flags.smoke else min(left, parts[name].limit)  # a slow machine may compile for minutes
        found[name] = run_part(name, flags.smoke, limit, found.get("rates"))
        print(table({name: found[name]}), flush=True)
        if out:
            from bhpeft.environment import hardware, library_versions

            record = {"smoke": flags.smoke, "parts": found, "versions": library_versions(), "hardware": hardware()}
            write_atomic(out, json.dumps(record, indent=2) + "\n")
    broken = [name for name, figures in found.items() if "failed" in figures or "missing" in figures]
    print(f"\n{len(names) - len(broken)} of {len(names)} parts ran" + (f"; not: {', '.join(broken)}" if broken else ""))


if __name__ == "__main__":
    run_main(main)
