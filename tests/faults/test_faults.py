"""What breaks around a run: a rank, the disk, the results folder, a checkpoint, a second run, a scheduler."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time

import psutil
import pytest

from bhpeft.checkpoints import fault, steps
from bhpeft.results import check_descriptions, read_metrics, read_predictions

from .conftest import ALONE, MULTINODE, SHARDED, contents, difference

ROUNDING = 1e-5  # fp32, over 24 steps of 0.01
faults = pytest.mark.faults
pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB of its own, in memory; `small_disk("remount,ro")` mounts it anew."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> subprocess.CompletedProcess:
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)

    if os.geteuid() != 0 or (refused := mount("size=8m")).returncode:
        pytest.skip("mounting a small file system is not permitted here" + ("" if os.geteuid() else refused.stderr))
    mount.folder = folder
    yield mount
    subprocess.run(["umount", "-l", str(folder)], check=False, timeout=30)


# ------------------------------------------------------------------------------------ told to stop, or half gone


def test_sigterm_saves_and_ends_with_a_code_of_its_own(command, start, uninterrupted, tmp_path):
    whole = uninterrupted(ALONE)
    run = start(command(ALONE, "--save_steps", 1000), tmp_path)
    assert run.until_trains()
    run.process.send_signal(signal.SIGTERM)
    assert run.end(60) == 75
    [(step, checkpoint)] = steps(tmp_path / "adapters/r")
    assert fault(checkpoint) is None and 0 < step < 24
    assert len(run.errors) == 1 and str(step) in run.errors[0] and "--resume" in run.errors[0]
    assert "Traceback" not in run.said and not (tmp_path / "results/metrics/r.json").exists()
    resumed = start(command(ALONE, "--save_steps", 1000, "--resume"), tmp_path)
    assert resumed.end() == 0 and f"behind step {step}" in resumed.said
    assert difference(whole.folder, tmp_path) == 0


@faults
@pytest.mark.parametrize("to", ["launcher", "one rank"])
def test_sigterm_to_some_of_it_saves_on_all_ranks(to, command, start, uninterrupted, tmp_path):
    whole = uninterrupted(SHARDED)
    run = start(command(SHARDED, "--save_steps", 1000), tmp_path)
    assert run.until_trains()
    (run.process if to == "launcher" else run.rank(1)).send_signal(signal.SIGTERM)
    code = run.end(60)
    assert code == 1  # the launcher's own
    [(step, checkpoint)] = steps(tmp_path / "adapters/r")
    assert fault(checkpoint) is None and len([line for line in run.errors if "stopped: SIGTERM" in line]) == 1
    assert not (tmp_path / "results/metrics/r.json").exists()
    resumed = start(command(SHARDED, "--save_steps", 1000, "--resume"), tmp_path)
    assert resumed.end() == 0 and f"behind step {step}" in resumed.said
    found = difference(whole.folder, tmp_path)
    print(f"SIGTERM to {to} at step {step}: largest weight difference {found}")
    assert found <= ROUNDING


@faults
@pytest.mark.parametrize("dies", [0, 1])
def test_one_rank_dies_and_the_other_says_so_within_a_minute(dies, command, start, uninterrupted, tmp_path):
    whole = uninterrupted(SHARDED)
    run = start(command(SHARDED), tmp_path)
    assert run.until_trains()
    ranks = [run.rank(0), run.rank(1)]
    ranks[dies].send_signal(signal.SIGKILL)
    begun = time.monotonic()
    assert run.end(60) != 0
    print(f"rank {dies} killed: all ended after {time.monotonic() - begun:.1f} s")
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    assert any("has lost another rank" in line for line in run.errors), run.said[-4000:]
    resumed = start(command(SHARDED, "--resume"), tmp_path)
    assert resumed.end() == 0, resumed.said[-3000:]
    assert difference(whole.folder, tmp_path) <= ROUNDING


# ------------------------------------------------------------------------------------------------------ the disk


@faults
@pytest.mark.parametrize("launcher", [ALONE, SHARDED], ids=["alone", "sharded"])
def test_a_full_disk_is_said_and_what_was_there_stays(launcher, command, start, uninterrupted, small_disk, tmp_path):
    whole = uninterrupted(launcher)
    disk = small_disk.folder
    earlier = start(command(ALONE, "--run_name", "earlier", "--epochs", 1), disk)
    assert earlier.end() == 0
    shutil.rmtree(disk / "adapters/earlier/checkpoint-8")
    before = contents(disk)
    run = start(command(launcher), disk)
    assert run.until(lambda: bool(steps(disk / "adapters/r")))
    with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(4096)):
            pass
    assert run.end(90) != 0
    assert any("cannot be written (" in line and "make room" in line for line in run.errors), run.said[-3000:]
    (disk / "filler").unlink()
    assert {name: content for name, content in contents(disk).items() if name in before} == before
    resumed = start(command(launcher, "--resume"), disk)
    assert resumed.end() == 0, resumed.said[-3000:]
    assert difference(whole.folder, disk) <= (0 if launcher == ALONE else ROUNDING)


@faults
@pytest.mark.parametrize("flag", ["--results_dir", "--output_dir"])
def test_a_read_only_folder_is_said_before_a_model_is_loaded(flag, command, start, small_disk, tmp_path):
    (small_disk.folder / "other").write_text("whole")
    assert small_disk("remount,ro").returncode == 0
    run = start(command(ALONE, flag, small_disk.folder / "there"), tmp_path)
    assert run.end() == 2
    assert len(run.errors) == 1 and str(small_disk.folder) in run.errors[0] and "choose another" in run.errors[0]
    assert "Loading weights" not in run.said and "Traceback" not in run.said
    assert contents(small_disk.folder) == {"other": b"whole"}


@faults
def test_a_results_folder_that_vanishes_is_made_again_and_said(command, start, uninterrupted, tmp_path):
    whole = uninterrupted(ALONE)
    run = start(command(ALONE), tmp_path)
    assert run.until_trains()
    shutil.rmtree(tmp_path / "results")
    assert run.end() == 0
    assert "results was removed while the run went on" in run.said
    assert sorted(contents(tmp_path / "results")) == sorted(contents(whole.folder / "results"))
    assert difference(whole.folder, tmp_path) == 0


@faults
def test_an_adapters_folder_that_vanishes_is_made_again(command, start, uninterrupted, tmp_path):
    whole = uninterrupted(ALONE)
    run = start(command(ALONE), tmp_path)
    assert run.until_trains()
    shutil.rmtree(tmp_path / "adapters", ignore_errors=True)
    code = run.end()
    if code:  # it vanished while a checkpoint was written
        assert len(run.errors) == 1 and "Traceback" not in run.said
        assert start(command(ALONE, "--resume"), tmp_path).end() == 0
    assert difference(whole.folder, tmp_path) == 0


# ------------------------------------------------------------------------------------------------ two at a time


@faults
def test_two_runs_of_one_name_and_two_of_two(command, start, tmp_path):
    first = start(command(ALONE, "--epochs", 60), tmp_path)  # long enough to be there when the second is
    assert first.until(lambda: (tmp_path / "results/.r.lock").exists())
    second = start(command(ALONE, "--overwrite"), tmp_path)
    other = start(command(ALONE, "--run_name", "other"), tmp_path)
    assert second.end(60) == 2
    assert len(second.errors) == 1 and f"process {first.process.pid} on" in second.errors[0]
    assert "Loading weights" not in second.said
    assert first.end() == 0 and other.end() == 0
    check_descriptions(tmp_path / "results/model_descriptions")
    text = (tmp_path / "results/model_descriptions").read_text()
    for name in ("r", "other"):
        assert text.count(f"==== RUN {name} ====") == 1
        rows = read_metrics(tmp_path / f"results/metrics/{name}.json")["rows"]["test"]
        assert len(read_predictions(tmp_path / f"results/predictions/{name}.csv")) == rows
    assert not list(tmp_path.rglob("*.lock"))


@faults
def test_the_lock_of_a_killed_run_is_named_and_taken_over(command, start, tmp_path):
    run = start(command(ALONE), tmp_path)
    assert run.until_trains()
    run.kill()
    assert (tmp_path / "results/.r.lock").exists()
    resumed = start(command(ALONE, "--resume"), tmp_path)
    assert resumed.end() == 0
    assert f"left by process {run.process.pid} on" in resumed.said and "taken over" in resumed.said
    assert not list(tmp_path.rglob("*.lock"))


# ----------------------------------------------------------------------------------------------- two machines


@faults
def test_two_machines_save_once_and_another_number_of_ranks_goes_on(command, start, tmp_path):
    same = ["--adapter_name", "lora", "--base_dropout", 0]  # nothing at random,
    same += ["--max_train_samples", 56]  # and no last step of an epoch that ranks fill up with other rows

    def on_two(where: str, *flags) -> list:
        """Two launchers, as on two machines: each with its own working folder and cache of models."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        runs = []
        for rank in (0, 1):
            own = ["--machine_rank", rank, "--main_process_ip", "127.0.0.1", "--main_process_port", port]
            words = command([*MULTINODE, *own], *same, *flags)
            home = tmp_path / f"{where}{rank}"
            runs.append(start(words, home, HF_HOME=str(home / "cache"), TORCHELASTIC_ERROR_FILE=str(home / "cache/e")))
        return runs

    for run in on_two("whole"):
        assert run.end() == 0, run.said[-3000:]
    assert read_metrics(tmp_path / "whole0/results/metrics/r.json")["hardware"]["ranks"] == 2
    runs = on_two("cut")
    assert runs[0].until(lambda: bool(steps(tmp_path / "cut0/adapters/r")))
    for run in runs:
        run.kill()
    # Saved once, on machine 0: the other has no file but what its launcher and its cache have made.
    for machine in ("whole1", "cut1"):
        assert [name for name in contents(tmp_path / machine) if not name.startswith("cache/")] == []
    shutil.copytree(tmp_path / "cut0", tmp_path / "one", ignore=shutil.ignore_patterns("said-*"))
    one = start(command([*SHARDED, "--num_processes", 1], *same, "--batch_size", 8, "--resume"), tmp_path / "one")
    assert one.end() == 0, one.said[-3000:]
    assert "it was made by 2 ranks and there are 1" in one.said
    for run in on_two("cut", "--resume"):  # machine 1 is given the checkpoint
        assert run.end() == 0, run.said[-3000:]
    for name in ("one", "cut0"):
        found = difference(tmp_path / "whole0", tmp_path / name)
        print(f"gone on with in {name}: largest weight difference {found}")
        assert found <= ROUNDING
