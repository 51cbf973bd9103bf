"""What a run says at its end, by task: predictions, figures, a plain sentence, a plot.

A report is a module with

    predictions(answered, task)         one row an example, as results/predictions/ holds it
    figures(answered, table, task)      name -> number
    ROWS                                (name, words) of the figures that are printed
    sentence(figures)                   how good and how sure, in plain words
    draw(columns, table, task)          a PNG file's bytes, or None; `columns` is heading -> figures

NumPy and pandas only; scikit-learn, sacrebleu and matplotlib are imported where they are used.
"""

from __future__ import annotations

from types import ModuleType

from bhpeft.report import labels, numbers, texts, true_false


def report_for(task) -> ModuleType:
    """The report of a `Task`."""
    if task.task_type == "generation":
        return true_false if task.labels else texts
    return numbers if task.task_type == "regression" else labels
