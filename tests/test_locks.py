"""One process at a time holds a lock; the kernel lets go of it, however its process ends."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal

import pytest

from bhpeft.errors import InputError
from bhpeft.locks import held, lock_beside, refuse_if_held
from bhpeft.results import check_descriptions, describe_run

fork = multiprocessing.get_context("fork")


def hold(path, holding, end) -> None:
    with held(path):
        holding.set()
        end.wait(60)


@pytest.fixture
def holder(tmp_path):
    """(path, process, end): another process that holds a lock until `end` is set."""
    path, holding, end = tmp_path / "here/.run.lock", fork.Event(), fork.Event()
    process = fork.Process(target=hold, args=(path, holding, end))
    process.start()
    assert holding.wait(30)
    yield path, process, end
    process.kill()
    process.join()


def test_a_lock_that_is_held_is_refused_in_one_line_and_free_afterwards(holder, tmp_path):
    path, process, end = holder
    for refuse in (lambda: refuse_if_held(path, "the run mine"), lambda: held(path, "the run mine").__enter__()):
        with pytest.raises(InputError) as error:
            refuse()
        assert re.search(rf"the run mine is being made by process {process.pid} on \S+ since 20", str(error.value))
    end.set()
    process.join()
    assert not path.exists()
    with held(path) as killed:
        assert killed is None and path.exists()
    assert not path.exists()


def test_the_lock_of_a_killed_process_is_taken_over_and_named(holder):
    path, process, _ = holder
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    refuse_if_held(path, "the run mine")
    with held(path) as killed:
        assert f"left by process {process.pid} on" in killed and "taken over" in killed
    assert not path.exists()


def test_looking_makes_nothing_and_a_file_in_the_way_is_said(tmp_path):
    refuse_if_held(tmp_path / "nowhere/.lock", "the run mine")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        held(tmp_path / "file/.lock").__enter__()
    assert lock_beside(tmp_path / "a/run").name == ".run.lock"


def describe(path, name: str) -> None:
    record = {"run_name": name, "config": {}, "parameters": {}, "metrics": {"accuracy": 0.5}}
    for _ in range(20):
        describe_run(path, record)


def test_runs_that_end_at_once_all_have_their_entry(tmp_path):
    path = tmp_path / "model_descriptions"
    writers = [fork.Process(target=describe, args=(path, f"run-{i}")) for i in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    check_descriptions(path)
    assert sorted(re.findall(r"^==== RUN (.*) ====$", path.read_text(), re.M)) == [f"run-{i}" for i in range(6)]
    assert [file.name for file in tmp_path.iterdir()] == ["model_descriptions"]
