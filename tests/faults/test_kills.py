"""Runs are killed at random moments and gone on with: they end with the adapter of a run that was left alone."""

from __future__ import annotations

import json
import time

import pytest

from bhpeft.checkpoints import MANIFEST, PARTIAL, fault

from .conftest import ALONE, SHARDED, contents, difference

HOW = {"alone": ALONE, "sharded": SHARDED}
ROUNDING = {"alone": 0.0, "sharded": 1e-6}
MOMENTS = ["start"] + ["training"] * 5 + ["checkpoint"] * 4


def wait_for(moment: str, run, seconds: float, folder, chance) -> bool:
    """Wait for a random moment of a kind; whether the run is still there."""
    if moment == "start":
        time.sleep(chance.uniform(1, 8))
    elif not run.until_trains():
        return False
    elif moment == "training":
        time.sleep(chance.uniform(0, seconds))
    else:
        written = chance.randrange(1, 8)  # checkpoints that are let be
        seen: set = set()

        def being_written() -> bool:
            names = {path.name for path in (folder / "adapters/r" / PARTIAL).glob("checkpoint-*")}
            seen.update(names)
            return bool(names) and len(seen) > written

        if not run.until(being_written, every=0.0005):
            return False
        time.sleep(chance.uniform(0, 0.03))
    return run.process.poll() is None


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", range(len(MOMENTS)))
@pytest.mark.parametrize("how", list(HOW))
def test_a_killed_run_ends_with_the_adapter_of_one_left_alone(
    how, number, command, start, uninterrupted, tmp_path, chance, record_property
):
    whole, seconds = uninterrupted(HOW[how])
    for attempt in range(4):  # the moment may come when the run has ended
        folder = tmp_path / str(attempt)
        run = start(command(HOW[how]), folder)
        if wait_for(MOMENTS[number], run, seconds / 2**attempt, folder, chance):
            run.kill()
            break
    adapter = folder / "adapters/r"
    left = sorted(path.name for path in adapter.glob("*")) if adapter.is_dir() else []
    for checkpoint in adapter.glob("checkpoint-*"):
        assert fault(checkpoint) is None  # what has its name is whole
    record_property("written", any((adapter / PARTIAL).glob("checkpoint-*")))
    resumed = start([*command(HOW[how]), "--resume"], folder)
    assert resumed.end() == 0, (left, resumed.said[-3000:])
    assert ("going on from" in resumed.said) == any(name.startswith("checkpoint-") for name in left)
    found = difference(whole, folder)
    record_property("difference", found)
    print(f"{how}, killed in {MOMENTS[number]}, left {left}: largest weight difference {found}")
    assert found <= ROUNDING[how]
    one, two = (json.loads((at / "results/metrics/r.json").read_text())["metrics"] for at in (whole, folder))
    assert one["accuracy"] == two["accuracy"] and one["nll"] == pytest.approx(two["nll"], abs=1e-5)
    assert not (adapter / PARTIAL).exists()
    # Adapter-sized: no file of a checkpoint, nor all of them, holds the base's 122,000 frozen weights.
    for checkpoint in adapter.glob("checkpoint-*"):
        assert MANIFEST in {path.name for path in checkpoint.iterdir()}
        assert sum(map(len, contents(checkpoint).values())) < 4 * 122_000
