"""What a run learns from its validation rows about its own sureness, and applies to what it writes.

    labels      a temperature T (`--fit_temperature`): probabilities are those of scores / T        temperature.py
    numbers     the deviation n of the labels' own noise: n^2 = mean((y - m)^2 - e^2) over validation rows, m the
                prediction and e the deviation of its samples; a prediction's total deviation is sqrt(e^2 + n^2), but n
                where n was measured without samples

Both are written into the adapter's card, so that testing and using it apply them too.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from bhpeft import environment
from bhpeft.config import Run
from bhpeft.errors import InputError
from bhpeft.prediction import scored_texts
from bhpeft.record import say
from bhpeft.report import report_for
from bhpeft.report.answered import Answered
from bhpeft.tasks import Task
from bhpeft.tasks.card import TaskCard
from bhpeft.temperature import at_an_end, fit_sample_temperature, fit_temperature
from bhpeft.uncertainty import nll

FLOOR = 0.01  # of the noise, in deviations of the training labels: samples may vary more than the residuals do


def check_calibration(run: Run, task: Task) -> None:
    """Raise `InputError` where `--fit_temperature` has no labels to fit on; before a model is loaded."""
    if run.data.fit_temperature and not task.labels:
        raise InputError(
            f"--fit_temperature: {task.task_type} here has no labels whose probabilities could be scaled; leave it out"
        )


def label_nll(answered: Answered, task: Task) -> tuple[float, np.ndarray, np.ndarray]:
    """NLL of the labels as answered, and which rows have one: (N,) places of the labels, (N,) booleans."""
    table = report_for(task).predictions(answered, task)
    columns = [name for name in table.columns if name.startswith("prob_")]
    place = {name.removeprefix("prob_"): i for i, name in enumerate(columns)}
    places = table["label"].map(lambda label: place.get(label, -1)).to_numpy()
    known = places >= 0
    return nll(table[columns].to_numpy()[known], places[known]), places, known


def fitted_temperature(answered: Answered, task: Task) -> float:
    """The temperature of least NLL over rows with labels; of samples that of the predictive mean."""
    _, places, known = label_nll(answered, task)
    if answered.samples is None:
        return fit_temperature(answered.scores[known], places[known])
    return fit_sample_temperature(answered.samples[known].transpose(1, 0, 2), places[known])


def label_noise(answered: Answered) -> float:
    """Deviation of the labels' own noise, in their units: what the residuals vary beyond the samples."""
    expected = np.array([float(row.expected) for row in answered.outputs])
    mean, epistemic = answered.numbers()
    net = float(((expected - mean) ** 2 - epistemic**2).mean())
    return math.sqrt(max(net, (FLOOR * answered.deviation) ** 2))


def calibrate(run: Run, task: Task, answered: dict[str, Answered], card: TaskCard) -> None:
    """Fit on the answers "validation", apply to all answers but the base's, say so, and keep it in the card.

    A temperature that runs to an end of what is searched (every row right, say) has not been fitted: it stays 1.
    Without a fit an adapter that is only tested keeps what its own card says. Every rank may call it; rank 0 writes.

    Args:
        answered: answers by name; those of the adapter get their temperature and noise, and texts that agree with them.
        card: of this run; written again into the adapter's folder where the run trains it.
    """
    validation = answered.get("validation")
    samples = run.data.posterior_samples or run.data.mc_dropout_samples
    if validation is not None and run.data.fit_temperature:
        fitted = fitted_temperature(validation, task)
        before, *_ = label_nll(validation, task)
        card.score_temperature, card.score_temperature_samples = 1.0 if at_an_end(fitted) else fitted, samples
    if validation is not None and task.task_type == "regression":
        card.noise_sd, card.noise_samples = label_noise(validation), samples
    if run.training.do_train:
        if environment.is_main_process() and (card.score_temperature, card.noise_sd) != (None, None):
            card.write(run.training.output_dir)
    else:
        _keep(run, card)

    for name, part in answered.items():
        if name != "base":
            part.temperature = card.score_temperature or 1.0
            part.noise_sd, part.noise_samples = card.noise_sd, card.noise_samples
            if not part.generated and task.labels:
                texts = scored_texts(part, task)
                part.outputs = [replace(row, output=text) for row, text in zip(part.outputs, texts, strict=True)]
    if validation is not None and run.data.fit_temperature:
        rows = f"{len(validation.ids):,} validation rows"
        if at_an_end(fitted):
            say(f"temperature: not fitted, T stays 1; the NLL of {rows} falls as far as T = {fitted:.3g}, where the "
                "search ends")  # fmt: skip
        else:
            after, *_ = label_nll(validation, task)
            say(f"temperature T = {fitted:.3f}, fitted on {rows}: their NLL {before:.4f} -> {after:.4f}")
    if card.noise_sd is not None:
        text = f"noise of the labels {card.noise_sd:.4g} (standard deviation), by validation rows"
        say(text + noise_note(card.noise_samples, samples))


def noise_note(fitted_with: int | None, samples: int) -> str:
    """What is to be said where the labels' noise was measured beside another number of samples than there are now."""
    if fitted_with and not samples:
        return f" and {fitted_with} samples of the weights; without samples the intervals lack what those disagree in"
    if fitted_with == 0 and samples:
        return " and no samples of the weights: it holds what those disagree in, which is not added again"
    return ""


def _keep(run: Run, card: TaskCard) -> None:
    """Take over what the tested adapter's own card says, where this run has not fitted it anew."""
    own = TaskCard.read(run.adapter.adapter_path)
    samples = run.data.posterior_samples or run.data.mc_dropout_samples
    if own is not None and card.score_temperature is None and own.score_temperature is not None:
        card.score_temperature, card.score_temperature_samples = own.score_temperature, own.score_temperature_samples
        note = f"temperature T = {own.score_temperature:.3f}, as the adapter's card says"
        if samples != own.score_temperature_samples:
            note += f"; fitted with {own.score_temperature_samples} samples of the weights, and this run has {samples}"
        if own.score_temperature != 1:
            say(note)
    if own is not None and card.noise_sd is None:
        card.noise_sd, card.noise_samples = own.noise_sd, own.noise_samples
