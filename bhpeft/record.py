"""Write down what a run did: answers, predictions, figures, plot and description, all under `results/`."""

from __future__ import annotations

import sys
from pathlib import Path

from accelerate.utils import gather_object

from bhpeft import environment
from bhpeft.config import Run
from bhpeft.feature_distance import COLUMN
from bhpeft.files import write_atomic
from bhpeft.model_card import write_model_card
from bhpeft.report import report_for
from bhpeft.report.answered import Answered
from bhpeft.report.ood import ood_figures, ood_sentence
from bhpeft.report.rounds import sentence as known_sentence
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

RESULTS = Path(__file__).resolve().parents[1] / "results"  # what the scripts of util/ read by themselves


def say(*lines: str) -> None:
    """Print lines, from the main process alone."""
    if environment.is_main_process():
        for line in lines:
            try:
                print(line, flush=True)
            except UnicodeEncodeError:  # a terminal that has not all letters ends no run
                code = sys.stdout.encoding
                print(line.encode(code, "backslashreplace").decode(code), flush=True)


def parameters_line(parameters: dict) -> str:
    """What is trained, in a line; `parameters` as of `parameter_counts`."""
    return "training {trainable:,} of {all:,} parameters ({trainable_percent:.4f} %)".format(**parameters)


def write_run(
    run: Run,
    files: RunFiles,
    task: Task,
    answered: dict[str, Answered],
    parameters: dict,
    timings: dict[str, float],
    validation: dict[str, float],
    history: list[dict],
    trained_rows: int,
    rounds: list[dict] | None = None,
) -> dict | None:
    """Write all files of a run and print its figures. Every rank must call it; rank 0 writes.

    Args:
        answered: answers to test rows of "base" and "adapter", to validation rows ("validation") and to rows of another
            domain ("ood"), as far as they were asked; the adapter's are written.
        validation: losses on validation rows.
        history: logged losses and learning rates, as of `TrainerState.log_history`.
        trained_rows: how many rows it trained on.
        rounds: what each round did, where the run learned in rounds.

    Returns:
        The record of `results/metrics/RUN.json` on rank 0, None on the other ranks.
    """
    memory = gather_object([environment.peak_memory_mib()])
    if not environment.is_main_process():
        return None
    if not files.results_dir.is_dir():
        say(f"{files.results_dir} was removed while the run went on; it is made again for this run's files")
    report = report_for(task)
    tables = {name: report.predictions(part, task) for name, part in answered.items()}
    for name, part in answered.items():
        if part.distances is not None:
            tables[name] = tables[name].assign(**{COLUMN: part.distances})
    figures = {name: report.figures(answered[name], tables[name], task) for name in answered if name != "ood"}
    if "ood" in answered:
        figures["ood"] = ood_figures(tables["adapter"], tables["ood"])
    calibrated = "adapter" in answered and answered["adapter"].temperature != 1
    record = {
        "run_name": run.training.run_name,
        "task_type": task.task_type,
        "metrics": {
            **figures.get("adapter", {}),
            **{name: value for name, value in validation.items() if name == "eval_loss"},
            **{name: figures[name] for name in ("base", "validation", "ood") if name in figures},
            **({"temperature": answered["adapter"].temperature} if calibrated else {}),
        },
        "config": run.as_dict(),
        "seed": run.training.seed,
        "versions": environment.library_versions(),
        "hardware": {**environment.hardware(), "peak_memory_mib": memory},
        "timings": timings,
        "parameters": parameters,
        "rows": {
            "train": trained_rows,
            "validation": len(answered["validation"].ids if "validation" in answered else task.validation),
            "test": len(answered["adapter"].ids if "adapter" in answered else task.test),
        },
        "history": history,
    }
    if rounds is not None:
        record["rounds"] = rounds
    with_head = "base" in answered and not answered["base"].generated and run.data.predict_by == "generate"
    headings = {
        "base": "untrained head" if with_head else "frozen base",
        "validation": "validation",
        "adapter": run.adapter.adapter_name,
    }
    columns = {headings[name]: figures[name] for name in headings if name in figures}
    files.metrics.unlink(missing_ok=True)  # of an earlier run of this name, which is none any more
    rounds_files = [] if rounds is None else [files.rounds, files.plots / "rounds.png"]  # written round by round
    written = {files.metrics, *rounds_files}
    if "adapter" in answered:
        outputs = answered["adapter"].outputs
        write_model_outputs(files.model_outputs, outputs)
        write_predictions(files.predictions, tables["adapter"])
        written |= {files.model_outputs, files.predictions}
        before = answered["base"].outputs if "base" in answered else None
        say("", "Held-out rows, some of them:", samples_table(outputs, before))
        say("", figures_table(columns, report.ROWS), "", report.sentence(figures["adapter"]))
        if "ood" in answered:
            say("", ood_sentence(figures["ood"]))
            write_predictions(files.ood_predictions, tables["ood"])
            written.add(files.ood_predictions)
        say("", f"answers         {files.model_outputs}", f"predictions     {files.predictions}")
        if task.task_type == "generation" and answered["adapter"].generated:  # only a person can judge it
            unjudged = [HumanScore(i, row.query, row.output, None, None) for i, row in enumerate(outputs)]
            write_human_evaluation(files.human_evaluation, unjudged)
            written.add(files.human_evaluation)
            say(f"to be judged    {files.human_evaluation}")
    elif columns:
        say("", figures_table(columns, report.ROWS))
    describe_run(files.descriptions, record)
    say(f"description     {files.descriptions}")
    if "adapter" in answered:
        shown = {heading: found for heading, found in columns.items() if heading != "validation"}
        plot = report.draw(shown, tables["adapter"], task)
        if plot is not None:
            write_atomic(files.plots / "answers.png", plot)
            written.add(files.plots / "answers.png")
            say(f"plot            {files.plots / 'answers.png'}")
    if run.training.do_train:
        write_model_card(run.training.output_dir, record, files.predictions if "adapter" in answered else None)
        say(f"adapter         {Path(run.training.output_dir)}")
    if rounds is not None:
        say("rounds          " + ", ".join(map(str, rounds_files)))
    # What an earlier run of this name left and this one does not write would be taken for this one's.
    left = files.left if run.output.overwrite else [files.ood_predictions, files.rounds, files.plots / "rounds.png"]
    for file in left:
        if file not in written and not files.judged(file):
            file.unlink(missing_ok=True)
    write_metrics(files.metrics, record)  # last of all: a run that has it is finished
    say(f"figures         {files.metrics}")
    where = "" if files.results_dir.resolve() == RESULTS else f" --results_dir {files.results_dir}"
    say(f"report          python util/report.py{where}")
    if rounds is not None:
        say("", known_sentence(rounds))
    return record
