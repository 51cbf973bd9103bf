"""How well does each method know what it does not know, on SST-2 with a real encoder?

    python benchmarks/uncertainty.py --base_model FOLDER_OF_MINILM --data_path FOLDER_OF_SST2 \
        [--ood_data_path FOLDER_OF_GENERICS] [--train_rows 1000] [--seeds 0,1,2] [--methods map,bh-peft]

Each seed draws training and validation rows of GLUE's train (benchmarks/slices.py: no validation text is part of a
training text or has one as its part) and starts the weights. Every method trains on the same rows, by the project's own
trainer, and answers the 872 rows of GLUE's dev, which nothing is tuned on, and rows of another domain (generics).
--tune_on_validation puts one half of the validation rows in dev's place (temperatures are fitted on the other half): to
choose SETTINGS by. --held_out_rows asks so many more sentences of train in dev's place, kept from training and from
validation, that nothing was tuned on: where dev's 872 are too few to tell two methods apart.

Prints means +- sample deviations over seeds, and differences to "map" and to its temperature with 95 % intervals
(Student's t over seeds of the paired differences; seeds differ in rows and weights, the test rows are the same). Writes
every run's figures to results/benchmarks/uncertainty_ROWS.json as it ends, and a plot beside it. Runs that are in that
file already, with the same settings, are not repeated (--again repeats them). A run takes the place of that of its
method and seed on the same base and rows alone; all others stay.
--work_folder keeps adapters and slices, to go on with later.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import parameter_efficient_fine_tuning as trainer_script  # noqa: E402
from benchmarks.processes import end_with_parent  # noqa: E402
from benchmarks.slices import write_slices  # noqa: E402
from benchmarks.uncertainty_table import draw, figures_of, tables  # noqa: E402
from bhpeft import training  # noqa: E402
from bhpeft.adapters.bh_peft import gaussian_layers  # noqa: E402
from bhpeft.bayesianise import bayesianise  # noqa: E402
from bhpeft.combine import combine  # noqa: E402
from bhpeft.environment import bf16_in_hardware, hardware, library_versions  # noqa: E402
from bhpeft.errors import InputError, run_main  # noqa: E402
from bhpeft.files import write_atomic  # noqa: E402

PRECISION = "ACCELERATE_MIXED_PRECISION"
SAMPLES = 10  # of the posterior, of dropout
# What every run has in common, and what depends on how many rows there are to train on.
COMMON = {
    "max_length": 128, "lr_scheduler_type": "linear", "warmup_steps": 0.06, "per_device_train_batch_size": 32,
    "train_sampling_strategy": "group_by_length", "save_strategy": "no", "logging_steps": 200,
}  # fmt: skip
EPOCHS = {1000: 20}  # by rows; others: see `epochs_of`
DISTANCE = {"feature_distance": True}  # of the frozen base: the same for all methods, so measured with some of them
LORA = {"adapter_name": "lora", "lora_rank": 8, "learning_rate": 1e-3, **DISTANCE}
BH_PEFT = {
    "adapter_name": "bh-peft", "learning_rate": 1e-3, "prefix_length": 10, "prefix_bottleneck_size": 2,
    "lora_rank": 4, "lora_alpha": 16, "bn_reduction_factor": 32, "adapter_scaling": 1,
    "kl_weight": 0.1, "initial_sigma": 0.03,  # chosen on whole sentences of the training data
    **DISTANCE,
}  # fmt: skip
POSTERIOR = {"posterior_samples": SAMPLES}
TEMPERATURE = {"fit_temperature": True}
# Flags of training ("train") and of answering ("test"); methods of equal training share it. "members": a deep ensemble.
# "measure": what rejects and tells other domains (default: 1 - the probability of the likeliest label). "independent":
# samples without pairs, to be compared with.
SETTINGS = {
    "map": {"train": LORA, "test": DISTANCE},
    "map+temperature": {"train": LORA, "test": {**TEMPERATURE, **DISTANCE}},
    "mc-dropout": {"train": {**LORA, "lora_dropout": 0.1}, "test": {"mc_dropout_samples": SAMPLES}},
    "ensemble": {"train": LORA, "members": 5},
    "training-free": {"train": LORA, "training_free": True, "test": POSTERIOR},
    "blob": {
        "train": {"adapter_name": "bayesian-lora", "lora_rank": 8, "learning_rate": 2e-3, "kl_weight": 0.1},
        "test": POSTERIOR,
    },
    "bh-peft": {"train": BH_PEFT, "test": {**POSTERIOR, **DISTANCE}},
    "bh-peft+temperature": {"train": BH_PEFT, "test": {**POSTERIOR, **TEMPERATURE, **DISTANCE}},
    "bh-peft-independent": {"train": BH_PEFT, "independent": True, "test": {**POSTERIOR, **DISTANCE}},
    "bh-peft-all": {"train": {**BH_PEFT, "bayesian": "all"}, "test": POSTERIOR},
    "bh-peft-kl-0.01": {"train": {**BH_PEFT, "kl_weight": 0.01}, "test": POSTERIOR},
    "bh-peft-kl-1": {"train": {**BH_PEFT, "kl_weight": 1}, "test": POSTERIOR},
    "bh-peft-sigma-0.0025": {"train": {**BH_PEFT, "initial_sigma": 0.0025}, "test": POSTERIOR},
}
SMOKE = {"train_rows": 48, "validation_rows": 24, "test_rows": 32, "max_steps": 4}


def epochs_of(train_rows: int | None) -> float:
    """Epochs by `EPOCHS`; of other numbers of rows as many steps as 1,000 rows make, but at most 20 epochs and at least
    1. None: all rows."""
    rows = train_rows or 60_000
    return EPOCHS.get(rows, max(1, min(20, 20_000 / rows)))


@contextlib.contextmanager
def precision_of_its_own() -> Iterator[None]:
    """The environment's precision, which a run sets for its whole process, is what it was afterwards."""
    before = os.environ.pop(PRECISION, None)
    try:
        yield
    finally:
        os.environ.pop(PRECISION, None)
        if before is not None:
            os.environ[PRECISION] = before


