"""Runs are killed at random moments and gone on with: they end with the adapter of a run that was left alone."""

from __future__ import annotations

import json
import os
import time

import pytest

from bhpeft.checkpoints import MANIFEST, PARTIAL, fault

from .conftest import ALONE, SHARDED, contents, difference

HOW = {"alone": ALONE, "sharded": SHARDED}
ROUNDING = {"alone": 0.0, "sharded": 1e-5}
MOMENTS = ["start"] + ["training"] * 4 + ["checkpoint"] * 4 + ["results"]


def wait_for(moment: str, run, whole, folder, chance, attempt: int) -> bool:
    """Wait for a random moment of a kind, the earlier the more attempts there were; whether the run is still there."""
    seconds = {"start": 8, "training": whole.training, "results": whole.answering}.get(moment, 0.03) / 2**attempt
    if moment == "training" and not run.until_trains():
        return False
    if moment == "results" and not run.until(lambda: "train_runtime" in run.said):
        return False
    if moment == "checkpoint":
        spared, seen = chance.randrange(1, 8), set()

        def being_written() -> bool:
            try:
                names = {n for n in os.listdir(folder / "adapters/r" / PARTIAL) if n.startswith("checkpoint-")}
            except FileNotFoundError:  # not yet, or not any more
                return False
            seen.update(names)
            return bool(names) and len(seen) > spared

        if not run.until(being_written, every=0.0005):
            return False
    time.sleep(chance.uniform(0, seconds))
    return run.process.poll() is None


def every_kill():
    """All of `make test-faults`; `make test` kills once, one process while it writes a checkpoint."""
    for how in HOW:
        for number, moment in enumerate(MOMENTS):
            quick = (how, number) == ("alone", MOMENTS.index("checkpoint"))
            yield pytest.param(how, number, marks=() if quick else pytest.mark.faults, id=f"{how}-{number}-{moment}")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("how", "number"), list(every_kill()))
def test_a_killed_run_ends_with_the_adapter_of_one_left_alone(
    how, number, command, start, uninterrupted, tmp_path, chance, record_property
):
    whole = uninterrupted(HOW[how])
    for attempt in range(4):  # the moment may come when the run has ended
        folder = tmp_path / str(attempt)
        run = start(command(HOW[how]), folder)
        if wait_for(MOMENTS[number], run, whole, folder, chance, attempt):
            run.kill()
            break
    adapter = folder / "adapters/r"
    left = sorted(path.name for path in adapter.glob("*")) if adapter.is_dir() else []
    for checkpoint in adapter.glob("checkpoint-*"):
        assert fault(checkpoint) is None  # what has its name is whole
    record_property("written", any((adapter / PARTIAL).glob("checkpoint-*")))
    finished = (folder / "results/metrics/r.json").exists()  # its last file: killed while it left
    resumed = start([*command(HOW[how]), "--resume"], folder)
    assert (resumed.end() == 0) != finished, (left, resumed.said[-3000:])
    assert ("the run r is finished" in resumed.said) == finished
    assert ("going on from" in resumed.said) == (not finished and any("checkpoint-" in name for name in left))
    found = difference(whole.folder, folder)
    record_property("difference", found)
    print(f"{how}, killed in {MOMENTS[number]}, left {left}: largest weight difference {found}")
    assert found <= ROUNDING[how]
    one, two = (json.loads((at / "results/metrics/r.json").read_text())["metrics"] for at in (whole.folder, folder))
    assert one["accuracy"] == two["accuracy"] and one["nll"] == pytest.approx(two["nll"], abs=1e-5)
    assert not (adapter / PARTIAL).exists()
    # Adapter-sized: no file of a checkpoint, nor all of them, holds the base's 122,000 frozen weights.
    for checkpoint in adapter.glob("checkpoint-*"):
        assert MANIFEST in {path.name for path in checkpoint.iterdir()}
        assert sum(map(len, contents(checkpoint).values())) < 4 * 122_000
