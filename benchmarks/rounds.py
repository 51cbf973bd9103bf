"""Does a posterior that becomes the next prior help to learn in rounds? SST-2 with a real encoder, no replay.

    python benchmarks/rounds.py --base_model FOLDER_OF_MINILM --data_path FOLDER_OF_SST2 [--seeds 0,1,2]

Rounds of 10, 20, 40, ... 5,120 new rows of GLUE's train, drawn by seed (benchmarks/slices.py). Every method trains the
same adapter on the same rows, by the project's own trainer, and answers the 872 rows of GLUE's dev, which nothing is
tuned on, and rows of every round before. --tune_on_validation asks whole sentences held out of train in dev's place.

    posterior       the posterior of a round is the prior of the next
    weights         a warm start: the weights go on, the prior stays as it was
    full replay     from scratch on all rows so far, every round
    posterior, partial replay    a fifth of every past round beside the new rows

Prints means +- sample deviations over seeds, differences to "weights" with 95 % intervals (Student's t over seeds), and
the matrix of what is known of each round; writes every run's figures to results/benchmarks/rounds.json as it ends, and
a plot beside it. Runs that are in that file with the same settings are not repeated (--again repeats them).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

import parameter_efficient_fine_tuning as trainer_script  # noqa: E402
from benchmarks.slices import write_slices  # noqa: E402
from benchmarks.uncertainty import BH_PEFT, COMMON, add_precision, precision_of_its_own  # noqa: E402
from benchmarks.uncertainty_table import aligned, t_interval  # noqa: E402
from bhpeft.environment import hardware, library_versions  # noqa: E402
from bhpeft.errors import InputError, run_main  # noqa: E402
from bhpeft.files import write_atomic  # noqa: E402
from bhpeft.report.rounds import matrix, still_known  # noqa: E402

ROUNDS = [10 * 2**i for i in range(10)]
SMOKE = {"rounds": [8, 16], "validation_rows": 16, "test_rows": 32, "epochs": 1, "steps": 2}
ADAPTER = {
    **{name: value for name, value in BH_PEFT.items() if name != "feature_distance"},
    "num_train_epochs": 3, "min_round_steps": 100, "max_known_samples": 200,
}  # fmt: skip
METHODS = {
    "weights": {"carry": "weights"},
    "posterior": {"carry": "posterior"},
    "full replay": {"carry": "none", "replay": "full"},
    "posterior, partial replay": {"carry": "posterior", "replay": "partial"},
}
BASELINE = "weights"
# name of the figure, heading, digits
COLUMNS = (
    ("accuracy", "accuracy", 4),
    ("nll", "NLL", 4),
    ("ece", "ECE", 4),
    ("backward_transfer", "backward transfer", 4),
    ("trained_rows", "rows trained on", 0),
    ("steps", "steps", 0),
    ("seconds", "seconds", 0),
)


def figures_of(rounds: list[dict]) -> dict:
    """Of the record's rounds: the last one's figures on the test, each round's accuracy on it, what is still known, and
    the costs: rows times epochs, steps, seconds of training."""
    tests = [next(asked for asked in done["evaluations"] if asked["evaluated_on"] == "test") for done in rounds]
    known = still_known(rounds)
    return {
        "accuracy": tests[-1]["value"], "nll": tests[-1]["nll"], "ece": tests[-1]["ece"],
        "backward_transfer": math.nan if known is None else known["backward_transfer"],
        "accuracies": [test["value"] for test in tests],
        "matrix": [[None if math.isnan(value) else value for value in row] for row in matrix(rounds)],
        "trained_rows": sum(done["trained_rows"] * done["epochs"] for done in rounds),
        "steps": sum(done["steps"] for done in rounds),
        "seconds": sum(done["seconds"] for done in rounds),
    }  # fmt: skip


def run(method: str, seed: int, slices: Path, flags: argparse.Namespace) -> dict:
    """Learn in rounds by a method; its figures."""
    settings = {**COMMON, **ADAPTER, **METHODS[method], "rounds": flags.rounds}
    if flags.smoke:
        settings |= {"num_train_epochs": SMOKE["epochs"], "min_round_steps": SMOKE["steps"]}
        settings |= {"max_test_samples": SMOKE["test_rows"]}
    tested = "validation.csv" if flags.tune_on_validation else "dev.csv"
    settings |= {"dataset_name": slices / "train.csv", "test_file": slices / tested, "seed": seed, "data_seed": seed}
    settings |= {"base_model": flags.base_model, "labels": ["negative", "positive"], "disable_tqdm": True}
    settings["bf16"] = flags.precision == "bf16"
    quiet = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, quiet, precision_of_its_own():
        settings |= {"run_name": "run", "results_dir": f"{folder}/results", "output_dir": f"{folder}/adapter"}
        words = []
        for key, value in settings.items():
            words += [f"--{key}", *(value if isinstance(value, list) else [value])]
        record = trainer_script.main([str(word) for word in words])
    return figures_of(record["rounds"])


def tables(runs: list[dict]) -> str:
    """Means +- deviations over seeds, differences to `BASELINE`, and each method's matrix, as text."""
    groups = {method: {run["seed"]: run for run in runs if run["method"] == method} for method in METHODS}
    groups = {method: group for method, group in groups.items() if group}
    heading = ["method", "seeds", *(text for _, text, _ in COLUMNS)]
    lines, differences = [heading], [heading]
    for method, group in groups.items():
        cells = [method, str(len(group))]
        for name, _, digits in COLUMNS:
            values = [run[name] for run in group.values()]
            spread = f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.{digits}f}{spread}")
        lines.append(cells)
        base = groups.get(BASELINE, {})
        shared = [seed for seed in group if seed in base and method != BASELINE]
        if not shared:
            continue
        cells = [method, str(len(shared))]
        for name, _, digits in COLUMNS:
            values = [group[seed][name] - base[seed][name] for seed in shared]
            low, high = t_interval(values)
            ends = "" if math.isnan(low) else f" ({low:+.{digits}f} to {high:+.{digits}f})"
            cells.append(f"{np.mean(values):+.{digits}f}{ends}")
        differences.append(cells)
    text = aligned("After the last round, mean +- sample deviation over seeds:", lines)
    if len(differences) > 1:
        title = f"Minus {BASELINE}, seed by seed (95 % interval: Student's t of the differences):"
        text += ["", *aligned(title, differences)]
    for method, group in groups.items():
        found = np.mean([np.array(run["matrix"], dtype=float) for run in group.values()], axis=0)
        lines = [["after", *map(str, range(1, len(found) + 1))]]
        lines += [[str(t), *("" if np.isnan(x) else f"{x:.2f}" for x in row)] for t, row in enumerate(found, 1)]
        text += ["", *aligned(f"{method}: accuracy on rows of each round, mean over seeds", lines)]
    return "\n".join(text)