@contextlib.contextmanager
def independent_draws() -> Iterator[None]:
    """Within the block the trainer's posterior samples are drawn one by one, not in pairs (`drawn_noise`)."""

    def drawn(model, samples: int, seed: int = 0) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(samples, *layer.mu.shape, generator=generator) for layer in gaussian_layers(model)]

    with patch.object(training, "drawn_noise", drawn):
        yield


class Bench:
    """Runs methods, keeping adapters and slices in one folder so that methods of equal training share it.

    Attributes:
        flags: of the command line.
        folder: what is kept.
    """

    def __init__(self, flags: argparse.Namespace, folder: Path):
        self.flags, self.folder = flags, folder

    def slices(self, seed: int) -> Path:
        """The folder of a seed's train.csv, validation.csv, dev.csv."""
        flags = self.flags
        name = f"{flags.train_rows or 'all'}-{flags.validation_rows}-{flags.validation}-{seed}"
        name += f"-{flags.held_out_rows}" if flags.held_out_rows else ""
        folder = self.folder / f"slices-{flags.data_path.resolve().name}-{name}"
        if not (folder / "dev.csv").is_file():  # written last
            whole = flags.validation == "sentences"
            rows = (flags.train_rows, flags.validation_rows)
            write_slices(flags.data_path, folder, *rows, seed, whole, flags.held_out_rows)
        return folder

    def run_trainer(self, name: str, seed: int, settings: dict) -> tuple[dict, Path]:
        """One run of the trainer; its record, and the folder of its predictions."""
        results = self.folder / "results" / name
        settings |= {"base_model": self.flags.base_model, "labels": ["negative", "positive"], "seed": seed}
        settings |= {"run_name": "run", "results_dir": results, "overwrite": True, "disable_tqdm": True}
        settings |= {"per_device_eval_batch_size": 32, "bf16": self.flags.precision == "bf16"}
        words = []
        for key, value in settings.items():
            words += [f"--{key}", *(value if isinstance(value, list) else [value])]
        out = io.StringIO()
        with contextlib.redirect_stdout(out), precision_of_its_own():
            record = trainer_script.main([str(word) for word in words])
        return record, results / "predictions"

    def train(self, settings: dict, seed: int, data_seed: int) -> tuple[Path, float]:
        """An adapter trained with these settings on the rows of `data_seed`: its folder, and seconds of training."""
        flags = self.flags
        slices = self.slices(data_seed)
        settings = {"num_train_epochs": epochs_of(flags.train_rows), **settings}
        if flags.smoke:
            settings |= {"max_steps": SMOKE["max_steps"]}
        on = [slices.name, seed, str(flags.base_model), flags.precision]
        key = json.dumps([settings, COMMON, *on], sort_keys=True)
        name = hashlib.sha256(key.encode()).hexdigest()[:16]
        folder = self.folder / "adapters" / name
        if not (folder / "seconds.json").is_file():
            data = {"dataset_name": slices / "train.csv", "test_file": slices / "dev.csv", "do_predict": False}
            record, _ = self.run_trainer(f"train-{name}", seed, {**COMMON, **settings, **data, "output_dir": folder})
            write_atomic(folder / "seconds.json", json.dumps(record["timings"]["train"]))
        return folder, json.loads((folder / "seconds.json").read_text())

    def test(self, method: str, adapter: Path, seed: int, settings: dict) -> tuple[dict, Path]:
        """Answer the test rows, and those of another domain; the record, and the folder of predictions."""
        flags, slices = self.flags, self.slices(seed)
        common = {"max_length": COMMON["max_length"]}
        settings = {"adapter_path": adapter, "do_train": False, **common, **settings}
        settings |= {"dataset_name": slices / "train.csv", "test_file": slices / self.parts[1]}
        if settings.get("fit_temperature"):
            settings |= {"do_eval": True, "validation_file": slices / self.parts[0]}
        if flags.ood_data_path:
            settings |= {"ood_dataset_name": "generics", "ood_data_path": flags.ood_data_path}
        if flags.smoke:
            settings |= {"max_test_samples": SMOKE["test_rows"], "max_ood_samples": SMOKE["test_rows"]}
        return self.run_trainer(f"{method}-{seed}", seed, settings)

    @property
    def parts(self) -> tuple[str, str]:
        """Files of the rows that temperatures are fitted on and that figures are of."""
        if self.flags.tune_on_validation:
            return "fit.csv", "report.csv"
        return "validation.csv", "held_out.csv" if self.flags.held_out_rows else "dev.csv"

    def run(self, method: str, seed: int) -> dict:
        """Train and answer; the figures."""
        settings = SETTINGS[method]
        members = settings.get("members", 1)
        seconds, predictions, record = 0.0, [], {}
        for member in range(members):
            adapter, trained = self.train(settings["train"], seed + 1000 * member, seed)
            seconds += trained
            if settings.get("training_free"):
                adapter, searched = self.training_free(adapter, seed)
                seconds += searched
            # The base's dropout is no part of an adapter's folder.
            kept = {key: value for key, value in settings["train"].items() if key == "base_dropout"}
            name = f"{method}-member{member}" if members > 1 else method
            with independent_draws() if settings.get("independent") else contextlib.nullcontext():
                record, folder = self.test(name, adapter, seed, {**kept, **settings.get("test", {})})
            predictions.append(folder)
        folder = predictions[0]
        if members > 1:
            folder = self.folder / "results" / f"{method}-{seed}" / "predictions"
            for name in ["run.csv", *(["run.ood.csv"] if self.flags.ood_data_path else [])]:
                combine([part / name for part in predictions], folder / name)
        found = figures_of(folder / "run.csv", folder / "run.ood.csv")
        found["temperature"] = record["metrics"].get("temperature")
        return {**found, "seconds": seconds}

    def training_free(self, adapter: Path, seed: int) -> tuple[Path, float]:
        """A Gaussian adapter around a trained one, its sigma searched on the validation rows; and seconds."""
        out = adapter.with_name(f"{adapter.name}-free-{self.parts[0].removesuffix('.csv')}")
        if not (out / "seconds.json").is_file():
            shutil.rmtree(out, ignore_errors=True)
            started = time.perf_counter()
            bayesianise(adapter, out, self.slices(seed) / self.parts[0], samples=SAMPLES, max_rows=300, seed=seed)
            write_atomic(out / "seconds.json", json.dumps(time.perf_counter() - started))
        return out, json.loads((out / "seconds.json").read_text())


