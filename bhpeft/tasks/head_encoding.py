"""Examples -> token ids for a model with a head of its own: a class, a choice or a number for a whole text."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from bhpeft.errors import InputError
from bhpeft.tasks.encoding import TooLong
from bhpeft.tasks.example import Example, chunks

TOGETHER = 1000  # texts tokenised at a time


@dataclass(frozen=True)
class Standardiser:
    """Numbers with the training rows' mean and (population) deviation taken out: what a regression head learns."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Standardiser:
        """Mean and deviation of the answers.

        Raises:
            InputError: all answers are the same number, so that there is nothing to learn.
        """
        values = array("d", (float(example.answer) for example in examples))
        try:
            mean = math.fsum(values) / len(values)
            deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
        except OverflowError:
            raise InputError(f"training answers as large as {max(values, key=abs):g} cannot be standardised") from None
        if not deviation > 0:
            raise InputError(f"all {len(values)} training answers are {values[0]:g}: there is nothing to learn")
        return cls(mean, deviation)

    def standardise(self, value: float) -> float:
        """As the head is trained on: mean 0, deviation 1 over the training rows."""
        return (value - self.mean) / self.deviation

    def restore(self, value: float) -> float:
        """The inverse of `standardise`: in the answers' own units."""
        return value * self.deviation + self.mean


@dataclass
class HeadEncoder:
    """Turns examples into rows of token ids with one target each.

    Attributes:
        task_type: "classification", "multiple_choice" or "regression".
        labels: class names or letters, in the order of the head's outputs.
        max_length: most tokens of a text; of question and choice together.
        long_prompts: "error", "truncate" (the end; of the question, where there are choices) or "drop".
        standardiser: of the numbers to predict.
    """

    tokenizer: PreTrainedTokenizerBase
    task_type: str
    labels: Sequence[str]
    max_length: int
    long_prompts: str = "error"
    standardiser: Standardiser | None = None

    def train_rows(self, examples: Sequence[Example], notes: list[str]) -> list[dict]:
        """Rows for the loss: `input_ids` and `labels`, the index of the class or choice, or a standardised number.

        Raises:
            InputError: texts are too long and `long_prompts` is "error", or none is left after dropping them.
        """
        return list(self.stream_rows(examples, notes))

    def stream_rows(self, examples: Iterable[Example], notes: list[str]) -> Iterator[dict]:
        """As `train_rows`, one after the other; what is to be said, and an error, come behind the last."""
        for row, example in self._encode(examples, notes, "training"):
            yield {**row, "labels": self.target(example)}

    def test_rows(self, examples: Sequence[Example], notes: list[str]) -> list[dict]:
        """Rows to answer: `input_ids` and `index` of the example.

        Raises:
            InputError: as `train_rows`.
        """
        position = {id(example): i for i, example in enumerate(examples)}
        return [{**row, "index": position[id(example)]} for row, example in self._encode(examples, notes, "test")]

    def target(self, example: Example) -> int | float:
        """What the head is to give: an index of `labels`, or a standardised number."""
        if self.task_type == "regression":
            return self.standardiser.standardise(float(example.answer))
        return list(self.labels).index(example.answer)

    def _encode(self, examples: Iterable[Example], notes: list[str], part: str) -> Iterator[tuple[dict, Example]]:
        found = TooLong(f"{part} texts are longer than --max_length {self.max_length}", "their end is cut",
                        self.long_prompts)  # fmt: skip
        for some in chunks(examples, TOGETHER):
            for row, length, example in self._tokenised(some):
                if found.passes(example, length, self.max_length):
                    yield row, example
        found.tell(notes)

    def _check_choices(self, examples: Sequence[Example]) -> None:
        """Raise `InputError` where a choice leaves no token for its question, of which alone something may be cut."""
        for example in examples:
            ids = self.tokenizer(list(example.choices), add_special_tokens=False)["input_ids"]
            longest = max(map(len, ids)) + self.tokenizer.num_special_tokens_to_add(pair=True)
            if longest >= self.max_length:
                raise InputError(
                    f"row {example.id}: --max_length {self.max_length} leaves no room for its question beside a choice "
                    f"of {longest} tokens; raise --max_length"
                )

    def _tokenised(self, examples: Sequence[Example]) -> Iterator[tuple[dict, int, Example]]:
        """Each example as a row, with the tokens that its longest text would have uncut."""
        choices = self.task_type == "multiple_choice"
        if choices:
            texts = [example.query for example in examples for _ in example.choices]
            seconds = [choice for example in examples for choice in example.choices]
        else:
            texts, seconds = [example.query for example in examples], None
        encoded = self.tokenizer(texts, seconds, return_attention_mask=False)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        if max(lengths) > self.max_length and self.long_prompts == "truncate":  # else such a row does not pass
            if choices:
                self._check_choices(examples)
            encoded = self.tokenizer(
                texts, seconds, truncation="only_first" if choices else True, max_length=self.max_length,
                return_attention_mask=False,
            )  # fmt: skip
        names = ["input_ids"]
        if choices and "token_type_ids" in encoded:
            names.append("token_type_ids")  # which is the question and which the choice
        place = 0
        for example in examples:
            count = len(example.choices) if choices else 1
            span = slice(place, place + count)
            row = {name: encoded[name][span] if choices else encoded[name][place] for name in names}
            yield row, max(lengths[span]), example
            place += count
