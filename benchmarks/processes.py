"""Commands in processes of their own, watched from outside: time, time until something is said, most memory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRAINER = ROOT / "parameter_efficient_fine_tuning.py"


@dataclass
class Finished:
    """What came of a command.

    Attributes:
        code: its exit code.
        output: what it said, errors too.
        seconds: on the clock, from its start to its end.
        marked: until it first said what was looked for; None if it never did.
        peak_mib: the most memory that it held, or one of the processes it started, resident; None where it is not told.
    """

    code: int
    output: str
    seconds: float
    marked: float | None = None
    peak_mib: float | None = None

    def checked(self) -> Finished:
        """Itself; `RuntimeError` with the end of what it said if it failed."""
        if self.code:
            raise RuntimeError(f"exit code {self.code}: {self.output[-3000:]}")
        return self


def execute(words: Sequence[str], timeout: float, mark: str | None = None, **environment: str) -> Finished:
    """Run a command to its end; past `timeout` seconds all of its processes are killed.

    Args:
        mark: a piece of a line of which the time is taken.
        environment: variables that it gets beside this process's own.

    Raises:
        RuntimeError: it took longer.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **environment}
    environment.pop("ACCELERATE_MIXED_PRECISION", None)
    started, marked, lines = time.perf_counter(), None, []
    process = subprocess.Popen(
        list(map(str, words)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    watch = Watch(process.pid, timeout)
    watch.start()
    for line in process.stdout:
        if mark and marked is None and mark in line:
            marked = time.perf_counter() - started
        lines.append(line)
    code, seconds = process.wait(), time.perf_counter() - started
    watch.over.set()
    watch.join()
    if watch.killed:
        raise RuntimeError(f"over its limit of {timeout:g} s: {''.join(lines)[-2000:]}")
    return Finished(code, "".join(lines), seconds, marked, watch.peak_mib)


class Watch(threading.Thread):
    """Looks at a process and those it has started ten times a second, and kills them all when their time is over.

    The kernel's high-water mark of each is read. (What it hands a parent with the exit code is no such thing: it begins
    with the memory that the parent itself had when it forked.)
    """

    def __init__(self, pid: int, limit: float):
        """Args:
        pid: the leader of a session of its own.
        limit: seconds.
        """
        super().__init__(daemon=True)
        self.pid, self.until = pid, time.monotonic() + limit
        self.over, self.killed = threading.Event(), False
        self.peak_mib: float | None = None

    def run(self) -> None:
        """Until `over` is set."""
        while not self.over.wait(0.1):
            for pid in family(self.pid):
                peak = high_water(pid)
                if peak is not None:
                    self.peak_mib = max(self.peak_mib or 0.0, peak)
            if time.monotonic() > self.until:
                self.killed = True
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.killpg(self.pid, signal.SIGKILL)
                return


def family(pid: int) -> list[int]:
    """A process and all that it and its children have started, as far as Linux tells."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        children = []
    return [pid, *(one for child in children for one in family(child))]


def high_water(pid: int) -> float | None:
    """The most resident memory of a process so far, MiB; None where it is not told."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((round(int(line.split()[1]) / 1024, 1) for line in lines if line.startswith("VmHWM")), None)


def as_flags(settings: dict) -> list[str]:
    """Settings as words of a command line; those that are None are left out."""
    words = []
    for name, value in settings.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def in_turns(part: str, methods: dict[str, Callable[[], dict]], repeats: int) -> dict[str, list[dict]]:
    """Call each method once, and all again, `repeats` times over: what disturbs the machine disturbs all of them."""
    found: dict[str, list[dict]] = {name: [] for name in methods}
    for turn in range(repeats):
        for name, method in methods.items():
            print(f"{part}: {name}, turn {turn + 1}", file=sys.stderr, flush=True)
            found[name].append(method())
    return found


def record_of(results: Path, run_name: str) -> dict:
    """What a run of the trainer has written of itself."""
    return json.loads((results / "metrics" / f"{run_name}.json").read_text(encoding="utf-8"))


def end_with_parent() -> None:
    """End this worker when the process that began it is gone: a pool does not see to that where a signal ended it."""

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
