"""Rows read, split and tokenised once: kept in files, found again at the next start, never held in memory whole.

    CACHE/rows-KEY/      the split dataset: task.json, train.arrow + places.npy, validation.arrow, test.arrow
    CACHE/tokens-KEY/    training rows as token ids: rows.arrow, which is mapped, lengths.npy, notes.json
    .../manifest.json    size and SHA-256 of each file, compared at every start (see `checkpoints.py`)

A key is a digest of all that an entry depends on. Of data files it is the content: time stamps may lie, on network file
systems and after a copy, and to read a file costs little of what is saved. Of this package it is the sources that turn
files into rows, so that no version has to be remembered. An entry is written beside and renamed; one process makes it
while the others wait; one that is not whole is made again. Deleting the folder while no run
uses it costs time alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from bhpeft.checkpoints import digest, fault, seal
from bhpeft.errors import InputError
from bhpeft.locks import held, lock_beside
from bhpeft.tasks.example import Example, Task, digest_of
from bhpeft.tasks.generics import QUESTIONS
from bhpeft.tasks.known import KNOWN, known_files
from bhpeft.tasks.load import load_task
from bhpeft.tasks.stored import StoredExamples, read_examples, write_examples
from bhpeft.tasks.table import READERS
from bhpeft.tasks.token_rows import TokenRows, write_tokens

OFF = "none"  # --row_cache none
STALE = 3600.0
TASK, NOTES, PLACES = "task.json", "notes.json", "places.npy"
SETTLED = ("name", "task_type", "labels", "instruction", "notes", "digest")  # of a task, beside its rows
# Flags that say what becomes of rows later. Any other one, and any new one, makes an entry of its own.
LATER = {
    "ood_dataset_name", "ood_data_path", "max_ood_samples", "prompt_template", "answer_end", "predict_by", "max_length",
    "long_prompts", "max_new_tokens", "context_turns", "packing", "do_sample", "temperature", "top_k", "top_p",
    "posterior_samples", "mc_dropout_samples", "feature_distance", "fit_temperature",
}  # fmt: skip
PATHS = ("name_or_path", "vocab_file", "merges_file", "tokenizer_file", "tokenizer_object")  # of a tokenizer's settings


def open_cache(flag: str | None, notes: list[str]) -> Path | None:
    """The folder of the cache; None where there is none.

    Args:
        flag: `--row_cache`: a folder, "none", or None for a folder "bhpeft" in that of `datasets`.
        notes: gets a line if that one cannot be written to.

    Raises:
        InputError: the folder that was asked for cannot be written to.
    """
    if flag == OFF:
        return None
    if flag is None:
        from datasets import config

        folder = Path(config.HF_DATASETS_CACHE) / "bhpeft"
    else:
        folder = Path(flag)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        if flag is not None:
            raise InputError(f"--row_cache {flag}: cannot be written to ({error.strerror}); give another") from None
        notes.append(f"{folder} cannot be written to: rows are kept in memory, and tokenised anew at every start")
        return None
    return folder


def load_cached(
    cache: Path | None, arguments, seed: int, with_validation: bool, with_training: bool, labels: tuple[str, ...] = ()
) -> Task:
    """As of `load_task`, the training rows left in a file; from the cache where nothing has changed.

    Rows of the hub are in memory, and read anew: `datasets` keeps them, and nothing tells whether they are the same.

    Raises:
        InputError: as `load_task`; or there is no room for the cache.
    """
    load = (arguments, seed, with_validation, with_training, labels)
    files = data_files(arguments)
    if cache is None or files is None or not with_training:
        return load_task(*load)
    settings = {name: value for name, value in dataclasses.asdict(arguments).items() if name not in LATER}
    content = contents(files)
    key = key_of(settings, seed, with_validation, labels, content)

    def make(folder: Path) -> None:
        task = load_task(*load, keep=lambda examples: write_examples(examples, folder / "train.arrow"))
        if contents(files) != content:
            raise InputError(f"{', '.join(map(str, files[:3]))}: changed while being read; start again")
        for part in ("validation", "test"):
            write_examples(getattr(task, part), folder / f"{part}.arrow")
        np.save(folder / PLACES, task.train.places)
        task.digest = digest_of(task)
        (folder / TASK).write_text(json.dumps({name: getattr(task, name) for name in SETTLED}), encoding="utf-8")

    folder = entry(cache / f"rows-{key}", TASK, make)
    settled = json.loads((folder / TASK).read_text(encoding="utf-8"))
    settled["labels"] = tuple(settled["labels"])
    train = StoredExamples(folder / "train.arrow", np.load(folder / PLACES, mmap_mode="r"))
    asked = {part: list(read_examples(folder / f"{part}.arrow")) for part in ("validation", "test")}
    return Task(train=train, **asked, **settled)


def encode_cached(cache: Path | None, encoder, task: Task, notes: list[str]) -> TokenRows | list[dict]:
    """As of `encoder.train_rows(task.train, notes)`, mapped from a file where there is a cache.

    Raises:
        InputError: as `encoder.train_rows`; or there is no room for the cache.
    """
    said = tokenizer_state(encoder.tokenizer) if cache else None
    if cache is None or said is None:
        return encoder.train_rows(task.train, notes)
    settings = {name: str(value) for name, value in vars(encoder).items() if name != "tokenizer" and name[0] != "_"}
    key = key_of(type(encoder).__name__, settings, said, source_of(task.train))

    def make(folder: Path) -> None:
        mine: list[str] = []
        write_tokens(encoder.stream_rows(task.train, mine), folder)
        (folder / NOTES).write_text(json.dumps(mine), encoding="utf-8")

    folder = entry(cache / f"tokens-{key}", NOTES, make)
    notes += json.loads((folder / NOTES).read_text(encoding="utf-8"))
    return TokenRows(folder)


# ------------------------------------------------------------------------------------------------ keys


def data_files(arguments) -> list[Path] | None:
    """The files that a dataset's rows are read from, as far as they are there; None where the hub is."""
    name = arguments.dataset_name
    more = [Path(file) for file in (arguments.test_file, arguments.validation_file) if file]
    if name == "generics" and arguments.data_path:
        files = [Path(arguments.data_path) / f"{kind}.csv" for kind in QUESTIONS]
    elif name in KNOWN and arguments.data_path:
        files = known_files(name, Path(arguments.data_path))
    elif name.lower().endswith(tuple(READERS)):
        files = [Path(name)]
    else:
        return None
    return [file for file in files + more if file.is_file()]