def add_precision(parser: argparse.ArgumentParser) -> None:
    """--precision of a benchmark's runs."""
    default = "bf16" if bf16_in_hardware() else "fp32"
    text = "default: bf16 where this machine multiplies in it, else fp32"
    parser.add_argument("--precision", choices=["fp32", "bf16"], default=default, help=text)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True, help="encoder, e.g. the folder of all-MiniLM-L6-v2")
    parser.add_argument("--data_path", type=Path, required=True, help="folder with SST-2's train.tsv and dev.tsv")
    parser.add_argument("--ood_data_path", type=Path, help="folder of the generics (default: no other domain)")
    parser.add_argument(
        "--train_rows",
        default="1000",
        help="rows to train on, or all that share no phrase with those of validation (default: 1000)",
    )
    parser.add_argument("--validation_rows", type=int, default=2000, help="rows held out of train (default: 2000)")
    parser.add_argument("--validation", choices=["sentences", "phrases"], default="sentences",
                        help="whole sentences, as dev's rows are, or any rows (default: sentences)")  # fmt: skip
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=",".join(SETTINGS))
    parser.add_argument("--tune_on_validation", action="store_true", help="figures of validation rows instead of dev's")
    parser.add_argument("--held_out_rows", type=int, default=0, metavar="N",
                        help="figures of N sentences of train that nothing was tuned on, instead of dev's")  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="a few rows and steps; the figures mean nothing")
    parser.add_argument("--out", type=Path, help="default: results/benchmarks/uncertainty_ROWS.json")
    parser.add_argument("--work_folder", type=Path, help="where adapters and slices are kept (default: nowhere)")
    parser.add_argument("--again", action="store_true", help="repeat runs that the output file holds already")
    add_precision(parser)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    flags = parser.parse_args(argv)
    if flags.jobs < 1:
        raise InputError(f"--jobs {flags.jobs}: must be at least 1")
    if flags.held_out_rows < 0:
        raise InputError(f"--held_out_rows {flags.held_out_rows}: must be 0 (dev's) or more")
    if flags.held_out_rows and flags.tune_on_validation:
        raise InputError("--held_out_rows and --tune_on_validation: figures are of one of them; give one")
    unknown = set(flags.methods.split(",")) - set(SETTINGS)
    if unknown:
        raise InputError(f"--methods {', '.join(sorted(unknown))}: must be of {', '.join(SETTINGS)}")
    if not all(seed.isdigit() for seed in flags.seeds.split(",")):
        raise InputError(f"--seeds {flags.seeds}: give whole numbers with commas between them")
    if flags.train_rows != "all" and not flags.train_rows.isdigit():
        raise InputError(f"--train_rows {flags.train_rows}: give a number, or all")
    flags.train_rows = None if flags.train_rows == "all" else int(flags.train_rows)
    if flags.smoke:
        flags.train_rows, flags.validation_rows = SMOKE["train_rows"], SMOKE["validation_rows"]
    part = "-validation" if flags.tune_on_validation else "-held-out" if flags.held_out_rows else ""
    name = f"uncertainty_{flags.train_rows or 'all'}{part}.json"
    flags.out = flags.out or ROOT / "results/benchmarks" / name
    return flags


