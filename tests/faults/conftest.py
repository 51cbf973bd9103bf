"""Real runs, started to be killed: as a user starts them, on a tiny model, in a folder of their own."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from conftest import ROOT, TRAINER
from safetensors.torch import load_file

ALONE = [sys.executable]
SHARDED = ["accelerate", "launch", "--config_file", ROOT / "ds_zero3_cpu.yaml", "--num_processes", 2]
SHARDED += ["--main_process_port", 0, "--mixed_precision", "no"]  # fp32: 16 bit make a difference of any other
MULTINODE = ["accelerate", "launch", "--config_file", ROOT / "ds_zero3_multinode.yaml", "--mixed_precision", "no"]
LIMIT = 240  # seconds a run may take, on a machine that does other things as well


class Started:
    """A run in processes of its own; what it says is kept in a file."""

    def __init__(self, words: list, folder: Path, **environment: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"said-{len(list(folder.glob('said-*')))}.txt"
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                list(map(str, words)), cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def errors(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith(("error: ", "stopped: "))]

    def processes(self) -> list[psutil.Process]:
        try:
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        for process in self.processes():
            if process.environ().get("RANK") == str(number) and TRAINER in " ".join(process.cmdline()):
                return process
        raise AssertionError(f"no rank {number}: {self.said[-2000:]}")

    def kill(self) -> None:
        """As a machine that loses its power: all of it at once."""
        processes = self.processes()
        for process in processes:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                pass
        psutil.wait_procs(processes[1:], timeout=30)
        self.process.wait(30)

    def until(self, condition, limit: float = LIMIT, every: float = 0.002) -> bool:
        """Wait until a condition holds: True; or the run has ended: False."""
        end = time.monotonic() + limit
        while not condition():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"nothing after {limit} s: {self.said[-3000:]}")
            time.sleep(every)
        return True

    def until_trains(self) -> bool:
        """Wait until the first step is logged."""
        return self.until(lambda: "'loss'" in self.said, every=0.02)

    def end(self, limit: float = LIMIT) -> int:
        """Wait for the end; the exit code."""
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {limit} s: {self.said[-3000:]}") from None


@pytest.fixture
def start(request):
    """`start(words, folder)` gives a `Started`; none outlives its test."""
    started: list[Started] = []

    def begin(words: list, folder: Path, **environment: str) -> Started:
        started.append(Started(words, folder, **environment))
        return started[-1]

    yield begin
    for run in started:
        if run.process.poll() is None:
            run.kill()


@pytest.fixture(scope="session")
def command(tiny_encoder, tmp_path_factory):
    """`command(launcher, *flags)`: a small training with a checkpoint every other step, its paths relative."""
    import csv

    from conftest import statement_rows

    rows = tmp_path_factory.mktemp("rows") / "rows.csv"
    with open(rows, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text_input", "text_label"])
        writer.writerows((q, "yes" if answer.startswith("True") else "no") for q, answer in statement_rows())

    def words(launcher: list, *flags) -> list:
        return [
            *launcher, ROOT / TRAINER, "--base_model", tiny_encoder, "--dataset_name", rows, "--test_fraction", 0.2,
            "--adapter_name", "bh-peft", "--prefix_length", 4, "--bn_reduction_factor", 8, "--lora_rank", 4,
            "--kl_weight", 0.01, "--lr", 1e-2, "--max_length", 48, "--epochs", 3, "--batch_size", 4,
            "--gradient_accumulation_steps", 1 if launcher != ALONE else 2, "--logging_steps", 1,
            "--save_strategy", "steps", "--save_steps", 2, "--disable_tqdm", "true", "--run_name", "r", *flags,
        ]  # fmt: skip

    return words


class Whole(NamedTuple):
    """A run that was left alone: its folder, the seconds from its first logged step to its last, and from there on."""

    folder: Path
    training: float
    answering: float


@pytest.fixture(scope="session")
def uninterrupted(command, tmp_path_factory):
    """`uninterrupted(launcher)` gives its `Whole`, made once."""
    made: dict[str, Whole] = {}

    def run(launcher: list) -> Whole:
        name = Path(launcher[0]).name
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            started, times = Started(command(launcher), folder), []
            for mark in ("'loss'", "train_runtime"):
                assert started.until(lambda mark=mark: mark in started.said, every=0.02), started.said[-3000:]
                times.append(time.monotonic())
            assert started.end() == 0, started.said[-3000:]
            made[name] = Whole(folder, times[1] - times[0], time.monotonic() - times[1])
        return made[name]

    return run


def difference(one: Path, two: Path) -> float:
    """The largest difference between the weights of two adapters of the same shapes."""
    one, two = (load_file(folder / "adapters/r/adapter_model.safetensors") for folder in (one, two))
    assert one.keys() == two.keys() and one
    return max((one[name].double() - two[name].double()).abs().max().item() for name in one)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by name, but for what runs have said."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("said-"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def chance(request) -> random.Random:
    """Random numbers of this test's own, the same at every run."""
    return random.Random(request.node.name)
