"""Going on with a run that was cut short: from where, and whether it is the same run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from transformers.integrations import is_deepspeed_zero3_enabled

from bhpeft import environment
from bhpeft.checkpoints import MANIFEST, PARTIAL, fault, files_in, newest, read_manifest, steps, writing
from bhpeft.config import Run, check_output_dir, goes_on
from bhpeft.errors import InputError
from bhpeft.job import Job
from bhpeft.locks import held, lock_beside, refuse_if_held
from bhpeft.record import say
from bhpeft.results import RunFiles
from bhpeft.tasks.example import digest_of

PATHS = ("dataset_name", "data_path", "test_file", "validation_file", "round_files")  # their rows count, not they
SPREAD = ("ranks", "per_device_train_batch_size", "gradient_accumulation_steps")  # their product counts, not they
TRAINING = (
    "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "optim_args",
    "adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor", "neftune_noise_alpha",
    "train_sampling_strategy", "seed", "data_seed", "precision",
)  # fmt: skip  # with all other settings but OutputArguments': what a run's result depends on


def settings_of(job: Job) -> dict:
    """What a run's result depends on: settings, and a digest of all rows in the order they arrive."""
    run, everything = job.run, job.run.as_dict()
    names = {f.name for part in (run.base, run.adapter, run.data, run.rounds) for f in dataclasses.fields(part)}
    names = names - {"resume_rounds", *PATHS} | set(TRAINING)
    found: dict[str, Any] = {name: everything.get(name) for name in sorted(names)}
    found["ranks"] = run.training.world_size
    found["zero3"] = is_deepspeed_zero3_enabled()
    found["rows"] = digest_of(job.task, job.plan.new if job.plan else None)
    return json.loads(json.dumps(found, default=str))


def check_same(was: dict, now: dict, where: str, but: tuple[str, ...] = ()) -> None:
    """Raise `InputError` if a run that is gone on with was made with other settings, `but` some, or with other rows.

    Args:
        was, now: as of `settings_of`.
        where: the flag and the file that says so.
    """
    for name in now:
        if name not in but and was.get(name) != now[name]:
            raise InputError(
                f"{where} was made with {name} {was.get(name)!r}, and now it is {now[name]!r}; "
                "give the same flags and rows, or begin again with --overwrite"
            )


def check_launch(checkpoint: str) -> None:
    """Raise `InputError` if a checkpoint was made under ZeRO-3 and this is not, or the other way round."""
    was = (read_manifest(Path(checkpoint))["settings"] or {}).get("zero3")
    if was is not None and was != is_deepspeed_zero3_enabled():
        how = "under ZeRO-3, by accelerate launch" if was else "without ZeRO-3, not by accelerate launch"
        raise InputError(f"{checkpoint}: was made {how}; start the run in the same way")


def find(job: Job) -> str | None:
    """The checkpoint that `--resume` goes on from, whole and of this run; None where there is none.

    Says which are not whole. Every rank must call it.

    Raises:
        InputError: it is that of another run: of other settings, or other rows.
    """
    folder = Path(job.run.training.output_dir)
    checkpoint = find_in(folder)
    if checkpoint is None:
        say(f"{folder}: no whole checkpoint; beginning at the beginning")
        return None
    was, now = read_manifest(Path(checkpoint))["settings"] or {}, settings_of(job)
    check_launch(checkpoint)
    rows, rows_now = (math.prod(of.get(name) or 1 for name in SPREAD) for of in (was, now))
    if rows != rows_now:
        raise InputError(
            f"--resume: {checkpoint} was made with {rows} rows a step, and now it is {rows_now}; "
            "ranks x --batch_size x --gradient_accumulation_steps must stay the same"
        )
    check_same(was, now, f"--resume: {Path(checkpoint) / MANIFEST}", SPREAD)
    step = checkpoint.rpartition("-")[2]
    say(f"going on from {checkpoint}, behind step {step}")
    if was["ranks"] != now["ranks"]:
        say(f"it was made by {was['ranks']} ranks and there are {now['ranks']}: all goes on but the random noise")
    return checkpoint


def find_in(folder: Path) -> str | None:
    """The newest whole checkpoint of a folder, as rank 0 sees it, on every machine; says which are not whole.

    A machine that has no such folder gets a copy of it.
    """
    found = [None, []]
    if environment.is_main_process():
        checkpoint, skipped = newest(folder)
        found = [checkpoint and checkpoint.name, skipped]
    name, skipped = broadcast_object_list(found)
    say(*skipped)
    if name is None:
        return None
    copy_to_machines(folder / name)
    return str(folder / name)


def copy_to_machines(checkpoint: Path) -> None:
    """Copy a folder that rank 0 has to the machines that have not, one file after another. Every rank must call it."""
    local = os.environ.get("LOCAL_RANK", "0") == "0"
    wanted = local and fault(checkpoint) is not None
    if not any(gather_object([wanted])):
        return
    main = environment.is_main_process()
    names = [str(file.relative_to(checkpoint)) for file in files_in(checkpoint)] + [MANIFEST] if main else None
    (names,) = broadcast_object_list([names])
    beside = checkpoint.parent / PARTIAL / checkpoint.name
    for name in names:
        (content,) = broadcast_object_list([(checkpoint / name).read_bytes() if main else None])
        if wanted:
            with writing(beside):
                (beside / name).parent.mkdir(parents=True, exist_ok=True)
                (beside / name).write_bytes(content)
    if wanted:
        with writing(checkpoint):
            shutil.rmtree(checkpoint, ignore_errors=True)
            os.replace(beside, checkpoint)
    environment.wait_for_all()


def locks_of(run: Run, files: RunFiles) -> list[Path]:
    """The locks of a run: of its name among the results, and of its adapter's folder."""
    named = [files.results_dir / run.training.run_name]
    return [lock_beside(path) for path in named + [Path(run.training.output_dir)] * run.training.do_train]


def refuse_if_running(run: Run, files: RunFiles) -> None:
    """Raise `InputError` if another process is making the run of this name, or an adapter in its folder."""
    if environment.is_main_process():
        for lock in locks_of(run, files):
            refuse_if_held(lock, f"the run {run.training.run_name}")


@contextlib.contextmanager
def alone(job: Job):
    """Be the only run of this name, and the only one to write into its adapter's folder, for the length of the block.

    Raises:
        InputError: another one is, or has been since the input was read.
    """
    run = job.run
    with contextlib.ExitStack() as stack:
        if environment.is_main_process():
            for lock in locks_of(run, job.files):
                if killed := stack.enter_context(held(lock, f"the run {run.training.run_name}")):
                    say(killed)
            job.files.check_free(run.output.overwrite or goes_on(run))
            check_output_dir(run)
        yield


def check_unfinished(run: Run, metrics: Path) -> None:
    """Raise `InputError` if `--resume` is asked for and the run has written its results behind its last checkpoint."""
    written = [folder.stat().st_mtime for _, folder in steps(Path(run.training.output_dir))]
    if run.output.resume and metrics.is_file() and metrics.stat().st_mtime > max(written, default=math.inf):
        raise InputError(
            f"--resume: the run {run.training.run_name} is finished, {metrics} is there; nothing to go on with"
        )


def clear(folder: Path) -> None:
    """Remove what an earlier run of the same folder left to go on from, on rank 0."""
    environment.wait_for_all()
    if environment.is_main_process():
        for old in (*(checkpoint for _, checkpoint in steps(folder)), folder / PARTIAL):
            shutil.rmtree(old, ignore_errors=True)
