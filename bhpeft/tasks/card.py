"""What an adapter was trained for: a small file in its folder, so that testing and using it ask the same question."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from bhpeft.errors import InputError
from bhpeft.files import read_text, write_atomic

FILE = "task.json"


@dataclass
class TaskCard:
    """The task of an adapter.

    Attributes:
        task_type, labels: as of `Task`.
        head: whether the model answers by a head of its own.
        prompt_template, instruction, max_length, answer_end: how a text becomes a prompt, and where an answer ends.
        later_template: text around every message but the first of a conversation, where there are conversations.
        context_turns: most exchanges given as context; None for as many as fit.
        predict_by: "generate" or "score", where labels are text.
        target_mean, target_deviation: of the training rows' numbers, for regression.
        base_in_4bit: whether the frozen weights were quantised.
        score_temperature: what scores are divided by before they become probabilities, where one was fitted.
        score_temperature_samples: how many samples of the weights it was fitted with; 0: none.
        noise_sd: standard deviation of the labels' own noise on the validation rows, for regression.
    """

    task_type: str
    labels: list[str]
    head: bool
    prompt_template: str
    instruction: str | None
    max_length: int
    predict_by: str
    answer_end: str | None = None
    target_mean: float | None = None
    target_deviation: float | None = None
    base_in_4bit: bool = False
    later_template: str | None = None
    context_turns: int | None = None
    score_temperature: float | None = None
    score_temperature_samples: int = 0
    noise_sd: float | None = None

    def write(self, folder: str | Path) -> None:
        """Write the card into an adapter's folder, whole or not at all."""
        write_atomic(Path(folder) / FILE, json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: str | Path) -> TaskCard | None:
        """The card of an adapter's folder; None where it has none (an adapter of another program's).

        Raises:
            InputError: it is not what `write` writes.
        """
        file = Path(folder) / FILE
        if not file.is_file():
            return None
        try:
            fields = json.loads(read_text(file))
            return cls(**fields)
        except (json.JSONDecodeError, TypeError) as error:
            raise InputError(f"{file}: not a card of a task ({error}); take it from the adapter's run again") from error
