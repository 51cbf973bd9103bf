"""Examples -> token ids for a language model: the prompt is never trained on, the answer ends with end-of-sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from bhpeft.errors import InputError
from bhpeft.tasks.example import Example

IGNORED = -100  # label of a position that takes no part in the loss (torch.nn.CrossEntropyLoss)


def with_choices(example: Example) -> str:
    """The input as text; choices, where there are any, each on a line behind their letter."""
    lines = [f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(example.choices)]
    return "\n".join([example.query, *lines])


def end_of_answer(tokenizer: PreTrainedTokenizerBase, text: str | None) -> int:
    """The token that ends an answer: end-of-sequence, or the one of a text such as a line end.

    A model whose end-of-sequence token was never trained cannot write it: small language models often end documents
    otherwise, and a frozen output layer tells such tokens apart no more than their random embeddings do.

    Raises:
        InputError: the text is not one token.
    """
    if text is None:
        return tokenizer.eos_token_id
    token = tokenizer("a" + text, add_special_tokens=False)["input_ids"][-1]
    if tokenizer.decode([token]) != text:
        raise InputError(
            f"--answer_end {text!r}: is not one token of the base model's; give another, such as a line end"
        )
    return token


@dataclass
class TooLong:
    """Counts the rows of a part that are too long, while they go by, and says so behind the last.

    Attributes:
        what: is too long, as in "training texts are longer than --max_length 64".
        cut: what is said of those that are cut.
        long_prompts: "error", "truncate" or "drop".
    """

    what: str
    cut: str
    long_prompts: str
    rows: int = 0
    long: int = 0
    longest: int = 0  # tokens
    first: Example | None = None

    def passes(self, example: Example, length: int, most: int) -> bool:
        """Count a row of `length` tokens; whether it is one to go on with, cut if it has more than `most`."""
        self.rows += 1
        if length <= most:
            return True
        self.long += 1
        self.longest = max(self.longest, length)
        self.first = self.first or example
        return self.long_prompts == "truncate"

    def tell(self, notes: list[str]) -> None:
        """Add a note if any was too long.

        Raises:
            InputError: that is an error, or none is left.
        """
        if not self.long:
            return
        what = f"{self.long} of {self.rows} {self.what}"
        if self.long_prompts == "error":
            raise InputError(
                f"{what} (longest: {self.longest} tokens; first: row {self.first.id}, {self.first.query[:40]!r}); "
                "raise --max_length as far as the base model has positions, or give --long_prompts truncate or drop"
            )
        if self.long_prompts == "drop" and self.long == self.rows:
            raise InputError(f"{what}: none is left after --long_prompts drop; raise --max_length")
        notes.append(f"{what}: {'dropped' if self.long_prompts == 'drop' else self.cut}")


@dataclass
class Encoder:
    """Turns examples into rows of token ids.

    Attributes:
        template: text around the input; `{text_input}` stands for it. Spaces at its end are dropped and
            one opens the answer instead, for tokenizers keep a space with the word after it; behind a
            line end the answer follows at once.
        max_length: most tokens of prompt and answer together.
        long_prompts: "error", "truncate" or "drop" prompts that leave no room. Cut is the input within the template,
            its end; a prompt without room for a single token of input is an error.
        labels: whose log-likelihoods are wanted; without any, that of the expected answer is.
        whole_labels: a label is the whole answer, so its end is a part of it; else the opening of one.
        answer_end: what ends an answer in place of the end-of-sequence token.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    max_length: int
    long_prompts: str = "error"
    labels: Sequence[str] = ()
    whole_labels: bool = False
    answer_end: str | None = None

    def __post_init__(self):
        self.end_id = end_of_answer(self.tokenizer, self.answer_end)
        self._longest_label: int | None = None  # in tokens, its end included; behind the template it is always the same

    def prompt(self, example: Example) -> str:
        """The text before the answer."""
        return self.template.replace("{text_input}", with_choices(example)).rstrip(" ")

    def encode(self, example: Example) -> tuple[list[int], list[int]]:
        """Token ids of (prompt, answer), the answer ending with end-of-sequence."""
        prompt_ids = self.tokenizer(self.prompt(example))["input_ids"]
        if prompt_ids and prompt_ids[-1] == self.tokenizer.eos_token_id != self.tokenizer.bos_token_id:
            prompt_ids = prompt_ids[:-1]  # some tokenizers end every text; the answer comes first
        return prompt_ids, self.continuation(example, prompt_ids, example.answer) + [self.end_id]

    def continuation(self, example: Example, prompt_ids: list[int], answer: str) -> list[int]:
        """Token ids of an answer that follows the prompt, as the tokenizer splits the whole text."""
        prompt = self.prompt(example)
        answer = answer if prompt.endswith("\n") else f" {answer}"
        whole = self.tokenizer(prompt + answer)["input_ids"]
        if whole and whole[-1] == self.tokenizer.eos_token_id != self.tokenizer.bos_token_id:
            whole = whole[:-1]
        if whole[: len(prompt_ids)] == prompt_ids:
            return whole[len(prompt_ids) :]
        return self.tokenizer(answer, add_special_tokens=False)["input_ids"]  # a merge spans the border

    def train_rows(self, examples: Sequence[Example], notes: list[str]) -> list[dict]:
        """Rows for the loss: `input_ids` and `labels`, of equal length, prompt positions `IGNORED`.

        Raises:
            InputError: prompts leave no room for an answer and `long_prompts` is "error".
        """
        return list(self.stream_rows(examples, notes))

    def stream_rows(self, examples: Iterable[Example], notes: list[str]) -> Iterator[dict]:
        """As `train_rows`, one after the other; what is to be said, and an error, come behind the last."""
        count = cut = 0
        for prompt_ids, answer_ids, _ in self._fitting(examples, notes, "training"):
            ids = (prompt_ids + answer_ids)[: self.max_length]
            count, cut = count + 1, cut + (len(prompt_ids) + len(answer_ids) > self.max_length)
            yield {"input_ids": ids, "labels": [IGNORED] * len(prompt_ids) + ids[len(prompt_ids) :]}
        if cut:
            notes.append(f"{cut} of {count} training answers cut at --max_length {self.max_length} tokens")

    def test_rows(self, examples: Sequence[Example], notes: list[str]) -> list[dict]:
        """Rows to answer: `input_ids` of the prompt, `label_ids` to score, `index` of the example.

        `label_ids` are those of each label, or of the expected answer alone where there are no labels.

        Raises:
            InputError: as `train_rows`.
        """
        position = {id(example): i for i, example in enumerate(examples)}
        end = [self.end_id] if self.whole_labels else []
        rows, cut = [], 0
        for prompt_ids, answer_ids, example in self._fitting(examples, notes, "test"):
            scored = [self.continuation(example, prompt_ids, label) + end for label in self.labels]
            if not scored:
                cut += len(prompt_ids) + len(answer_ids) > self.max_length
                scored = [answer_ids[: self.max_length - len(prompt_ids)]]
            rows.append({"input_ids": prompt_ids, "label_ids": scored, "index": position[id(example)]})
        if cut:
            notes.append(f"{cut} of {len(rows)} expected answers scored up to --max_length {self.max_length} tokens")
        return rows

    def _fitting(self, examples: Iterable[Example], notes: list[str], part: str) -> Iterator[tuple]:
        """The encoded examples whose prompt leaves room for an answer, mended as `long_prompts` says."""
        what = f"{part} prompts are longer than --max_length {self.max_length} allows"
        found = TooLong(what, "the end of their input is cut", self.long_prompts)
        for example in examples:
            row = (*self.encode(example), example)
            length, room = len(row[0]), self._room(row[0], example)
            if found.passes(example, length, room):
                yield row if length <= room else self._cut(*row)
        found.tell(notes)

    def _room(self, prompt_ids: list[int], example: Example) -> int:
        """Most tokens of a prompt: beside it goes the longest label, or at least one token of free text."""
        if not (self.whole_labels and self.labels):
            return self.max_length - 1
        if self._longest_label is None:
            self._longest_label = max(len(self.continuation(example, prompt_ids, label)) + 1 for label in self.labels)
        return self.max_length - self._longest_label

    def _cut(self, prompt_ids: list[int], answer_ids: list[int], example: Example):
        """The same example with the end of its input cut until there is room for an answer.

        The room does not depend on the example's own answer, which a test row must not give away: it is that of the
        longest label, or half of the length.
        """
        labelled = self.whole_labels and self.labels
        room = self._room(prompt_ids, example) if labelled else self.max_length - self.max_length // 2
        text = example.query  # the choices stay whole
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        surplus = len(prompt_ids) - room
        while surplus > 0:
            if surplus >= len(offsets):
                raise InputError(
                    f"row {example.id}: --max_length {self.max_length} leaves no room for its input beside the "
                    "template; raise --max_length"
                )
            offsets = offsets[: len(offsets) - surplus]
            shorter = replace(example, query=text[: offsets[-1][1]])
            prompt_ids, answer_ids = self.encode(shorter)
            surplus = len(prompt_ids) - room
        return prompt_ids, answer_ids, example