def contents(files: Iterable[Path]) -> list[tuple[str, str]]:
    """Name and SHA-256 of each file."""
    return [(str(file), digest(file)) for file in files]


def key_of(*parts) -> str:
    """32 hex digits of JSON-like values, and of what makes entries of them."""
    said = json.dumps([*parts, *_makers()], sort_keys=True, default=str)
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@functools.cache
def _makers() -> tuple[str, ...]:
    """The sources of this package that turn files into rows, and versions of the libraries that they use."""
    here = Path(__file__).parent
    versions = [importlib.metadata.version(name) for name in ("tokenizers", "transformers", "pyarrow", "pandas")]
    return (*(digest(file) for file in (*sorted(here.glob("*.py")), here.parent / "files.py")), *versions)


def source_of(examples: Sequence[Example]) -> str:
    """What stands for all training examples in a key: the entry they are read from, else a digest of them."""
    if isinstance(examples, StoredExamples):
        return examples.file.parent.name
    found = hashlib.sha256()
    for example in examples:
        found.update(repr(example).encode())
    return found.hexdigest()


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """All that decides which tokens a text becomes; None of a tokenizer that cannot tell."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    state = json.loads(backend.to_str())
    for name in ("truncation", "padding"):  # left by its last call, and given anew by each
        state.pop(name, None)
    settings = {name: value for name, value in tokenizer.init_kwargs.items() if name not in PATHS}
    said = [type(tokenizer).__name__, state, tokenizer.special_tokens_map, settings]
    return json.dumps(said, sort_keys=True, default=str)


# --------------------------------------------------------------------------------------------- entries


def clear_partial(cache: Path) -> None:
    """Remove what killed processes have left: nothing takes `STALE` seconds to make and has not been written to."""
    for folder in cache.glob(".*.partial*"):
        with contextlib.suppress(OSError):
            if time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir())) > STALE:
                shutil.rmtree(folder, ignore_errors=True)


def entry(target: Path, needed: str, make: Callable[[Path], None]) -> Path:
    """An entry of the cache, whole: found, or made by this process, or by another one that is waited for.

    Args:
        target: its folder.
        needed: a file that it must hold.
        make: writes all its files into the folder it is given.

    Raises:
        InputError: of `make`; or there is no room.
    """
    if fault(target, needed) is None:
        return target
    with held(lock_beside(target), wait=True):
        if fault(target, needed) is None:
            return target
        # Named by its maker: where a file system knows no locks, several make the same entry, and the first one counts.
        beside = target.with_name(f".{target.name}.{socket.gethostname()}-{os.getpid()}.partial")
        try:
            clear_partial(target.parent)
            beside.mkdir()
            make(beside)
            if fault(target, needed) is not None:
                seal(beside, target, None)
        except OSError as error:
            if fault(target, needed) is None:
                return target
            raise InputError(
                f"{target}: cannot be written ({error.strerror or error}); make room, give another --row_cache, or none"
            ) from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return target
