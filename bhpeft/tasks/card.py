"""What an adapter was trained for: a small file in its folder, so that testing and using it ask the same question."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from bhpeft.errors import InputError
from bhpeft.files import read_json, write_atomic
from bhpeft.tasks.templates import TEMPLATES

FILE = "task.json"
TASK_TYPES = ("classification", "regression", "multiple_choice", "generation")


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
        noise_samples: how many samples of the weights it was measured beside; 0: none, and it holds their spread too.
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
    noise_samples: int | None = None

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
        mend = "take it from the adapter's run again"
        fields = read_json(file, mend)
        try:
            card = cls(**fields)
        except TypeError as error:
            raise InputError(f"{file}: not a card of a task ({error}); {mend}") from error
        if wrong := card._wrong():
            raise InputError(f"{file}: {wrong[0]} is {wrong[1]!r:.60}; {mend}")
        return card

    def _wrong(self) -> tuple[str, object] | None:
        """The first field that cannot be, with its value."""
        kinds = {"str": str, "bool": bool, "int": int, "float": int | float}
        for field in dataclasses.fields(self):
            kind, value = field.type.removesuffix(" | None"), getattr(self, field.name)
            if kind == "list[str]":
                good = isinstance(value, list) and all(isinstance(item, str) for item in value)
            elif value is None:
                good = kind != field.type
            else:
                good = isinstance(value, kinds[kind]) and (kind == "bool" or not isinstance(value, bool))
            if not good:
                return field.name, value
        if self.task_type not in TASK_TYPES:
            return "task_type", self.task_type
        if "{text_input}" not in self.prompt_template and self.prompt_template not in TEMPLATES:
            return "prompt_template", self.prompt_template
        return ("max_length", self.max_length) if self.max_length < 1 else None
