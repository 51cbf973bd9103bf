"""What a run is going to do, settled and checked before a weight is loaded; and what has come of its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from bhpeft.config import Run
from bhpeft.feature_distance import FILE, chosen, fit_distance, read_distance
from bhpeft.prediction import read_answers
from bhpeft.record import say
from bhpeft.report.answered import Answered
from bhpeft.results import RunFiles
from bhpeft.tasks import Example, Task
from bhpeft.tasks.encoding import Encoder
from bhpeft.tasks.head_encoding import HeadEncoder
from bhpeft.tasks.rounds import RoundPlan
from bhpeft.training import AdapterTrainer, BeforeTraining


@dataclass
class Job:
    """A run whose input is known to be good.

    Attributes:
        plan: which rows arrive in which round; None where all are trained on at once.
        base_name: hub id or folder of the base model.
        with_head: it answers by a head of its own.
        in_4bit: its frozen weights are quantised.
        encoder: turns examples into rows.
        train_rows: encoded, in a file where there is a cache; None where nothing is trained, and in rounds, each of
            which encodes its own.
        validation_rows: encoded with labels; None without `--do_eval`.
        test_rows: encoded to be answered.
        ood, ood_rows: rows of another domain, the same way; empty without `--ood_dataset_name`.
    """

    run: Run
    files: RunFiles
    task: Task
    plan: RoundPlan | None
    base_name: str
    with_head: bool
    in_4bit: bool
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder | HeadEncoder
    train_rows: Sequence[dict] | None
    validation_rows: list[dict] | None
    test_rows: list[dict]
    ood: list[Example]
    ood_rows: list[dict]

    @property
    def head(self) -> str:
        """How the model answers: "lm", or the task type of its own head."""
        return self.task.task_type if self.with_head else "lm"

    def answer(self, trainer: AdapterTrainer, rows: Sequence[dict], examples: Sequence[Example]) -> Answered:
        """Answer rows, as of `encoder.test_rows(examples)`."""
        return read_answers(trainer.answer(rows), rows, examples, self.task, self.encoder)

    def know_the_domain(self, trainer: AdapterTrainer) -> None:
        """With `--feature_distance`: fit it on training rows and keep it beside the adapter, or read the adapter's."""
        training, wanted = self.run.training, self.run.data.feature_distance
        if training.do_train and training.should_save:
            (Path(training.output_dir) / FILE).unlink(missing_ok=True)  # of an adapter that was here before
        if wanted and not training.do_train:
            trainer.feature_distance = read_distance(self.run.adapter.adapter_path)
        if not wanted or not training.do_train:
            return
        rows = self.encoder.test_rows(chosen(self.task.train, training.data_seed), [])
        try:
            trainer.feature_distance = fit_distance(trainer.features(rows))
        except ValueError as error:  # all but a few rows were too long, or all are one
            say(f"--feature_distance is left out: {error}")
            return
        if training.should_save:
            trainer.feature_distance.save(training.output_dir)

    def answer_with_base(self, trainer: AdapterTrainer, answered: dict[str, Answered]) -> None:
        """Answer the test with the adapter switched off and keep that as "base": before training, if there is any,
        once the model is wrapped and sharded."""

        def answer() -> None:
            with trainer.model.disable_adapter():
                answered["base"] = self.answer(trainer, self.test_rows, self.task.test)

        if trainer.train_dataset is None:
            answer()
        else:
            trainer.add_callback(BeforeTraining(answer))


@dataclass
class Learned:
    """What has come of training.

    Attributes:
        trainer: with the trained model.
        parameters: as of `parameter_counts`.
        history: logged losses and learning rates.
        answered: what was answered before training: the test, by the frozen base.
        seconds: what training took.
        rounds: what each round did, for the run's record.
    """

    trainer: AdapterTrainer
    parameters: dict[str, int | float]
    history: list[dict]
    answered: dict[str, Answered] = field(default_factory=dict)
    seconds: float = 0.0
    rounds: list[dict[str, Any]] | None = None
