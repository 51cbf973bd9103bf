"""Checkpoints that are whole or are not there: written beside, sealed with checksums, renamed, found again.

    RUN/.partial/checkpoint-8/...     while it is written
    RUN/checkpoint-8/manifest.json    size and SHA-256 of every other file; the folder is renamed last of all

A process may die at any moment: what it leaves is the folder of before or the new one. A disk may lie: what a file
holds is compared with the manifest before a run goes on from it. Plain Python.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from bhpeft.errors import InputError

MANIFEST = "manifest.json"
PARTIAL = ".partial"  # in a run's folder: what is being written into it
STATE = "trainer_state.json"
TORN = "SafetensorError|PytorchStreamWriter|inline_container|Parent directory"  # how torch says that a write failed


@contextlib.contextmanager
def writing(folder: Path):
    """Turn a write that fails within the block into an `InputError` of one line."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
    except Exception as error:  # safetensors and torch's zip writer have errors of their own
        if not re.search(TORN, f"{type(error).__name__} {error}"):
            raise
        why = str(error).splitlines()[0]
    else:
        return
    raise InputError(f"{folder}: cannot be written ({why}); make room or permission, then go on with --resume")


def digest(file: Path) -> str:
    """SHA-256 of a file, which is not held in memory for it."""
    found = hashlib.sha256()
    with open(file, "rb") as content:
        while part := content.read(2**20):
            found.update(part)
    return found.hexdigest()


def to_disk(path: Path) -> None:
    """Have a file, or a folder's list of names, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_in(folder: Path) -> list[Path]:
    """A checkpoint's files without its manifest, in order."""
    return sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST)


def seal(written: Path, target: Path, settings: dict | None) -> None:
    """Give a written folder, a checkpoint or another, its manifest and its name.

    Args:
        written: the folder, all of it there.
        target: as `RUN/checkpoint-N`; one of that name is replaced.
        settings: what the run's result depends on, for `newest` to hand out; None where it is not known.
    """
    files = {str(file.relative_to(written)): [file.stat().st_size, digest(file)] for file in files_in(written)}
    (written / MANIFEST).write_text(json.dumps({"files": files, "settings": settings}, indent=1), encoding="utf-8")
    for path in [*written.rglob("*"), written]:
        to_disk(path)
    replaced = written.with_name(f"{written.name}.old")
    if target.exists():
        os.replace(target, replaced)
    os.replace(written, target)
    to_disk(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def move_into(written: Path, target: Path) -> None:
    """Move the files of a folder into another one, each over its namesake, once all have reached the disk."""
    files = list(written.iterdir())
    for file in files:
        to_disk(file)
    for file in files:
        os.replace(file, target / file.name)
    written.rmdir()
    to_disk(target)


def read_manifest(folder: Path) -> dict:
    """`files` and `settings` of a checkpoint; `ValueError` with the reason where there is no manifest to be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {"files": {name: tuple(of) for name, of in manifest["files"].items()}, "settings": manifest["settings"]}
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}, so it was cut short or is of an older version") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its {MANIFEST} cannot be read ({error})") from None


def fault(folder: Path, needed: str = STATE) -> str | None:
    """Why a run cannot go on from a checkpoint, in a few words; None where it is whole.

    Files that the manifest does not name are not looked at, nor are they ever read.

    Args:
        needed: a file that the manifest must name.
    """
    if not folder.is_dir():
        return "there is no such folder"
    try:
        wanted = read_manifest(folder)["files"]
        for name, (size, sum_) in wanted.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes in place of {size}"
            if digest(file) != sum_:
                return f"{name} is not what was written"
    except (ValueError, TypeError, OSError) as error:
        return str(error)
    return None if needed in wanted else f"it has no {needed}"


def steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, checkpoint) of every checkpoint in a run's folder, whole or not, the oldest first."""
    found = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*") if path.is_dir())
    return sorted((int(match[1]), folder / match[0]) for match in found if match)


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run's folder, and a line on each newer one that is not."""
    skipped = []
    for _, checkpoint in reversed(steps(folder)):
        why = fault(checkpoint)
        if why is None:
            return checkpoint, skipped
        skipped.append(f"{checkpoint}: not whole, {why}; skipped")
    return None, skipped


def keep_last(folder: Path, step: int, count: int | None, best: str | None) -> None:
    """Remove all checkpoints of a run's folder up to a step but the last `count` and the best.

    Later ones are what was not gone on from, and are replaced in their turn.

    Args:
        count: None, 0 or less keeps them all.
    """
    until = [checkpoint for at, checkpoint in steps(folder) if at <= step]
    for checkpoint in until[:-count] if count and count > 0 else []:
        if best is None or checkpoint.resolve() != Path(best).resolve():
            shutil.rmtree(checkpoint, ignore_errors=True)
