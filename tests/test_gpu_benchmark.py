"""benchmarks/gpu.py at toy size on the CPU: its parts run, and one that cannot does not take the rest."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import forked
import pytest
from conftest import ROOT

from benchmarks.gpu import attempt, run_here, run_part, table
from benchmarks.gpu_parts import PARTS, settings_of

RATES = {"tflops_bf16": 1e-3, "link_pinned_gbps": 1.0}


def child(name, out):
    # The interpreter's own ninja, as `run_part` has it: another one would compile DeepSpeed's optimizer again.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run_here(name, True, RATES, out)


def run_forked(name, folder):
    """As `run_part`, in a process that need not import torch again."""
    out = folder / f"{name}.json"
    process = forked._server.Process(target=child, args=(name, out))
    process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", ["qlora-13b", "lora-13b", "zero3-bf16-tuned", "zero3-bf16-persistence"])
def test_training_parts_take_steps_beside_the_plan(name, tmp_path):
    found = run_forked(name, tmp_path)
    assert found["step_seconds"] > 0 and found["samples_per_second"] == pytest.approx(
        settings_of(True).rows / found["step_seconds"], rel=1.0
    )
    assert found["planned_gpu_gib"] > 0
    if not name.startswith("zero3"):  # its precision on a CPU is fp32, whose rate was not measured
        assert found["planned_compute_seconds"] > 0


def test_comparing_parts_give_ratios(tmp_path):
    found = run_forked("bh-peft", tmp_path)
    assert found["seconds_ratio"] == pytest.approx(found["bh_peft_step_seconds"] / found["lora_step_seconds"])
    found = run_forked("sampling", tmp_path)
    assert found["samples"] == 10
    for rows in (1, 2):
        passes = found[f"samples_ms_batch_{rows}"] / found[f"one_pass_ms_batch_{rows}"]
        assert found[f"ratio_batch_{rows}"] == pytest.approx(passes) and passes > 0
    found = run_forked("stock", tmp_path)
    ours, stock = found["ours_samples_per_second"], found["stock_samples_per_second"]
    assert found["ratio_to_stock"] == pytest.approx(ours / stock) and found["ratio_to_stock_grouped"] > 0


def test_a_part_that_fails_takes_no_other_with_it():
    assert run_part("no-such-part", True, 60)["failed"] == "KeyError: 'no-such-part'"
    assert run_part("rates", True, 0.2)["failed"] == "over its limit of 0 s"

    def missing(settings, rates):
        raise ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes")

    def full(settings, rates):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    def broken(settings, rates):
        raise RuntimeError("shapes differ")

    found = {"qlora-13b": attempt(missing, None, None), "lora-13b": attempt(full, None, None)}
    assert found["qlora-13b"] == {"missing": "bitsandbytes"} and "Tried to allocate" in found["lora-13b"]["failed"]
    with pytest.raises(RuntimeError, match="shapes differ"):
        attempt(broken, None, None)
    shown = table({**found, "rates": {"seconds": 3.0, "tflops_bf16": 400.5}})
    assert "needs bitsandbytes" in shown and "out of GPU memory" in shown and "400.5" in shown


def test_the_parts_fit_into_nine_minutes_and_no_page_claims_their_figures():
    from benchmarks.gpu import TOTAL

    assert TOTAL <= 540 and all(part.limit < TOTAL / 3 for part in PARTS.values())
    kept = ROOT / "results/benchmarks/gpu.json"
    assert not kept.exists() or not json.loads(kept.read_text())["smoke"]
