"""Runs of the trainer in fresh processes that need not import torch again: forked from a server that has.

Importing the stack takes some 6 s of CPU, a small run 2 s, and the suite starts a hundred of them. `accelerate launch`
and `torchrun` are stood in for by what they do: accelerate's own code makes the environment, and the ranks are forked
with it. The launchers themselves are run by the tests that ask for it (`real=True`), and by the demo's.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Scripts that import torch; the others start fast, and shall be seen to.
SCRIPTS = {
    ROOT / "parameter_efficient_fine_tuning.py",
    ROOT / "demo/classify.py",
    ROOT / "util/export_adapter.py",
    ROOT / "tests/distributed/inspect_sharding.py",
    ROOT / "tests/distributed/inspect_kl.py",
}
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["parameter_efficient_fine_tuning"])


def split(words: list[str]) -> tuple[list[str], str, list[str]] | None:
    """(launcher, script, flags) of a command that can be forked, else None."""
    at = next((i for i, word in enumerate(words) if Path(word) in SCRIPTS), None)
    if at is None:
        return None
    launcher = words[:at]
    known = launcher == [sys.executable] or launcher[:2] == ["torchrun", "--nproc_per_node"]
    if known or (launcher[:2] == ["accelerate", "launch"] and _settings(launcher).use_deepspeed):
        return launcher, words[at], words[at + 1 :]
    return None


def run(words: list[str], cwd: Path, timeout: float, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """As `subprocess.run(words, capture_output=True, text=True)`; the first rank to fail ends the others.

    One that has not ended after `timeout` seconds is an AssertionError with what it said, and where it hung.
    """
    launcher, script, flags = split(words)
    ranks = [environment] if launcher == [sys.executable] else _rank_environments(launcher, environment)
    os.environ["PYTHONPATH"] = environment["PYTHONPATH"]  # read by the server, which starts with the first run
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        said = [f"{folder}/stdout", f"{folder}/stderr"]
        given = [(script, flags, str(cwd), rank, said, timeout) for rank in ranks]
        children = [_server.Process(target=_child, args=one) for one in given]
        for child in children:
            child.start()
        until = time.monotonic() + timeout
        try:
            while any(child.is_alive() for child in children) and not any(child.exitcode for child in children):
                children[0].join(0.05)
                time.sleep(0.05)
                if time.monotonic() > until:
                    shown = "\n".join(Path(path).read_text()[-6000:] for path in said)
                    raise AssertionError(f"not ended after {timeout} s: {' '.join(words)}\n{shown}")
        finally:
            for child in children:
                child.kill() if child.exitcode is None else None
                child.join()
        code = next((child.exitcode for child in children if child.exitcode), 0)
        return subprocess.CompletedProcess(words, code, *(Path(path).read_text() for path in said))


def _child(
    script: str, flags: list[str], cwd: str, environment: dict[str, str], said: list[str], timeout: float
) -> None:
    for descriptor, path in zip((1, 2), said, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    faulthandler.dump_traceback_later(timeout * 0.95)  # a hang says where, in stderr
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = [script, *flags]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def _settings(launcher: list[str]):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    # The launcher wants a script; it is not read here.
    words = [*launcher[2:], "script.py"]
    settings, defaults, precision_of_file = _validate_launch_command(launch_command_parser().parse_args(words))
    fields = list(defaults.deepspeed_config) if defaults else []
    fields += ["mixed_precision"] if precision_of_file else []
    settings.deepspeed_fields_from_accelerate_config = ",".join(fields)
    return settings


def _rank_environments(launcher: list[str], environment: dict[str, str]) -> list[dict[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if launcher[0] == "torchrun":
        ranks, shared = int(launcher[2]), dict(environment)
    else:
        ranks, shared = _accelerate_environment(launcher, environment)
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _accelerate_environment(launcher: list[str], environment: dict[str, str]) -> tuple[int, dict[str, str]]:
    """Number of ranks, and the environment that accelerate's launcher gives all of them."""
    from accelerate.commands.launch import prepare_deepspeed_cmd_env

    settings = _settings(launcher)
    settings.main_process_port = None
    known = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(environment)
        _, shared = prepare_deepspeed_cmd_env(settings)
    finally:
        os.environ.clear()
        os.environ.update(known)
    return settings.num_processes, shared