def draw(path: Path, runs: list[dict]) -> None:
    """Accuracy on the test over all rows seen so far, a line a method, each seed as a thin one."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(7, 4.2), layout="constrained")
    axes = canvas.subplots()
    colors = dict(zip(METHODS, ("#0072b2", "#d55e00", "#555555", "#cc79a7"), strict=True))
    for method, color in colors.items():
        group = [run for run in runs if run["method"] == method]
        if not group:
            continue
        seen = np.cumsum(group[0]["rounds"])
        for run in group:
            axes.plot(seen, run["accuracies"], color=color, linewidth=0.6, alpha=0.5)
        mean = np.mean([run["accuracies"] for run in group], axis=0)
        axes.plot(seen, mean, color=color, marker="o", markersize=4, label=method)
    axes.set(xscale="log", xlabel="rows seen so far", ylabel="accuracy on the test")
    axes.legend(frameon=False)
    axes.grid(color="0.9")
    png = io.BytesIO()
    canvas.savefig(png, format="png", dpi=120, metadata={"Software": None})
    write_atomic(path, png.getvalue())


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True, help="encoder, e.g. the folder of all-MiniLM-L6-v2")
    parser.add_argument("--data_path", type=Path, required=True, help="folder with SST-2's train.tsv and dev.tsv")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=";".join(METHODS), help="of " + "; ".join(METHODS))
    parser.add_argument("--tune_on_validation", action="store_true", help="ask validation rows instead of dev's")
    parser.add_argument("--smoke", action="store_true", help="a few rows and steps; the figures mean nothing")
    parser.add_argument("--out", type=Path, help="default: results/benchmarks/rounds.json")
    parser.add_argument("--again", action="store_true", help="repeat runs that the output file holds already")
    add_precision(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    flags = parser.parse_args(argv)
    flags.methods = [method.strip() for method in flags.methods.split(";")]
    if set(flags.methods) - set(METHODS):
        raise InputError(f"--methods {'; '.join(flags.methods)}: must be of {'; '.join(METHODS)}")
    if not all(seed.isdigit() for seed in flags.seeds.split(",")):
        raise InputError(f"--seeds {flags.seeds}: give whole numbers with commas between them")
    flags.seeds = [int(seed) for seed in flags.seeds.split(",")]
    flags.rounds = SMOKE["rounds"] if flags.smoke else ROUNDS
    part = "_validation" if flags.tune_on_validation else ""
    flags.out = flags.out or ROOT / f"results/benchmarks/rounds{part}.json"
    return flags


def main(argv: list[str] | None = None) -> dict:
    """Run what is missing; return the record that is written."""
    flags = parse_arguments(argv)
    record: dict = json.loads(flags.out.read_text()) if flags.out.is_file() else {"runs": []}
    runs = record["runs"]
    place = {
        "precision": flags.precision, "rounds": flags.rounds, "smoke": flags.smoke,
        "base_model": Path(flags.base_model).name,
        "data": flags.data_path.resolve().name, "reported_on": "validation" if flags.tune_on_validation else "dev",
    }  # fmt: skip

    def wanted(method: str) -> dict:
        return json.loads(json.dumps({"method": method, **place, "settings": {**COMMON, **ADAPTER, **METHODS[method]}}))

    def holds(run: dict, values: dict) -> bool:
        return all(name in run and run[name] == value for name, value in values.items())

    for seed in flags.seeds:
        with tempfile.TemporaryDirectory() as folder:
            validation = SMOKE["validation_rows"] if flags.smoke else 2000
            write_slices(flags.data_path, Path(folder), sum(flags.rounds), validation, seed)
            for method in flags.methods:
                own = {**wanted(method), "seed": seed}
                if not flags.again and any(holds(run, own) for run in runs):
                    continue
                print(f"{method}, seed {seed} ...", file=sys.stderr, flush=True)
                found = run(method, seed, Path(folder), flags)
                runs[:] = [run for run in runs if not holds(run, {**place, "method": method, "seed": seed})]
                runs.append({**own, **found})
                record = {"runs": runs, "versions": library_versions(), "hardware": hardware()}
                write_atomic(flags.out, json.dumps(record, indent=1) + "\n")
    shown = [run for run in runs if run["method"] in METHODS and holds(run, wanted(run["method"]))]
    print("\n" + tables(shown))
    draw(flags.out.with_suffix(".png"), shown)
    print(f"\nwritten: {flags.out}, {flags.out.with_suffix('.png')}")
    return record


if __name__ == "__main__":
    run_main(main)