@dataclass
class Collator:
    """Rows -> one batch, padded to its longest row.

    Rows to generate from (`label_ids`) are padded on the left, so that the next token follows the prompt; their
    `label_ids`, (B, labels, tokens), are padded with `IGNORED`. All others are padded on the right. Where a row's
    `input_ids` are those of C choices, the batch is (B, C, L).
    """

    pad_token_id: int

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        side = "left" if "label_ids" in rows[0] else "right"
        nested = isinstance(rows[0]["input_ids"][0], list)

        def stack(name: str, value: int, ones: bool = False) -> torch.Tensor:
            texts = [ids for row in rows for ids in (row[name] if nested else [row[name]])]
            stacked = pad([[1] * len(ids) for ids in texts] if ones else texts, value, side)
            return stacked.view(len(rows), -1, stacked.shape[1]) if nested else stacked

        batch = {"input_ids": stack("input_ids", self.pad_token_id), "attention_mask": stack("input_ids", 0, True)}
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = stack("token_type_ids", 0)
        if "labels" in rows[0]:
            each_token = isinstance(rows[0]["labels"], list)
            labels = [row["labels"] for row in rows]
            batch["labels"] = pad(labels, IGNORED, side) if each_token else torch.tensor(labels)
        if "index" in rows[0]:
            batch["index"] = torch.tensor([row["index"] for row in rows])
        if "label_ids" in rows[0]:
            flat = pad([ids for row in rows for ids in row["label_ids"]], IGNORED, "right")
            batch["label_ids"] = flat.view(len(rows), len(rows[0]["label_ids"]), -1)
        return batch


def pad(rows: list[list[int]], value: int, side: str) -> torch.Tensor:
    """Stack rows of different lengths, (B, longest), filled up with `value` on `side`."""
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([row + f if side == "right" else f + row for row, f in zip(rows, fill, strict=True)])
