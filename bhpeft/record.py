"""Write down what a run did: answers, predictions, figures, plot and description, all under `results/`."""

from __future__ import annotations

from pathlib import Path

from accelerate.utils import gather_object

from bhpeft import environment
from bhpeft.config import Run
from bhpeft.files import write_atomic
from bhpeft.report import report_for
from bhpeft.report.answered import Answered
from bhpeft.report.tables import figures_table, samples_table
from bhpeft.results import (
    HumanScore,
    RunFiles,
    describe_run,
    write_human_evaluation,
    write_metrics,
    write_model_outputs,
    write_predictions,
)
from bhpeft.tasks import Task


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
        answered: answers to test rows of "base" and "adapter", and to validation rows ("validation"), as far as they
            were asked; the adapter's are written.
        validation: losses on validation rows.
        history: logged losses and learning rates, as of `TrainerState.log_history`.

    Returns:
        The record of `results/metrics/RUN.json` on rank 0, None on the other ranks.
    """
    memory = gather_object([environment.peak_memory_mib()])
    if not environment.is_main_process():
        return None
    report = report_for(task)
    tables = {name: report.predictions(part, task) for name, part in answered.items()}
    figures = {name: report.figures(answered[name], tables[name], task) for name in answered}
    record = {
        "run_name": run.training.run_name,
        "task_type": task.task_type,
        "metrics": {
            **figures.get("adapter", {}),
            **{name: value for name, value in validation.items() if name == "eval_loss"},
            **{name: figures[name] for name in ("base", "validation") if name in figures},
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
    with_head = "base" in answered and not answered["base"].generated and run.data.predict_by == "generate"
    headings = {
        "base": "untrained head" if with_head else "frozen base",
        "validation": "validation",
        "adapter": run.adapter.adapter_name,
    }
    columns = {headings[name]: figures[name] for name in headings if name in figures}
    if "adapter" in answered:
        outputs = answered["adapter"].outputs
        write_model_outputs(files.model_outputs, outputs)
        write_predictions(files.predictions, tables["adapter"])
        before = answered["base"].outputs if "base" in answered else None
        say("", "Held-out rows, some of them:", samples_table(outputs, before))
        say("", figures_table(columns, report.ROWS), "", report.sentence(figures["adapter"]))
        say("", f"answers         {files.model_outputs}", f"predictions     {files.predictions}")
        if task.task_type == "generation" and answered["adapter"].generated:  # only a person can judge it
            unjudged = [HumanScore(i, row.query, row.output, None, None) for i, row in enumerate(outputs)]
            write_human_evaluation(files.human_evaluation, unjudged)
            say(f"to be judged    {files.human_evaluation}")
    elif columns:
        say("", figures_table(columns, report.ROWS))
    write_metrics(files.metrics, record)
    describe_run(files.descriptions, record)
    say(f"figures         {files.metrics}", f"description     {files.descriptions}")
    if "adapter" in answered:
        shown = {heading: found for heading, found in columns.items() if heading != "validation"}
        plot = report.draw(shown, tables["adapter"], task)
        if plot is not None:
            write_atomic(files.plots / "answers.png", plot)
            say(f"plot            {files.plots / 'answers.png'}")
    if run.training.do_train:
        say(f"adapter         {Path(run.training.output_dir)}")
    return record
