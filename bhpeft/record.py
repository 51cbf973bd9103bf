"""Write down what a run did: answers, predictions, figures, plot and description, all under `results/`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object

from bhpeft import environment, report
from bhpeft.config import Run
from bhpeft.files import write_atomic
from bhpeft.results import (
    HumanScore,
    ModelOutput,
    RunFiles,
    describe_run,
    write_human_evaluation,
    write_metrics,
    write_model_outputs,
    write_predictions,
)
from bhpeft.tasks import Task


@dataclass
class Answered:
    """Answers to the test rows: ids, texts, and (N, C) log-likelihoods of the task's labels (None without)."""

    ids: list[str]
    outputs: list[ModelOutput]
    log_likelihoods: np.ndarray | None


def say(*lines: str) -> None:
    """Print lines, from the main process alone."""
    if environment.is_main_process():
        for line in lines:
            print(line, flush=True)


def write_run(
    run: Run,
    files: RunFiles,
    task: Task,
    answered: dict[str, Answered],
    parameters: dict,
    timings: dict[str, float],
    validation: dict[str, float],
    history: list[dict],
) -> dict | None:
    """Write all files of a run and print its figures. Every rank must call it; rank 0 writes.

    Args:
        answered: "base" and "adapter", as far as they were asked; the adapter's are written.
        validation: losses on validation rows.
        history: logged losses and learning rates, as of `TrainerState.log_history`.

    Returns:
        The record of `results/metrics/RUN.json` on rank 0, None on the other ranks.
    """
    memory = gather_object([environment.peak_memory_mib()])
    if not environment.is_main_process():
        return None
    tables = {
        name: report.predictions_table(part.ids, part.outputs, task.labels, part.log_likelihoods)
        for name, part in answered.items()
    }
    train_pairs = [(example.query, example.answer) for example in task.train]
    figures = {name: report.summarise(answered[name].outputs, tables[name], train_pairs) for name in answered}
    record = {
        "run_name": run.training.run_name,
        "metrics": {
            **figures.get("adapter", {}),
            **{name: value for name, value in validation.items() if name == "eval_loss"},
            **({"base": figures["base"]} if "base" in figures else {}),
        },
        "config": run.as_dict(),
        "seed": run.training.seed,
        "versions": environment.library_versions(),
        "hardware": {**environment.hardware(), "peak_memory_mib": memory},
        "timings": timings,
        "parameters": parameters,
        "rows": {"train": len(task.train), "validation": len(task.validation), "test": len(task.test)},
        "history": history,
    }
    if "adapter" in answered:
        outputs = answered["adapter"].outputs
        write_model_outputs(files.model_outputs, outputs)
        write_predictions(files.predictions, tables["adapter"])
        unjudged = [HumanScore(i, row.query, row.output, None, None) for i, row in enumerate(outputs)]
        write_human_evaluation(files.human_evaluation, unjudged)
        headings = {"base": "frozen base", "adapter": run.adapter.adapter_name}
        columns = {headings[name]: figures[name] for name in headings if name in figures}
        before = answered["base"].outputs if "base" in answered else None
        say("", "Held-out rows, some of them:", report.samples_table(outputs, before))
        say("", report.figures_table(columns), "", report.sentence(figures["adapter"]))
        say("", f"answers         {files.model_outputs}", f"predictions     {files.predictions}")
        say(f"to be judged    {files.human_evaluation}")
    write_metrics(files.metrics, record)
    describe_run(files.descriptions, record)
    say(f"figures         {files.metrics}", f"description     {files.descriptions}")
    if "adapter" in answered and task.labels:
        write_atomic(files.plots / "answers.png", report.draw_answers(columns, tables["adapter"]))
        say(f"plot            {files.plots / 'answers.png'}")
    if run.training.do_train:
        say(f"adapter         {Path(run.training.output_dir)}")
    return record
