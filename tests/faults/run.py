"""`make test-faults`: kills, faults, bad input and fuzzing, one group after another, and a summary of what held.

python tests/faults/run.py [GROUP ...]        groups: kills faults inputs fuzz
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GROUPS = {
    "kills": ["tests/faults/test_kills.py"],
    "faults": [
        "tests/faults/test_faults.py",
        "tests/test_checkpoints.py",
        "tests/test_watch.py",
        "tests/test_locks.py",
    ],
    "inputs": ["tests/test_bad_input.py"],
    "fuzz": ["tests/test_fuzz.py"],
}


def run(group: str, folder: Path) -> list[ElementTree.Element]:
    """Run a group's tests, those marked `faults` too; its test cases. A file that is not there has none."""
    files = [file for file in GROUPS[group] if (ROOT / file).exists()]
    report = folder / f"{group}.xml"
    if files:
        words = [sys.executable, "-m", "pytest", "-m", "", "-q", "-o", "junit_family=xunit1", f"--junitxml={report}"]
        subprocess.run([*words, *files], cwd=ROOT, check=False)
    return list(ElementTree.parse(report).iter("testcase")) if report.exists() else []


def property_of(case: ElementTree.Element, name: str) -> str | None:
    """What a test has recorded by `record_property`."""
    found = [entry.get("value") for entry in case.iter("property") if entry.get("name") == name]
    return found[0] if found else None


def held(cases: list[ElementTree.Element]) -> int:
    """How many passed."""
    return sum(not any(case.find(bad) is not None for bad in ("failure", "error", "skipped")) for case in cases)


def main(groups: list[str]) -> int:
    """Run groups and print what held; 0 if all did."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        cases = {group: run(group, Path(folder)) for group in groups or GROUPS}
    print()
    for group, what in (("kills", "kills survived"), ("faults", "faults"), ("inputs", "bad inputs")):
        if group in cases:
            print(f"{what:<16}{held(cases[group])}/{len(cases[group])}")
    for how in ("alone", "sharded"):
        mine = [case for case in cases.get("kills", []) if f"[{how}" in (case.get("name") or "")]
        found = [float(value) for case in mine if (value := property_of(case, "difference")) is not None]
        if found:
            written = sum(property_of(case, "written") == "True" for case in mine)
            print(f"  {how:<14}largest weight difference {max(found):.3g}, {written} while a checkpoint was written")
    if "fuzz" in cases:
        examples = sum(int(property_of(case, "examples") or 1) for case in cases["fuzz"])
        print(f"{'fuzz':<16}{examples} cases, {len(cases['fuzz']) - held(cases['fuzz'])} failures")
    skipped = [case for some in cases.values() for case in some if case.find("skipped") is not None]
    for case in skipped:
        print(f"  skipped       {case.get('name')}: {case.find('skipped').get('message')}")
    print(f"{'minutes':<16}{(time.monotonic() - begun) / 60:.1f}")
    everything = [case for some in cases.values() for case in some]
    return int(held(everything) + len(skipped) < len(everything))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