def slice_of(flags: argparse.Namespace) -> dict:
    """The base and the rows that a run is of, by their folders' names; runs of different ones stand side by side."""
    ood = flags.ood_data_path
    reported_on = f"{flags.held_out_rows} held out" if flags.held_out_rows else "dev"
    reported_on = "validation" if flags.tune_on_validation else reported_on
    return {
        "precision": flags.precision, "train_rows": flags.train_rows, "validation_rows": flags.validation_rows,
        "validation": flags.validation,
        "reported_on": reported_on, "smoke": flags.smoke,
        "base_model": Path(flags.base_model).name, "data": flags.data_path.resolve().name,
        "ood_data": None if ood is None else ood.resolve().name,
    }  # fmt: skip


def settings_of(method: str, flags: argparse.Namespace) -> dict:
    """All that a method's figures depend on beside its slice and seed, as JSON gives it back."""
    common = {**COMMON, "num_train_epochs": epochs_of(flags.train_rows), "samples": SAMPLES}
    found = json.loads(json.dumps({"settings": SETTINGS[method], "common": common}))
    if "posterior_samples" in SETTINGS[method].get("test", {}) and not SETTINGS[method].get("independent"):
        found["draws"] = "in pairs"  # runs of before were not, and are repeated
    return found


def holds(run: dict, wanted: dict) -> bool:
    """Whether a run of the file has all these values."""
    return all(name in run and run[name] == value for name, value in wanted.items())


