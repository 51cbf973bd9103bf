"""The whole pipeline in minutes: a frozen model that knows a small world learns to judge statements about it.

    make demo                         LoRA; ADAPTER=qlora, prompt-tuning, bh-peft or hybrid for the others
    accelerate launch --config_file ds_zero3_cpu.yaml demo/demo.py --adapter_name lora [--flag value ...]

The base model (demo/base, made by demo/make_base.py) has read plain sentences about the world of demo/world.py and
answers statements with anything but true or false. It stays frozen, sharded over the ranks; the adapter learns from
statements about some (subject, property) pairs and is asked about others.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

import world  # noqa: E402 - found through the path above

from bhpeft import environment  # noqa: E402
from bhpeft.errors import InputError, nearest, run_main  # noqa: E402
from bhpeft.files import write_rows  # noqa: E402
from bhpeft.html_report import write_report  # noqa: E402
from bhpeft.record import say  # noqa: E402
from parameter_efficient_fine_tuning import main as run_trainer  # noqa: E402

CACHE = ROOT / "demo" / "cache"
ADAPTERS = ("lora", "qlora", "prompt-tuning", "bh-peft", "hybrid")


def main() -> None:
    """Write the statements, train and answer by the recipe of `--adapter_name`, and say what happened."""
    flags = sys.argv[1:]
    adapter = "lora"
    if "--adapter_name" in flags[:-1]:
        at = flags.index("--adapter_name")
        adapter = flags[at + 1]
        del flags[at : at + 2]
    if adapter not in ADAPTERS:
        raise InputError(f"ADAPTER={adapter}: the demo has no such adapter;{nearest(adapter, ADAPTERS)} "
                         f"Known: {', '.join(ADAPTERS)}")  # fmt: skip
    train, test = world.split(world.statements())
    for name, rows in (("train", train), ("test", test)):
        # Every rank writes the same bytes in one step, so none has to wait for another.
        write_rows(CACHE / f"{name}.csv", ["text_input", "text_label"], [(r.text_input, r.text_label) for r in rows])
    say(
        f"A frozen model knows {len(world.THINGS)} things of a small world. Learning to judge statements from "
        f"{len(train)} of them; asked about {len(test)} others, no (subject, property) pair of which it was taught.",
        "",
    )
    record = run_trainer(
        [
            *("--config", str(ROOT / "recipes" / f"demo_{adapter.replace('-', '_')}.yaml")),
            *("--base_model", str(ROOT / "demo" / "base")),
            *("--dataset_name", str(CACHE / "train.csv"), "--test_file", str(CACHE / "test.csv")),
            *("--results_dir", str(ROOT / "results"), "--overwrite"),
            *flags,
        ]
    )
    if record is None:  # not the main process
        return
    report, *_ = write_report(record["config"]["results_dir"])[0]
    before, after = record["metrics"].get("base"), record["metrics"]
    if before is None:  # --compare_base false
        return
    say(
        "",
        f"Before: {before['accuracy']:.0%} right, {before['ties']} of {before['rows']} answers neither true nor false "
        f"(forced to choose: {before['scored_accuracy']:.0%}).",
        f"After:  {after['accuracy']:.0%} right; the first word alone would give {after['first_word_baseline']:.0%}.",
        f"{record['parameters']['trainable_percent']:.2f} % of the parameters were trained, in "
        f"{record['timings']['train']:.0f} s, over {record['hardware']['ranks']} rank(s).",
        "",
        f"All of it, with curves and samples, to be opened in a browser: {report}",
    )


if __name__ == "__main__":
    run_main(main)
    environment.leave_together()