def run_together(flags: argparse.Namespace, folder: Path, seed: int, methods: list[str]) -> list[tuple[str, dict]]:
    """Methods that share their training, one after another: each with its figures."""
    bench, found = Bench(flags, folder), []
    for method in methods:
        print(f"{method}, seed {seed} ...", file=sys.stderr, flush=True)
        found.append((method, bench.run(method, seed)))
    return found


def in_parts(flags: argparse.Namespace, folder: Path, missing: list[tuple[int, str]]) -> Iterator[tuple]:
    """(seed, method, figures) of each missing run as it ends, `--jobs` groups of equal training at a time."""
    groups: dict[tuple[int, str], list[str]] = {}
    for seed, method in missing:
        groups.setdefault((seed, json.dumps(SETTINGS[method]["train"], sort_keys=True)), []).append(method)
    if flags.jobs == 1:
        for (seed, _), methods in groups.items():
            yield from ((seed, *found) for found in run_together(flags, folder, seed, methods))
        return
    for seed in {seed for seed, _ in groups}:
        Bench(flags, folder).slices(seed)
    # Begun anew, so that they take this number of threads, which torch reads when it is loaded.
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // flags.jobs))
    with ProcessPoolExecutor(flags.jobs, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        tasks = {pool.submit(run_together, flags, folder, seed, group): seed for (seed, _), group in groups.items()}
        for task in as_completed(tasks):
            yield from ((tasks[task], *found) for found in task.result())


def main(argv: list[str] | None = None) -> dict:
    """Run what is missing; return the record that is written."""
    flags = parse_arguments(argv)
    methods, seeds = flags.methods.split(","), [int(seed) for seed in flags.seeds.split(",")]
    record: dict = json.loads(flags.out.read_text()) if flags.out.is_file() else {"runs": []}
    runs, rows = record["runs"], slice_of(flags)

    def wanted(seed: int, method: str) -> dict:
        return {"method": method, "seed": seed, **rows, **settings_of(method, flags)}

    def known(seed: int, method: str) -> bool:
        return not flags.again and any(holds(run, wanted(seed, method)) for run in runs)

    missing = [(seed, method) for seed in seeds for method in methods if not known(seed, method)]
    with contextlib.ExitStack() as stack:
        folder = flags.work_folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for seed, method, found in in_parts(flags, folder, missing):
            runs[:] = [run for run in runs if not holds(run, {"method": method, "seed": seed, **rows})]
            runs.append({**wanted(seed, method), **found})
            record = {"runs": runs, "versions": library_versions(), "hardware": hardware()}
            write_atomic(flags.out, json.dumps(record, indent=1) + "\n")
    shown = [run for run in runs if run["method"] in SETTINGS and holds(run, rows | settings_of(run["method"], flags))]
    print("\n" + tables(shown, list(SETTINGS)))
    draw(flags.out.with_suffix(".png"), shown, list(SETTINGS))
    print(f"\nwritten: {flags.out}, {flags.out.with_suffix('.png')}")
    return record


if __name__ == "__main__":
    run_main(main)
